"""The kernels on a GPU: float64's values within tolerance, repeatable bits, bounded memory, and no host waits."""

import pytest
import torch
import torch.nn.functional as F

from mirage_dist.kernels.logprob import linear_logits, linear_token_kl, linear_token_logps
from mirage_dist.kernels.steer import steer_mse

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
# dtype -> largest absolute error of a value, relative error of a gradient
TOLERANCES = {torch.float32: (2e-5, 5e-6), torch.bfloat16: (1e-4, 5e-3)}
ROWS, HIDDEN, VOCABULARY, SEQUENCES = 640, 256, 32_003, 8


def case(dtype, trains=True):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, HIDDEN, generator=generator) for n in (ROWS, VOCABULARY))
    labels = torch.randint(VOCABULARY, (ROWS,), generator=generator).cuda()
    weight = weight.mul(HIDDEN**-0.5).to("cuda", dtype).requires_grad_(trains)
    return [hidden.to("cuda", dtype).requires_grad_(), weight], labels


def in_float64(tensors):
    return [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]


def gradients(value, upstream, tensors):
    return torch.autograd.grad(value, [x for x in tensors if x.requires_grad], upstream.to(value.dtype))


def check(dtype, value, grads, exact, oracle):
    assert (value - exact).abs().max() < TOLERANCES[dtype][0] * max(1, exact.abs().max() / 32)
    for mine, theirs in zip(grads, oracle, strict=True):
        assert (mine.double() - theirs).norm() / theirs.norm() < TOLERANCES[dtype][1]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("workspace_mb", [512, 8])
@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_token_log_probabilities(dtype, workspace_mb, trains, softcap):
    tensors, labels = case(dtype, trains)
    upstream = torch.randn(ROWS, device="cuda")

    def run(tensors):
        logp = linear_token_logps(*tensors, labels, softcap=softcap, workspace_mb=workspace_mb)
        return logp, *gradients(logp, upstream, tensors)

    first, again = run(tensors), run(tensors)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    exact, *oracle = run(in_float64(tensors))
    check(dtype, first[0], first[1:], exact, oracle)


def losses(logp, beta=0.01):
    """A sum of mean cross entropy and NPO over the sequences' log-probabilities."""
    margin = logp.view(SEQUENCES, -1).sum(1) + 800.0
    return 2 / beta * F.softplus(beta * margin).mean() - logp.mean()


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("workspace_mb", [8, 512])
def test_losses_on_top(dtype, workspace_mb):
    tensors, labels = case(dtype)

    def run(tensors):
        value = losses(linear_token_logps(*tensors, labels, workspace_mb=workspace_mb))
        return value, *torch.autograd.grad(value, tensors)

    first, again = run(tensors), run(tensors)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    exact, *oracle = run(in_float64(tensors))
    check(dtype, first[0], first[1:], exact, oracle)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("trains", [True, False])
def test_kl(dtype, trains):
    tensors, _ = case(dtype, trains)
    with torch.no_grad():
        reference = 0.5 * linear_logits(*tensors)

    def run(tensors):
        kl = linear_token_kl(*tensors, reference)
        return kl, *gradients(kl, torch.ones(ROWS, device="cuda"), tensors)

    first = run(tensors)
    exact, *oracle = run(in_float64(tensors))
    check(dtype, first[0], first[1:], exact, oracle)


def extra_bytes(run, grads):
    """Peak bytes that `run` allocates beyond its gradients, after a first call."""
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in grads)


def test_logits_beyond_the_workspace_take_the_workspace_and_the_gradients():
    tensors, labels = case(torch.bfloat16)

    def run():
        torch.autograd.grad(linear_token_logps(*tensors, labels, workspace_mb=8).sum(), tensors)

    assert extra_bytes(run, tensors) < 16 << 20  # the logits take 78 MiB


def test_nothing_waits_for_the_device():
    tensors, labels = case(torch.bfloat16)
    weights, target = torch.ones(ROWS, device="cuda"), torch.zeros(HIDDEN, device="cuda")
    reference = linear_logits(*tensors).detach()

    def step():
        loss = losses(linear_token_logps(*tensors, labels))
        loss = loss + linear_token_kl(*tensors, reference).sum()
        (loss + steer_mse(tensors[0], target, weights)).backward()

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("reference", [False, True])
def test_steering_error(dtype, reference):
    generator = torch.Generator().manual_seed(0)
    act = torch.randn(4, 160, 4100, generator=generator).to("cuda", dtype).requires_grad_()
    target = torch.randn(*([640] if reference else []), 4100, device="cuda")
    weight = torch.rand(640, device="cuda").round()
    loss = steer_mse(act, target, weight)
    exact = act.detach().double().requires_grad_()
    oracle = steer_mse(exact, target.double(), weight)
    (mine,), (theirs,) = torch.autograd.grad(3 * loss, act), torch.autograd.grad(3 * oracle, exact)
    assert (loss - oracle).abs() < 5e-6 * oracle
    assert (mine.double() - theirs).norm() < TOLERANCES[dtype][1] * theirs.norm()
