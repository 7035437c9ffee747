"""What a processor returns beside token ids, sorted by shape: values of tokens, and tensors of pictures.

Values of tokens have to grow with an answer, be padded with their row, and be made for rows without a picture. Any
other family's outputs are sorted by the same rule, or refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mirage_dist.schema import ConfigError

OWN = ("input_ids", "attention_mask")
# Labels are placed here, on answers; a processor's own (PaliGemma's) know of no conversation.
DROPPED = ("labels",)


@dataclass(frozen=True)
class Outputs:
    """A processor's outputs.

    neutral: name of each value of tokens -> that value on text without a picture, 0 or a nested list of zeros.
    pictures: names of the tensors of pictures.
    """

    neutral: dict[str, Any]
    pictures: tuple[str, ...]

    @property
    def by_row(self) -> bool:
        """Whether each token names the pictures of its own row that it attends to, as in Mllama.

        Then picture tensors have one entry for each row of the batch, also for one without a picture.
        """
        return any(isinstance(value, list) for value in self.neutral.values())


def sort(kind: str, prompt: Mapping[str, Any], longer: Mapping[str, Any]) -> Outputs:
    """The outputs of a processor of class `kind`, by what it returns for one picture under two prompts.

    prompt: its outputs for a prompt of S tokens, each (1, …). longer: for the same prompt with more text at its end. An
    output (1, S, …) that follows the prompt's length is a value of tokens if that text goes on with the last token's
    value, or 0. An output that is the same for both prompts is a tensor of pictures. Raises ConfigError that names any
    other output.
    """
    before, whole = (outputs["input_ids"].shape[1] for outputs in (prompt, longer))
    if whole <= before:
        raise ConfigError(f"{kind}: its tokenizer makes no tokens of the chat template's own text")
    neutral, pictures = {}, []
    for name in dict.fromkeys([*prompt, *longer]):
        if name in OWN or name in DROPPED:
            continue
        value, other = prompt.get(name), longer.get(name)
        if not isinstance(value, Tensor) or not isinstance(other, Tensor):
            raise _refusal(kind, name, f"as {type(value).__name__}, which is no tensor")
        if value.shape == other.shape:
            if not torch.equal(value, other):
                raise _refusal(kind, name, "whose values depend on the prompt's text")
            pictures.append(name)
        elif value.shape[:2] == (1, before) and other.shape == (1, whole, *value.shape[2:]):
            if not _goes_on(value[0], other[0]):
                raise _refusal(kind, name, "whose values on the text after a picture are not constant")
            neutral[name] = torch.zeros_like(value[0, 0]).tolist()
        else:
            shapes = f"{tuple(value.shape)} for a prompt of {before} tokens, {tuple(other.shape)} for one of {whole}"
            raise _refusal(kind, name, f"of shape {shapes}")
    return Outputs(neutral, tuple(pictures))


def _goes_on(value_S: Tensor, longer_S: Tensor) -> bool:
    last = value_S[-1]
    if value_S.ndim == 1 and last != 0:
        return False
    return bool((longer_S[len(value_S) :] == last).all()) and torch.equal(longer_S[: len(value_S)], value_S)


def _refusal(kind: str, name: str, what: str) -> ConfigError:
    return ConfigError(
        f"{kind} returns {name!r} {what}; it cannot be padded and continued with an answer, so models of this family "
        "are not supported. Choose a model of another family (see docs/models.md)"
    )
