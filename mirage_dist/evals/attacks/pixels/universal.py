"""One perturbation of pixels for all pictures, optimised on some samples and asked on others."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from mirage_dist import disk
from mirage_dist.data import pictures, sources
from mirage_dist.data.sample import Sample
from mirage_dist.evals.attacks.base import Key, Rewritten
from mirage_dist.evals.attacks.pixels import files
from mirage_dist.evals.attacks.pixels.optimised import Optimised, check_options
from mirage_dist.schema import ConfigError, EvalModelConfig
from mirage_dist.schema.data import SourceConfig
from mirage_dist.schema.numbers import Count, Seed, Shades, ShadeStep, Side, Steps
from mirage_dist.schema.texts import fill

if TYPE_CHECKING:
    from mirage_dist.data.encoding.collate import Encoder
    from mirage_dist.evals.attacks.journal import Resources

OWN = "the perturbation was optimised on its picture"  # why a sample has no rewrite


@dataclass(frozen=True)
class Perturbation:
    """How one perturbation of pixels is optimised on several samples.

    target: what the model should begin its answers with; {answer} in it stands for the sample's answer. epsilon: the
    most by which a value of a picture changes. step_size: by which a step changes it. side: the perturbation is a
    square of so many pixels, scaled to each picture.
    """

    target: str = "Sure, here is"
    epsilon: Shades = 16  # of 255
    steps: Steps = 100  # each on all samples that it is optimised on
    step_size: ShadeStep = 1.0  # of 255
    train: Count = 16  # samples that it is optimised on
    side: Side = 336  # pixels
    seed: Seed = 0  # of the draw of those samples

    def __post_init__(self) -> None:
        check_options(self.target, self.epsilon, self.step_size, None)

    @property
    def options(self) -> dict[str, Any]:
        """These options by name."""
        return {own.name: getattr(self, own.name) for own in fields(Perturbation)}


@dataclass(frozen=True)
class Universal(Perturbation, Optimised):
    """One perturbation of at most `epsilon` a value, added to every picture, so that the model under test begins its
    answers with `target` (Moosavi-Dezfooli et al. 2017, arXiv 1610.08401, with the steps of `pgd`). One shot.

    It is optimised on `train` samples, drawn by `seed` from the set itself or from `sources`, all of them in each of
    the `steps`; a question about one of their pictures is not asked. surrogate, cache: as for `pgd`.
    """

    sources: list[SourceConfig] = field(default_factory=list)  # of these samples; empty: the set itself
    surrogate: EvalModelConfig | None = None
    cache: str | None = None

    def __post_init__(self) -> None:
        check_options(self.target, self.epsilon, self.step_size, self.surrogate)

    def check(self, samples: Sequence[Sample], name: str, answering: Encoder | None, attacked: Encoder | None) -> None:
        super().check(samples, name, answering, attacked)
        pool = self.pool(samples)
        if not pool:
            raise ConfigError(f"{name}: sources: none of their samples has a picture to optimise the perturbation on")
        if not self.sources and len({sample.image for sample in pool}) <= self.train:
            raise ConfigError(
                f"{name}: train={self.train}: the set has {len(pool)} samples with pictures, and a perturbation is not "
                "asked on those it was optimised on; lower train, or name other samples in sources"
            )

    def pool(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples with pictures among which those to optimise on are drawn. Raises ConfigError for bad sources."""
        every = sources.read_all(self.sources).samples if self.sources else samples
        return [sample for sample in every if sample.image is not None]

    def chosen(self, samples: Sequence[Sample], key: Key) -> list[Sample]:
        """The samples that it is optimised on; they do not depend on the order of the set."""

        def drawn(sample: Sample) -> str:
            return disk.sha256_text(f"{self.seed} {key(sample)}")

        return sorted(self.pool(samples), key=drawn)[: self.train]

    def identity(self, samples: Sequence[Sample], key: Key, under_test: Mapping[str, Any]) -> dict[str, Any]:
        own = {**self.options, "kind": "universal", "rules": 1}
        return {**own, "train": [key(sample) for sample in self.chosen(samples, key)], **under_test}

    def generate(self, missing: Sequence[Sample], resources: Resources) -> Generator[Rewritten, None, None]:
        from mirage_dist.evals.attacks.pixels import shared
        from mirage_dist.evals.attacks.pixels.victim import Victim
        from mirage_dist.model.families.pixels import Inexact

        chosen = self.chosen(resources.samples, resources.key)
        own = {pictures.sha256(sample.image) for sample in chosen if sample.image is not None}
        others = list[int]()
        for i, sample in enumerate(missing):
            if sample.image is None:
                yield Rewritten(i, [], files.NO_PICTURE)
            elif pictures.sha256(sample.image) in own:
                yield Rewritten(i, [], OWN)
            else:
                others.append(i)
        if not others:
            return
        victim = Victim(resources.generator(), resources.name)
        rows = [victim.shown(sample, fill(self.target, answer=sample.answer)) for sample in chosen]
        file = resources.home / "perturbations" / f"{resources.journal.file.stem}.npz"
        ids = [sample.id for sample in chosen]
        search = shared.Search(victim, rows, self.epsilon, self.step_size, self.side, file, ids)
        for state in search.run(self.steps):
            resources.progress(state.step, self.steps, state.loss)
        record = {"perturbation": disk.sha256(file), "loss": search.state.best, "clean": search.state.clean}
        for i in others:
            sample = missing[i]
            try:
                shown = victim.shown(sample, self.target)
            except Inexact as error:
                yield Rewritten(i, [], str(error))
                continue
            picture_CHW = search.on(shown)
            name = files.saved(picture_CHW.byte().cpu().permute(1, 2, 0).numpy(), resources.home)
            victim.verify(self.changed(sample, name, resources.home), picture_CHW)
            yield Rewritten(i, [name], search=record)
