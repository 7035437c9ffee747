"""A sample: what every reader makes and everything downstream takes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from mirage_dist import disk


@dataclass(frozen=True)
class Draw:
    """How an answer is drawn at random, token by token, in place of taking the likeliest tokens.

    temperature: divides the logits. top_p: a token is drawn among the likeliest ones that together have at least this
    probability (nucleus sampling; Holtzman et al., ICLR 2020, arXiv 1904.09751). seed: decides the draw, whatever else
    is answered beside it.
    """

    temperature: float
    top_p: float
    seed: int


@dataclass(frozen=True)
class Turn:
    """A question within a conversation that the model under test has with a fixed user.

    number: of the answers that it gives in the conversation, from 1; `turns` of them in all. own: the turns of the
    history, from 0, whose answers are its own; they are "" until these exist.
    """

    number: int
    turns: int
    own: tuple[int, ...]

    @property
    def last(self) -> bool:
        return self.number == self.turns


@dataclass(frozen=True)
class Sample:
    """One question about one picture, with the answer to learn or to forget.

    image: path of the picture, None for a text-only record. answer: "" where the data publish none. safe: whether the
    *pair* should be answered (VLGuard's label for the split it comes from). history: earlier (question, answer) turns,
    oldest first. references: the answer of each annotator, for benchmarks that score against several; `answer` is then
    the most frequent of them. begun: the text with which an attack begins the model's answer (see
    `evals.attacks.prefill`); "" in every file. shown: the turn whose question shows the picture, from 0, the oldest one
    of the history. draw: how an attack has the answer drawn; None in every file, and for the likeliest tokens.
    turn: where it stands in an attack's conversation; None in every file. original_image: where an attack changed the
    picture's pixels so little that it shows what it did, the picture before; None in every file.
    source: the file that the sample was read from, for messages. `id` is unique within a source file and split.
    """

    id: str
    image: str | None
    question: str
    answer: str
    safe: bool
    category: str
    source: str
    history: tuple[tuple[str, str], ...] = ()
    references: tuple[str, ...] = field(default=(), repr=False)
    begun: str = field(default="", repr=False)
    shown: int = 0
    draw: Draw | None = field(default=None, repr=False)
    turn: Turn | None = field(default=None, repr=False)
    original_image: str | None = field(default=None, repr=False)

    def digest(self) -> str:
        """SHA-256, in hexadecimal, of the fields that decide what a run trains on.

        These are id, image (the path), question, answer, safe, category, history and shown: the same sample in a moved
        file has the same digest. The digest depends on no version of Python and on no change to this class's other
        fields.
        """
        fields = [self.id, self.image, self.question, self.answer, self.safe, self.category, self.history]
        return disk.digest([*fields, self.shown] if self.shown else fields)


def digest_of(sample: Sample, picture: str | None) -> str:
    """`Sample.digest` with the picture named by the SHA-256 of its bytes, wherever they are; None without a picture."""
    return replace(sample, image=picture).digest()


def stream_digest(samples: Iterable[Sample]) -> str:
    """SHA-256, in hexadecimal, over the samples' digests in their order: the same samples reordered hash otherwise."""
    total = hashlib.sha256()
    for sample in samples:
        total.update(bytes.fromhex(sample.digest()))
    return total.hexdigest()
