"""Pictures changed a little, with the gradients of the model under test (PGD)."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mirage_dist.data.sample import Sample
from mirage_dist.evals.attacks.base import Key, Rewritten
from mirage_dist.evals.attacks.pixels import files
from mirage_dist.evals.attacks.pixels.optimised import Optimised, check_options
from mirage_dist.schema import ConfigError, EvalModelConfig
from mirage_dist.schema.numbers import Repeats, Seed, Shades, ShadeStep, Steps
from mirage_dist.schema.texts import fill

if TYPE_CHECKING:
    from mirage_dist.evals.attacks.journal import Resources
    from mirage_dist.evals.attacks.pixels.search import Search
    from mirage_dist.evals.attacks.pixels.victim import Victim


@dataclass(frozen=True)
class Pgd(Optimised):
    """The picture changed by at most `epsilon` a value so that the model under test begins its answer with `target`
    (see `evals.attacks.pixels.search`; Madry et al. 2018, arXiv 1706.06083). It needs that model's weights.

    target: an affirmative opening; {answer} in it stands for the sample's answer. steps, step_size, restarts: the
    budget of a question, which ends when its target is reached. stages: gradient steps after which the best picture so
    far is asked too, ascending: success under the first K of its pictures is success within the K-th budget. surrogate:
    the model that is attacked in place of the one under test (transfer). cache: a folder in which suites share the
    pictures. A question without a picture has no rewrite.
    """

    target: str = "Sure, here is"
    epsilon: Shades = 8  # of 255
    steps: Steps = 100  # of a restart
    step_size: ShadeStep = 1.0  # of 255
    restarts: Repeats = 1
    stages: list[Steps] = field(default_factory=list)
    seed: Seed = 0  # of the random starts
    surrogate: EvalModelConfig | None = None
    cache: str | None = None

    checks_stop = True

    def __post_init__(self) -> None:
        check_options(self.target, self.epsilon, self.step_size, self.surrogate)
        total = self.steps * self.restarts
        if self.stages != sorted(set(self.stages)) or (self.stages and self.stages[-1] >= total):
            raise ConfigError(
                f"stages={self.stages}: expected different numbers of steps in ascending order, each below the whole "
                f"budget of steps × restarts = {total}"
            )

    @property
    def shots(self) -> int:
        return len(self.stages) + 1

    @property
    def spent(self) -> tuple[int, ...]:  # type: ignore[override]
        return *self.stages, self.steps * self.restarts

    def identity(self, samples: Sequence[Sample], key: Key, under_test: Mapping[str, Any]) -> dict[str, Any]:
        names = ("target", "epsilon", "steps", "step_size", "restarts", "stages", "seed")
        return {**{name: getattr(self, name) for name in names}, "kind": "pgd", "rules": 1, **under_test}

    def generate(self, missing: Sequence[Sample], resources: Resources) -> Generator[Rewritten, None, None]:
        from mirage_dist.evals.attacks.pixels import search
        from mirage_dist.evals.attacks.pixels.victim import Victim

        without, places = list[Rewritten](), list[int]()
        if any(sample.image is not None for sample in missing):
            victim = Victim(resources.generator(), resources.name)
            searches = self._searches(victim, missing, resources, places, without)
            for number, result in search.searched(victim, searches, resources.check):
                i, names = places[number], list[str]()
                for picture_CHW in result.pictures:
                    names.append(files.saved(picture_CHW.permute(1, 2, 0).numpy(), resources.home))
                    victim.verify(self.changed(missing[i], names[-1], resources.home), picture_CHW)
                yield Rewritten(i, names, search=result.record())
        yield from without
        yield from (Rewritten(i, [], files.NO_PICTURE) for i, own in enumerate(missing) if own.image is None)

    def _searches(
        self,
        victim: Victim,
        samples: Sequence[Sample],
        resources: Resources,
        places: list[int],
        without: list[Rewritten],
    ) -> Iterator[Search]:
        """A search for each sample with a picture, whose places are noted on the way; or why there can be none."""
        from mirage_dist.evals.attacks.pixels.search import Budget, Search
        from mirage_dist.model.families.pixels import Inexact

        budget = Budget(self.epsilon, self.step_size, self.steps, self.restarts, tuple(self.stages))
        for i, sample in enumerate(samples):
            if sample.image is None:
                continue
            try:
                shown = victim.shown(sample, fill(self.target, answer=sample.answer))
            except Inexact as error:
                without.append(Rewritten(i, [], str(error)))
                continue
            places.append(i)
            yield Search(shown, budget, f"{self.seed} {resources.key(sample)}")
