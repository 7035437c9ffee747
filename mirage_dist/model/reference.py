"""The reference model in three forms: the policy with its adapters off, a frozen sharded engine, or a cache.

The cache holds response-token log-probabilities, which are constants of a frozen model. It is filled by the
policy itself before anything has trained, so that no second model is ever in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mirage_dist.model import activations
from mirage_dist.model.policy import Outputs, Policy, Request, no_grad_forward
from mirage_dist.schema import ConfigError

Forward = Callable[[dict[str, Tensor], Request], Outputs]


def adapters_off(engine: Any) -> Forward:
    """The policy without its adapters. Raises ConfigError when it has none."""
    hf = engine.module.hf
    if not hasattr(hf, "disable_adapter"):
        raise ConfigError("reference=adapters_off needs model.lora; full fine-tuning has cache or engine")

    def forward(inputs: dict[str, Tensor], request: Request) -> Outputs:
        with hf.disable_adapter():
            return no_grad_forward(engine, inputs, request)

    return forward


def frozen(engine: Any) -> Forward:
    """A second engine whose parameters never change."""
    return lambda inputs, request: no_grad_forward(engine, inputs, request)


def shared_layer(policy: Policy, tap: int) -> int | None:
    """The lowest decoder layer that trains: what goes into it is the same in policy and reference, so that a reference
    which is asked for the output of layer `tap` can start there.

    None where something below a layer trains (the projector, embeddings), where dropout makes the policy's own forward
    another one, or where the decoder's layers cannot be called one by one.
    """
    backbone = policy.backbone
    if not activations.is_plain(backbone):
        return None
    text = activations.decoder(backbone)
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


class LogProbs:
    """Response-token log-probabilities of samples under the reference: (stream, index) -> (n,) float32."""

    def __init__(self) -> None:
        self.table: dict[tuple[str, int], Tensor] = {}

    def add(self, samples: list[tuple[str, int]], logp_N: Tensor, segment_N: Tensor) -> None:
        """Rows of one batch; `segment_N` is the row of `samples` that each belongs to."""
        sizes = torch.bincount(segment_N, minlength=len(samples)).tolist()
        self.table.update(zip(samples, logp_N.float().cpu().split(sizes), strict=True))

    def rows(self, samples: list[tuple[str, int]], device: torch.device) -> Tensor:
        """The log-probabilities of these samples' tokens, in their order: (N,)."""
        return torch.cat([self.table[sample] for sample in samples]).to(device, non_blocking=True)

    def save(self, file: Path) -> None:
        """One rank's part: names, indices, lengths, values."""
        keys = sorted(self.table)
        values = [self.table[key].numpy() for key in keys]
        partial = file.with_suffix(".tmp")
        with partial.open("wb") as handle:
            np.savez(
                handle,
                streams=np.array([name for name, _ in keys], dtype=str),
                indices=np.array([index for _, index in keys], dtype=np.int64),
                lengths=np.array([len(v) for v in values], dtype=np.int64),
                values=np.concatenate(values) if values else np.zeros(0, np.float32),
            )
        partial.replace(file)

    def load(self, file: Path) -> None:
        """Add what `save` wrote."""
        with np.load(file, allow_pickle=False) as part:
            values: Mapping[str, Any] = dict(part)
        edges = np.cumsum(values["lengths"])[:-1]
        rows = np.split(values["values"], edges) if len(values["lengths"]) else []
        for name, index, row in zip(values["streams"], values["indices"], rows, strict=True):
            self.table[str(name), int(index)] = torch.from_numpy(row.copy())
