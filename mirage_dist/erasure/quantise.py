"""Quantisation: does the forgotten content return when the weights are rounded?

Unlearning changes weights by little, and rounding to few levels may undo these changes (Zhang et al., arXiv
2410.16454).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from mirage_dist import disk
from mirage_dist.erasure.results import QuantisationResult, Quantised, Rounding
from mirage_dist.erasure.setting import ErasureTest, Forget, Prepared, Setting, headline
from mirage_dist.evals.models.hf import HuggingFace
from mirage_dist.model import directory
from mirage_dist.model.families import roles
from mirage_dist.schema import ConfigError, EvalRecipe, EvalSetConfig
from mirage_dist.schema.numbers import Count, whole

WIDEST_GROUPED = 4  # bits; with more, all weights of an output channel share one scale


@dataclass(frozen=True)
class Quantisation(ErasureTest):
    """Round to nearest, symmetric, scaled by the largest magnitude in a group: the suite's rates before and after.

    bits: 8 has one scale for each output channel, 4 and fewer one for each `group` input weights of a channel. Only the
    decoder's linear layers are rounded, as common quantisers do; not embeddings, lm_head, vision tower and projector.
    The weights keep their dtype and only take fewer values, so that the test runs on any hardware. bfloat16 rounds them
    once more, which matters at 8 bits (half a step is 1/254 of the largest weight, bfloat16's up to 1/512).
    attacks: evaluate the suite's attacks too.
    """

    bits: list[Annotated[int, whole(2, 8)]] = field(default_factory=lambda: [8, 4])
    group: Count = 64  # input weights of a channel that share a scale, below 8 bits
    attacks: bool = True

    def __post_init__(self) -> None:
        if not self.bits:
            raise ConfigError(f"bits={self.bits}; expected numbers of bits from 2 to 8")

    def prepared(self, forget: Forget, recipe: EvalRecipe) -> Prepared:
        return Prepared(self._measure)

    def _measure(self, setting: Setting) -> QuantisationResult:
        after = {str(bits): setting.kept(f"int{bits}", lambda b=bits: self._after(setting, b)) for bits in self.bits}
        return {"before": headline(setting.before)["entry"], "after": after}

    def _after(self, setting: Setting, bits: int) -> Quantised:
        out = disk.own(setting.folder / "rounded") / f"model-int{bits}"
        setting.log(f"{bits} bits a weight")
        weights = write_rounded(setting, bits, self.group if bits <= WIDEST_GROUPED else None, out)
        sets = setting.recipe.sets
        if not self.attacks:
            sets = {name: EvalSetConfig(options.kind, options.sources) for name, options in sets.items()}
        result = setting.evaluate(f"int{bits}", replace(setting.model, path=str(out)), sets)
        disk.remove_own(out.parent)
        return {"entry": headline(result)["entry"], "weights": weights}


def rounded(weight_OI: Tensor, bits: int, group: int | None) -> Tensor:
    """The weights (O, I) rounded to the nearest of 2^bits − 1 levels, evenly spaced from −s to s, in their dtype.

    s is the largest magnitude in an output channel (group None) or in each `group` weights of a channel; the last group
    of a channel may be smaller. The error is at most s / (2^bits − 2), plus the rounding of the dtype.
    """
    levels = 2 ** (bits - 1) - 1
    inputs = weight_OI.shape[1]
    width = min(group or inputs, inputs)
    padded = nn.functional.pad(weight_OI.float(), (0, -inputs % width))
    weight_OGW = padded.unflatten(1, (-1, width))
    step_OG1 = weight_OGW.abs().amax(2, keepdim=True) / levels
    step_OG1 = torch.where(step_OG1 == 0, torch.ones_like(step_OG1), step_OG1)
    whole_OGW = (weight_OGW / step_OG1).round().clamp(-levels, levels)
    return (whole_OGW * step_OG1).flatten(1)[:, :inputs].to(weight_OI.dtype)


@torch.no_grad()
def round_decoder(hf: Any, bits: int, group: int | None) -> Rounding:
    """Round every linear layer of a Hugging Face model's text decoder in place (see `rounded`)."""
    decoder = roles.decoder(hf)
    layers = [module for module in decoder.modules() if isinstance(module, nn.Linear)]
    changed = total = count = 0.0
    for layer in layers:
        weight = layer.weight.detach().clone()
        layer.weight.copy_(rounded(weight, bits, group))
        changed += float((layer.weight.float() - weight.float()).square().sum())
        total += float(weight.float().square().sum())
        count += weight.numel()
    whole = sum(parameter.numel() for parameter in hf.parameters())
    return {"layers": len(layers), "share": count / whole, "error": (changed / total) ** 0.5}


def write_rounded(setting: Setting, bits: int, group: int | None, out: Path) -> Rounding:
    """Write the model under test with rounded weights to `out`, as an ordinary model directory."""
    disk.remove(out)  # of a start that was killed
    source = Path(str(setting.model.path))
    with disk.folder(out, durable=False) as folder:
        directory.copy_processing(source, folder)
        hf = HuggingFace(setting.model, setting.recipe.template, setting.recipe.generation).model
        rounding = round_decoder(hf, bits, group)
        hf.save_pretrained(folder)
    return rounding
