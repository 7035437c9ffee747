"""Loading: zero.Init, adapters, attention, and which parameters train."""

from __future__ import annotations

import fnmatch
import hashlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mirage_dist.config import nearest
from mirage_dist.model import activations
from mirage_dist.model.policy import Policy
from mirage_dist.schema import ConfigError, ModelConfig

# Vision-language models that hand positions and the borders of packed sequences to their text decoder and to nothing
# else. Others make positions of a picture's grid (Qwen2-VL), or attention of token types (Gemma 3).
PACKABLE = {
    *("aya_vision", "cohere2_vision", "got_ocr2", "internvl", "llava", "llava_next", "llava_onevision", "mistral3"),
    "vipllava",
}
ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}  # kinds of layers that keep them apart
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def processor(model: ModelConfig) -> Any:
    """The processor of the model directory or hub name. Raises ConfigError when it cannot be loaded."""
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(model.path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path={model.path}: its processor cannot be loaded: {error}") from error


def policy(model: ModelConfig, dtype: str, deepspeed_config: Mapping[str, Any], frozen: bool = False) -> Policy:
    """The model to train (or with `frozen` a reference), its parameters partitioned while they load under ZeRO-3.

    Raises ConfigError when it cannot be loaded or a pattern of `model.train` or `model.freeze` matches nothing.
    """
    from transformers import AutoModelForImageTextToText
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    # transformers partitions what it loads as long as this object lives.
    keep = HfDeepSpeedConfig(dict(deepspeed_config)) if _stage(deepspeed_config) == 3 else None
    try:
        hf: Any = AutoModelForImageTextToText.from_pretrained(
            model.path, dtype=DTYPES[dtype], attn_implementation=attention(model, dtype), use_safetensors=True
        )
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"model.path={model.path}: cannot be loaded: {error}") from error
    finally:
        del keep
    if frozen:
        return Policy(hf.requires_grad_(False))
    if model.gradient_checkpointing:
        hf.gradient_checkpointing_enable({"use_reentrant": False})
        hf.enable_input_require_grads()  # else adapters behind a checkpoint get no gradient
    if model.lora is not None:
        return Policy(_with_adapters(hf, model))
    choose_trainable(hf, model.train, model.freeze)
    return Policy(hf)


def choose_trainable(hf: Any, train: Sequence[str], freeze: Sequence[str]) -> list[str]:
    """Set requires_grad by name patterns; returns the names that train.

    Raises ConfigError for a `train` pattern that matches no parameter, or when nothing is left to train. A
    `freeze` pattern may match nothing: the defaults name several families' vision towers.
    """
    names = [name for name, _ in hf.named_parameters()]
    for pattern in train:
        if not fnmatch.filter(names, pattern):
            raise ConfigError(
                f"model.train: pattern {pattern!r} matches no parameter; {nearest(pattern, names[:2000])}"
            )
    chosen = []
    for name, parameter in hf.named_parameters():
        wanted = any(fnmatch.fnmatchcase(name, p) for p in train)
        parameter.requires_grad_(wanted and not any(fnmatch.fnmatchcase(name, p) for p in freeze))
        if parameter.requires_grad:
            chosen.append(name)
    if not chosen:
        raise ConfigError(f"model.freeze={list(freeze)} leaves nothing of model.train={list(train)} to train")
    return chosen


def _with_adapters(hf: Any, model: ModelConfig) -> Any:
    import peft

    options = model.lora
    assert options is not None
    linear = [name for name, module in hf.named_modules() if isinstance(module, torch.nn.Linear)]
    for pattern in options.targets:
        if not fnmatch.filter(linear, pattern):
            raise ConfigError(f"model.lora.targets: {pattern!r} matches no linear layer; {nearest(pattern, linear)}")
    targets = [name for name in linear if any(fnmatch.fnmatchcase(name, p) for p in options.targets)]
    for pattern in options.also_train:
        if not fnmatch.filter((name for name, _ in hf.named_parameters()), pattern):
            raise ConfigError(f"model.lora.also_train: {pattern!r} matches no parameter")
    wrapped = peft.get_peft_model(
        hf,
        peft.LoraConfig(r=options.rank, lora_alpha=options.alpha, lora_dropout=options.dropout, target_modules=targets),
    )
    for name, parameter in wrapped.named_parameters():
        if any(fnmatch.fnmatchcase(name, p) for p in options.also_train):
            parameter.requires_grad_(True)
    return wrapped


def attention(model: ModelConfig, dtype: str) -> str:
    """The attention implementation; `auto` takes flash-attention for bf16 where it is installed and there is a GPU."""
    if model.attention != "auto":
        return model.attention
    flash = dtype == "bf16" and torch.cuda.is_available() and importlib.util.find_spec("flash_attn") is not None
    return "flash_attention_2" if flash else "sdpa"


def base_hash(path: str) -> str:
    """SHA-256 over the weight files of a model directory or of a hub name's snapshot in the cache, names included.

    Raises ConfigError when there is no safetensors file: other weights are never loaded.
    """
    from transformers.utils.hub import cached_file

    folder = Path(path)
    if not folder.is_dir():
        try:
            folder = Path(str(cached_file(path, "config.json"))).parent
        except OSError as error:
            raise ConfigError(f"model.path={path}: neither a directory nor in the model cache: {error}") from error
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"model.path={path}: no *.safetensors in {folder}; other weights are never loaded")
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as handle:
            digest.update(file.name.encode() + hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()


def _stage(deepspeed_config: Mapping[str, Any]) -> int:
    return deepspeed_config.get("zero_optimization", {}).get("stage", 0)


def check_directory(model: ModelConfig) -> None:
    """Raise ConfigError early when a local `model.path` is no model directory; a hub name is left to the loader."""
    folder = Path(model.path)
    looks_local = folder.is_absolute() or model.path.startswith((".", "runs/")) or folder.exists()
    if looks_local and not (folder / "config.json").is_file():
        raise ConfigError(f"model.path={model.path}: no config.json there; give a Hugging Face model directory")
    if (folder / "config.json").is_file():
        try:
            json.loads((folder / "config.json").read_text())
        except ValueError as error:
            raise ConfigError(f"{folder / 'config.json'}: not JSON: {error}") from error


def check_names(model: ModelConfig, layer: int | None, packing: bool = False) -> None:
    """Raise ConfigError for a name pattern or layer that the model does not have, or packing that it cannot take.

    All from its configuration: the model is built without memory (on the meta device), which takes a second where
    weights take minutes.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    try:
        config = AutoConfig.from_pretrained(model.path)
        with torch.device("meta"):
            hf: Any = AutoModelForImageTextToText.from_config(config)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path={model.path}: no model can be made of its config.json: {error}") from error
    wanted = _with_adapters(hf, model) if model.lora is not None else hf
    if model.lora is None:
        choose_trainable(hf, model.train, model.freeze)
    policy = Policy(wanted)
    if layer is not None:
        activations.check_layer(policy.backbone, layer)
    if packing:
        check_packing(policy.backbone)


def check_packing(backbone: Any) -> None:
    """Raise ConfigError unless the model is known to keep packed sequences apart."""
    kind, text = backbone.config.model_type, activations.decoder(backbone)
    if kind not in PACKABLE:
        raise ConfigError(
            f"data.packing: {kind} is not known to keep packed sequences apart (models that make positions of a "
            f"picture's grid, such as Qwen2-VL, do not); leave it off. Known: {', '.join(sorted(PACKABLE))}"
        )
    kinds = set(getattr(text.config, "layer_types", None) or ())
    if not text._supports_attention_backend or not kinds <= ATTENTION:
        raise ConfigError(
            f"data.packing: not every layer of {text.config.model_type} keeps packed sequences apart; leave it off"
        )
