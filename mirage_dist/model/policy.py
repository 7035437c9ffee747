"""The module that DeepSpeed wraps: one forward that computes everything an objective requests.

Arguments and results are named tuples and dicts, because ZeRO-3's hooks find tensors in no other types.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mirage_dist.model import activations, head
from mirage_dist.model.activations import Narrow, Prefix
from mirage_dist.model.families import packing, roles
from mirage_dist.model.vision import FEATURES, Tower
from mirage_dist.ranks import peer_lost

# What decoders call the norm after their last layer.
FINAL_NORMS = ("norm", "final_norm", "final_layernorm", "final_layer_norm", "ln_f")


class Distilled(NamedTuple):
    """Rows whose distribution is compared with the reference's, the label's logit there lowered by `penalty`.

    index_N, labels_N: as in `Request`. ref_logits_NV: the reference's logits of these rows.
    """

    index_N: Tensor
    labels_N: Tensor
    ref_logits_NV: Tensor
    penalty: float


class Request(NamedTuple):
    """What to compute; positions are flat (b·S + t) into the hidden states.

    index_N, labels_N: rows whose log-probabilities to compute, and the tokens that they predict. kl_index_M: rows whose
    KL divergence from `ref_logits_MV` to compute, or whose logits where no reference logits are given (the request to a
    reference model). layers: decoder layers to tap. narrow: the rows that continue after a layer; they must include
    every row requested above. share: return the input of this layer as a prefix. prefix: start from it, whatever the
    inputs are. vision: record these connectors' inputs for the pictures only; empty: of those that are constants (see
    `model.vision`). distilled: see `Distilled`.
    """

    index_N: Tensor | None = None
    labels_N: Tensor | None = None
    kl_index_M: Tensor | None = None
    ref_logits_MV: Tensor | None = None
    layers: tuple[int, ...] = ()
    narrow: Narrow | None = None
    share: int | None = None
    prefix: Prefix | None = None
    vision: tuple[str, ...] | None = None
    distilled: Distilled | None = None


class Outputs(NamedTuple):
    """logp_N, kl_M, logits_MV, distilled_N in float32; activations, vision in the model's dtype. None where not
    requested.

    activations_BSD: tapped layer -> its output, for the rows that reached the layer. prefix: see `share`. vision:
    connector -> its input. distilled_N: the cross entropies that `Distilled` describes.
    """

    logp_N: Tensor | None = None
    kl_M: Tensor | None = None
    logits_MV: Tensor | None = None
    activations_BSD: dict[int, Tensor] | None = None
    prefix: Prefix | None = None
    vision: dict[str, Tensor] | None = None
    distilled_N: Tensor | None = None


class HeadedModel(nn.Module):
    """A Hugging Face image-text-to-text model, or peft's wrapping of one, with the loss head and one call.

    The policy, the reference model and the target of an attack are such models.
    """

    def __init__(self, hf: Any) -> None:
        super().__init__()
        self.hf = hf
        head.install(self.base)
        # Here, since an AttributeError within one of the properties below would hide its cause.
        roles.decoder(self.base)

    @property
    def base(self) -> Any:
        """The Hugging Face model itself; adapters are inside its layers."""
        return self.hf.get_base_model() if hasattr(self.hf, "get_base_model") else self.hf

    @property
    def backbone(self) -> Any:
        """The model below its lm_head."""
        return self.base.base_model

    @cached_property
    def tower(self) -> Tower:
        """The vision tower, recorded and replayed."""
        return Tower(self.base)

    @property
    def hidden_size(self) -> int:
        return self.base.config.get_text_config().hidden_size

    @property
    def depth(self) -> int:
        """Number of decoder layers."""
        return len(roles.decoder(self.backbone).layers)

    def unused(self, depth: int) -> list[nn.Parameter]:
        """Parameters that a forward truncated after `depth` decoder layers never uses.

        These are the later layers, the final norm and the LM head (unless tied to the embeddings).
        """
        text = roles.decoder(self.backbone)
        norms = [module for name, module in text.named_children() if name in FINAL_NORMS]
        later = [*text.layers[depth:], *norms, self.base.get_output_embeddings()]
        tied = {id(p) for p in text.get_input_embeddings().parameters()}
        return [p for module in later for p in module.parameters() if id(p) not in tied]

    def forward(self, inputs: dict[str, Tensor], request: Request) -> Outputs:
        """One pass; it ends after the last tapped layer when no output of the LM head is requested."""
        if request.vision is not None:
            return Outputs(vision=self.tower.recorded(inputs, request.vision))
        of_head = (request.index_N, request.kl_index_M, request.distilled)
        needs_head = any(part is not None for part in of_head)
        end = self.depth if needs_head or not request.layers else max(request.layers) + 1
        if request.prefix is not None:
            layers, prefix = range(request.prefix.layer, end), request.prefix
            _, tapped = activations.run(self.backbone, layers, prefix.hidden_BSD, prefix.arguments, request.layers)
            return Outputs(activations_BSD=tapped)
        narrow = request.narrow if request.narrow is not None and request.narrow.first < end else None
        hidden_BSD, tapped_BSD, prefix = self.hidden(inputs, request._replace(narrow=narrow), end)
        logp_N = kl_M = logits_MV = distilled_N = None
        hidden_RD, lm_head = hidden_BSD.flatten(0, 1), self.base.get_output_embeddings()
        # The request's positions are of the whole batch, of which only some rows may have come this far.
        left_out = narrow.rows.start * hidden_BSD.shape[1] if narrow is not None else 0
        if request.index_N is not None:
            logp_N = lm_head(hidden_RD.index_select(0, request.index_N - left_out), labels_N=request.labels_N)
        if request.kl_index_M is not None:
            rows_MD = hidden_RD.index_select(0, request.kl_index_M - left_out)
            if request.ref_logits_MV is None:
                logits_MV = lm_head(rows_MD, exact=True)
            else:
                kl_M = lm_head(rows_MD, ref_logits_NV=request.ref_logits_MV)
        if (soft := request.distilled) is not None:
            rows_ND = hidden_RD.index_select(0, soft.index_N - left_out)
            options = {"ref_logits_NV": soft.ref_logits_NV, "penalty": soft.penalty}
            distilled_N = lm_head(rows_ND, labels_N=soft.labels_N, **options)
        return Outputs(logp_N, kl_M, logits_MV, tapped_BSD, prefix, distilled_N=distilled_N)

    def hidden(
        self, inputs: dict[str, Tensor], request: Request, end: int
    ) -> tuple[Tensor, dict[int, Tensor], Prefix | None]:
        """Through `end` decoder layers and the norm: hidden states, outputs of tapped layers, the prefix to share."""
        narrow, share, taps = request.narrow, request.share, request.layers
        own = end if narrow is None else narrow.first  # layers that the backbone itself runs
        kept = {number for number in (share, *taps, own - 1) if number is not None and number < own}
        with (
            self.tower.replaying(inputs) if FEATURES in inputs else nullcontext(inputs) as entered,
            packing.entering(self.backbone, entered) as arguments,
            activations.seeing(self.backbone, kept, own) as seen,
        ):
            hidden_BSD = self.backbone(**arguments, use_cache=False).last_hidden_state
        tapped_BSD = {number: seen.outputs[number] for number in taps if number < own}
        if narrow is not None:
            _, arguments = seen.inputs[own - 1]
            hidden_BSD, arguments = activations.narrowed(seen.outputs[own - 1], arguments, narrow.rows)
            hidden_BSD, late_BSD = activations.run(self.backbone, range(own, end), hidden_BSD, arguments, taps)
            tapped_BSD |= late_BSD
            hidden_BSD = roles.decoder(self.backbone).norm(hidden_BSD)
        prefix = None
        if share is not None:
            shared_BSD, arguments = seen.inputs[share]
            prefix = Prefix(share, shared_BSD.detach(), arguments)
        return hidden_BSD, tapped_BSD, prefix


def differ_by(module: Any, depth: int, live: dict[str, Any], replayed: dict[str, Any]) -> float:
    """How far the first decoder layers come apart with replayed pictures: the difference's share of a hidden state.

    Infinite where the family's code cannot run with them. depth: number of decoder layers.
    """
    layer = min(3, depth - 1)

    def hidden(inputs: dict[str, Any]) -> Tensor:
        tapped = no_grad_forward(module, inputs, Request(layers=(layer,))).activations_BSD
        assert tapped is not None
        return tapped[layer].float()

    live_BSD = hidden(live)
    try:
        replayed_BSD = hidden(replayed)
    except Exception as error:  # of any kind: the code is the family's own
        if isinstance(error, torch.OutOfMemoryError) or peer_lost(error):
            raise
        return math.inf
    return float((live_BSD - replayed_BSD).norm() / live_BSD.norm())


def no_grad_forward(module: Any, inputs: dict[str, Tensor], request: Request) -> Outputs:
    """A forward without dropout and without a graph; the module's mode is restored."""
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            return module(inputs, request)
    finally:
        module.train(training)
