"""A tiny GGUF file of Llama's architecture with a byte-level BPE tokenizer, written by the library `gguf` itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import quantize
from tokenizers.pre_tokenizers import ByteLevel

WIDTH, HEADS, KV_HEADS, MLP, LAYERS = 64, 4, 2, 96, 2
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = ("h e", "l l", "he ll", "hell o", "Ġ w")
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOKENS = (*SPECIAL, *sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES))


def write(
    file: Path,
    architecture: str = "llama",
    tied: bool = True,
    change: Callable[[dict[str, Any]], None] = lambda tensors: None,
) -> Path:
    """Random weights in Q4_1, Q8_0 and F32, as in the real file. change: of tensors by their GGUF names."""
    writer = GGUFWriter(file, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(50000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([TokenType.CONTROL] * len(SPECIAL) + [TokenType.NORMAL] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(CHAT_TEMPLATE)
    tensors = _tensors(tied)
    change(tensors)
    for name, (values, kind) in tensors.items():
        if kind == GGMLQuantizationType.F32:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _tensors(tied: bool) -> dict[str, tuple[np.ndarray, GGMLQuantizationType]]:
    generator, kv = np.random.default_rng(7), WIDTH // HEADS * KV_HEADS
    q4, q8, f32 = GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0, GGMLQuantizationType.F32
    shapes = {"token_embd": ((len(TOKENS), WIDTH), q8), "output_norm": ((WIDTH,), f32)}
    if not tied:
        shapes["output"] = ((len(TOKENS), WIDTH), q8)
    for layer in range(LAYERS):
        own = {
            "attn_norm": ((WIDTH,), f32),
            "ffn_norm": ((WIDTH,), f32),
            "attn_q": ((WIDTH, WIDTH), q4),
            "attn_k": ((kv, WIDTH), q4),
            "attn_v": ((kv, WIDTH), q4),
            "attn_output": ((WIDTH, WIDTH), q4),
            "ffn_gate": ((MLP, WIDTH), q4),
            "ffn_up": ((MLP, WIDTH), q4),
            "ffn_down": ((WIDTH, MLP), q4),
        }
        shapes |= {f"blk.{layer}.{name}": entry for name, entry in own.items()}
    return {
        f"{name}.weight": (generator.normal(0.0, 0.2, shape).astype(np.float32), kind)
        for name, (shape, kind) in shapes.items()
    }
