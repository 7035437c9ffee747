"""Sharded checkpoints: a directory is one if and only if its manifest is there.

    checkpoints/step-000100/   DeepSpeed's shards, objective.safetensors, manifest.json
    checkpoints/latest         the newest one's name

Shards go to `step-000100.tmp`, are synced and hashed; the manifest is written last; then one rename makes it a
checkpoint. A process may die at any moment: what was committed before stays whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from mirage_dist.config import ConfigError, RunError
from mirage_dist.world import World, barrier, gather

PARTIAL = ".tmp"


def save(engine: Any, folder: Path, manifest: Mapping[str, Any], objective: Mapping[str, Tensor], world: World) -> Path:
    """Commit the checkpoint of `manifest["step"]`; every rank calls this. Returns its directory.

    Raises RunError when it cannot be written (no space left); earlier checkpoints are as they were.
    """
    name = f"step-{manifest['step']:06d}"
    partial, final = folder / (name + PARTIAL), folder / name
    if world.main:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
    barrier(world, f"checkpoint {name}")
    with _told(partial):
        engine.save_checkpoint(str(folder), tag=partial.name, save_latest=False, exclude_frozen_parameters=True)
        if world.main:
            save_file({key: value.contiguous() for key, value in objective.items()}, partial / "objective.safetensors")
    barrier(world, f"shards of {name}")
    with _told(partial):
        own = _digests(partial, world)
    files = _gathered(own, world)
    if world.main:
        with _told(partial):
            _write_synced(partial / "manifest.json", json.dumps({**manifest, "files": files}, indent=1))
            _sync_folder(partial)
            if final.exists():  # saved again after a resume from an older one
                shutil.rmtree(final)
            os.rename(partial, final)
            _write_synced(folder / ("latest" + PARTIAL), name)
            os.replace(folder / ("latest" + PARTIAL), folder / "latest")
            _sync_folder(folder)
    barrier(world, f"commit of {name}")
    return final


@contextmanager
def _told(partial: Path) -> Iterator[None]:
    """Say what a failed write means. The rank that fails ends, and its launcher ends the others."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch and safetensors report a full disk as errors of their own
        raise RunError(f"{partial}: cannot be written ({error}); every checkpoint before it is whole") from error


def newest(folder: Path, world: World) -> Path | None:
    """The newest whole checkpoint, the same on every rank; damaged ones are reported and passed over."""
    step = -1
    if world.main:
        for candidate in sorted(folder.glob("step-*[0-9]"), reverse=True):
            fault = damage(candidate)
            if fault is None:
                step = int(candidate.name.removeprefix("step-"))
                break
            world.say(f"{candidate} is passed over: {fault}")
    step = int(gather(world, [step], "newest checkpoint")[0, 0])
    return None if step < 0 else folder / f"step-{step:06d}"


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, None when it is whole: manifest, each file's size and SHA-256."""
    try:
        files = read_manifest(checkpoint)["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"no readable manifest ({error})"
    for name, told in files.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != told["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, the manifest says {told['bytes']}"
        if _sha256(file) != told["sha256"]:
            return f"{name} does not have the SHA-256 of the manifest"
    return None


def load(engine: Any, checkpoint: Path, expected: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Put parameters and moments back; returns the manifest and the objective's state.

    Raises ConfigError when the checkpoint is of another recipe, other base weights, or another world size.
    """
    manifest = read_manifest(checkpoint)
    for key, what in (("config_hash", "recipe"), ("base_hash", "base weights"), ("world_size", "number of ranks")):
        if manifest[key] != expected[key]:
            raise ConfigError(
                f"{checkpoint}: saved with another {what} ({key} {manifest[key]}, now {expected[key]}); "
                "resume with the one it was saved with, or choose another run.dir"
            )
    path, _ = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name, load_module_strict=False)
    if path is None:
        raise RuntimeError(f"{checkpoint}: DeepSpeed found no checkpoint there")
    return manifest, load_file(checkpoint / "objective.safetensors")


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint directory."""
    return json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))


def _digests(partial: Path, world: World) -> dict[str, dict[str, Any]]:
    """This rank's share of the files, synced to disk and hashed."""
    files = sorted(file for file in partial.rglob("*") if file.is_file())
    found = {}
    for file in files[world.rank :: world.size]:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
        found[str(file.relative_to(partial))] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
    return found


def _gathered(own: dict[str, Any], world: World) -> dict[str, Any]:
    if world.size == 1:
        return own
    everyone: list[Any] = [None] * world.size
    dist.all_gather_object(everyone, own)
    return dict(sorted(item for part in everyone for item in part.items()))


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _write_synced(file: Path, text: str) -> None:
    with file.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
