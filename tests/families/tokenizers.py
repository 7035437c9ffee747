"""Tokenizers of the families' kinds, trained on a few sentences: byte-level BPE and SentencePiece-like BPE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "What is in this picture? Describe it, please.",
    "I am sorry, I cannot help with that request.",
    "The picture shows a red square on a small table.",
    "How can I make a cake at home? You are a helpful assistant.",
    "USER: ASSISTANT: User: Assistant: user assistant system model",
]


def byte_level(
    special: Sequence[str], named: Mapping[str, str] | None = None, bos: str | None = None, **tokens: str
) -> PreTrainedTokenizerFast:
    """As Qwen's, Llama 3's and Mistral's newer tokenizers.

    special: all special tokens, in the order of their ids. named: attribute -> token. bos: begins every text.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _train(backend, special, 320 + len(special), alphabet)
    return _wrap(backend, special, named, bos, tokens)


def sentencepiece(
    special: Sequence[str], named: Mapping[str, str] | None = None, bos: str = "<s>", **tokens: str
) -> PreTrainedTokenizerFast:
    """As Llama 2's, Mistral's and Gemma's: a space is part of the word that it precedes."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    alphabet = [chr(code) for code in range(33, 127)] + ["\n", "▁"]
    _train(backend, special, 200 + len(special), alphabet)
    return _wrap(backend, special, named, bos, tokens)


def _train(backend: Tokenizer, special: Sequence[str], size: int, alphabet: list[str]) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(SENTENCES, trainer)


def _wrap(backend: Tokenizer, special, named, bos, tokens) -> PreTrainedTokenizerFast:
    if bos is not None:
        start = [(bos, backend.token_to_id(bos))]
        backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=start)
        tokens = {"bos_token": bos, **tokens}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        extra_special_tokens=dict(named or {}),
        **tokens,
    )
