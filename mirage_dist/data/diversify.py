"""Safety data whose openings say nothing: each question worded anew, by templates that both classes get evenly.

The remedy on the data side that reviewers of "Safety Mirage" (arXiv 2503.11832) asked for, a paraphrase-diversified
SFT: if every opening leads to refusals and answers alike, no first word can stand for either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mirage_dist.data import rewording, stream
from mirage_dist.data.sources import Sample
from mirage_dist.schema import ConfigError, DiversifyConfig


def diversify(samples: Sequence[Sample], config: DiversifyConfig, seed: int) -> list[Sample]:
    """`config.copies` wordings of every sample, in the order of the samples; answers stay.

    In each class (`safe` or not) every template is used equally often, but for one where the numbers do not divide.
    Which sample gets which is drawn by the seed. With `config.keep` the question as it is comes first.
    Raises ConfigError when one class is missing, since there is then nothing to balance.
    """
    classes = {safe: [i for i, sample in enumerate(samples) if sample.safe == safe] for safe in (True, False)}
    for safe, members in classes.items():
        if not members:
            kind = "answer" if safe else "refusal"
            raise ConfigError(f"diversify: the safety data have no {kind} among {len(samples)} samples")
    chosen: dict[int, list[str]] = {}
    for safe, members in classes.items():
        rng = np.random.default_rng(stream.derived_seed(seed, f"diversify {safe}"))
        # A round of all templates after another, in one order: a sample's copies differ, and uses are even.
        order = [config.templates[i] for i in rng.permutation(len(config.templates))]
        for place, member in enumerate(rng.permutation(members).tolist()):
            start = place * config.copies
            chosen[member] = [order[(start + copy) % len(order)] for copy in range(config.copies)]
    return [worded for i, sample in enumerate(samples) for worded in _wordings(sample, chosen[i], config.keep)]


def _wordings(sample: Sample, templates: Sequence[str], keep: bool) -> list[Sample]:
    worded = [
        replace(sample, id=f"{sample.id}~{number}", question=rewording.fill(template, sample))
        for number, template in enumerate(templates, start=1)
    ]
    return [sample, *worded] if keep else worded
