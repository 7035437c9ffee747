"""A sample: what every reader makes and everything downstream takes."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Sample:
    """One question about one picture, with the answer to learn or to forget.

    image: path of the picture, None for a text-only record. answer: "" where the data publish none. safe: whether the
    *pair* should be answered (VLGuard's label for the split it comes from). history: earlier (question, answer) turns,
    oldest first. references: what each annotator answered, for benchmarks that score against several; `answer` is then
    the most frequent of them. begun: what stands in the answer's place already when the model is asked (see
    `evals.attacks.prefill`); no file has it. source: the file it was read from, for messages. `id` is unique within a
    source file and split.
    """

    id: str
    image: str | None
    question: str
    answer: str
    safe: bool
    category: str
    source: str
    history: tuple[tuple[str, str], ...] = ()
    references: tuple[str, ...] = field(default=(), repr=False)  # no part of what a run trains on, which is hashed so
    begun: str = field(default="", repr=False)
