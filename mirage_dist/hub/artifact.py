"""`mirage export RUN OUT --artifact NAME`: an export as a W&B artifact of the run that trained it.

The artifact belongs to the training run's own W&B run, so W&B shows which run a model comes from. Online, the command
ends when W&B has every file. Offline, places and checksums of the files are recorded, and `wandb sync` uploads them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mirage_dist import runs
from mirage_dist.hub import folder, remote
from mirage_dist.model import export
from mirage_dist.model.export import Form
from mirage_dist.model.shards import step_of
from mirage_dist.monitoring import wandb_files, wandb_run
from mirage_dist.monitoring.sinks import reason
from mirage_dist.progress import ON_STDERR, log
from mirage_dist.schema import ConfigError, RunError

NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")  # what W&B takes, see `wandb.Artifact`


def add(run: Path, out: Path, step: int | None, form: Form, name: str, base: str | None = None) -> Iterator[str]:
    """Export (see `folder.written`) and record `out` as a version of the artifact `name`; yields lines to print.

    base: the base model's name on the hub. Raises ConfigError for a name that W&B does not take, a run without W&B, and
    what `folder.written` raises; RunError where W&B cannot be reached or does not take the files.
    """
    option = f"--artifact {name}"
    if not NAME.fullmatch(name):
        raise ConfigError(f"{option}: expected 1 to 128 letters, digits, '-', '_' and '.'")
    monitor, manifest = runs.recipe(run).monitor, runs.manifest(run)
    if monitor.wandb == "off" or manifest is None:
        raise ConfigError(
            f"{option}: {run / 'config.yaml'}, as the first start wrote it, has monitor.wandb: off, and an artifact "
            "belongs to a run of W&B; share the export with --push OWNER/NAME"
        )
    base = folder.base_name(run, form, base, option)
    head = folder.written(run, out, step, form, base)
    files = remote.contents(out)
    number = step_of(export.chosen(run / "checkpoints", step))
    about = {
        "step": number,
        "form": form,
        "objective": runs.recipe(run).objective["name"],
        "seed": manifest["seed"],
        "config_hash": manifest["config_hash"],
        "checkpoint_hash": head.get("checkpoint_hash"),
        "base_model": base,
        "base_model_hash": head.get("base_model_hash"),
        "data": {stream: record["sha256"] for stream, record in manifest["data"].items()},
    }
    size = sum((out / path).stat().st_size for path in files)
    whole = f"{len(files)} files, {size:,} bytes"
    if monitor.wandb == "online":
        log.info(f"W&B: uploading {out} ({whole})", extra=ON_STDERR)
    try:
        stored = _record(run, wandb_run.options(monitor, str(run), manifest["wandb_id"], evaluation=True), {
            "folder": out, "files": files, "name": name, "about": about, "alias": f"step-{number}",
        })  # fmt: skip
    except Exception as error:  # W&B's own are of many classes
        raise RunError(
            f"{option}: W&B did not take {out} ({reason(error)}); {out} is whole, give the same command again"
        ) from error
    if stored is not None:
        yield f"W&B: {stored}, {whole}"
    else:
        yield (
            f"W&B: {name} is recorded under {run / 'wandb'}, {whole}; keep {out} until "
            f"`wandb sync {run / 'wandb'}/offline-run-*` has uploaded it"
        )


def _record(run: Path, options: dict[str, Any], content: dict[str, Any]) -> str | None:
    """The artifact's name and version at W&B; None offline. Raises OSError where W&B's file of a run lacks it."""
    sink = wandb_run.WandbRun({**options, "say": _say})
    sink.open()
    try:
        digest, stored = sink.artifact(**content)
    except BaseException:
        sink.close("failed")
        raise
    sink.close("finished")
    if stored is None and (content["name"], digest) not in wandb_files.artifacts(run / "wandb", options["id"]):
        raise OSError(f"{run / 'wandb'} lacks it: W&B could not write there")
    return stored


def _say(info: str = "", warning: str = "", goes_on: bool = False) -> None:
    """What the sink says; that it records offline in place of online is an error here: nothing would be uploaded."""
    if warning:
        raise RunError(warning)
    log.info(info, extra=ON_STDERR)
