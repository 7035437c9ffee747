"""The folder that is shared: an export with its card, written now or found whole, that names no place here."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

from huggingface_hub import ModelCardData

from mirage_dist import disk, runs
from mirage_dist.hub import measured
from mirage_dist.model import directory, export
from mirage_dist.model.export import Form
from mirage_dist.model.exports import card, merged
from mirage_dist.model.shards import MANIFEST
from mirage_dist.schema import ConfigError

LARGEST = 1 << 20  # bytes of a file that is searched for names of directories; a vocabulary is larger


def base_name(run: Path, form: Form, base: str | None, option: str) -> str | None:
    """The base model's name on the hub: `base`, or what the recipe says. Raises ConfigError, which begins with
    `option`, for an adapter whose base has none.
    """
    base = base or card.hub_name(runs.recipe(run).model.path)
    if form != "merged" and base is None:
        raise ConfigError(
            f"{option}: an adapter names its base model, which has only a path of this machine; give its name on the "
            "hub with --base OWNER/NAME"
        )
    return base


def written(run: Path, out: Path, step: int | None, form: Form, base: str | None) -> ModelCardData:
    """Export (see `export.export`) with the run's evaluations in the card, unless `out` is this export already, whose
    card may have been edited. Returns the card's head. Raises ConfigError for an `out` that is something else, whose
    weights have changed, or that names a directory of this machine.
    """
    if os.path.lexists(out):
        _check_export(run, out, step, form)
    else:
        export.export(run, out, step, form=form, base=base, evaluations=partial(measured.evaluations, run))
    head = card.read_file(out / card.FILE)
    _check_places(run, out)
    return head


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
