"""The samples of a start: from the table that an earlier start has made, or read and checked by all ranks, and kept.

The first start reads the data on rank 0 into a draft beside the run directory, or in it where it exists already; the
ranks share its pictures, its audit and its lengths. The draft becomes `samples/KEY` once the directory is this job's. A
later start with the same KEY reads no data. Errors are the same on every rank, and come before anything of the run is
written.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mirage_dist import disk, state
from mirage_dist.data import audit, sources
from mirage_dist.data.sources import Source
from mirage_dist.disk import removal
from mirage_dist.model import load
from mirage_dist.progress import log
from mirage_dist.ranks import Group, gathered, on_main, together
from mirage_dist.schema import ConfigError, RunError, TrainRecipe
from mirage_dist.train.caches import identity, samples
from mirage_dist.train.caches.identity import File
from mirage_dist.train.caches.samples import FOLDER, Table
from mirage_dist.train.feed import Feed, encoder_of
from mirage_dist.train.lease import Lease
from mirage_dist.train.measures import validation
from mirage_dist.train.planning import openers
from mirage_dist.train.planning.check import (
    Checked,
    agreed,
    check_balance,
    divide,
    imitated_warnings,
)
from mirage_dist.train.planning.fitting import rows_that_fit
from mirage_dist.train.planning.streams import check_no_picture, check_pairs, describe, read_streams


@dataclass(frozen=True)
class Prepared:
    """The run's samples, checked. new: whether this start has checked them, so that the table is not yet published."""

    feed: Feed
    table: Table
    cut: int
    new: bool

    def publish(self, lease: Lease) -> None:
        """Keep the table in the run directory, and remove those of other data, processors or versions; rank 0 calls it.

        Raises OSError.
        """
        home, own = lease.root / FOLDER, self.table.folder
        if self.new:
            home.mkdir(exist_ok=True)
            staged = lease.workspace / own.name
            os.rename(own, staged)
            disk.remove(home / own.name, lease.workspace)  # a damaged one, or one to be verified
            disk.publish(staged, home / own.name)
            disk.remove_own(own.parent)
        for other in home.iterdir():
            if samples.KEY.fullmatch(other.name) and other.name != own.name:
                disk.remove(other, lease.workspace)


@contextmanager
def prepared(checked: Checked, group: Group) -> Iterator[Prepared]:
    """The run's samples with every check of them passed. Every rank enters; in this block a new table can be published.

    Raises ConfigError on every rank.
    """
    needs, files = checked.needs, dict[str, File | None]()
    together(group, lambda: files.update(identity.inputs(checked.recipe)))  # before the processor is read too
    processor = load.processor(checked.recipe.model)
    recipe = agreed(checked.recipe, processor, group)

    def look() -> tuple[str, Path | None]:
        key = identity.key(recipe, needs, processor, files)
        folder = Path(recipe.run.dir) / FOLDER / key
        return key, None if recipe.data.verify or not _usable(folder, recipe) else folder

    key, folder = together(group, look)
    if folder is not None:
        yield _prepared(checked, recipe, folder, processor, group, new=False)
        return
    with _draft(Path(recipe.run.dir), key, group) as folder:
        _check(checked, recipe, processor, group, folder)
        # Of every stream, those that no step trains on too.
        every, draft = replace(needs, streams=tuple(checked.recipe.data.streams)), samples.opened(folder, whole=False)
        warnings = _audited(checked, draft, group)
        feed = Feed(recipe, every, draft, processor)
        feed.check_lengths(group)

        def seal() -> None:
            if (path := identity.changed(files, identity.inputs(checked.recipe))) is not None:
                raise ConfigError(f"{path}: changed while the data were checked; start again when it is whole")
            samples.finish(draft, feed.measured, recipe.data.max_length, [*warnings, *feed.unwritable])

        with disk.refusals(folder, "nothing of the run was written"):
            together(group, seal)
        yield _prepared(checked, recipe, folder, processor, group, new=True)


def _prepared(checked: Checked, recipe: TrainRecipe, folder: Path, processor: Any, group: Group, new: bool) -> Prepared:
    table = samples.opened(folder)
    feed = Feed(recipe, checked.needs, table, processor)
    cut = feed.check_lengths(group)
    check_balance(feed)
    divide(feed, checked, lambda feed: rows_that_fit(checked, feed, group))
    return Prepared(feed, table, cut, new)


def _usable(folder: Path, recipe: TrainRecipe) -> bool:
    try:
        samples.opened(folder)
        if recipe.data.balance is not None:
            openers.read(folder)
    except FileNotFoundError:
        return False
    except (state.Damaged, ConfigError, OSError) as error:
        log.warning(f"{error}. The data are read and checked again")
        return False
    return True


@contextmanager
def _draft(root: Path, key: str, group: Group) -> Iterator[Path]:
    """A new folder for a table, on the file system of the run directory; what is left of it in the end is removed."""

    def make() -> Path:
        # Not in the run directory before that exists: a recipe with an error leaves nothing there.
        home, name = Path(os.path.realpath(root)), FOLDER
        while not home.is_dir():
            home, name = home.parent, root.name
        try:
            with disk.private_umask():
                disk.remove_leftovers(home / name)
                made.append(disk.own(removal.sibling(home / name)))
                (made[0] / key).mkdir()
        except OSError as error:
            raise RunError(f"{home}: the run's samples cannot be written: {error}") from error
        return made[0] / key

    with removal.removed_in_the_end() as made:
        folder = on_main(group, make)
        assert folder is not None
        yield folder


def _check(checked: Checked, recipe: TrainRecipe, processor: Any, group: Group, folder: Path) -> None:
    """Read and check all data, and write all of the table but its lengths and the audit. recipe: resolved."""
    needs, encoder, streams = checked.needs, encoder_of(recipe, processor), dict[str, Source]()

    def read() -> None:
        streams.update(read_streams(checked.recipe, needs))
        samples.write_unchecked(folder, sources.unchecked_pictures(streams))

    def settle() -> None:
        inspected = {path: one for part in parts for path, one in part.items()}
        sources.settle(streams, inspected)
        kept = {name: streams[name].samples for name in recipe.data.streams}
        check_pairs(kept, needs.paired)
        if encoder.text_only:
            check_no_picture(kept, recipe.model.path)
        samples.write(
            folder,
            kept,
            inspected,
            {name: streams[name].left_out() for name in kept},
            validation.warnings(streams),
            describe(streams, recipe.data.refusals),
        )
        if recipe.data.balance is not None:
            own = openers.of({name: kept[name] for name in needs.streams}, recipe.data.refusals)
            openers.balance(own, needs)  # an error comes before the lengths are measured
            openers.write(folder, own)
        streams.clear()

    with disk.refusals(folder, "nothing of the run was written"), disk.private_umask():
        together(group, read)
        own = samples.unchecked(folder, group.rank, group.size)
        parts = gathered(group, sources.inspect(own, encoder.refusals, quiet=not group.main))
        together(group, settle)


def _audited(checked: Checked, draft: Table, group: Group) -> list[str]:
    """On rank 0 the warnings of the audit (see `data.audit`); each rank counts its share of the rows of a draft.

    The shares are joined in the order of the rows, so that the result is that of one rank, ties included.
    """
    refusals, names = checked.recipe.data.refusals, checked.needs.audited
    # Rank 0 alone needs the file of phrases, as it alone reads the data.
    counted = together(group, lambda: {name: audit.Imitated(refusals) for name in names})
    for name, counts in counted.items():
        size = len(draft.rows[name])
        start, stop = (size * rank // group.size for rank in (group.rank, group.rank + 1))
        counts.add(draft.rows[name].texts(start, stop))
    whole, *others = gathered(group, counted) or [{}]
    for part in others:
        for name, counts in part.items():
            whole[name].join(counts)
    return imitated_warnings(checked, whole)
