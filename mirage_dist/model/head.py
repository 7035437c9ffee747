"""An LM head whose forward computes the token log-probabilities of selected rows.

Under ZeRO-3 a weight is whole only inside its module's forward and backward, so the loss head has to be that
module's forward; the parameter keeps its Hugging Face name. Without labels it is the plain linear layer.

Some families change what this layer gives: softcap · tanh(scale · z / softcap), with one of the two or both (Gemma 2's
cap, the scale of Granite and Cohere). Which, is measured on the model's own forward (`curve`), since attributes of a
configuration have many names, and not every class that has one uses it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mirage_dist.kernels.distil import linear_distilled_ce
from mirage_dist.kernels.logprob import linear_logits, linear_token_kl, linear_token_logps
from mirage_dist.schema import ConfigError

TOLERANCE = 1e-5  # of a logit's size: rounding of float32 stays below 1e-6


class Curve(NamedTuple):
    """From an output z of the linear layer to a logit: scale · z, or softcap · tanh(scale · z / softcap)."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, z: Tensor) -> Tensor:
        return z * self.scale if self.softcap is None else self.softcap * torch.tanh(z * self.scale / self.softcap)


class TokenLogProbHead(nn.Linear):
    """An output projection (V, D) that can also reduce its logits to what an objective needs."""

    curve: Any  # Curve; nn.Module declares every other attribute a tensor

    def forward(  # type: ignore[override]
        self,
        hidden: Tensor,
        labels_N: Tensor | None = None,
        ref_logits_NV: Tensor | None = None,
        exact: bool = False,
        penalty: float = 0.0,
    ) -> Tensor:
        """For rows (N, D): log-probabilities of `labels_N` (N,); KL(reference ‖ policy) where `ref_logits_NV` is given
        (N,); where both are, the cross entropy to the reference's distribution with the label's logit lowered by
        `penalty` (N,); or with `exact` the float32 logits (N, V). Otherwise the output of the plain linear layer, which
        the model scales and caps itself.
        """
        if labels_N is None and ref_logits_NV is None and not exact:
            return super().forward(hidden)
        bias, (scale, softcap) = self.bias, self.curve
        if scale != 1.0:  # on the rows, which are few; powers of two, as published models have, round nothing
            hidden, bias = hidden * scale, None if bias is None else bias * scale
        options: dict[str, Any] = {"bias": bias, "softcap": softcap}
        if labels_N is not None and ref_logits_NV is not None:
            return linear_distilled_ce(hidden, self.weight, labels_N, ref_logits_NV, penalty, **options)
        if labels_N is not None:
            return linear_token_logps(hidden, self.weight, labels_N, **options)
        if ref_logits_NV is not None:
            return linear_token_kl(hidden, self.weight, ref_logits_NV, **options)
        return linear_logits(hidden, self.weight, **options)


def install(model: Any) -> TokenLogProbHead:
    """Turn the model's output embedding into a `TokenLogProbHead`, in place, and return it.

    Raises ConfigError when it is not a plain linear layer (for example with an adapter on lm_head).
    """
    head: Any = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise ConfigError(
            f"lm_head is a {type(head).__name__}; the loss head needs a plain linear layer. Leave lm_head out of "
            "model.lora.targets"
        )
    fused: Any = head
    fused.curve = curve(model)
    fused.__class__ = TokenLogProbHead
    return fused


def curve(model: Any) -> Curve:
    """How the model changes the outputs of its LM head, measured without its weights.

    Its own forward runs on hidden states of width 1, with an LM head of one weight, in place of its backbone and head.
    Where that cannot be done, or the curve has another shape, the configuration's soft cap without a scale, whose
    log-probabilities `families.guard` compares with the model's own.
    """
    assumed = Curve(softcap=getattr(model.config.get_text_config(), "final_logit_softcapping", None))
    bias = float(model.get_output_embeddings().bias is not None)  # scaled with the rest, or the curve does not fit
    # From outputs that no cap bends to those at which every cap is reached.
    z_N = torch.tensor([sign * 2.0**power for power in range(-27, 30, 3) for sign in (1, -1)], dtype=torch.float64)
    try:
        logit_N = _own_logits(model, z_N - bias, bias)
        scale = float(logit_N[0] / z_N[0])
        end = float(logit_N[-2].abs())
        own = Curve(scale, end if end < abs(scale) * float(z_N[-2]) / 2 else None)
        fits = math.isfinite(scale) and scale != 0 and torch.allclose(logit_N, own(z_N), rtol=TOLERANCE, atol=0)
    except Exception:  # of any kind: a family's own code, with hidden states that it did not foresee
        return assumed
    return own if fits else assumed


@torch.no_grad()
def _own_logits(model: Any, hidden_N: Tensor, bias: float) -> Tensor:
    """What the model's forward makes of these hidden states with an LM head of weight 1 and this bias: (N,)."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        unit = nn.Linear(1, 1, bias=bool(bias), dtype=torch.float64)
        nn.init.ones_(unit.weight)
        if bias:
            nn.init.constant_(unit.bias, bias)
        instead = {id(model.get_output_embeddings()): unit, id(model.base_model): _Given(model.base_model, hidden_N)}
        tokens_1N = torch.zeros(1, len(hidden_N), dtype=torch.long)
        outputs = type(model).forward(_replaced(model, instead), input_ids=tokens_1N, use_cache=False)
    return outputs.logits.double().reshape(hidden_N.shape)


class _Given(nn.Module):
    """A backbone whose hidden states are given, one row of width 1, whatever its inputs are."""

    def __init__(self, backbone: nn.Module, hidden_N: Tensor) -> None:
        super().__init__()
        self.outputs = _Outputs(hidden_N[None, :, None])
        self.settings = vars(backbone)  # a family may keep its scale here

    def forward(self, *_inputs: Any, **_options: Any) -> _Outputs:
        return self.outputs

    def __getattr__(self, name: str) -> Any:
        settings = self.__dict__.get("settings", {})
        return settings[name] if name in settings else super().__getattr__(name)


class _Outputs:
    """A backbone's outputs of which only the hidden states are there."""

    def __init__(self, hidden_BSD: Tensor) -> None:
        self.last_hidden_state = hidden_BSD

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, place: Any) -> Tensor | None:
        return self.last_hidden_state if place in (0, "last_hidden_state") else None


def _replaced(module: nn.Module, instead: Mapping[int, nn.Module]) -> nn.Module:
    """A copy of the module with the modules in `instead`, by id, in the place of its own; it shares the others."""
    if id(module) in instead:
        return instead[id(module)]
    copied = copy.copy(module)
    children = module._modules.items()
    copied._modules = {name: None if child is None else _replaced(child, instead) for name, child in children}
    return copied
