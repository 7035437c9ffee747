"""QLoRA (Dettmers et al., 2023): a frozen base in 4 bits below adapters that train, by bitsandbytes."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Any

import torch

from mirage_dist.model.families.roles import Parts
from mirage_dist.schema import ConfigError, ModelConfig

KEY = "model.lora.load_in_4bit"
PACKAGES = ("bitsandbytes", "accelerate")  # transformers wants both


def wanted(model: ModelConfig) -> bool:
    """Whether the base is loaded in 4 bits."""
    return model.lora is not None and model.lora.load_in_4bit


def unquantized(model: ModelConfig) -> ModelConfig:
    """The same with the base in the dtype of training, for merging adapters."""
    return replace(model, lora=replace(model.lora, load_in_4bit=False)) if model.lora is not None else model


def check(stage: int) -> None:
    """Raise ConfigError where a 4-bit base cannot be loaded or shared, whatever device this process has.

    stage: of ZeRO. transformers loads a quantised model whole on every rank also under stage 3, so that stage 2 takes
    no more memory and moves less.
    """
    if stage == 3:
        raise ConfigError(
            f"{KEY}: a 4-bit base is whole on every rank and is not partitioned by ZeRO-3; take stage 2, "
            "deepspeed: configs/deepspeed/zero2.json"
        )
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"{KEY} needs {' and '.join(missing)} (pip install {' '.join(missing)}), or set it to false")


def config(empty: Any, dtype: torch.dtype) -> Any:
    """How transformers quantises: the linear layers of the decoder as NF4 with quantised constants; LM head, vision
    tower and connector stay in `dtype`.

    empty: the model without memory. Raises ConfigError without a GPU.
    """
    from transformers import BitsAndBytesConfig

    if not torch.cuda.is_available():
        raise ConfigError(f"{KEY} needs a CUDA device, and this process sees none; set it to false")
    role_of = Parts(empty).role_of
    kept = [
        name
        for name, module in empty.named_modules()
        if isinstance(module, torch.nn.Linear) and role_of.get(f"{name}.weight") != "decoder"
    ]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=kept,
    )
