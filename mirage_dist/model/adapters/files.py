"""A checkpoint's adapters as a directory of peft's, which peft and vLLM load beside the base model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from mirage_dist.schema import LoraConfig

PREFIX = "base_model.model."  # what peft puts before the names of the model
NAME = ".default"  # of the adapter, in the names of its parameters in memory; not in its file


def write(folder: Path, base: str, options: LoraConfig, weights: Mapping[str, torch.Tensor]) -> None:
    """Write adapter_config.json and adapter_model.safetensors.

    base: what the adapter names as its base model (see `place`). weights: adapter parameters by their names in the peft
    model. `target_modules` lists whole layer names: short ones, such as q_proj, would also
    select layers of the vision tower.
    """
    import peft

    layers = sorted({name.removeprefix(PREFIX).split(".lora_")[0] for name in weights})
    config = peft.LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=layers,
        base_model_name_or_path=base,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    named = {name.replace(f"{NAME}.", "."): tensor.contiguous() for name, tensor in weights.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def place(base: str) -> str:
    """A base model's path, absolute, or its name in the hub's cache as it is."""
    return os.path.realpath(base) if Path(base).is_dir() else base
