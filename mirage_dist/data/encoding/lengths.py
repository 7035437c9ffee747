"""Lengths of many samples: tokenised in batches, by worker processes, with those of `Encoder.sizes` as the result."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

from mirage_dist.data.encoding.collate import Encoder
from mirage_dist.data.encoding.conversation import called
from mirage_dist.data.encoding.rows import Tokens
from mirage_dist.data.sample import Sample
from mirage_dist.schema import ConfigError

AT_ONCE = 256  # samples that are tokenised in one call


def measured(encoder: Encoder, samples: Sequence[Sample]) -> NDArray[np.int32]:
    """Tokens (n, 3) of each sample: of its whole row before truncation, of its responses after it, and of its
    responses before it those that stand for text without a token (see `Tokens.unknown`).

    Raises what `Encoder.length` raises of the first sample that it refuses.
    """
    lengths = np.empty((len(samples), 3), np.int32)
    for start in range(0, len(samples), AT_ONCE):
        own = [samples[number] for number in range(start, min(start + AT_ONCE, len(samples)))]
        try:
            sizes = _at_once(encoder, own)
        except ConfigError:  # of whichever sample came to it first; one by one it is the first sample's
            sizes = [_alone(encoder, sample) for sample in own]
        lengths[start : start + len(own)] = [(*_both(parts, encoder.max_length), lost) for parts, lost in sizes]
    return lengths


def unwritable(tokens: Tokens, stream: str, samples: Sequence[Sample], unknown: NDArray[np.int32]) -> Iterator[str]:
    """A warning where answers of a stream hold text without a token. unknown: (n,), the third of `measured`."""
    if count := int((unknown > 0).sum()):
        yield (
            f"data.streams.{stream}: the tokenizer has no token for a part of {count} of {len(unknown)} answers and "
            f"writes {tokens.tokenizer.unk_token} in its place, so that the model is trained on that; most of it in "
            f"{called(samples[int(np.argmax(unknown))])}. Write these answers in characters that it has, or train a "
            "model whose tokenizer has them"
        )


def _alone(encoder: Encoder, sample: Sample) -> tuple[list[int], int]:
    own = next(encoder.sizes_of([sample], [encoder.conversation.pieces(sample, answered=True)]))
    encoder.check_cut(sample, own[0])
    return own


def _at_once(encoder: Encoder, samples: Sequence[Sample]) -> list[tuple[list[int], int]]:
    tokens, pieces = encoder.tokens, [encoder.conversation.pieces(sample, answered=True) for sample in samples]
    texts = set()
    for sample, own in zip(samples, pieces, strict=True):
        shown = "".join(own[: 2 * sample.shown + 1])
        texts |= {(text, tokens.adds_start(text)) for text in (own[0], shown)}
        # As `Tokens.after` has them.
        texts |= {(text, False) for before, after in pairwise(own) for text in (before, before + after)}
    with tokens.ahead(texts):
        sizes = list(encoder.sizes_of(samples, pieces))
    for sample, (parts, _) in zip(samples, sizes, strict=True):
        encoder.check_cut(sample, parts)
    return sizes


def _both(parts: Sequence[int], longest: int) -> tuple[int, int]:
    """parts: prompts and answers in turn."""
    starts = accumulate(parts, initial=0)
    left = [min(part, max(0, longest - start)) for start, part in zip(starts, parts, strict=False)]
    return sum(parts), sum(left[1::2])
