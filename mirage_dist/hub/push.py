"""`mirage export RUN OUT --push OWNER/NAME`: an export with its card, and its upload to the hub.

Everything that can be wrong is looked at before weights are written or anything is made on the hub. OUT may be there
already where it is an export of the same checkpoint, as after `--dry-run` or an upload that broke off; its card may
have been edited meanwhile.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mirage_dist import disk, runs
from mirage_dist.hub import measured, remote
from mirage_dist.model import directory, export
from mirage_dist.model.export import Form
from mirage_dist.model.exports import card, merged
from mirage_dist.model.shards import MANIFEST
from mirage_dist.schema import ConfigError

LARGEST = 1 << 20  # bytes of a file that is searched for names of directories; a vocabulary is larger


@dataclass(frozen=True)
class Target:
    """Where an export goes. public: for everybody to see. dry_run: nothing leaves this machine."""

    name: str
    public: bool = False
    dry_run: bool = False


def push(run: Path, out: Path, step: int | None, form: Form, target: Target, base: str | None = None) -> Iterator[str]:
    """Export (see `export.export`), write the card with the run's evaluations, and upload; yields lines to print.

    base: the base model's name on the hub. Raises ConfigError for a malformed or occupied name, without a token or one
    that may not write, for an adapter whose base has no name on the hub, and for an OUT that is something else than
    this export; RunError where the hub cannot be reached or an upload breaks off: it says what is there then.
    """
    remote.check_name(target.name)
    base = base or card.hub_name(runs.recipe(run).model.path)
    if form != "merged" and base is None:
        raise ConfigError(
            f"--push {target.name}: an adapter names its base model, which has only a path of this machine; give its "
            "name on the hub with --base OWNER/NAME"
        )
    repository = None if target.dry_run else remote.Repository(target.name)
    there = None
    if repository is not None:
        repository.check_rights()
        there = repository.require_free(not target.public, out)
    if os.path.lexists(out):
        _check_export(run, out, step, form)
    else:
        export.export(run, out, step, form=form, base=base, evaluations=partial(measured.evaluations, run))
    head = card.read_file(out / card.FILE)  # which may have been edited
    _check_places(run, out)
    files = {path: (out / path).stat().st_size for path in remote.contents(out)}
    rates = len(head.eval_results or [])
    whole = f"{len(files)} files, {sum(files.values()):,} bytes, {rates or 'no'} rates in the card"
    seen = "public" if target.public else "private"
    if repository is None:
        yield from (f"{size:>15,}  {path}" for path, size in files.items())
        yield (
            f"dry run: {out} is written, and nothing was uploaded. Without --dry-run these {whole} go to the {seen} "
            f"model repository {target.name}; read {out / card.FILE} first, and change it where it is wrong"
        )
        return
    if there is not None and not there.empty:
        yield f"{repository.url}: holds {out} already, whole ({whole}, {seen}, commit {there.commit})"
        return
    there = there or repository.create(not target.public)
    there = repository.commit(out, there.commit, f"{form} export of checkpoint {head.get('checkpoint_hash')}")
    yield f"{repository.url}: {whole}, {seen}, one commit {there.commit}"


def _check_export(run: Path, out: Path, step: int | None, form: Form) -> None:
    """Raise ConfigError unless `out` is this checkpoint's export in this form, with weights as they were written."""
    other = f"{out} exists, and is no {form} export of this checkpoint; give another OUT"
    if not (out / card.FILE).is_file():
        raise ConfigError(other)
    head = card.read_file(out / card.FILE)
    checkpoint = export.chosen(run / "checkpoints", step)
    adapter = (out / directory.ADAPTER_CONFIG).is_file()
    there = "adapter" if adapter else "both" if (out / "adapter").is_dir() else "merged"
    if head.get("checkpoint_hash") != disk.sha256(checkpoint / MANIFEST) or there != form:
        raise ConfigError(other)
    for folder in (out, out / "adapter") if form == "both" else (out,):
        if problem := merged.changed(folder):
            raise ConfigError(f"{folder / problem}: changed since it was exported; export to another OUT")


def _check_places(run: Path, out: Path) -> None:
    """Raise ConfigError where a file that describes the export names a directory of this machine."""
    own = (runs.recipe(run).model.path, run, out, Path.home(), Path.cwd())
    places = {made(place) for place in own for made in (os.path.realpath, os.path.abspath) if os.path.isdir(place)}
    files = (file for pattern in (card.FILE, "*.json", "adapter/*.json") for file in sorted(out.glob(pattern)))
    for file in (file for file in files if file.stat().st_size <= LARGEST):
        content = file.read_text(encoding="utf-8", errors="replace")
        named = {place for place in places if place in content or json.dumps(place)[1:-1] in content}
        if file.name == card.FILE:
            named |= {match[0] for match in card.PLACE.finditer(content)}
        if named := named - {os.sep}:
            raise ConfigError(
                f"{file}: names {min(named)}, a path of this machine; export to another OUT with --base OWNER/NAME, or "
                "change the file"
            )
