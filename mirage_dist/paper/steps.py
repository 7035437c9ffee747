"""Checking the chain, and running it on this machine, link after link."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mirage_dist import config as configs
from mirage_dist import inputs, launching
from mirage_dist.data import prepare
from mirage_dist.data.published import check as published
from mirage_dist.data.published.catalogue import DATASETS
from mirage_dist.embedded import lookalike
from mirage_dist.evals import runner, status, worklist
from mirage_dist.evals.attacks import rewrites
from mirage_dist.paper import chain
from mirage_dist.paper.chain import Link
from mirage_dist.paper.recipe import PaperRecipe
from mirage_dist.progress import log
from mirage_dist.report import Summary, report
from mirage_dist.report import published as tables
from mirage_dist.schema import ConfigError, EvalRecipe, PrepareRecipe, TrainRecipe
from mirage_dist.train.planning import check as training

LOOKALIKE = (
    "Made on a small model and look-alike files of an embedded world: nothing here can be held against the paper."
)
DATA = "data"  # the folder of published files, within the chain's


@contextmanager
def within(recipe: PaperRecipe) -> Iterator[None]:
    """Relative paths of the chain's recipes are below its folder, which is made if needed.

    The recipes themselves are still those of the directory in which the command was given, where it has them.
    """
    before, home = os.getcwd(), os.environ.get("MIRAGE_HOME")
    os.environ["MIRAGE_HOME"] = home or before
    Path(recipe.folder).mkdir(parents=True, exist_ok=True)
    os.chdir(recipe.folder)
    try:
        yield
    finally:
        os.chdir(before)
        if home is None:
            del os.environ["MIRAGE_HOME"]
        else:
            os.environ["MIRAGE_HOME"] = home


def check(recipe: PaperRecipe) -> list[str]:
    """Check the published files and every recipe of the chain, without a model. Returns what was checked.

    Raises ConfigError naming the link and its key, and for data that are not as published.
    """
    tables.table(recipe.published)
    if unknown := [name for name in recipe.data if name not in DATASETS]:
        raise ConfigError(f"data: {unknown[0]}: no dataset of the catalogue; `mirage data list` has all of them")
    chained = chain.links(recipe)
    for link in chained:
        _check(link, recipe.ranks)
    if recipe.world is not None:
        return [f"{len(chained)} recipes are in order; the data are made from a world"]
    starts = {"model": recipe.model, **{f"models.{name}.model": own.model for name, own in recipe.models.items()}}
    for key, folder in starts.items():
        if folder is not None and not Path(folder).is_dir():
            raise ConfigError(f"{key}={folder}: no such folder; docs/paper.md says how the models are brought there")
    wrong = []
    for name in recipe.data:
        seen = list(published.findings(DATASETS[name], Path(DATA)))
        wrong += [
            f"{name}: {one.place} {one.state}: {one.detail}" for one in seen if one.state not in ("right", "optional")
        ]
    if wrong:
        raise ConfigError("\n".join(["data are not as published (docs/get_data.md says what belongs where):", *wrong]))
    return [f"{len(chained)} recipes are in order; {', '.join(recipe.data) or 'no data'} are as published"]


def _check(link: Link, ranks: int) -> None:
    own = link.load()
    try:
        if isinstance(own, TrainRecipe):
            training.check_recipe(own, ranks)
        elif isinstance(own, EvalRecipe):
            worklist.check(own)
        else:
            prepare.check(own)
    except ConfigError as error:
        raise ConfigError(f"link {link.name}: {error}") from error


def data(recipe: PaperRecipe) -> None:
    """Make the small model and the look-alike files of a chain with a world; otherwise nothing."""
    if recipe.world is not None:
        inputs.base_model(recipe.world)
        lookalike.make(recipe.world, Path(DATA))


def run(recipe: PaperRecipe) -> None:
    """Run every link that is not done, one after another. Raises what the links raise.

    A second call goes on where the first was stopped: every link knows what it has done.
    """
    data(recipe)
    chained = chain.links(recipe)
    for number, link in enumerate(chained, start=1):
        log.info(f"[{number}/{len(chained) + 1}] {link.name}: {link.recipe}")
        _run(link, recipe.ranks)


def _run(link: Link, ranks: int) -> None:
    own = link.load()
    if isinstance(own, TrainRecipe):
        if not (Path(own.run.dir) / "export").is_dir():
            launching.train(ranks, link.recipe, link.overrides)
    elif isinstance(own, PrepareRecipe):
        if own.harvest is not None:
            status.require_complete(Path(own.harvest))
        log.info(prepare.summary(prepare.prepare(own, rewrites.reworder(own))))
    else:
        runner.evaluate(own)


def results(recipe: PaperRecipe) -> Summary:
    """Write the report, whose first table has the published figures beside ours, and results.json beside it.

    Raises ConfigError while a model was not evaluated on the first suite.
    """
    runs = {name: chain.run_dir(recipe, name) for name in ("base", *recipe.models)}
    digest = configs.config_hash([configs.config_hash(link.load(), ("run", "monitor")) for link in chain.links(recipe)])
    own = tables.compute(recipe.published, runs, digest, None if recipe.world is None else LOOKALIKE)
    note = f"{own['source']}; {own['judge']}. Below each rate of ours: its 95 % interval, and the published figure."
    out = Path(recipe.out) / "report"
    lead = ("The published table, and ours", note, tables.html(own))
    return report(runs, out, suite=next(iter(recipe.suites)), lead=lead, files={tables.FILE: tables.dumped(own)})


def table(recipe: PaperRecipe) -> str:
    """The first table as text."""
    return tables.text(tables.read(Path(recipe.out) / "report" / tables.FILE))
