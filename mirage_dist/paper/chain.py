"""The chain: which recipe with which overrides is run after which, for one machine and for Slurm alike.

    data ── harvest ── sets ── trainings ── evaluations ── report
      └───────────────────── base's evaluations ──────────────┘

Every link is a verb of the command and goes on where it was stopped; a link whose result is there does nothing.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mirage_dist import config as configs
from mirage_dist.paper.recipe import LinkConfig, PaperRecipe
from mirage_dist.schema import ConfigError, EvalRecipe, PrepareRecipe, TrainRecipe

Verb = Literal["eval", "prepare", "train"]
SCHEMAS = {"eval": EvalRecipe, "prepare": PrepareRecipe, "train": TrainRecipe}
TRAINING = {"npo": "unlearn_npo.sh", "rmu": "unlearn_rmu.sh"}  # Slurm scripts by objective; otherwise sft.sh
DATA, REPORT = "data", "report"  # links without a recipe of their own


@dataclass(frozen=True)
class Link:
    """One step. needs: names of the links before it. overrides: all of the recipe's."""

    name: str
    verb: Verb
    recipe: str
    overrides: tuple[str, ...]
    needs: tuple[str, ...] = ()

    def load(self) -> EvalRecipe | PrepareRecipe | TrainRecipe:
        """The resolved recipe. Raises ConfigError as `config.load`, naming this link."""
        try:
            return configs.load(self.recipe, self.overrides, SCHEMAS[self.verb])
        except ConfigError as error:
            raise ConfigError(f"link {self.name}: {error}") from error

    @property
    def script(self) -> str:
        """The Slurm script that runs it."""
        if self.verb == "prepare":
            return "mirage.sh"
        if self.verb == "eval":
            return "eval_attacks.sh"
        recipe = self.load()
        assert isinstance(recipe, TrainRecipe)
        return TRAINING.get(str(recipe.objective["name"]), "sft.sh")


def run_dir(recipe: PaperRecipe, model: str) -> Path:
    """The run directory of a model of the chain."""
    return Path(recipe.out) / model


def links(recipe: PaperRecipe) -> list[Link]:
    """All links but the report, each after those that it needs. Raises ConfigError for recipes that do not fit."""
    return list(_links(recipe))


def _links(recipe: PaperRecipe) -> Iterator[Link]:
    seed = f"seed={recipe.seed}"
    base = [configs.override("model.path", recipe.model)]
    if recipe.harvest is not None:
        yield _link(recipe, "harvest", "eval", recipe.harvest, [*_of(recipe, "base"), *base])
    rows = run_dir(recipe, "base") / "evals" / _suite(recipe) / "rows" if recipe.harvest is not None else None
    for name, link in recipe.sets.items():
        made = _link(recipe, f"set-{name}", "prepare", link, [seed])
        if rows is not None and _answers(made) == "harvest":
            made = _link(
                recipe, made.name, "prepare", link, [seed, configs.override("harvest", str(rows))], ["harvest"]
            )
        yield made
    for name, link in recipe.models.items():
        start = configs.override("model.path", link.model or recipe.model)
        own = [seed, start, configs.override("run.dir", str(run_dir(recipe, name))), f"run.name={name}"]
        yield _link(recipe, f"train-{name}", "train", link, own, [f"set-{need}" for need in link.needs])
    for name in ("base", *recipe.models):
        for suite, link in recipe.suites.items():
            own = [*_of(recipe, name), *(base if name == "base" else [])]
            needs = [] if name == "base" else [f"train-{name}"]
            yield _link(recipe, f"eval-{name}-{suite}", "eval", link, own, needs)


def _of(recipe: PaperRecipe, model: str) -> list[str]:
    return [configs.override("run.dir", str(run_dir(recipe, model))), f"run.name={model}", f"seed={recipe.seed}"]


def _link(
    recipe: PaperRecipe, name: str, verb: Verb, link: LinkConfig, own: Sequence[str], needs: Sequence[str] = ()
) -> Link:
    """Overrides in the order in which later ones win: the scale's, the recipe's of this chain, the chain's own."""
    return Link(name, verb, link.recipe, (*getattr(recipe.every, verb), *link.overrides, *own), tuple(needs))


def _answers(link: Link) -> str:
    recipe = link.load()
    assert isinstance(recipe, PrepareRecipe)
    return recipe.answers


def _suite(recipe: PaperRecipe) -> str:
    assert recipe.harvest is not None
    made = _link(recipe, "harvest", "eval", recipe.harvest, _of(recipe, "base"))
    loaded = made.load()
    assert isinstance(loaded, EvalRecipe)
    return loaded.suite


def levels(chain: Sequence[Link]) -> list[list[Link]]:
    """Links that may run side by side, level after level."""
    depth: dict[str, int] = {}
    for link in chain:
        depth[link.name] = 1 + max((depth[need] for need in link.needs), default=-1)
    return [
        [link for link in chain if depth[link.name] == level] for level in range(1 + max(depth.values(), default=-1))
    ]


def lines(recipe: PaperRecipe, file: str, words: Sequence[str]) -> list[str]:
    """For slurm/paper.sh, one a link: name, names of those before it, script, folder, and the script's words, quoted.

    file, words: the recipe of the chain and its overrides, with which data and report are made.
    """
    chain, own = links(recipe), [file, *words]
    made = [DATA] if recipe.world is not None else []
    rows = [(DATA, "", "mirage.sh", ".", shlex.join(["paper", "--data", *own])) for _ in made]
    for link in chain:
        needs = ",".join(link.needs or made)
        words_of = shlex.join([*_verb(link), link.recipe, *link.overrides])
        rows.append((link.name, needs, link.script, recipe.folder, words_of))
    evaluations = ",".join(link.name for link in chain if link.name.startswith("eval-"))
    rows.append((REPORT, evaluations, "mirage.sh", ".", shlex.join(["paper", "--report", *own])))
    # No field is empty: a shell's `read` takes two tabs for one.
    return ["\t".join(field or "-" for field in row) for row in rows]


def _verb(link: Link) -> list[str]:
    """slurm/mirage.sh takes the verb as its first word; the other scripts have theirs."""
    return [link.verb] if link.verb == "prepare" else []
