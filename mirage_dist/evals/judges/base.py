"""The base of all judges: a judge reads rows (see `evals.rows`) and decides what kind of answer the model gave."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import sys
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, ClassVar

from mirage_dist.evals.results import UNJUDGED, Scores, Verdict
from mirage_dist.schema import EvalRecipe, RunError

Row = Mapping[str, Any]
Source = ModuleType | bytes | Mapping[str, Any]  # of what decides a verdict


def judged_picture(row: Row) -> str | None:
    """The picture by which an answer is judged: of an attack on pixels the one before it, which shows the same.

    What was optimised to mislead one model may mislead a judge as well.
    """
    return row.get("original_image", row["image"])


@dataclass(frozen=True)
class Opinion:
    """A verdict and the details that led to it, written beside it; never a key, never an endpoint's own words.

    Of a `failed` one: reason; final: a later request would fail too, so none is sent; untried: none was sent. note: for
    the message of an evaluation that ends without verdicts; it is not written.
    """

    verdict: Verdict
    detail: dict[str, Any] = field(default_factory=dict)
    note: str = field(default="", compare=False)


@dataclass(frozen=True, kw_only=True)
class Judge:
    """A judge, as a recipe describes it: the fields of its dataclass are its options.

    A subclass names its `verdicts`, and has either `verdict` (one row at a time) or `opinions` (all rows, for a judge
    that asks a model or looks beyond one row).

    name: in metrics.json and in file names; `default_name` unless the recipe gives one.
    kind: in metrics.json; the class's name unless it sets one. about: what reports print after "Judged by".
    verdicts: those that it can give, beside `unparsed` and `failed`. slow: each opinion is written to disk as it comes.
    exact: its verdicts are true labels, against which the others' precision and recall are computed.
    guards: it decides from picture, question and answer alone whether an answer is harmful, so that a filter of answers
    can ask it (see `evals.defences.output_filter`).
    """

    kind: ClassVar[str] = ""
    verdicts: ClassVar[frozenset[Verdict]] = frozenset()
    slow: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    guards: ClassVar[bool] = False

    name: str = ""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.kind = cls.kind or cls.__name__

    @property
    def default_name(self) -> str:
        return self.kind

    @property
    def about(self) -> str:
        return f"the rules of {type(self).__module__}.{type(self).__qualname__}"

    def of(self, recipe: EvalRecipe) -> Judge:
        """This judge for one recipe: itself, unless it depends on more than its options. Loads no weights.

        Raises ConfigError when the recipe or this machine lacks something that the judge needs.
        """
        return self

    def verdict(self, row: Row) -> Verdict:
        """The verdict on one row; its keys are those of `evals.rows.row`."""
        raise NotImplementedError(f"{type(self).__qualname__} defines neither verdict nor opinions")

    def opinions(self, rows: Sequence[Row], suite: Sequence[Row]) -> Generator[tuple[int, Opinion], None, None]:
        """(index into `rows`, opinion) of each row, in any order. suite: all rows, judged before or not.

        Raises RunError when `verdict` returns what is not one of `verdicts`.
        """
        shared = {verdict: Opinion(verdict) for verdict in self.verdicts | UNJUDGED}  # there may be a million rows
        for i, row in enumerate(rows):
            verdict = self.verdict(row)
            if verdict not in shared:
                allowed = ", ".join(sorted(self.verdicts))
                raise RunError(f"judge {self.name}: row {row['key']}: verdict {verdict!r} is not one of its {allowed}")
            yield i, shared[verdict]

    def figures(self, rows: Sequence[Row], opinions: Sequence[Opinion]) -> dict[str, Scores]:
        """What is published beside the rates, by set (see `results.JudgeResult.scores`). opinions: one for each row."""
        return {}

    @property
    def depends_on(self) -> Sequence[Source]:
        """What decides a verdict beside the row, the options and the source of the judge's own module: other modules
        that it calls, contents of files that it reads.
        """
        return ()

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides a verdict beside the row. Cached verdicts with another one are not used."""
        classes = [cls for cls in type(self).__mro__ if issubclass(cls, Judge) and cls is not Judge]
        modules = dict.fromkeys(sys.modules[cls.__module__] for cls in classes)
        names = [f.name for f in dataclasses.fields(self) if f.compare and f.name != "name"]
        return fingerprint(*modules, *self.depends_on, {name: getattr(self, name) for name in names})


def fingerprint(*parts: Source) -> str:
    """SHA-256 of modules' sources, bytes, and mappings that JSON can hold (dataclasses within them included)."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, ModuleType):
            part = inspect.getsource(part).encode()
        elif isinstance(part, Mapping):
            part = json.dumps(part, sort_keys=True, default=dataclasses.asdict).encode()
        total.update(hashlib.sha256(part).digest())
    return total.hexdigest()
