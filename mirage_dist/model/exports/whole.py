"""A trained model loaded and saved by one process: for models whose tensors on disk are made of several parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mirage_dist.model import load
from mirage_dist.model.exports.merged import LARGEST, check_trained
from mirage_dist.model.shards import Shards
from mirage_dist.schema import ModelConfig


def write(folder: Path, model: ModelConfig, dtype: str, depth: int | None, shards: Shards) -> None:
    """Write the weights, with the files that `save_pretrained` writes beside them. Raises ConfigError as `planned`."""
    policy = load.policy(model, dtype, {})
    if depth is not None:  # later layers were not even loaded
        for parameter in policy.unused(depth):
            parameter.requires_grad_(False)
    hf = policy.hf
    parameters = dict(hf.named_parameters())
    check_trained(shards.folder, [name for name, p in parameters.items() if p.requires_grad], shards.shapes)
    with torch.no_grad():
        for name in shards.shapes:
            parameters[name].copy_(shards.whole(name))
    if model.lora is not None:
        hf = hf.merge_and_unload()
    _as_plain_linear(hf)
    hf.save_pretrained(folder, max_shard_size=LARGEST)


def _as_plain_linear(hf: Any) -> None:
    """Give the output projection back the class that transformers knows; the loss head's is ours."""
    head = hf.get_output_embeddings()
    head.__class__ = torch.nn.Linear
