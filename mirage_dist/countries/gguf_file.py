"""GGUF files of Llama's architecture: their header, their tensors, and their conversion to a Hugging Face model.

transformers converts them too, in several times the time: it walks the 98 000 words and merges of a tokenizer through
memory-mapped arrays, twice. Only the tokenizer is left to it. Layout:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mirage_dist.schema import ConfigError

MAGIC, VERSIONS = b"GGUF", (2, 3)
ARCHITECTURE = "llama"
ALIGNMENT = 32  # bytes, where the file names no other
STRING, ARRAY = 8, 9  # of the types of values; the others have a fixed size:
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
LARGEST = 1 << 28  # entries of an array, dimensions of a tensor: more is a damaged file
# Parts of names: GGUF's -> transformers'. Those of a layer follow `blk.N.` and `model.layers.N.`.
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
AGAIN = "copy or download it again"


class Place(NamedTuple):
    """One tensor: ggml's number of its type, its shape in torch's order, and its bytes in the file."""

    kind: int
    shape: tuple[int, ...]
    start: int
    stop: int


class Header(NamedTuple):
    """values: the file's settings by their GGUF names, such as `llama.block_count`."""

    values: dict[str, Any]
    tensors: dict[str, Place]


class _Cursor:
    """Reads little-endian values from the start of a file."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.at = data, 0

    def number(self, form: str) -> Any:
        (value,) = struct.unpack_from(f"<{form}", self.data, self.at)
        self.at += struct.calcsize(f"<{form}")
        return value

    def text(self) -> str:
        length = self.number("Q")
        if length > len(self.data) - self.at:
            raise ValueError(f"a text of {length} bytes")
        self.at += length
        return bytes(self.data[self.at - length : self.at]).decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            return self.number(SCALARS[kind])
        inner, count = self.number("I"), self.number("Q")
        if count > LARGEST or inner == ARRAY:
            raise ValueError(f"an array of {count} values of type {inner}")
        return [self.value(inner) for _ in range(count)]


def header(file: Path) -> Header:
    """The settings and tensors of a GGUF file.

    Raises ConfigError when it is no GGUF file, is cut, holds a model of another architecture than Llama's, or cannot be
    read.
    """
    try:
        if not (size := file.stat().st_size):
            raise ConfigError(f"{file}: an empty file; {AGAIN}")
        data = np.memmap(file, dtype=np.uint8, mode="r").data
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from error
    if bytes(data[:4]) != MAGIC:
        raise ConfigError(f"{file}: no GGUF file (it does not begin with {MAGIC.decode()}); {AGAIN}")
    try:
        content = _header(data)
    except struct.error as error:  # a value lies beyond the end
        raise ConfigError(f"{file}: cut off within its header: it has only {size} bytes; {AGAIN}") from error
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise ConfigError(f"{file}: damaged or cut off: its header cannot be read ({error}); {AGAIN}") from error
    if (architecture := content.values.get("general.architecture")) != ARCHITECTURE:
        raise ConfigError(
            f"{file}: a model of the architecture {architecture!r}; expected {ARCHITECTURE!r}, since no other is "
            "converted. Give a directory in transformers' format instead"
        )
    end = max((place.stop for place in content.tensors.values()), default=0)
    if size < end:
        raise ConfigError(f"{file}: cut off: {size} bytes, but its header describes {end}; {AGAIN}")
    return content


def _header(data: memoryview) -> Header:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    cursor = _Cursor(data)
    cursor.at = len(MAGIC)
    if (version := cursor.number("I")) not in VERSIONS:
        raise ValueError(f"version {version}; known: {VERSIONS}")
    tensors, values = cursor.number("Q"), cursor.number("Q")
    settings: dict[str, Any] = {}
    for _ in range(values):
        name = cursor.text()
        settings[name] = cursor.value(cursor.number("I"))
    described = []
    for _ in range(tensors):
        name, dimensions = cursor.text(), cursor.number("I")
        shape = tuple(cursor.number("Q") for _ in range(dimensions))[::-1]
        described.append((name, shape, cursor.number("I"), cursor.number("Q")))
    alignment = settings.get("general.alignment", ALIGNMENT)
    begin = -(-cursor.at // alignment) * alignment
    places: dict[str, Place] = {}
    for name, shape, kind, offset in described:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        if (count := math.prod(shape)) > LARGEST * block or (shape and shape[-1] % block):
            raise ValueError(f"{name} has shape {shape}")
        places[name] = Place(kind, shape, begin + offset, begin + offset + count // block * size)
    return Header(settings, places)


def convert(file: Path, out: Path, layers: int | None = None) -> None:
    """Write the model in a GGUF file to the folder `out`: configuration, fp32 safetensors, tokenizer, chat template.

    layers: only so many of the decoder's, the first ones. Raises ConfigError as `header` does, and for weights that
    Llama does not have or of which one is missing.
    """
    import torch
    from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    content = header(file)
    config = configuration(file, content, layers)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    weights = {}
    for name, place in content.tensors.items():
        if (target := _renamed(name)) in model.state_dict():
            weights[target] = torch.from_numpy(_tensor(file, target, place, config))
        elif target is None or not _of_a_later_layer(target, config.num_hidden_layers):
            raise ConfigError(f"{file}: holds {name}, a weight that {ARCHITECTURE} does not have; {AGAIN}")
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise ConfigError(
            f"{file}: its weights do not fit its settings: {' '.join(str(error).split())[:300]}"
        ) from error
    model.tie_weights()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def configuration(file: Path, content: Header, layers: int | None = None) -> Any:
    """The LlamaConfig of a GGUF file, with all decoder layers or the first `layers`.

    Raises ConfigError when a setting is missing.
    """
    from transformers import LlamaConfig

    values: Mapping[str, Any] = content.values
    try:
        depth, heads = (values[f"{ARCHITECTURE}.{name}"] for name in ("block_count", "attention.head_count"))
        width = values[f"{ARCHITECTURE}.embedding_length"]
        return LlamaConfig(
            vocab_size=content.tensors["token_embd.weight"].shape[0],
            hidden_size=width,
            intermediate_size=values[f"{ARCHITECTURE}.feed_forward_length"],
            num_hidden_layers=depth if layers is None else min(layers, depth),
            num_attention_heads=heads,
            num_key_value_heads=values.get(f"{ARCHITECTURE}.attention.head_count_kv", heads),
            head_dim=values.get(f"{ARCHITECTURE}.rope.dimension_count", width // heads),
            max_position_embeddings=values[f"{ARCHITECTURE}.context_length"],
            rms_norm_eps=values[f"{ARCHITECTURE}.attention.layer_norm_rms_epsilon"],
            rope_parameters={
                "rope_type": "default",
                "rope_theta": values.get(f"{ARCHITECTURE}.rope.freq_base", 10000.0),
            },
            tie_word_embeddings="output.weight" not in content.tensors,
            bos_token_id=values.get("tokenizer.ggml.bos_token_id"),
            eos_token_id=values.get("tokenizer.ggml.eos_token_id"),
            pad_token_id=values.get("tokenizer.ggml.padding_token_id"),
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"{file}: no settings of a Llama model: {error!r}; {AGAIN}") from error


def _renamed(name: str) -> str | None:
    """transformers' name of a tensor; None for one that Llama does not have."""
    parts = name.split(".")
    if len(parts) == 2 and parts[0] in OUTER:
        return f"{OUTER[parts[0]]}.{parts[1]}"
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in LAYER:
        return f"model.layers.{parts[1]}.{LAYER[parts[2]]}.{parts[3]}"
    return None


def _of_a_later_layer(name: str, layers: int) -> bool:
    parts = name.split(".")
    return parts[1] == "layers" and int(parts[2]) >= layers


def _tensor(file: Path, name: str, place: Place, config: Any) -> np.ndarray:
    """One tensor in float32, as transformers wants it."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType(place.kind)
    block, size = GGML_QUANT_SIZES[kind]
    content = np.fromfile(file, dtype=np.uint8, count=place.stop - place.start, offset=place.start)
    rows = content.reshape(*place.shape[:-1], place.shape[-1] // block * size)
    values = np.ascontiguousarray(dequantize(rows, kind), dtype=np.float32).reshape(place.shape)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return values
    # GGUF has the two numbers that a rotary position turns side by side, transformers half a head apart.
    turned = values.reshape(heads, place.shape[0] // heads // 2, 2, -1).swapaxes(1, 2)
    return np.ascontiguousarray(turned).reshape(place.shape)
