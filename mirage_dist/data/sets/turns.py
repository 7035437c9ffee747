"""Safety data as conversations: what a record says of its picture as the turns of one row.

VLGuard's own conversion, and the one of "Safety Mirage" (arXiv 2503.11832) for supervised fine-tuning, put the safe and
the unsafe question about a safe picture into one conversation, in an order drawn for each record.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from mirage_dist.data.formats import BadRecord
from mirage_dist.data.sample import Sample


class Turns:
    """Joins the samples of each record of a file, in the file's order, to one sample with a history.

    The order of turns is drawn by Python's `random`, seeded once for a file and used once for each record of several
    samples: with the seed 0 it is that of the published conversion (ys-zong/VLGuard, convert_to_llava_format.py).
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def __call__(self, samples: Sequence[Sample]) -> list[Sample]:
        """One sample or none: its history has all turns but the last, whose question, answer and label are its own.

        The first question shows the picture. Raises BadRecord when the samples are not about one picture.
        """
        if len(samples) < 2:
            return list(samples)
        if len({sample.image for sample in samples}) > 1 or any(sample.history for sample in samples):
            raise BadRecord("its samples are no turns of one conversation: they differ in their picture or history")
        drawn = list(samples)
        self.random.shuffle(drawn)
        history = tuple((sample.question, sample.answer) for sample in drawn[:-1])
        return [replace(drawn[-1], history=history)]
