"""Questions reworded by a chat model for safety data (see `data.diversify`): checked, kept on disk, asked for once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mirage_dist.data.diversify import Reword
from mirage_dist.data.sample import Sample
from mirage_dist.evals.attacks.rewrite import Rewrite
from mirage_dist.evals.attacks.rewrites import Rewriter
from mirage_dist.schema import PrepareRecipe


def reworder(recipe: PrepareRecipe) -> Reword | None:
    """What rewords for `data.prepare`, None for a recipe without a chat model.

    Rewrites lie in `out`.rewrites/ beside the sets, so that a start after a kill asks for what is missing. It raises
    RunError where too many could not be asked for.
    """
    config = recipe.diversify
    if config is None or config.chat is None:
        return None
    rewriter = Rewriter(Path(f"{recipe.out}.rewrites"), {}, _no_model)

    def reword(samples: Sequence[Sample], opener: str) -> list[str | None]:
        assert config.chat is not None
        attack = Rewrite(config.chat, word=opener, shots=1, attempts=config.attempts, min_match=config.min_match)
        table = rewriter(attack, samples, f"opener-{opener}")
        made = [table(sample) for sample in samples]
        return [rows[0].question if rows else None for rows in made]

    return reword


def _no_model(claims: object) -> None:
    """A chat model's rewrites need no model under test."""
