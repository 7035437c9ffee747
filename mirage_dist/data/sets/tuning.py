"""Sets for supervised fine-tuning: safety data as conversations, and safety data or sets reworded."""

from __future__ import annotations

from collections.abc import Mapping

from mirage_dist.data import diversify, sources
from mirage_dist.data.diversify import Reword
from mirage_dist.data.sample import Sample
from mirage_dist.data.sets.counts import ConversationCounts, DiversifiedCounts
from mirage_dist.data.sets.turns import Turns
from mirage_dist.schema import DiversifyConfig, PrepareRecipe


def conversations(recipe: PrepareRecipe) -> tuple[list[Sample], ConversationCounts]:
    """The safety data with the questions about one picture as the turns of one row."""
    safety = sources.combined(sources.read(config, join=Turns(recipe.seed)) for config in recipe.safety)
    turns = sum(1 + len(sample.history) for sample in safety.samples)
    return safety.samples, {"samples": len(safety.samples), "turns": turns, "read": safety.left_out()}


def diversified(
    recipe: PrepareRecipe, config: DiversifyConfig, reword: Reword | None
) -> tuple[list[Sample], DiversifiedCounts]:
    """The safety data with every wording equally often in both classes."""
    safety = sources.read_all(recipe.safety, answered=True)
    samples, failed = diversify.diversify(safety.samples, config, recipe.seed, reword)
    return samples, {
        "samples": len(samples),
        "questions": len(safety.samples),
        "not_reworded": failed,
        "read": safety.left_out(),
    }


def reworded(
    recipe: PrepareRecipe, config: DiversifyConfig, sets: Mapping[str, list[Sample]], reword: Reword | None
) -> tuple[dict[str, list[Sample]], DiversifiedCounts]:
    """The forget and retain sets with every wording equally often in each."""
    forget, retain = sets["forget"], sets["retain"]
    kept = [False] * len(forget) + [True] * len(retain)
    wordings, failed = diversify.wordings_of([*forget, *retain], kept, config, recipe.seed, reword)
    parts = {"forget": wordings[: len(forget)], "retain": wordings[len(forget) :]}
    new = {name: [sample for own in part for sample in own] for name, part in parts.items()}
    samples = sum(map(len, new.values()))
    return new, {"samples": samples, "questions": len(kept), "not_reworded": failed}
