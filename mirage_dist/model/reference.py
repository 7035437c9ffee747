"""The reference model in three forms: a cache, the policy with its adapters off, or a frozen sharded engine.

The cache holds the log-probabilities of response tokens, which are constants of a frozen model. The policy itself
fills it before anything has trained, so that a second model is never in memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from mirage_dist.model import activations
from mirage_dist.model.families import roles
from mirage_dist.model.policy import HeadedModel, Outputs, Request, no_grad_forward
from mirage_dist.schema import ConfigError

SampleKey = tuple[str, int]  # stream, index of the sample in it


class Reference(ABC):
    """What the policy is compared with."""

    @abstractmethod
    def outputs(self, inputs: dict[str, Tensor], request: Request, samples: Sequence[SampleKey]) -> Outputs:
        """What `request` names, under the reference; without a gradient.

        inputs: the model's keyword arguments. samples: those whose response tokens `request.index_N` holds, in order.
        """


class Frozen(Reference):
    """A second engine, whose parameters never change."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def outputs(self, inputs: dict[str, Tensor], request: Request, samples: Sequence[SampleKey]) -> Outputs:
        return no_grad_forward(self.engine, inputs, request)


class AdaptersOff(Reference):
    """The policy without its adapters. Raises ConfigError when it has none."""

    def __init__(self, engine: Any) -> None:
        if not hasattr(engine.module.hf, "disable_adapter"):
            raise ConfigError("reference=adapters_off requires model.lora; use cache or engine for full fine-tuning")
        self.engine = engine

    def outputs(self, inputs: dict[str, Tensor], request: Request, samples: Sequence[SampleKey]) -> Outputs:
        with self.engine.module.hf.disable_adapter():
            return no_grad_forward(self.engine, inputs, request)


def shared_layer(policy: HeadedModel, tap: int) -> int | None:
    """The lowest decoder layer that trains, up to `tap`, the lowest tapped layer: its input is the same in policy and
    reference, so the reference's forward can start there.

    None where anything below a decoder layer trains (the projector, embeddings), where dropout makes the policy's own
    forward differ, or where the decoder's layers cannot be called one by one.
    """
    backbone = policy.backbone
    if not activations.is_plain(backbone):
        return None
    text = roles.decoder(backbone)
    of_layers = {id(p): number for number, module in enumerate(text.layers) for p in module.parameters()}
    above = {id(p) for module in (text.norm, policy.base.get_output_embeddings()) for p in module.parameters()}
    above -= {id(p) for p in text.embed_tokens.parameters()}  # tied to the head, they train below as well
    trained = [id(p) for p in backbone.parameters() if p.requires_grad and id(p) not in above]
    if any(number not in of_layers for number in trained):
        return None
    first = min((of_layers[number] for number in trained), default=tap)
    below = [m for m in backbone.modules() if isinstance(m, nn.Dropout) and m.p > 0]
    within = {id(m) for module in text.layers[first:] for m in module.modules()}
    drops = getattr(text.config, "attention_dropout", 0.0) > 0 or any(id(m) not in within for m in below)
    return None if drops or first > tap else first


class LogProbs(Reference):
    """A cache of response-token log-probabilities under the reference: sample -> (n,) float32."""

    def __init__(self) -> None:
        self.table: dict[SampleKey, Tensor] = {}

    def outputs(self, inputs: dict[str, Tensor], request: Request, samples: Sequence[SampleKey]) -> Outputs:
        """Log-probabilities only; distributions and activations are not cached."""
        if request.index_N is None:
            return Outputs()
        return Outputs(logp_N=self.rows(samples, request.index_N.device))

    def add(self, samples: Sequence[SampleKey], logp_N: Tensor, segment_N: Tensor) -> None:
        """Add one batch; `segment_N` is the index into `samples` of each response token."""
        sizes = torch.bincount(segment_N, minlength=len(samples)).tolist()
        self.table.update(zip(samples, logp_N.float().cpu().split(sizes), strict=True))

    def rows(self, samples: Sequence[SampleKey], device: torch.device) -> Tensor:
        """Log-probabilities of the response tokens of `samples`, in their order: (N,)."""
        return torch.cat([self.table[sample] for sample in samples]).to(device, non_blocking=True)

    def save(self, handle: BinaryIO) -> None:
        """Write the table: stream names, indices, lengths and values."""
        keys = sorted(self.table)
        values = [self.table[key].numpy() for key in keys]
        np.savez(
            handle,
            streams=np.array([name for name, _ in keys], dtype=str),
            indices=np.array([index for _, index in keys], dtype=np.int64),
            lengths=np.array([len(v) for v in values], dtype=np.int64),
            values=np.concatenate(values) if values else np.zeros(0, np.float32),
        )

    def load(self, file: Path) -> None:
        """Add the entries of a file that `save` wrote.

        Raises ValueError when the file is damaged or is not such a file; the table is then unchanged.
        """
        self.table.update({key: torch.from_numpy(row.copy()) for key, row in saved_rows(file)})


def saved_rows(file: Path) -> list[tuple[SampleKey, np.ndarray]]:
    """The entries of a file that `LogProbs.save` wrote.

    Raises ValueError when the file is damaged or is not such a file.
    """
    try:
        with np.load(file, allow_pickle=False) as part:
            values: Mapping[str, Any] = dict(part)
        edges = np.cumsum(values["lengths"])[:-1]
        rows = np.split(values["values"].astype(np.float32, casting="no"), edges) if len(values["lengths"]) else []
        names = zip(values["streams"], values["indices"], strict=True)
        return [((str(name), int(index)), row) for (name, index), row in zip(names, rows, strict=True)]
    except Exception as error:  # of zipfile, zlib, tokenize …: whatever a damaged byte makes NumPy do
        raise ValueError(f"{error}" or type(error).__name__) from error
