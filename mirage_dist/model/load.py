"""Loading: zero.Init, adapters, attention, and which parameters train."""

from __future__ import annotations

import fnmatch
import importlib.util
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from mirage_dist.config import nearest
from mirage_dist.model import activations, directory, vision
from mirage_dist.model.policy import HeadedModel
from mirage_dist.schema import ConfigError, DataConfig, ModelConfig

# Vision-language models that pass positions and the borders of packed sequences to their text decoder only. Others
# derive positions from a picture's grid (Qwen2-VL), or attention from token types (Gemma 3).
PACKABLE = {
    *("aya_vision", "cohere2_vision", "got_ocr2", "internvl", "llava", "llava_next", "llava_onevision", "mistral3"),
    "vipllava",
}
# Kinds of layers that keep packed sequences apart.
ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def processor(model: ModelConfig) -> Any:
    """The processor of the model directory or hub name. Raises ConfigError when it cannot be loaded."""
    from transformers import AutoProcessor

    folder = directory.resolve(model.path)
    try:
        return AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path={model.path}: its processor cannot be loaded: {error}") from error


def policy(
    model: ModelConfig,
    dtype: str,
    deepspeed_config: Mapping[str, Any],
    depth: int | None = None,
    frozen: bool = False,
) -> HeadedModel:
    """The model to train, or with `frozen` a reference. Under ZeRO-3 its parameters are partitioned while they load.

    depth: load only this many decoder layers; the norm and head above them do not train. Raises ConfigError when the
    model cannot be loaded, a pattern of `model.train` matches nothing, or nothing within `depth` trains.
    """
    from transformers import AutoModelForImageTextToText
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    folder = directory.resolve(model.path)
    # transformers partitions the weights that it loads as long as this object lives.
    keep = HfDeepSpeedConfig(dict(deepspeed_config)) if _stage(deepspeed_config) == 3 else None
    try:
        hf: Any = AutoModelForImageTextToText.from_pretrained(
            folder,
            config=_config(model, depth),
            dtype=DTYPES[dtype],
            attn_implementation=attention(model, dtype),
            use_safetensors=True,
        )
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"model.path={model.path}: cannot be loaded: {error}") from error
    finally:
        del keep
    if frozen:
        return HeadedModel(hf.requires_grad_(False))
    if model.gradient_checkpointing:
        hf.gradient_checkpointing_enable({"use_reentrant": False})
        hf.enable_input_require_grads()  # otherwise adapters in checkpointed layers get no gradient
    return trainable(hf, model, depth)


def trainable(hf: Any, model: ModelConfig, depth: int | None) -> HeadedModel:
    """The model with adapters, or with the parameters selected that train; none after `depth` decoder layers.

    Raises ConfigError as `policy` does.
    """
    if model.lora is not None:
        built = HeadedModel(_with_adapters(hf, model))
    else:
        choose_trainable(hf, model.train, model.freeze)
        built = HeadedModel(hf)
    if depth is not None:
        activations.check_layer(built.backbone, depth - 1)
        for parameter in built.unused(depth):
            parameter.requires_grad_(False)
        if not any(p.requires_grad for p in built.parameters()):
            raise ConfigError(
                f"objective.layer={depth - 1}: no trained parameter lies below that layer's output, and no term uses a "
                "later layer; change model.train, or model.lora.targets"
            )
    return built


def _config(model: ModelConfig, depth: int | None) -> Any:
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(directory.resolve(model.path))
    text = config.get_text_config()
    # Never more layers than the model has: `check_names` reports a missing layer.
    if depth is not None and depth < text.num_hidden_layers:
        text.num_hidden_layers = depth
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:depth]
    return config


def choose_trainable(hf: Any, train: Sequence[str], freeze: Sequence[str]) -> list[str]:
    """Set requires_grad by name patterns; returns the names of the parameters that train.

    Raises ConfigError for a `train` pattern that matches no parameter, or when no parameter is left to train. A
    `freeze` pattern may match nothing: the defaults name the vision towers of several model families.
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
    """The attention implementation; `auto` is flash-attention for bf16 on a GPU where it is installed, else sdpa."""
    if model.attention != "auto":
        return model.attention
    flash = dtype == "bf16" and torch.cuda.is_available() and importlib.util.find_spec("flash_attn") is not None
    return "flash_attention_2" if flash else "sdpa"


def base_hash(path: str) -> str:
    """SHA-256 of the files that decide the base model (see `directory.files`), of a directory or a hub name.

    Raises ConfigError when there is no model, or when it has no safetensors file.
    """
    return directory.model_hash(directory.resolve(path))


def _stage(deepspeed_config: Mapping[str, Any]) -> int:
    return deepspeed_config.get("zero_optimization", {}).get("stage", 0)


def check_names(model: ModelConfig, data: DataConfig, layers: Collection[int], depth: int | None) -> HeadedModel:
    """Check what the recipe wants of the model against its configuration alone; returns the model without memory.

    layers: the tapped ones. depth: see `policy`. Raises ConfigError for a name pattern that matches nothing, a
    layer that does not exist, or when the model cannot be packed or its vision features cannot be cached.
    """
    built = weightless(model, depth)
    for layer in layers:
        activations.check_layer(built.backbone, layer)
    if data.packing:
        check_packing(built.backbone)
    if data.cache_vision:
        vision.check(built.base)
    return built


def weightless(model: ModelConfig, depth: int | None = None) -> HeadedModel:
    """The model to train, with adapters and requires_grad, on the meta device: no memory, and a second, not minutes.

    Raises ConfigError as `policy` does.
    """
    from transformers import AutoModelForImageTextToText

    try:
        with torch.device("meta"):
            hf: Any = AutoModelForImageTextToText.from_config(_config(model, depth))
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path={model.path}: no model can be made of its config.json: {error}") from error
    return trainable(hf, model, depth)


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
