"""The kernels of the step against float64: Triton's on a GPU, which compiles them, their eager twins on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from mirage_dist.doctor.checks import Context, Verdict, failed, not_here, ok, warning

# dtype -> largest absolute error of a log-probability and relative error of a gradient (as the tests have them)
TOLERANCES = {"float32": (2e-5, 5e-6), "bfloat16": (1e-4, 5e-3)}
ROWS, HIDDEN, VOCABULARY = 96, 128, 4099
STEERED = (2, 48, 1056)


def loss_head(context: Context) -> Verdict:
    """Token log-probabilities and their gradients."""
    import torch

    from mirage_dist.kernels.logprob import linear_token_logps

    device = context.group.device
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator) * HIDDEN**-0.5
    labels = torch.randint(VOCABULARY, (ROWS,), generator=generator).to(device)
    upstream = torch.randn(ROWS, generator=generator).to(device)

    def run(hidden_ND: Any, weight_VD: Any) -> list[Any]:
        logp = linear_token_logps(hidden_ND, weight_VD, labels)
        return [logp, *torch.autograd.grad(logp, [hidden_ND, weight_VD], upstream.to(logp.dtype))]

    return _compared("log-probabilities", run, (hidden, weight), device)


def steering(context: Context) -> Verdict:
    """RMU's error of activations and its gradient."""
    import torch

    from mirage_dist.kernels.steer import steer_mse

    device = context.group.device
    generator = torch.Generator().manual_seed(0)
    act, target = torch.randn(STEERED, generator=generator), torch.randn(STEERED[-1], generator=generator).to(device)
    weight = torch.rand(STEERED[0] * STEERED[1], generator=generator).round().to(device)

    def run(act: Any) -> list[Any]:
        loss = steer_mse(act, target.to(torch.promote_types(act.dtype, torch.float32)), weight)
        (gradient,) = torch.autograd.grad(loss, act)
        # The mean over rows, which like a log-probability is a number near 1.
        return [loss.detach() / weight.sum().to(loss.dtype), gradient]

    return _compared("the steering error", run, (act,), device)


def attention(context: Context) -> Verdict:
    """Gradients of the same bits every time, and packed sequences by PyTorch's flash-attention."""
    import torch

    from mirage_dist.model.families.attention import USUAL, flash_fault, gradient_fault

    if context.group.device.type != "cuda":
        return not_here("no GPU: gradients have the same bits every time, and packed sequences are computed one by one")
    began = time.monotonic()
    faults = {name: fault for name in TOLERANCES if (fault := gradient_fault(USUAL, getattr(torch, name)))}
    packed = flash_fault(USUAL, torch.bfloat16)
    seconds = time.monotonic() - began
    values = {"seconds": seconds, "gradients": faults, "packed": packed}
    if faults:
        return warning(
            "gradients are not repeatable bit by bit: " + "; ".join(f"{name}: {why}" for name, why in faults.items()),
            "runs are right, but one that is resumed does not end with the bits of one that never stopped",
            **values,
        )
    if packed:
        return warning(
            f"PyTorch's flash-attention does not serve packed sequences: {packed}",
            "data.packing=auto pads here; pip install 'mirage-dist[flash]' packs without it",
            **values,
        )
    return ok(f"repeatable gradients; packed sequences by PyTorch's flash-attention ({seconds:.1f} s)", **values)


def _compared(what: str, run: Callable[..., list[Any]], inputs: tuple[Any, ...], device: Any) -> Verdict:
    """`run` in each dtype against the same in float64, which is the eager twin on every device."""
    import torch

    from mirage_dist.kernels.backend import has_triton

    began, worst = time.monotonic(), {}
    for name, (absolute, relative) in TOLERANCES.items():
        dtype = getattr(torch, name)
        leaves = [x.to(device, dtype).requires_grad_() for x in inputs]
        value, *gradients = run(*leaves)
        exact, *oracle = run(*(x.detach().double().requires_grad_() for x in leaves))
        error = (value.double() - exact).abs().max().item() / absolute
        shares = [
            ((mine.double() - theirs).norm() / theirs.norm().clamp_min(1e-30)).item() / relative
            for mine, theirs in zip(gradients, oracle, strict=True)
        ]
        worst[name] = max([error, *shares])
    seconds = time.monotonic() - began
    values = {"seconds": seconds, "error_of_tolerance": worst}
    gpu = device.type == "cuda"
    how = f"Triton on {torch.cuda.get_device_name(device)}" if gpu and has_triton() else "eager PyTorch"
    bad = {name: share for name, share in worst.items() if not share <= 1}  # NaN too
    if bad:
        name, share = max(bad.items(), key=lambda item: item[1])
        return failed(
            f"{what} by {how} differ from float64: {share:.3g} × the tolerance in {name}",
            "do not train here: try another GPU or driver, the tested versions, and report it",
            **values,
        )
    text = f"{what} by {how} match float64 ({seconds:.1f} s)"
    if gpu and not has_triton():
        return warning(f"{text}; triton is not installed", "pip install triton: it is faster", **values)
    return ok(text if gpu else f"{text}; Triton needs a GPU", **values)
