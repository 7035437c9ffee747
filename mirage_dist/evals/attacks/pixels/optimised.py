"""What the attacks have in common that change pixels with gradients."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mirage_dist.data.sample import Sample
from mirage_dist.evals.attacks.base import Generated
from mirage_dist.evals.attacks.pixels import files
from mirage_dist.schema import ConfigError, EvalModelConfig
from mirage_dist.schema.texts import check_template

if TYPE_CHECKING:
    from mirage_dist.data.encoding.collate import Encoder


def check_options(target: str, epsilon: int, step_size: float, surrogate: EvalModelConfig | None) -> None:
    """Raise ConfigError for an empty target or one with another placeholder, for steps larger than the range, and for a
    surrogate without weights.
    """
    if surrogate is not None and surrogate.url is not None:
        raise ConfigError("surrogate.url: an endpoint shows no gradients; name a model's directory in surrogate.path")
    if not target.strip():
        raise ConfigError("target is empty; give an affirmative opening, or {answer}")
    check_template(target, ("answer",), "target")
    if step_size > 2 * epsilon:
        raise ConfigError(
            f"step_size={step_size:g}: a step would cross the whole range of ± epsilon={epsilon}; "
            f"expected at most {2 * epsilon}"
        )


class Optimised(Generated):
    """An attack that makes a target likelier by changing a picture within ± epsilon."""

    with_history = True
    targeted = True
    pinned = True
    origin = "gradients"

    @property
    def weights(self) -> bool:  # type: ignore[override]
        return self.surrogate is None

    def check(self, samples: Sequence[Sample], name: str, answering: Encoder | None, attacked: Encoder | None) -> None:
        from mirage_dist.evals.attacks.pixels import victim  # brings torch

        files.check_pictured(samples, name, answering)
        if attacked is not None:
            victim.preprocessing(attacked, name)

    def changed(self, sample: Sample, rewrite: str, home: Path) -> Sample:
        return files.attacked(sample, rewrite, home)
