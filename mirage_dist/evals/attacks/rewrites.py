"""Rewrites that a model has to make, before there is anything to ask: one worker makes them, the others wait.

    evals/SUITE/rewrites/SET-ATTACK-HASH.jsonl     one line a sample: {"key", "id", "rewrites", "why"}
                                                   one line a step of a search: {"search", "step", …}

HASH is of all that decides them, so that what lies there is what would be made again. Lines are whole and on disk when
the next one begins: a start after a kill makes what is missing. The files are private (mode 0600).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import cache, partial
from pathlib import Path
from typing import Any

from mirage_dist import signals
from mirage_dist.data.sample import Sample
from mirage_dist.evals.attacks.base import Attack, Key, Made, Prepared, Table
from mirage_dist.evals.attacks.combine import Combine
from mirage_dist.evals.sharing.claims import Claims
from mirage_dist.evals.sharing.files import lines, told
from mirage_dist.evals.worker import Progress
from mirage_dist.schema import RunError
from mirage_dist.signals import StopRequested

POLL_SECONDS = 0.5
NOTED_LINES = 10  # progress lines of a search
NO_NAME = re.compile(r"[^\w-]")  # what a file's name does without


class Journal:
    """The lines of one file: a sample's rewrites by its key, the last state of each search by its name."""

    def __init__(self, file: Path) -> None:
        self.file, self.end = file, 0  # of the whole lines that were read
        self.made: dict[str, list[str]] = {}
        self.searches: dict[str, dict[str, Any]] = {}

    def refresh(self) -> Journal:
        """Take in what was appended. Of several lines with one key the first counts, so that all read the same."""
        for start, text in lines(self.file, self.end) if self.file.exists() else ():
            self.end = start + len(text)
            try:
                line = json.loads(text)
            except ValueError:
                continue  # cut by a kill; what it was to hold is made again
            if "search" in line:
                self.searches[line["search"]] = line
            else:
                self.made.setdefault(line["key"], line["rewrites"])
        return self

    def append(self, line: Mapping[str, Any]) -> None:
        """On disk when this returns. Raises RunError where the disk is full."""
        with told(self.file.parent):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                size = os.fstat(descriptor).st_size
                cut = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"  # by a kill: it stays a line of its own
                left = memoryview(("\n" * cut + json.dumps(line, ensure_ascii=False) + "\n").encode())
                while left:
                    left = left[os.write(descriptor, left) :]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


class Bench:
    """What attacks need to make their rewrites (see `evals.attacks.base.Bench`), as long as `held()` says so."""

    def __init__(
        self,
        name: str,
        samples: Sequence[Sample],
        journal: Journal,
        key: Key,
        load: Callable[[], Any],
        held: Callable[[], bool],
    ) -> None:
        self.name, self.samples, self.journal, self.key = name, samples, journal, key
        self.generator, self.held = load, held

    def noted(self, name: str) -> dict[str, Any] | None:
        return self.journal.searches.get(name)

    def note(self, name: str, state: Mapping[str, Any], tell: bool) -> None:
        self.append({"search": name, **state})
        step, steps = state["step"], state["steps"]
        if tell and step * NOTED_LINES // steps > (step - 1) * NOTED_LINES // steps:
            print(f"{self.name}: step {step} of {steps}, loss {state['loss']:.3f}", flush=True)

    def append(self, line: Mapping[str, Any]) -> None:
        """Raises StopRequested behind the line in which a signal came."""
        if not self.held():
            raise _Lost
        self.journal.append(line)
        _stop_if_asked(self.name)


class _Lost(Exception):
    """Another worker took this one for dead, and makes the rewrites now."""


class Rewriter:
    """Makes an attack ready to be called, whatever it needs: `rows.plan` calls it for each attack of each set.

    under_test: all that answers depend on beside their questions. load: the model under test.
    """

    def __init__(self, suite: Path, under_test: Mapping[str, Any], load: Callable[[Claims], Any]) -> None:
        self.suite, self.under_test, self.load = suite, under_test, load
        self.key = cache(_key)

    def __call__(self, attack: Attack, samples: Sequence[Sample], name: str) -> Attack:
        """Raises RunError where too many could not be asked for, and StopRequested after a signal."""
        if isinstance(attack, Combine):
            return attack.prepared(samples, name, lambda part, given, number: self(part, given, f"{name}-{number}"))
        return self._made(attack, list(dict.fromkeys(samples)), name) if isinstance(attack, Prepared) else attack

    def _made(self, attack: Prepared, samples: Sequence[Sample], name: str) -> Table:
        home = self.suite if attack.cache is None else Path(attack.cache)
        decided = json.dumps(attack.identity(samples, self.key, self.under_test), sort_keys=True)
        digest = hashlib.sha256(decided.encode()).hexdigest()[:12]
        journal = Journal(home / "rewrites" / f"{NO_NAME.sub('_', name)}-{digest}.jsonl")
        with Claims(home) as claims:
            self._complete(attack, samples, f"rewrites {name}", journal, claims)
        found = {(s.id, s.question): journal.made[self.key(s)] for s in samples}
        return Table(found, attack.shots, attack.control, attack.min_match, attack.origin)

    def _complete(
        self, attack: Prepared, samples: Sequence[Sample], name: str, journal: Journal, claims: Claims
    ) -> None:
        """Returns when every sample is in the journal, by whomever."""
        waited = False
        load = cache(lambda: self.load(claims))
        while any(self.key(s) not in journal.refresh().made for s in samples):
            _stop_if_asked(name)
            if claim := claims.take(journal.file.stem):
                try:
                    held = partial(claims.held, claim)
                    _make(attack, Bench(name, samples, journal.refresh(), self.key, load, held))
                except _Lost:
                    continue
                finally:
                    claims.release(claim)
            else:
                if not waited:
                    print(f"{name}: another worker makes them; waiting for it", flush=True)
                waited = True
                time.sleep(POLL_SECONDS)


def _make(attack: Prepared, bench: Bench) -> None:
    """Make what is missing, a line each. What could not be asked for is written when few enough are without."""
    samples = bench.samples
    known = [bench.journal.made.get(bench.key(sample)) for sample in samples]
    missing = [sample for sample, rewrites in zip(samples, known, strict=True) if rewrites is None]
    there, without, failed = len(samples) - len(missing), known.count([]), list[Made]()
    print(f"{bench.name}: {there} of {len(samples)} are there ({bench.journal.file})", flush=True)
    # Closed when a signal ends the loop, so that questions not yet under way are not put.
    with Progress(len(samples), there, bench.name) as progress, closing(attack.make(missing, bench)) as making:
        for made in making:
            without += not made.rewrites
            if made.failed:
                failed.append(made)
                continue
            _write(made, missing, bench)
            there += 1
            progress.show(there)
    reasons = ", ".join(f"{why} × {n}" for why, n in sorted(Counter(made.why for made in failed).items()))
    if failed and len(samples) - without < attack.min_match * len(samples):
        raise RunError(
            f"{bench.name}: {len(failed)} of {len(samples)} samples could not be asked for ({reasons}); what was made "
            "is on disk, and the next start asks for the rest"
        )
    for made in failed:
        _write(made, missing, bench)
    if without:
        told_why = f", {len(failed)} of them because nobody answered ({reasons})" if failed else ""
        print(f"{bench.name}: {without} of {len(samples)} samples are without rewrites{told_why}", flush=True)


def _stop_if_asked(name: str) -> None:
    if signal := signals.received():
        raise StopRequested(f"{name}: stopped by {signal}; every rewrite so far is on disk")


def _write(made: Made, samples: Sequence[Sample], bench: Bench) -> None:
    sample = samples[made.index]
    why = {"why": made.why} if made.why else {}
    bench.append({"key": bench.key(sample), "id": sample.id, "rewrites": made.rewrites, **why})


def _key(sample: Sample) -> str:
    picture = None
    if sample.image is not None:
        with open(sample.image, "rb") as handle:
            picture = hashlib.file_digest(handle, "sha256").hexdigest()
    content = [sample.id, sample.question, sample.answer, sample.history, picture]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
