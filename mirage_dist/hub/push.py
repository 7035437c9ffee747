"""`mirage export RUN OUT --push OWNER/NAME`: an export with its card, and its upload to the hub.

Everything that can be wrong is looked at before weights are written or anything is made on the hub. OUT may be there
already where it is an export of the same checkpoint, as after `--dry-run` or an upload that broke off; its card may
have been edited meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mirage_dist.hub import folder, remote
from mirage_dist.model.export import Form
from mirage_dist.model.exports import card


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
    base = folder.base_name(run, form, base, f"--push {target.name}")
    repository = None if target.dry_run else remote.Repository(target.name)
    there = None
    if repository is not None:
        repository.check_rights()
        there = repository.require_free(not target.public, out)
    head = folder.written(run, out, step, form, base)
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
