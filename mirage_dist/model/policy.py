"""The module that DeepSpeed wraps: one forward that gives everything an objective asked for.

What goes in and comes out are named tuples and dicts, because ZeRO-3's hooks look for tensors in no other type.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mirage_dist.model import activations, head, vision


class Request(NamedTuple):
    """What to compute; positions are flat (b·S + t) into the hidden states.

    index_N, labels_N: rows whose log-probability is wanted, and what they predict. kl_index_M: rows whose KL to
    `ref_logits_MV` is wanted; without reference logits, whose own logits are (what a reference is asked). layer: tap
    this decoder layer. vision: nothing but the features of the pictures (see `model.vision`).
    """

    index_N: Tensor | None = None
    labels_N: Tensor | None = None
    kl_index_M: Tensor | None = None
    ref_logits_MV: Tensor | None = None
    layer: int | None = None
    vision: bool = False


class Outputs(NamedTuple):
    """logp_N, kl_M, logits_MV in float32; activation_BSD, vision_IPF in the model's dtype. None where not asked for."""

    logp_N: Tensor | None = None
    kl_M: Tensor | None = None
    logits_MV: Tensor | None = None
    activation_BSD: Tensor | None = None
    vision_IPF: Tensor | None = None


class Policy(nn.Module):
    """A Hugging Face image-text-to-text model (or peft's wrapping of one) behind one call."""

    def __init__(self, hf: Any) -> None:
        super().__init__()
        self.hf = hf
        head.install(self.base)

    @property
    def base(self) -> Any:
        """The Hugging Face model itself; adapters are inside its layers."""
        return self.hf.get_base_model() if hasattr(self.hf, "get_base_model") else self.hf

    @property
    def backbone(self) -> Any:
        """The model below its lm_head."""
        return getattr(self.base, self.base.base_model_prefix)

    @property
    def hidden_size(self) -> int:
        return getattr(self.base.config, "text_config", self.base.config).hidden_size

    def forward(self, inputs: dict[str, Tensor], request: Request) -> Outputs:
        """One pass; it ends behind the tapped layer when no row of the head's is needed."""
        if request.vision:
            return Outputs(vision_IPF=vision.features(self.backbone, inputs["pixel_values"]))
        needs_head = request.index_N is not None or request.kl_index_M is not None
        tapped = nullcontext([])
        if request.layer is not None:
            tapped = activations.tap(self.backbone, request.layer, stop=not needs_head)
        with tapped as found:
            hidden_BSD = self.backbone(**vision.entered(self.backbone, inputs), use_cache=False).last_hidden_state
        logp_N = kl_M = logits_MV = None
        hidden_RD, lm_head = hidden_BSD.flatten(0, 1), self.base.get_output_embeddings()
        if request.index_N is not None:
            logp_N = lm_head(hidden_RD.index_select(0, request.index_N), labels_N=request.labels_N)
        if request.kl_index_M is not None:
            rows_MD = hidden_RD.index_select(0, request.kl_index_M)
            if request.ref_logits_MV is None:
                logits_MV = lm_head(rows_MD, exact=True)
            else:
                kl_M = lm_head(rows_MD, ref_logits_NV=request.ref_logits_MV)
        return Outputs(logp_N, kl_M, logits_MV, found[0] if found else None)


def no_grad_forward(module: Any, inputs: dict[str, Tensor], request: Request) -> Outputs:
    """A forward without dropout and without a graph; the module's mode is put back."""
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            return module(inputs, request)
    finally:
        module.train(training)
