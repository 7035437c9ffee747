"""Benchmarks' published scores as a judge: every answer to a utility set is `scored`, and the score is its detail."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass

from mirage_dist.data import formats
from mirage_dist.evals.judges import figures, scoring
from mirage_dist.evals.judges.base import Judge, Opinion, Row, Source
from mirage_dist.evals.results import CLEAN, Scores
from mirage_dist.schema import ConfigError, EvalRecipe


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
            rules = {source.score for source in options.sources}
            rule = rules.pop() if len(rules) == 1 else None
            if rule is None:
                raise ConfigError(
                    f"sets.{name}: kind utility takes sources that are scored alike, of {', '.join(formats.scored())}; "
                    f"got {', '.join(source.format for source in options.sources)}"
                )
            scores[name] = rule
        if not scores:
            raise ConfigError("judges: benchmark scores sets of kind utility, and there is none")
        return _OfSets(name=self.name, scores=scores)


# Score -> how the answer is read that is compared with the right one.
READ = {"option": scoring.option, "pope": scoring.pope, "mme": scoring.mme, "gqa": scoring.gqa}
FIGURES = {"pope": figures.pope, "mme": figures.mme}


@dataclass(frozen=True, kw_only=True)
class _OfSets(Benchmark):
    scores: Mapping[str, str]  # set -> how its answers are scored (see `SourceConfig.score`)

    def opinions(self, rows: Sequence[Row], suite: Sequence[Row]) -> Generator[tuple[int, Opinion], None, None]:
        yield from ((i, self._opinion(row)) for i, row in enumerate(rows))

    def _opinion(self, row: Row) -> Opinion:
        rule = self.scores.get(row["set"])
        if rule is None:
            return Opinion("answered")
        if rule == "vqa":
            return Opinion("scored", {"score": scoring.vqa_accuracy(row["response"], row["references"])})
        # An answer in which no option can be read is wrong, as published; its detail has the option null.
        chosen = READ[rule](row["response"])
        return Opinion("scored", {"score": float(chosen == row["expected"]), "option": chosen})

    def figures(self, rows: Sequence[Row], opinions: Sequence[Opinion]) -> dict[str, Scores]:
        computed = {}
        for name, rule in self.scores.items():
            if rule in FIGURES:
                own = [
                    figures.Answered(row["id"], row["category"], row["expected"], opinion.detail.get("option"))
                    for row, opinion in zip(rows, opinions, strict=True)
                    if row["set"] == name and row["attack"] == CLEAN.attack
                ]
                computed[name] = FIGURES[rule](own)
        return computed

    @property
    def depends_on(self) -> tuple[Source, ...]:
        return scoring, scoring.WORDS.read_bytes()
