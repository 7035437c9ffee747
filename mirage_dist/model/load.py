"""Loading: zero.Init, adapters, attention, and which parameters train."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from mirage_dist.data.encoding.collate import Encoder
from mirage_dist.model import activations, directory, trainable, vision, weights
from mirage_dist.model.adapters import quantization
from mirage_dist.model.families import by_row, configs, packing, processors, replays, roles, truncation
from mirage_dist.model.policy import HeadedModel
from mirage_dist.progress import log
from mirage_dist.schema import ConfigError, DataConfig, ModelConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def processor(model: ModelConfig) -> Any:
    """The processor of the model directory or hub name. Raises ConfigError when it cannot be loaded."""
    return processors.load(directory.resolve(model.path))


def configuration(model: ModelConfig, depth: int | None = None) -> Any:
    """The configuration of the model directory or hub name, of all decoder layers or the first `depth`.

    Raises ConfigError when it cannot be loaded.
    """
    config = configs.load(directory.resolve(model.path))
    # Never more layers than the model has: `check_names` reports a missing layer.
    return config if depth is None else truncation.truncated(config, depth)


def picture_token(model: ModelConfig) -> int | None:
    """The token whose places a picture's features take (see `roles.picture_token`); None for a text-only model."""
    return roles.picture_token(configuration(model))


def policy(
    model: ModelConfig,
    dtype: str,
    deepspeed_config: Mapping[str, Any],
    depth: int | None = None,
    frozen: bool = False,
) -> HeadedModel:
    """The model to train, or with `frozen` a reference. Under ZeRO-3 its parameters are partitioned while they load.

    depth: load only this many decoder layers; the norm and head above them do not train. Raises ConfigError when the
    model cannot be loaded, its files lack a weight or hold a NaN, a pattern of `model.train` matches nothing, or
    nothing within `depth` trains.
    """
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    folder = directory.resolve(model.path)
    config = configuration(model, depth)
    options: dict[str, Any] = {}
    if quantization.wanted(model):
        quantization.check(_stage(deepspeed_config))
        empty = weightless(replace(model, lora=None, train=None, freeze=[]), depth, dtype).hf
        options["quantization_config"] = quantization.config(empty, DTYPES[dtype])
    # transformers partitions the weights that it loads as long as this object lives.
    keep = HfDeepSpeedConfig(dict(deepspeed_config)) if _stage(deepspeed_config) == 3 else None
    try:
        with _groups_of_hpz(deepspeed_config):
            hf = weights.load(
                roles.auto_class(config),
                folder,
                config=config,
                dtype=DTYPES[dtype],
                attn_implementation=attention(model, dtype),
                **options,
            )
    finally:
        del keep
    by_row.keep_apart(hf)
    if frozen:
        return HeadedModel(hf.requires_grad_(False))
    if model.gradient_checkpointing:
        hf.gradient_checkpointing_enable({"use_reentrant": False})
        hf.enable_input_require_grads()  # otherwise adapters in checkpointed layers get no gradient
    return trainable.prepare(hf, model, depth)


@contextmanager
def _groups_of_hpz(deepspeed_config: Mapping[str, Any]) -> Iterator[None]:
    """Lets a second model of this process, such as a reference, use the process groups made for the first one.

    DeepSpeed keeps these in one global place, makes them for every model that it partitions while it loads, and then
    refuses to make them again.
    """
    from deepspeed.utils import groups

    size = deepspeed_config.get("zero_optimization", {}).get("zero_hpz_partition_size", 1)
    present: Any = groups._get_zero_param_intra_parallel_group()
    make = groups._create_zero_param_parallel_group
    if present is not None and torch.distributed.get_world_size(present) != size:
        present = groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    if present is not None:
        groups._create_zero_param_parallel_group = lambda size: None
    try:
        yield
    finally:
        groups._create_zero_param_parallel_group = make


def attention(model: ModelConfig, dtype: str, planned: bool = False) -> str | None:
    """The attention implementation to ask transformers for; None leaves the choice to it (sdpa where a family has it).

    `auto` is flash-attention for bf16 on a GPU where it is installed, else None. planned: for a GPU that is not here.
    """
    if model.attention != "auto":
        return model.attention
    gpu = planned or torch.cuda.is_available()
    flash = dtype == "bf16" and gpu and importlib.util.find_spec("flash_attn") is not None
    return "flash_attention_2" if flash else None


def base_hash(path: str) -> str:
    """SHA-256 of the files that decide the base model (see `directory.files`), of a directory or a hub name.

    Raises ConfigError when there is no model, or when it has no safetensors file.
    """
    return directory.model_hash(directory.resolve(path))


def _stage(deepspeed_config: Mapping[str, Any]) -> int:
    return deepspeed_config.get("zero_optimization", {}).get("stage", 0)


def check_names(
    model: ModelConfig, data: DataConfig, layers: Collection[int], depth: int | None, dtype: str = "fp32"
) -> HeadedModel:
    """Check what the recipe wants of the model against its configuration alone; returns the model without memory.

    layers: the tapped ones. depth: see `policy`. Raises ConfigError for a name pattern that matches nothing, a
    layer that does not exist, or when the model's vision features cannot be cached.
    """
    built = weightless(model, depth, dtype)
    for layer in layers:
        activations.check_layer(built.backbone, layer)
    if data.cache_vision and by_row.layers(built.base):
        raise ConfigError(
            f"data.cache_vision: {built.base.config.model_type} takes the pictures of each row apart from its tokens; "
            "take data.cache_vision out"
        )
    if data.cache_vision:
        vision.check(built.base)
    return built


def resolved(model: ModelConfig, data: DataConfig, dtype: str, processor: Any, planned: bool = False) -> DataConfig:
    """`data` with `packing` true or false: `auto` is true for models that keep packed sequences apart, on a GPU where
    their attention does not compare all of a row's tokens, and logs which.

    planned: for a GPU that is not here. Loads no weights. Raises ConfigError when `packing` is true for a model that
    does not keep them apart, or `cache_vision` for one that recorded features cannot serve.
    """
    if data.packing is False and not data.cache_vision:
        return data
    encoder = Encoder(processor, picture_token=picture_token(model), image_aspect=data.image_aspect)
    config = configuration(model)
    if data.cache_vision and (reason := replays.fault(config, encoder)) is not None:
        raise ConfigError(f"data.cache_vision: {reason}; take data.cache_vision out")
    if data.packing is False:
        return data
    implementation = attention(model, dtype, planned)
    if encoder.by_row:
        fault = f"{config.model_type} has the pictures of each row apart from its tokens"
    else:
        flash = (implementation or "").startswith("flash")
        fault = packing.fault(config, encoder.placeholder, encoder.placeholder_picture, flash)
    if data.packing == "auto":
        if fault is None and (planned or torch.cuda.is_available()):
            fault = packing.costly(config, implementation, DTYPES[dtype], planned)
        reason = f"{config.model_type} keeps packed sequences apart" if fault is None else fault
        log.info(f"data.packing=auto: {'packed' if fault is None else 'padded'}, since {reason}")
    elif fault is not None:
        raise ConfigError(f"data.packing: {fault}; take `auto`, which pads here, or false")
    return replace(data, packing=fault is None)


def weightless(model: ModelConfig, depth: int | None = None, dtype: str = "fp32") -> HeadedModel:
    """The model to train, with adapters and requires_grad, on the meta device: no memory, and a second, not minutes.

    Raises ConfigError as `policy` does.
    """
    config = configuration(model, depth)
    try:
        with torch.device("meta"):
            hf: Any = roles.auto_class(config).from_config(config, attn_implementation=attention(model, dtype))
    except Exception as error:  # of any kind: a family's own code, with values that it did not foresee
        raise ConfigError(
            f"model.path={model.path}: no model can be made of its config.json: {configs.brief(error)}"
        ) from error
    with torch.device("meta"):  # peft makes its adapters on the CPU and fills them: two seconds of a 7B model's
        return trainable.prepare(hf, model, depth)
