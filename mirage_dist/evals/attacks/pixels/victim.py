"""The attacked model, as a search over pixels uses it: how likely a target is, and what the pixels change about it.

The loss of a row is the mean negative log-probability of its target's tokens, without the end token, as in
`evals.attacks.gcg`. A target is reached when each of its tokens is the likeliest one after the prompt and the tokens
before it: greedy decoding then begins the answer with it.

Shapes: B rows, T tokens of a target, N of all targets, V vocabulary; pictures C = 3 × H × W, each row's of its own
size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mirage_dist.data import pictures
from mirage_dist.data.encoding.collate import Batch, Encoder
from mirage_dist.data.encoding.conversation import called
from mirage_dist.data.sample import Sample
from mirage_dist.evals.attacks.gcg import last_answers
from mirage_dist.evals.models.hf import HuggingFace
from mirage_dist.evals.models.memory import RowsAtOnce
from mirage_dist.model import vision
from mirage_dist.model.families.pixels import TOLERANCE, Inexact, Preprocessing
from mirage_dist.model.policy import HeadedModel, Request
from mirage_dist.schema import ConfigError, RunError
from mirage_dist.schema.limits import CEILING

PIXELS = "pixel_values"


def preprocessing(encoder: Encoder, where: str) -> Preprocessing:
    """The differentiable preprocessing of a model's pictures, checked against the model's own; loads no weights.

    where: the attack, for messages. Raises ConfigError for a text-only model, and for an image processor that cannot be
    written so.
    """
    if encoder.pictured is None:
        raise ConfigError(f"{where}: the model is text-only and sees no pixels; choose a vision-language model")
    try:
        made = Preprocessing(encoder.pictured.framing)
        made.check()
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return made


@dataclass(frozen=True)
class Shown:
    """A sample with a picture, and the target as its answer.

    picture_CHW: the picture's bytes as whole values, float32. inputs: what the model's own processor makes of it.
    """

    sample: Sample
    picture_CHW: Tensor
    inputs: dict[str, Tensor]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.picture_CHW.shape[1], self.picture_CHW.shape[2]


class Score(NamedTuple):
    """loss_B: float32 on the CPU. reached_B: whether greedy decoding begins with the target. gradients: of each row's
    picture (C, H, W), float32 on the device.
    """

    loss_B: Tensor
    reached_B: Tensor
    gradients: list[Tensor]


class Victim:
    """The attacked model. rows: how many rows go through it at once. Raises ConfigError as `preprocessing`."""

    def __init__(self, generator: HuggingFace, where: str) -> None:
        self.encoder, self.device, self.placed = generator.encoder, generator.device, generator.placed
        self.preprocessing = preprocessing(self.encoder, where)
        self.network = HeadedModel(generator.model).requires_grad_(False).eval()
        remedy = "leave this sample out or use a larger GPU"
        self.rows = RowsAtOnce(generator.batch_size, self.device, "the number of pictures searched at once", remedy)

    def shown(self, sample: Sample, target: str) -> Shown:
        """A sample with its picture and the target. Raises Inexact for a picture that the model gets in a way that is
        not reproduced.
        """
        path = sample.image or ""
        bytes_HWC = np.asarray(pictures.open_picture(path, CEILING.value))
        picture_CHW = torch.from_numpy(bytes_HWC.copy()).permute(2, 0, 1).float().contiguous()
        inputs = self.encoder.picture(path)
        self._compare(sample, picture_CHW, inputs)
        return Shown(replace(sample, answer=target), picture_CHW.to(self.device), inputs)

    def verify(self, sample: Sample, picture_CHW: Tensor) -> None:
        """Raise RunError unless the model, given the file of this sample's picture, gets what the search gave it."""
        try:
            self._compare(sample, picture_CHW.cpu().float(), self.encoder.picture(sample.image))
        except ConfigError as error:
            raise RunError(f"the attacked picture {sample.image} is not what was optimised: {error}") from error

    def _compare(self, sample: Sample, picture_CHW: Tensor, inputs: dict[str, Tensor]) -> None:
        own, values = self.preprocessing(picture_CHW[None]), inputs[PIXELS]
        if values.shape != own.shape or not float((values - own).abs().max()) <= TOLERANCE:
            raise Inexact(
                f"{called(sample)}: {self.preprocessing.kind} makes something else of this picture than its settings' "
                "steps"
            )

    # ------------------------------------------------------------------------------------------------ scores

    def encoded(self, rows: Sequence[Shown]) -> Batch:
        """Prompts and targets of these rows as one batch. Reads no picture again."""
        blank = self.encoder.placeholder_picture
        known = [row.inputs for row in rows]

        def lookup(paths: Sequence[str | None]) -> dict[str, Any]:
            of = known if len(paths) == len(known) and None not in paths else [blank]
            return {name: vision.joint([one[name] for one in of]) for name in of[0]}

        with self.encoder.recalling(lookup):
            return self.encoder.encode([row.sample for row in rows])

    def score(self, batch: Batch, attacked: Sequence[Tensor]) -> Score:
        """Losses and gradients of the encoded rows with these pictures, of whole values, in place of their own."""
        groups: dict[torch.Size, list[int]] = {}
        for number, picture_CHW in enumerate(attacked):
            groups.setdefault(picture_CHW.shape, []).append(number)
        stacks = [torch.stack([attacked[n].detach() for n in own]).requires_grad_() for own in groups.values()]
        order = torch.tensor([n for own in groups.values() for n in own]).argsort()
        values_BCYX = torch.cat([self.preprocessing(stack) for stack in stacks])[order.to(self.device)]
        inputs = self.placed({**batch.inputs, PIXELS: values_BCYX})
        targets = last_answers(batch)
        index_N = torch.cat([index_T for index_T, _ in targets]).to(self.device)
        label_N = torch.cat([label_T for _, label_T in targets]).to(self.device)
        logits_NV = self.network(inputs, Request(kl_index_M=index_N)).logits_MV
        logp_N = logits_NV.log_softmax(1).gather(1, label_N[:, None]).squeeze(1)
        likeliest_N = logits_NV.detach().argmax(1) == label_N
        counts = [len(label_T) for _, label_T in targets]
        loss_B = torch.stack([-part.mean() for part in logp_N.split(counts)])
        reached_B = torch.stack([part.all() for part in likeliest_N.split(counts)])
        gradients: dict[int, Tensor] = {}
        for own, of_stack in zip(groups.values(), torch.autograd.grad(loss_B.sum(), stacks), strict=True):
            gradients |= dict(zip(own, of_stack, strict=True))
        return Score(loss_B.detach().float().cpu(), reached_B.cpu(), [gradients[n] for n in range(len(attacked))])
