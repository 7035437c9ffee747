"""Quantisation: does what was forgotten come back when the weights are rounded?

Fine-tuning moves weights by little, and rounding to few levels may undo just that (Zhang et al., arXiv 2410.16454).
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mirage_dist.erasure.setting import Setting, headline
from mirage_dist.evals.models.hf import HuggingFace
from mirage_dist.model import activations
from mirage_dist.schema import ConfigError, EvalSetConfig

WIDEST_GROUPED = 4  # bits; above it a whole output channel shares its scale


@dataclass(frozen=True)
class Quantisation:
    """Round to nearest, symmetric, scaled by the largest magnitude of a group: the suite's rates before and after.

    bits: 8 scales each output channel, 4 and fewer each `group` input weights of one. The decoder's linear layers are
    rounded; embeddings, lm_head, vision tower and projector stay, as quantisers leave them. The weights keep their
    dtype and only take fewer values, so that it runs anywhere: bfloat16 rounds them once more, which 8 bits notice
    (half a step is 1/254 of the largest weight, bfloat16's up to 1/512).
    """

    bits: list[int] = field(default_factory=lambda: [8, 4])
    group: int = 64
    attacks: bool = True  # ask the suite's attacks too

    def __post_init__(self) -> None:
        if not self.bits or any(not 2 <= bits <= 8 for bits in self.bits):
            raise ConfigError(f"bits={self.bits}; expected numbers of bits from 2 to 8")
        if self.group < 1:
            raise ConfigError(f"group={self.group}; expected a number of weights above 0")

    def __call__(self, setting: Setting) -> dict[str, Any]:
        """{"before": entry, "after": {bits: {"entry", "weights"}}}, entry as in `evals.runner.evaluate`."""
        after = {str(bits): setting.kept(f"int{bits}", lambda b=bits: self._after(setting, b)) for bits in self.bits}
        return {"before": headline(setting.before)["entry"], "after": after}

    def _after(self, setting: Setting, bits: int) -> dict[str, Any]:
        out = setting.folder / f"model-int{bits}"
        setting.say(f"{bits} bits a weight")
        weights = write_rounded(setting, bits, self.group if bits <= WIDEST_GROUPED else None, out)
        sets = setting.recipe.sets
        if not self.attacks:
            sets = {name: EvalSetConfig(options.kind, options.sources) for name, options in sets.items()}
        asked = setting.ask(f"int{bits}", replace(setting.model, path=str(out)), sets)
        shutil.rmtree(out)
        return {"entry": headline(asked)["entry"], "weights": weights}


def rounded(weight_OI: Tensor, bits: int, group: int | None) -> Tensor:
    """The nearest weights of 2^bits − 1 levels, evenly from −s to s: (O, I) in the dtype given.

    s is the largest magnitude of an output channel (group None), or of each `group` weights of one; the last group of
    a channel may be narrower. Off by at most s / (2^bits − 2), and by the dtype's own rounding.
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
def round_decoder(hf: Any, bits: int, group: int | None) -> dict[str, Any]:
    """Round in place every linear layer of the text decoder: {"layers", "share", "error"}.

    share: of all the model's parameters that are rounded. error: root mean square of the change against that of the
    weights.
    """
    decoder = activations.decoder(getattr(hf, hf.base_model_prefix))
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


def write_rounded(setting: Setting, bits: int, group: int | None, out: Path) -> dict[str, Any]:
    """Write the model under test, rounded, to `out` as an ordinary model directory; see `round_decoder`."""
    shutil.rmtree(out, ignore_errors=True)  # a killed start left it
    source = Path(str(setting.model.path))
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors*", "*.tmp"))
    hf = HuggingFace(setting.model, setting.recipe.template, setting.recipe.generation).model
    told = round_decoder(hf, bits, group)
    hf.save_pretrained(out)
    return told
