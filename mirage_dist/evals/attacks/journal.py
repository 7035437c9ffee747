"""Generated rewrites on disk, and what an attack may use while it generates them.

    evals/SUITE/rewrites/SET-ATTACK-HASH.jsonl     one `SampleLine` a sample, one `SearchLine` a step of a search

HASH covers everything that decides the rewrites. A line is on disk before the next one is written. What a line that is
cut, damaged or edited held is generated again, and the log names the line. The files are private (mode 0600).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from mirage_dist import disk, signals, state
from mirage_dist.data.sample import Sample
from mirage_dist.evals.attacks.base import Key
from mirage_dist.evals.sharing.files import Damage, append, lines
from mirage_dist.progress import EVERY_RANK, log
from mirage_dist.signals import StopRequested

SEARCH_LINES = 10  # of progress, for each search


class SampleLine(TypedDict):
    """The rewrites of one sample."""

    key: str  # the sample's hash
    id: str
    rewrites: list[str]
    why: NotRequired[str]  # there are none
    result: NotRequired[dict[str, Any]]  # of the search for them: steps, losses, whether its target was reached


class SearchState(TypedDict):
    """A suffix search after `step` of `steps` steps."""

    step: int
    steps: int
    ids: list[int]  # the suffix's tokens
    loss: float
    text: str  # the suffix
    rows: NotRequired[int]  # candidates that went through the model at once, where the memory had not sufficed for more


class SearchLine(SearchState):
    search: str  # its name


class Journal:
    """The lines of one file: each sample's rewrites by its key, the last state of each search by its name.

    results: how the search for a sample's rewrites went, by its key, of those that had one.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.end, self.count = file, 0, 0  # bytes and number of the whole lines read so far
        self.rewrites: dict[str, list[str]] = {}
        self.searches: dict[str, SearchState] = {}
        self.results: dict[str, dict[str, Any]] = {}

    def refresh(self) -> Journal:
        """Read appended lines. Of several lines with one key the first counts, so that all readers agree."""
        damage = Damage()
        for start, text in lines(self.file, self.end) if self.file.exists() else ():
            self.end, self.count = start + len(text), self.count + 1
            try:
                line = state.parse("rewrite", text, self.file)
            except state.Damaged:
                if text.strip():  # not after a cut line, which `append` ends
                    damage.add(self.file, self.count)
                continue
            if "search" in line:
                self.searches[line["search"]] = cast(SearchState, line)
            elif line["key"] not in self.rewrites:
                self.rewrites[line["key"]] = line["rewrites"]
                if "result" in line:
                    self.results[line["key"]] = line["result"]
        if damage:
            log.info(f"cut, damaged or edited, so generated again: {damage}", extra=EVERY_RANK)
        return self

    def append(self, line: SampleLine | SearchLine) -> None:
        """The line is on disk when this returns. Raises RunError when the disk is full."""
        with disk.refusals(self.file.parent, "whole lines are kept, and the next start generates the rest"):
            append(self.file, state.sealed("rewrite", cast(dict[str, Any], line)))


class Superseded(Exception):
    """Another worker considered this one dead and has taken over the generation of the rewrites."""


class Resources:
    """What an attack may use while it generates rewrites.

    samples: all samples of the attack, missing or not. key: a sample's hash. generator: loads the model under test
    (`evals.models`) when first called. held: whether this worker still has the claim.
    """

    def __init__(
        self,
        name: str,
        samples: Sequence[Sample],
        journal: Journal,
        key: Key,
        generator: Callable[[], Any],
        held: Callable[[], bool],
    ) -> None:
        self.name, self.samples, self.journal, self.key = name, samples, journal, key
        self.generator, self.held = generator, held

    @property
    def home(self) -> Path:
        """The folder in which the attack's files are."""
        return self.journal.file.parent.parent

    def state(self, search: str) -> SearchState | None:
        """The last saved state of a search, also of one that a killed process began."""
        return self.journal.searches.get(search)

    def save(self, search: str, state: SearchState, report: bool) -> None:
        """Save a search's state. report: log its progress now and then."""
        self.append({"search": search, **state})
        if report:
            self._report(state["step"], state["steps"], state["loss"])

    def progress(self, step: int, steps: int, loss: float) -> None:
        """After a step of a search whose state the attack has saved itself: log it now and then. Raises as `check`."""
        self._report(step, steps, loss)
        self.check()

    def check(self) -> None:
        """Between steps: raises StopRequested when a signal has arrived, and Superseded when the claim is lost."""
        if not self.held():
            raise Superseded
        stop_if_requested(self.name)

    def _report(self, step: int, steps: int, loss: float) -> None:
        if step * SEARCH_LINES // steps > (step - 1) * SEARCH_LINES // steps:
            log.info(f"{self.name}: step {step} of {steps}, loss {loss:.3f}", extra=EVERY_RANK)

    def append(self, line: SampleLine | SearchLine, stops: bool = True) -> None:
        """Raises Superseded when the claim is lost, and, if `stops`, StopRequested after the line, when a signal has
        arrived.
        """
        if not self.held():
            raise Superseded
        self.journal.append(line)
        if stops:
            stop_if_requested(self.name)


def stop_if_requested(name: str) -> None:
    """Raise StopRequested when a signal has arrived."""
    if signal := signals.received():
        raise StopRequested(f"{name}: stopped by {signal}; every rewrite so far is on disk")
