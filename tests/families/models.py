"""Tiny random models of real transformers classes, in the layout in which each family is published.

    make("qwen2_5_vl", folder)          # a model directory
    folder = family("qwen2_5_vl")       # the fixture of tests/conftest.py: the directory, made once a session

Files are written as the hub has them (configuration, preprocessor_config.json, processor_config.json where a family
has one, chat template, tokenizer, generation_config.json), never by a processor's class: some of these classes want
torchvision when they are constructed. Weights are a function of the family's name.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from families import llava, others, qwen_vl
from families.parts import Family

FAMILIES: dict[str, Family] = {**llava.FAMILIES, **qwen_vl.FAMILIES, **others.FAMILIES}


def make(name: str, folder: Path, change: Callable[[dict[str, Any]], None] | None = None) -> Path:
    """Write the model directory of a family to `folder`, and return it.

    change: a change of the configuration before the model is made.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )

    write_files(name, folder, change)
    config = AutoConfig.from_pretrained(folder)
    pictured = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    model_class = (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING if pictured else MODEL_FOR_CAUSAL_LM_MAPPING)[type(config)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(name.encode()))
        model = model_class(config)
        _draw(model)
    kept = {file: (folder / file).read_bytes() for file in ("config.json", "generation_config.json")}
    model.save_pretrained(folder)
    for file, content in kept.items():  # as published, not as this version of transformers writes them
        (folder / file).write_bytes(content)
    return folder


def write_files(name: str, folder: Path, change: Callable[[dict[str, Any]], None] | None = None) -> None:
    """Everything but the weights."""
    family = FAMILIES[name]
    tokenizer = family.tokenizer()
    config = family.config(tokenizer.convert_tokens_to_ids)
    text = config.get("text_config", config)
    text.update(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    text["bos_token_id"] = tokenizer.bos_token_id
    if change is not None:
        change(config)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    ends = [tokenizer.convert_tokens_to_ids(token) for token in family.ends] or tokenizer.eos_token_id
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": ends, "pad_token_id": tokenizer.pad_token_id}
    files = {**family.files, "config.json": config, "generation_config.json": {**ids, **family.generation}}
    if family.template is not None:
        if family.template_file == "chat_template.json":
            files[family.template_file] = {"chat_template": family.template}
        elif family.template_file == "tokenizer_config.json":
            own = json.loads((folder / "tokenizer_config.json").read_text())
            files[family.template_file] = {**own, "chat_template": family.template}
        else:
            (folder / family.template_file).write_text(family.template)
    for file, content in files.items():
        (folder / file).write_text(json.dumps(content, indent=2) + "\n")


def _draw(model: torch.nn.Module) -> None:
    """Weights of a size at which pictures and early tokens change the log-probabilities of later ones."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.08)
            elif name.endswith("gate"):  # Mllama's; at their own start, zero, no picture is seen
                parameter.fill_(0.7)
