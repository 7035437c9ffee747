"""Loading a model's configuration, which decides its family: transformers' own format only, and no remote code ever."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mirage_dist.model.families import roles
from mirage_dist.schema import ConfigError

# Kinds of checkpoints in an original format, as their config.json names them -> a conversion for transformers.
CONVERSIONS = {
    "llava_llama": "llava-hf/llava-1.5-7b-hf or llava-hf/llava-v1.6-vicuna-7b-hf",
    "LlavaLlamaForCausalLM": "llava-hf/llava-1.5-7b-hf or llava-hf/llava-v1.6-vicuna-7b-hf",
    "llava_mistral": "llava-hf/llava-v1.6-mistral-7b-hf",
    "LlavaMistralForCausalLM": "llava-hf/llava-v1.6-mistral-7b-hf",
    "llava_qwen": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
    "LlavaQwenForCausalLM": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
    "internvl_chat": "OpenGVLab/InternVL3-8B-hf",
    "InternVLChatModel": "OpenGVLab/InternVL3-8B-hf",
    "multi_modality": "deepseek-community/deepseek-vl-7b-chat or deepseek-community/Janus-Pro-7B",
    "MultiModalityCausalLM": "deepseek-community/deepseek-vl-7b-chat or deepseek-community/Janus-Pro-7B",
}
# Files that may name remote code.
NAMING_CODE = ("config.json", "processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
# What transformers raises for a directory that is no whole model, or for a value in its files that it does not accept.
FAULTS = (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError)
BRIEF = 300  # characters of a library's message


def load(folder: Path) -> Any:
    """The configuration of a model directory. Reads config.json alone.

    Raises ConfigError when it is missing or broken, for a checkpoint in its original format or with remote code, and
    for a model that is neither an image-text-to-text nor a causal language model.
    """
    from transformers import AutoConfig

    never_run_remote_code()
    _refuse_original(folder, read(folder / "config.json"))
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # of any kind: every family's class checks its values in its own way
        raise ConfigError(f"{folder / 'config.json'}: no configuration of a model: {brief(error)}") from error
    roles.auto_class(config)
    # Some files name the attention of the machine that wrote them. It is this machine's to choose.
    if str(config._attn_implementation).startswith("flash"):
        config._attn_implementation = None
    return config


def never_run_remote_code() -> None:
    """Make transformers raise ValueError where it would ask on the terminal whether to run a repository's code."""
    from transformers import dynamic_module_utils

    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0


def names_remote_code(folder: Path) -> bool:
    """Whether a file of this directory names classes in code of its repository."""
    return any("auto_map" in read(folder / name) for name in NAMING_CODE if (folder / name).is_file())


def read(file: Path) -> dict[str, Any]:
    """The JSON object in a file of a model directory. Raises ConfigError when it cannot be read, or is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror}); give a Hugging Face model directory") from error
    except (ValueError, RecursionError) as error:  # RecursionError: nested too deep
        raise ConfigError(f"{file}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: expected a JSON object, found {type(content).__name__}")
    return content


def brief(error: BaseException) -> str:
    """A library's error on one line, cut after `BRIEF` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = text if not isinstance(error, KeyError) else f"no {text}"
    return text if len(text) <= BRIEF else f"{text[:BRIEF]} …"


def remote_code(folder: Path, part: str) -> ConfigError:
    """The error for a directory of which a part needs code from its repository."""
    return ConfigError(f"model.path={folder}: its {part} needs remote code, which is never run; {_conversion(None)}")


def _refuse_original(folder: Path, content: dict[str, Any]) -> None:
    """Raise ConfigError unless transformers itself has the model type and the class that config.json names."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind, classes = content.get("model_type"), content.get("architectures") or []
    unknown = None
    if kind is None:
        unknown = "no model_type"
    elif kind not in CONFIG_MAPPING:
        unknown = f"model_type {kind}"
    elif classes and not any(hasattr(transformers, str(name)) for name in classes):
        unknown = f"the class {classes[0]}"
    if unknown is None:
        return
    example = next((CONVERSIONS[name] for name in (kind, *classes) if name in CONVERSIONS), None)
    raise ConfigError(
        f"model.path={folder}: config.json names {unknown}, "
        + ("which every model in transformers' format has" if kind is None else "which transformers does not have")
        + f" (installed: {transformers.__version__}): the model is in its original format or needs remote code, which "
        f"is never run; {_conversion(example)}"
    )


def _conversion(example: str | None) -> str:
    such = f", such as {example}" if example else " (its name often ends in -hf)"
    return f"use the model's conversion for transformers{such}"
