"""Rewrites that a model generates before a suite can be evaluated: one worker generates them, the others wait.

A start after a kill generates only what is missing (see `evals.attacks.journal`).
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import cache, partial
from pathlib import Path
from typing import Any

from mirage_dist import disk
from mirage_dist.data import pictures
from mirage_dist.data.diversify import Reword
from mirage_dist.data.encoding.collate import Encoder
from mirage_dist.data.sample import Sample
from mirage_dist.evals.attacks.base import Attack, Generated, Rewritten, Table
from mirage_dist.evals.attacks.journal import Journal, Resources, SampleLine, Superseded, stop_if_requested
from mirage_dist.evals.attacks.rewrite import Rewrite
from mirage_dist.evals.sharing.claims import Claims
from mirage_dist.progress import EVERY_RANK, Progress, log
from mirage_dist.schema import ConfigError, EvalModelConfig, PrepareRecipe, RunError

POLL_SECONDS = 0.5
NOT_IN_NAMES = re.compile(r"[^\w-]")  # characters that a file's name does without


class Rewriter:
    """Prepares attacks: the work list calls it for each attack of each set.

    under_test: everything that answers depend on beside their questions. load: loads the model under test. encoder: of
    its prompts, for checks before it is loaded; None where no model answers.
    """

    def __init__(
        self,
        suite: Path,
        under_test: Mapping[str, Any],
        load: Callable[[Claims], Any],
        encoder: Encoder | None = None,
        other: Callable[[EvalModelConfig], Rewriter] | None = None,
    ) -> None:
        self.suite, self.under_test, self.load = suite, under_test, load
        self.encoder, self.other = encoder, other
        self.key = cache(sample_key)

    def __call__(self, attack: Attack, samples: Sequence[Sample], name: str) -> Attack:
        """The attack, ready to be called on these samples.

        Raises RunError when the model could not be reached for too many samples, and StopRequested after a signal.
        """
        return attack.prepared(samples, name, self)

    def table(self, attack: Generated, samples: Sequence[Sample], name: str) -> Table:
        """The rewrites of these samples, generated unless they are on disk."""
        samples = list(dict.fromkeys(samples))
        on = self._on(attack.surrogate, name)
        attack.check(samples, name, self.encoder, on.encoder)
        home = self.suite if attack.cache is None else Path(attack.cache)
        digest = disk.digest(attack.identity(samples, self.key, on.under_test))
        journal = Journal(home / "rewrites" / f"{NOT_IN_NAMES.sub('_', name)}-{digest[:12]}.jsonl")
        with Claims(home) as claims:
            on.complete(attack, samples, f"rewrites {name}", journal, claims)
        return Table(
            rewrites={s: [attack.changed(s, text, home) for text in journal.rewrites[self.key(s)]] for s in samples},
            shots=attack.shots,
            control=attack.control,
            min_match=attack.min_match,
            origin=attack.origin,
            spent=attack.spent,
            optimised=digest if attack.pinned else "",
        )

    def _on(self, surrogate: EvalModelConfig | None, name: str) -> Rewriter:
        """The rewriter of the model that an attack is optimised on."""
        if surrogate is None:
            return self
        if self.other is None:
            raise ConfigError(f"{name}: surrogate: no other model can be attacked here; take it out")
        return self.other(surrogate)

    def complete(
        self, attack: Generated, samples: Sequence[Sample], name: str, journal: Journal, claims: Claims
    ) -> None:
        """Return when every sample is in the journal, whichever worker wrote it. Raises as `__call__`."""
        waiting = False
        load = cache(lambda: self.load(claims))
        while any(self.key(s) not in journal.refresh().rewrites for s in samples):
            stop_if_requested(name)
            if claim := claims.take(journal.file.stem):
                try:
                    held = partial(claims.held, claim)
                    _generate(attack, Resources(name, samples, journal.refresh(), self.key, load, held))
                except Superseded:
                    continue
                finally:
                    claims.release(claim)
            else:
                if not waiting:
                    log.info(f"{name}: another worker generates them; waiting for it", extra=EVERY_RANK)
                waiting = True
                time.sleep(POLL_SECONDS)


def _generate(attack: Generated, resources: Resources) -> None:
    """Write one line for each missing sample. Samples whose request failed get one only if `min_match` still holds and
    the model has not been given up.
    """
    name, samples = resources.name, resources.samples
    known = [resources.journal.rewrites.get(resources.key(sample)) for sample in samples]
    missing = [sample for sample, rewrites in zip(samples, known, strict=True) if rewrites is None]
    done, without, failed = len(samples) - len(missing), known.count([]), list[Rewritten]()
    log.info(f"{name}: {done} of {len(samples)} samples are on disk ({resources.journal.file})", extra=EVERY_RANK)
    # Closed when a signal ends the loop, so that no further request is sent.
    with (
        Progress(len(samples), name, "sample", initial=done) as progress,
        closing(attack.generate(missing, resources)) as results,
    ):
        for result in results:
            without += not result.rewrites
            if result.failed:
                failed.append(result)
                continue
            _write(result, missing, resources, stops=not attack.checks_stop)
            done += 1
            progress.show(done)
    reasons = ", ".join(f"{why} × {n}" for why, n in sorted(Counter(result.reason for result in failed).items()))
    if failed and (any(r.untried for r in failed) or len(samples) - without < attack.min_match * len(samples)):
        note = next((f"; the server's words: {result.note}" for result in failed if result.note), "")
        raise RunError(
            f"{name}: the requests for {len(failed)} of {len(samples)} samples failed ({reasons}){note}; all rewrites "
            "so far are on disk, and the next start sends the failed requests again"
        )
    for result in failed:
        _write(result, missing, resources)
    if without:
        explained = f", {len(failed)} of them because their requests failed ({reasons})" if failed else ""
        log.info(f"{name}: {without} of {len(samples)} samples are without rewrites{explained}", extra=EVERY_RANK)
    stop_if_requested(name)


def _write(result: Rewritten, samples: Sequence[Sample], resources: Resources, stops: bool = True) -> None:
    sample = samples[result.index]
    line: SampleLine = {"key": resources.key(sample), "id": sample.id, "rewrites": result.rewrites}
    if result.reason:
        line["why"] = result.reason
    if result.search is not None:
        line["result"] = dict(result.search)
    resources.append(line, stops)


def sample_key(sample: Sample) -> str:
    """A hash of everything in a sample that decides its rewrites, its picture's bytes included."""
    picture = None if sample.image is None else pictures.sha256(sample.image)
    shown = [sample.shown] if sample.shown else []
    return disk.digest([sample.id, sample.question, sample.answer, sample.history, picture, *shown])


# --------------------------------------------------------------------------------------------- for safety data


def reworder(recipe: PrepareRecipe) -> Reword | None:
    """The function with which `data.prepare` rewords safety data; None for a recipe without a chat model.

    Rewrites are in `out`.rewrites/ beside the sets, so that a start after a kill requests only what is missing. The
    function raises RunError when the requests for too many samples failed.
    """
    config = recipe.diversify
    if config is None or config.chat is None:
        return None
    chat, attempts, min_match = config.chat, config.attempts, config.min_match
    rewriter = Rewriter(Path(f"{recipe.out}.rewrites"), {}, _no_model)

    def reword(samples: Sequence[Sample], opener: str) -> list[str | None]:
        attack = Rewrite(chat, word=opener, shots=1, attempts=attempts, min_match=min_match)
        table = rewriter(attack, samples, f"opener-{opener}")
        rewrites = [table(sample) for sample in samples]
        return [rows[0].question if rows else None for rows in rewrites]

    return reword


def _no_model(claims: object) -> None:
    """A chat model's rewrites need no model under test."""
