"""Benchmarks' published scores as a judge: every answer to a utility set is `scored`, and the score is its detail."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass

from mirage_dist.evals.judges import scoring
from mirage_dist.evals.judges.base import Judge, Opinion, Row, Source
from mirage_dist.schema import ConfigError, EvalRecipe

# Source format -> how its answers are scored.
SCORES = {"vqav2": "vqa", "textvqa": "vqa", "vizwiz": "vqa", "scienceqa": "option"}


@dataclass(frozen=True, kw_only=True)
class Benchmark(Judge):
    """Scores from 0 to 1 of the answers to utility sets; every answer to another set is `answered`."""

    kind = "benchmark"
    verdicts = frozenset({"scored"})

    @property
    def about(self) -> str:
        return "the benchmarks' published scores against their own answers"

    def of(self, recipe: EvalRecipe) -> Judge:
        """Raises ConfigError when a utility set's formats have no published score, or different ones."""
        scores: dict[str, str] = {}
        for name, options in recipe.sets.items():
            if options.kind != "utility":
                continue
            rules = {SCORES.get(source.format) for source in options.sources}
            if None in rules or len(rules) != 1:
                given = ", ".join(source.format for source in options.sources)
                raise ConfigError(
                    f"sets.{name}: kind utility takes sources that are scored alike, of {', '.join(SCORES)}; got "
                    f"{given}"
                )
            scores[name] = str(rules.pop())
        if not scores:
            raise ConfigError("judges: benchmark scores sets of kind utility, and there is none")
        return _OfSets(name=self.name, scores=scores)


@dataclass(frozen=True, kw_only=True)
class _OfSets(Benchmark):
    scores: Mapping[str, str]  # set -> `vqa` or `option`

    def opinions(self, rows: Sequence[Row], suite: Sequence[Row]) -> Generator[tuple[int, Opinion], None, None]:
        yield from ((i, self._opinion(row)) for i, row in enumerate(rows))

    def _opinion(self, row: Row) -> Opinion:
        match self.scores.get(row["set"]):
            case "vqa":
                return Opinion("scored", {"score": scoring.vqa_accuracy(row["response"], row["references"])})
            case "option":
                # An answer without a readable option is wrong, as in LLaVA's script; its detail has the option null.
                chosen = scoring.option(row["response"])
                return Opinion("scored", {"score": float(chosen == row["expected"]), "option": chosen})
        return Opinion("answered")

    @property
    def depends_on(self) -> tuple[Source, ...]:
        return scoring, scoring.WORDS.read_bytes()
