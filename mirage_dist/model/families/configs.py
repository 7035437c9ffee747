"""Loading a model's configuration, which decides its family: transformers' own format only, and no remote code ever."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mirage_dist.model.families import roles
from mirage_dist.schema import ConfigError, documents

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
GENERATION = "generation_config.json"
# Settings of a generation config that make `generate` return something else, or need code from a repository: the usual
# value of each.
ONE_ANSWER = {
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
    "num_beam_groups": 1,
    "penalty_alpha": 0,
    "dola_layers": None,
    "constraints": None,
    "force_words_ids": None,
    "custom_generate": None,
    "max_time": None,
    "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None,
    "is_assistant": False,
    "stop_strings": None,
    "watermarking_config": None,
    "guidance_scale": 1.0,
}
# What transformers raises for a directory that is no whole model, or for a value in its files that it does not accept.
FAULTS = (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError)
GIVE = "give the model's own file"
BRIEF = 300  # characters of a library's message
# Implementations of attention, and of experts, that torch and transformers have themselves.
ATTENTION = (None, "eager", "sdpa", "flex_attention")
EXPERTS = (None, "eager", "batched_mm", "grouped_mm")
# Sizes by transformers' own names (a family's own name for one is looked up in its `attribute_map`): the largest value,
# which is several times that of any published model. Far larger ones would take all memory, or minutes, to refuse.
LARGEST = {
    "num_hidden_layers": 2000,
    "depth": 2000,
    "hidden_size": 2**20,
    "embed_dim": 2**20,
    "projection_dim": 2**20,
    "intermediate_size": 2**24,
    "vocab_size": 2**26,
    "head_dim": 2**16,
    "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16,
    "num_heads": 2**16,
    "num_experts": 2**16,
    "num_local_experts": 2**16,
    "num_channels": 2**16,
    "image_size": 2**16,
    "patch_size": 2**16,
    "max_position_embeddings": 2**40,
}
NEVER_ZERO = ("hidden_size", "vocab_size", "head_dim", "num_attention_heads", "num_key_value_heads", "num_heads")
NEVER_ZERO += ("num_hidden_layers", "depth", "patch_size", "image_size", "num_channels")


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
    check_sizes(folder / "config.json", config)
    _choose_attention(config)
    return config


def _choose_attention(config: Any) -> None:
    """Let transformers choose the attention, here and in the parts, unless the file names one of torch's own.

    Some files name the attention of the machine that wrote them. A name OWNER/NAME is a repository on the hub, of which
    transformers would run a kernel's code.
    """
    for part in parts(config):
        if getattr(part, "_attn_implementation", None) not in ATTENTION:
            part._attn_implementation = None
        if getattr(part, "_experts_implementation", None) not in EXPERTS:
            part._experts_implementation = None


def sizes(config: Any) -> Iterator[tuple[Any, str, Any]]:
    """The sizes in a configuration and its parts: (part, transformers' name, value), for the names in `LARGEST`."""
    for part in parts(config):
        names = {own: name for name, own in getattr(part, "attribute_map", {}).items()}
        for own, value in vars(part).items():
            if (name := names.get(own, own)) in LARGEST and value is not None:
                yield part, name, value


def parts(config: Any) -> list[Any]:
    """A configuration and those of its parts, such as a tower's, outer ones first."""
    inner = [getattr(config, name, None) for name in getattr(config, "sub_configs", ())]
    return [config, *(part for sub in inner if hasattr(sub, "to_dict") for part in parts(sub))]


def check_sizes(file: Path, config: Any) -> None:
    """Raise ConfigError for a size that no model has. What fits to the weights is checked in `model.weights`."""
    for part, name, value in sizes(config):
        for number in value if isinstance(value, (list, tuple)) else (value,):
            least = int(name in NEVER_ZERO)
            if type(number) is not int or not least <= number <= LARGEST[name]:
                raise ConfigError(
                    f"{file}: {name}={_shown(value)} in {type(part).__name__}: expected a whole number from {least} to "
                    f"{LARGEST[name]:,}; {GIVE}"
                )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]} …"


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
        content = json.loads(documents.read_bytes(file))
    except ConfigError as error:
        raise ConfigError(f"{error}; give a Hugging Face model directory") from error
    except (ValueError, RecursionError) as error:  # RecursionError: nested too deep
        raise ConfigError(f"{file}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: expected a JSON object, found {type(content).__name__}")
    return content


def generation(folder: Path) -> Any:
    """The generation config of a model directory; None where it has none.

    Raises ConfigError for a file that is broken, or that asks for something other than one answer in tokens.
    """
    from transformers import GenerationConfig

    file = folder / GENERATION
    if not file.exists():
        return None
    content = read(file)
    try:
        config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # of any kind: values are compared before their types are checked
        raise ConfigError(f"{file}: no generation config: {brief(error)}") from error
    for name in ("eos_token_id", "pad_token_id", "bos_token_id"):
        value = getattr(config, name, None)
        numbers = value if isinstance(value, list) and name == "eos_token_id" else [value]
        if not all(number is None or (type(number) is int and number >= 0) for number in numbers):
            raise ConfigError(f"{file}: {name}={_shown(value)}: expected a token's number, or none")
    if wrong := [name for name, usual in ONE_ANSWER.items() if content.get(name) not in (None, usual)]:
        raise ConfigError(
            f"{file}: {wrong[0]}={_shown(content[wrong[0]])} asks for another kind of generation than one answer by "
            "greedy decoding; take it out"
        )
    return config


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
    if not isinstance(kind, (str, type(None))):
        raise ConfigError(f"{folder / 'config.json'}: model_type={_shown(kind)} is no name; {GIVE}")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ConfigError(
            f"{folder / 'config.json'}: architectures={_shown(classes)} is no list of class names; {GIVE}"
        )
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
