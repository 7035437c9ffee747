"""Benchmarks' published scores as a judge: every answer to a utility set is `scored`, with its score beside it."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass

from mirage_dist.evals.judges import scoring
from mirage_dist.evals.judges.base import Opinion, Row, fingerprint
from mirage_dist.evals.metrics import Verdict
from mirage_dist.schema import ConfigError, EvalRecipe, JudgeConfig

# Source format -> how its answers are scored.
SCORES = {"vqav2": "vqa", "textvqa": "vqa", "vizwiz": "vqa", "scienceqa": "option"}


@dataclass(frozen=True)
class Benchmark:
    """scores: set -> `vqa` or `option`. Of other sets it says nothing: each row is `answered`."""

    name: str
    scores: Mapping[str, str]
    kind: str = "benchmark"
    about: str = "the benchmarks' published scores against their own answers"
    verdicts: frozenset[Verdict] = frozenset({"scored"})
    slow: bool = False

    @property
    def fingerprint(self) -> str:
        return fingerprint(scoring, scoring.WORDS.read_bytes(), {"scores": dict(self.scores)})

    def opinions(self, rows: Sequence[Row], suite: Sequence[Row]) -> Generator[tuple[int, Opinion], None, None]:
        return ((i, self._opinion(row)) for i, row in enumerate(rows))

    def _opinion(self, row: Row) -> Opinion:
        match self.scores.get(row["set"]):
            case "vqa":
                return Opinion("scored", {"score": scoring.vqa_accuracy(row["response"], row["references"])})
            case "option":
                # No option that can be read is wrong, as in LLaVA's script; the verdict's detail tells.
                chosen = scoring.option(row["response"])
                return Opinion("scored", {"score": float(chosen == row["expected"]), "option": chosen})
        return Opinion("answered")


def benchmark(recipe: EvalRecipe, config: JudgeConfig) -> Benchmark:
    """Raises ConfigError for a utility set whose format has no published score, or several."""
    scores = {}
    for name, options in recipe.sets.items():
        if options.kind != "utility":
            continue
        found = {SCORES.get(source.format) for source in options.sources}
        if None in found or len(found) != 1:
            given = ", ".join(source.format for source in options.sources)
            raise ConfigError(
                f"sets.{name}: kind utility takes sources that are scored alike, of {', '.join(SCORES)}; got {given}"
            )
        scores[name] = str(found.pop())
    if not scores:
        raise ConfigError("judges: benchmark scores sets of kind utility, and there is none")
    return Benchmark(str(config.name), scores)
