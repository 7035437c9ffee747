"""An output filter: a guard reads each answer before the user gets it, and withholds what it finds harmful."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, overload

from mirage_dist.evals import judges
from mirage_dist.evals.defences.base import Defence
from mirage_dist.evals.judges import Judge
from mirage_dist.evals.judges.base import Row
from mirage_dist.schema import Choice, ConfigError, EvalRecipe

REFUSAL = "The answer was withheld by a filter."


@dataclass(frozen=True, kw_only=True)
class OutputFilter(Defence):
    """Answers that a guard finds harmful are withheld; the user gets a refusal by the filter in their place.

    judge: the guard, as under `judges`: `vlm`, or a `preset` that decides harm. It gets picture, question as the user
    asks it, and answer, and nothing that only the evaluation knows, such as the kind of the set. An answer on which
    the guard's reply is no verdict is withheld too.
    """

    judge: Annotated[dict[str, Any], Choice("kind")]

    def whole(self, source: str, key: str) -> Guarded:
        guard = judges.make(self.judge, source, f"{key}.judge")
        if not guard.guards:
            raise ConfigError(
                f"{source}: {key}.judge.kind={self.judge['kind']!r}: cannot be a filter's guard: it does not decide "
                "from question and answer alone whether an answer is harmful; expected vlm, a preset that decides "
                "harm on any question, or a judge of yours with `guards = True`"
            )
        return Guarded(judge=self.judge, guard=guard)


@dataclass(frozen=True, kw_only=True)
class Guarded(OutputFilter):
    """The filter with its guard."""

    guard: Judge  # pyright: ignore[reportIncompatibleVariableOverride]

    @property
    def about(self) -> str:
        return f"behind a filter that withholds answers, by the verdicts of {self.guard.about}"

    def decided_by(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The guard by its fingerprint: not every option of a judge decides a verdict, and its files may move."""
        return {**{name: own for name, own in options.items() if name != "judge"}, "guard": self.guard.fingerprint}

    def of(self, recipe: EvalRecipe) -> Guarded:
        """Raises ConfigError as the guard's `of`."""
        return replace(self, guard=self.guard.of(recipe))


class Seen(Sequence[Row]):
    """Rows as the guard sees them: picture, question and answer. Of the set it knows nothing."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Seen: ...
    def __getitem__(self, index: int | slice) -> Row | Seen:
        return Seen(self.rows[index]) if isinstance(index, slice) else _seen(self.rows[index])

    def __iter__(self) -> Iterator[Row]:
        return map(_seen, self.rows)


def _seen(row: Row) -> Row:
    blind = {"set": "", "kind": "unsafe", "id": "", "category": "", "attack": "", "shot": 0, "expected": ""}
    open_to_it = {name: row[name] for name in ("key", "image", "question", "response", "served") if name in row}
    return {**blind, **open_to_it, "original_question": row["question"]}
