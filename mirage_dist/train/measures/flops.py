"""FLOPs of a step's real tokens, and the peak of a GPU: what model FLOPs utilisation (MFU) divides.

As in Chowdhery et al. (2022, PaLM, appendix B): padding and what is computed a second time (gradient checkpointing) do
not count, and causal attention counts whole. Counted are the decoder layers, the LM head on the rows that it computes,
and a reference model that runs in the step; the vision tower is not, which is 1 to 2 % of LLaVA-1.5's step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from mirage_dist.model.families import roles
from mirage_dist.model.policy import FINAL_NORMS
from mirage_dist.objectives.base import Needs

# Dense bfloat16 FLOP/s, by a part of the device's name; the first that fits. From NVIDIA's data sheets (H100, H200,
# B200, A100, L40S, L4, A10, RTX 6000 Ada), whose figures with sparsity are twice these.
PEAKS = {
    "B200": 2250e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 6000 Ada": 364e12,
}


def peak(name: str) -> float | None:
    """Dense bfloat16 FLOP/s of a GPU by its name; None for one that is not in the table."""
    return next((value for part, value in PEAKS.items() if part in name), None)


@dataclass(frozen=True)
class Layer:
    """FLOPs of one token in a decoder layer's matrix products, forward and backward; attention comes on top.

    width: heads · size of a head. attention_backward: whether a gradient goes through the attention.
    """

    forward: float
    backward: float
    width: int
    attention_backward: bool


class Cost:
    """FLOPs of a step of one model and objective, from its counts.

    narrows: whether only the rows that the LM head needs go on above a tapped layer. reference_from: the first layer
    that a reference computes in the step; None for a cache or no reference.
    """

    def __init__(self, model: Any, needs: Needs, narrows: bool, reference_from: int | None) -> None:
        """model: a `HeadedModel`, whole or partitioned."""
        self.needs, self.narrows, self.reference_from = needs, narrows, reference_from
        self.layers = layers(model)
        head = model.base.get_output_embeddings()
        # A row's logits, the gradient of its hidden state, and with it the weight's.
        self.head_forward = 2.0 * head.in_features * head.out_features
        self.head = self.head_forward * (3 if head.weight.requires_grad else 2)

    def step(self, counts: Mapping[str, float]) -> float:
        """counts: of the whole step, as the collator names them (see `feed.MicroBatch.counts`)."""
        needs, total = self.needs, 0.0
        for name in needs.streams:
            tokens, sequences = counts[f"{name}.input_tokens"], counts[f"{name}.sequences"]
            if not tokens or not sequences:
                continue
            length = tokens / sequences
            for layer in self.layers[: self._depth(name)]:
                attention = 4.0 * length * layer.width
                total += tokens * (layer.forward + layer.backward)
                total += tokens * attention * (3 if layer.attention_backward else 1)
            total += self.head * (name in needs.logp) * counts[f"{name}.tokens"]
            total += self.head * (name in needs.kl) * counts.get(f"{name}.kl_positions", 0.0)
            if self.reference_from is not None and name in (*needs.ref_logp, *needs.kl, *needs.ref_activation):
                for layer in self.layers[self.reference_from : needs.reference_depth]:
                    total += tokens * (layer.forward + 4.0 * length * layer.width)
                total += self.head_forward * (name in needs.ref_logp) * counts[f"{name}.tokens"]
                total += self.head_forward * (name in needs.kl) * counts.get(f"{name}.kl_positions", 0.0)
        return total

    def _depth(self, name: str) -> int | None:
        """Number of decoder layers that this stream's rows go through; None for all."""
        above = (*self.needs.logp, *self.needs.kl)
        if not self.needs.layers or name in above or (above and not self.narrows):
            return None
        return max(self.needs.layers) + 1


def layers(model: Any) -> list[Layer]:
    """The decoder layers of a `HeadedModel`, from the first one on."""
    text, config = roles.decoder(model.backbone), model.base.config.get_text_config()
    inner = {id(p) for layer in text.layers for p in layer.parameters()}
    norms = [module for name, module in text.named_children() if name in FINAL_NORMS]
    above = {id(p) for module in (*norms, model.base.get_output_embeddings()) for p in module.parameters()}
    above -= {id(p) for p in text.get_input_embeddings().parameters()}  # tied to the head
    outer = (p for p in model.parameters() if id(p) not in inner and id(p) not in above)
    trains = any(p.requires_grad for p in outer)  # whether anything that this point depends on does
    heads = getattr(config, "num_attention_heads", None)
    heads = heads if isinstance(heads, int) else 0  # some decoders have no attention, or other heads in each layer
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1))
    made = []
    for layer in text.layers:
        forward = backward = 0.0
        attended = trains
        for name, module in layer.named_modules():
            for own, trained in _products(module, config):
                forward += own
                backward += own * (trains + trained)
                trains = trains or trained
                attended = attended or (trained and "attn" in name)
        made.append(Layer(forward, backward, width, attended))
    return made


def _products(module: nn.Module, config: Any) -> list[tuple[float, bool]]:
    """FLOPs of a token in a module's own weights, and whether each trains: linear layers, and experts in one weight, of
    which a token takes some.
    """
    if isinstance(module, nn.Linear):
        return [(2.0 * module.in_features * module.out_features, module.weight.requires_grad)]
    taken, stacked = getattr(config, "num_experts_per_tok", None) or 1, []
    for parameter in module.parameters(recurse=False):
        shape = getattr(parameter, "ds_shape", parameter.shape)
        if len(shape) == 3:
            stacked.append((2.0 * shape[1] * shape[2] * taken, parameter.requires_grad))
    return stacked
