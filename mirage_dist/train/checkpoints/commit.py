"""Sharded checkpoints: a directory is one if and only if its manifest is there.

    checkpoints/step-000100/   rank-00000-of-00002.safetensors …, objective.safetensors, index.json, manifest.json
    checkpoints/latest         the newest one's name

Every rank writes its fragments (`model.shards`) into the owner's workspace, synced and hashed; rank 0 adds the index of
what lies in which shard; the manifest comes last; then one rename makes it a checkpoint. A process may die at any
moment: what was committed before stays whole. Saving in the background costs the step almost nothing: the saved state
changes only in the optimizer's update, so it is copied to host memory while the next forward and backward run, and that
update waits for the copy. The commit follows at the first step boundary at which all ranks have written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor

from mirage_dist import disk, state
from mirage_dist.model.shards import (
    INDEX,
    MANIFEST,
    SHARD,
    Fragment,
    Layout,
    Placed,
    Scalars,
    Shards,
    committed,
    damage,
    index,
    placed,
    places,
    read_manifest,
    step_of,
    unpacked,
    write,
)
from mirage_dist.progress import EVERY_RANK, log
from mirage_dist.ranks import Group, barrier, everyones, gather
from mirage_dist.schema import ConfigError, RunError, TrainConfig
from mirage_dist.train.checkpoints import fragments as training_state
from mirage_dist.train.optimizers.groups import OptimizerRecord, record

Digests = dict[str, dict[str, Any]]  # file -> {"bytes", "sha256"}
Snapshot = tuple[list[Fragment], Tensor]  # see `fragments.snapshot`


class _Part(NamedTuple):
    """What one rank has written: sizes and digests of its files, and the layout of its shard, packed."""

    digests: Digests
    tensors: bytes
    scalars: bytes


@dataclass
class _Pending:
    """A checkpoint that is being written.

    copied: in the background, resolves to the copy of the training state that the files are written from. part:
    resolves to what this rank has written.
    """

    name: str
    partial: Path
    manifest: Mapping[str, Any]
    copied: Future[Snapshot] | None
    part: Future[_Part]


class Saver:
    """Writes and commits the checkpoints of one run; every rank makes the same calls.

    workspace: the lease's folder (see `train.lease`), from which a commit is one rename.
    """

    def __init__(self, folder: Path, workspace: Path, train: TrainConfig, group: Group) -> None:
        self.folder, self.workspace, self.train, self.group = folder, workspace, train, group
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._copier = ThreadPoolExecutor(1, "snapshot")  # another thread: a copy must not wait for a removal
        self._buffer: Tensor | None = None
        self._pending: _Pending | None = None
        self._placed: tuple[list[bytes], dict[str, Placed]] = [], {}  # the last save's layouts, and where things lie

    def save(self, engine: Any, manifest: Mapping[str, Any], objective: Mapping[str, Tensor]) -> None:
        """Write the checkpoint of `manifest["step"]`.

        With `train.save_in_background` it is written in the background; call `before_update` before the next update.
        Raises RunError when it cannot be written (no space left); earlier checkpoints stay whole.
        """
        self.finish()
        name = f"step-{manifest['step']:06d}"
        partial = self.workspace / f"{name}.tmp"
        if self.group.main:
            with _write_failures(partial):
                self.folder.mkdir(parents=True, exist_ok=True)
                disk.remove(partial, self.workspace)
                partial.mkdir()
        barrier(self.group, f"checkpoint {name}")
        fragments, scalars = training_state.fragments(engine)
        optimizer: OptimizerRecord = record(engine, str(self.train.optimizer["name"]))
        stage = engine.zero_optimization_stage()
        whole = {**manifest, "optimizer": optimizer, "zero_stage": stage}
        own = {key: value.clone().contiguous() for key, value in objective.items()} if self.group.main else None
        copied = None
        if self.train.save_in_background:
            copied = self._copier.submit(
                training_state.snapshot, fragments, self._buffer, training_state.moment(self.group.device)
            )
        part = self._writer.submit(_write, partial, self.group, copied or fragments, scalars, own)
        self._pending = _Pending(name, partial, whole, copied, part)
        if copied is None:
            self.finish()

    def before_update(self) -> None:
        """Wait until the pending checkpoint no longer needs the training state as it is."""
        if self._pending is not None and self._pending.copied is not None:
            _, self._buffer = self._pending.copied.result()

    @property
    def written(self) -> bool:
        """Whether this rank has nothing left to write of the pending checkpoint; a failed write counts as done."""
        return self._pending is None or self._pending.part.done()

    @property
    def committed(self) -> bool:
        """Whether no checkpoint is pending."""
        return self._pending is None

    def step_ended(self, all_written: bool) -> None:
        """Commit the pending checkpoint when every rank has written its part."""
        if all_written:
            self.finish()

    def finish(self) -> None:
        """Wait for the pending checkpoint, if there is one, and commit it. Raises RunError."""
        if self._pending is None:
            return
        self.before_update()
        pending, self._pending = self._pending, None
        with _write_failures(pending.partial):
            own = pending.part.result()
        parts = everyones(self.group, own)
        if self.group.main:
            with _write_failures(pending.partial):
                self._commit(pending, parts)
                self._retain(pending.name)

    def settle(self, step: int) -> None:
        """Complete an interrupted commit: `latest` and retention, as of the checkpoint that the run resumed from.

        Raises RunError when something that this package did not make is where a later checkpoint would be put.
        """
        if self.group.main:
            for checkpoint in places(self.folder):
                if step_of(checkpoint) > step:
                    _check_place(checkpoint)
        if step and self.group.main:
            name = f"step-{step:06d}"
            with _write_failures(self.workspace / name):
                self._point_to(name)
                self._retain(name)

    def amend(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add metrics to the committed checkpoint of a step, by which retention compares it from now on.

        Raises RunError when its manifest cannot be written.
        """
        if self.group.main:
            checkpoint = self.folder / f"step-{step:06d}"
            manifest = read_manifest(checkpoint)
            text = state.sealed(
                "checkpoint", {**manifest, "metrics": {**manifest.get("metrics", {}), **metrics}}, indent=1
            )
            with _write_failures(self.workspace / checkpoint.name):
                disk.write(checkpoint / MANIFEST, text, workspace=self.workspace)
                self._retain(checkpoint.name)

    def _commit(self, pending: _Pending, parts: Sequence[_Part]) -> None:
        files = dict(item for part in parts for item in part.digests.items())
        text = index([name for name in sorted(files) if SHARD.fullmatch(name)], *self._index(parts))
        files[INDEX] = asdict(disk.write(pending.partial / INDEX, text, workspace=pending.partial))
        files = dict(sorted(files.items()))
        text = state.sealed("checkpoint", {**pending.manifest, "files": files}, indent=1)
        disk.write(pending.partial / MANIFEST, text, workspace=pending.partial)
        final = self.folder / pending.name
        if (final / MANIFEST).is_file():  # it was damaged, or is made again after a resume from an older one
            self._remove_later(final)
        else:
            _check_place(final)
        disk.publish(pending.partial, final)
        self._point_to(pending.name)

    def _index(self, parts: Sequence[_Part]) -> tuple[dict[str, Placed], list[Scalars]]:
        """Where all tensors lie, and every rank's scalars. The layouts of one run hardly ever change between saves."""
        layouts = [part.tensors for part in parts]
        if layouts != self._placed[0]:
            self._placed = layouts, placed(unpacked(layout) for layout in layouts)
        alike = {packed: unpacked(packed) for packed in dict.fromkeys(part.scalars for part in parts)}
        return self._placed[1], list(alike.values())

    def _point_to(self, name: str) -> None:
        disk.write(self.folder / "latest", name, workspace=self.workspace)

    def _retain(self, newest: str) -> None:
        """Remove the checkpoints that retention does not keep. A failure is only reported: the commit is complete.

        Damaged checkpoints do not count. Those later than the newest whole one will be written again, and those without
        a readable manifest are left for inspection.
        """
        manifests: dict[Path, Mapping[str, Any]] = {}
        for checkpoint in committed(self.folder):
            with suppress(state.Damaged, ConfigError, OSError):
                if step_of(checkpoint) <= step_of(self.folder / newest):
                    manifests[checkpoint] = read_manifest(checkpoint)
        keep = kept({step_of(c): manifest.get("metrics", {}) for c, manifest in manifests.items()}, self.train)
        for checkpoint, manifest in manifests.items():
            if step_of(checkpoint) not in keep and checkpoint.name != newest:
                try:
                    if foreign := _foreign(checkpoint, manifest["files"]):
                        log.warning(f"{checkpoint}: retention leaves it, because of what others put there: {foreign}")
                        continue
                    self._remove_later(checkpoint)
                except OSError as error:
                    if not self.workspace.is_dir():
                        raise
                    log.warning(f"{checkpoint}: retention cannot remove it ({error})")

    def _remove_later(self, checkpoint: Path) -> None:
        """Rename a checkpoint out of its folder, so that it is never half there, and remove it in the background."""
        gone = disk.detach(checkpoint, self.workspace)
        self._writer.submit(disk.discard, gone)

    def close(self) -> None:
        """Commit what is pending and end the writer's thread."""
        self.finish()
        self._copier.shutdown()
        self._writer.shutdown()


def kept(checkpoints: Mapping[int, Mapping[str, float]], train: TrainConfig) -> set[int]:
    """The steps that retention keeps; checkpoints: the metrics of each (means since the one before).

    These are the last `keep_last`, every multiple of `keep_every`, and the one with the least `keep_best`; all when
    `keep_last` is None.
    """
    steps = sorted(checkpoints)
    if train.keep_last is None:
        return set(steps)
    keep = set(steps[-train.keep_last :])
    if train.keep_every is not None:
        keep |= {step for step in steps if step % train.keep_every == 0}
    measured = {step: m.get(train.keep_best or "") for step, m in checkpoints.items()}
    measured = {step: value for step, value in measured.items() if value is not None}
    if measured:
        keep.add(min(measured, key=lambda step: (measured[step], -step)))
    return keep


def newest(folder: Path, group: Group) -> Path | None:
    """The newest whole checkpoint, the same on every rank; damaged ones are reported and skipped.

    The ranks share the reading: each compares size and SHA-256 of its part of the files.
    """
    steps = [step_of(f) for f in committed(folder)] if group.main else []
    last = -1
    while True:
        candidates = [s for s in steps if last < 0 or s < last]
        last = int(gather(group, [max(candidates, default=-1)], "newest checkpoint")[0, 0])
        if last < 0:
            return None
        checkpoint = folder / f"step-{last:06d}"
        fault = damage(checkpoint, group.rank, group.size)
        faulty = gather(group, [fault is not None], f"check of {checkpoint.name}")[:, 0]
        if not faulty.any():
            return checkpoint
        if fault is not None and group.rank == int(faulty.argmax()):
            log.warning(f"{checkpoint} is passed over: {fault}", extra=EVERY_RANK)


def load(engine: Any, checkpoint: Path, expected: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Restore parameters and the optimizer's state, whatever world size and ZeRO stage saved them; returns the manifest
    and the objective's state.

    Raises ConfigError when the checkpoint is of another recipe or other base weights.
    """
    manifest = read_manifest(checkpoint)
    for key, what in (("config_hash", "recipe"), ("base_hash", "base weights")):
        if manifest.get(key) != expected[key]:
            raise ConfigError(
                f"{checkpoint}: saved with another {what} ({key} {manifest.get(key)}, now {expected[key]}); "
                "resume with the one it was saved with, or choose another run.dir"
            )
    with Shards(checkpoint) as shards:
        training_state.load(engine, shards)
    return manifest, load_file(checkpoint / "objective.safetensors")


def _check_place(final: Path) -> None:
    """Raise RunError unless a checkpoint can be put here: by its manifest, one is ours; an empty folder is nobody's."""
    if (final / MANIFEST).is_file():
        return
    if final.is_symlink() or final.is_file() or (final.is_dir() and any(final.iterdir())):
        raise RunError(
            f"{final}: is in the place of a checkpoint that is still to be written, and is none (it holds no "
            "manifest.json); move it away, then start again. Every checkpoint that is committed is whole"
        )


def _foreign(checkpoint: Path, files: Mapping[str, Any]) -> str:
    """The names in a checkpoint that its manifest does not name; those of files open on NFS are nobody's."""
    names = {entry.name for entry in checkpoint.iterdir() if not entry.name.startswith(".nfs")}
    return ", ".join(sorted(names - {*files, MANIFEST}))


@contextmanager
def _write_failures(partial: Path) -> Iterator[None]:
    """Explain a failed write. The rank that fails ends, and its launcher ends the others."""
    try:
        yield
    except OSError as error:
        if not partial.parent.is_dir():
            raise RunError(f"{partial}: another job has taken this run directory over; nothing is written") from error
        raise RunError(f"{partial}: cannot be written ({error}); every checkpoint before it is whole") from error


def _write(
    partial: Path,
    group: Group,
    source: Sequence[Fragment] | Future[Snapshot],
    scalars: Scalars,
    objective: dict[str, Tensor] | None,
) -> _Part:
    """Write this rank's files; rank 0 has the objective's state as well. Runs in the writer's thread."""
    fragments = source.result()[0] if isinstance(source, Future) else source
    name = f"rank-{group.rank:05d}-of-{group.size:05d}.safetensors"
    digests = {name: asdict(write(partial / name, fragments, scalars))}
    if objective is not None:
        file = partial / "objective.safetensors"
        digests[file.name] = asdict(disk.write(file, serialize(objective), workspace=partial))
    return _Part(digests, *Layout.of(fragments, scalars).packed())
