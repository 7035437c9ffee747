"""What W&B's files on disk hold of a run: WANDB/offline-run-TIME-ID/run-ID.wandb.

The format is LevelDB's log: 7 bytes of header, then blocks of 32 KiB with records in chunks, each after its CRC, length
and kind; a record is a protobuf message of W&B's. A file whose writer was killed ends anywhere.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mirage_dist import disk, state
from mirage_dist.schema import ConfigError

HEADER, CHUNK, BLOCK = 7, 7, 32768
WHOLE, LAST = 1, 4
OF_TRAINING = "tokens_per_s"  # a value of each step of training, and of nothing else


@dataclass
class Held:
    """step: the last step of training, 0 for none. evaluated: the checkpoints whose rates are logged."""

    step: int = 0
    evaluated: set[int] = field(default_factory=set)


def held(folder: Path, identity: str) -> Held:
    """What the files of this W&B run hold, together with what `note` recorded: files that were sent may be removed."""
    result = Held()
    # Without a readable note the files alone show it.
    with suppress(FileNotFoundError, state.Damaged, ConfigError):
        result.step = state.read("held", _note(folder, identity))["step"]
    for file in offline_files(folder, identity):
        for record in records(file):
            values = _values(record)
            if OF_TRAINING in values:
                result.step = max(result.step, record.history.step.num)
            if "eval/step" in values:
                result.evaluated.add(int(json.loads(values["eval/step"])))
    return result


def note(folder: Path, identity: str, step: int) -> None:
    """Record that W&B holds the steps of training up to this one."""
    disk.write(_note(folder, identity), state.sealed("held", {"step": step}))


def offline_files(folder: Path, identity: str) -> list[Path]:
    return sorted(folder.glob(f"offline-run-*-{identity}/run-{identity}.wandb"))


def artifacts(folder: Path, identity: str) -> set[tuple[str, str]]:
    """Name and digest of each artifact that the files of this W&B run record."""
    every = (record for file in offline_files(folder, identity) for record in records(file))
    return {(r.artifact.name, r.artifact.digest) for r in every if r.WhichOneof("record_type") == "artifact"}


def mark_sent(folder: Path, identity: str) -> None:
    """Make `wandb sync` pass over the offline files of training: W&B gets their steps another way.

    Those of evaluations and exports hold no step, and what they hold comes from nowhere else.
    """
    for file in offline_files(folder, identity):
        if any(OF_TRAINING in _values(record) for record in records(file)):
            file.with_name(f"{file.name}.synced").touch()


def records(file: Path) -> Iterator[Any]:
    """The whole records of a file, as protobuf messages (`wandb_internal_pb2.Record`)."""
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]

    data, at, parts = file.read_bytes(), HEADER, b""
    while at + CHUNK <= len(data):
        left = BLOCK - at % BLOCK
        if left < CHUNK:
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        chunk = data[at + CHUNK : at + CHUNK + size]
        if kind == 0 or len(chunk) < size:
            return
        at, parts = at + CHUNK + size, parts + chunk
        if kind in (WHOLE, LAST):
            record = Record()
            try:
                record.ParseFromString(parts)
            except Exception:  # protobuf's error class differs between its implementations
                return
            yield record
            parts = b""


def _values(record: Any) -> dict[str, str]:
    """Name -> JSON text of the values that a record logs; none of a record of another kind."""
    if record.WhichOneof("record_type") != "history":
        return {}
    return {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}


def _note(folder: Path, identity: str) -> Path:
    return folder / f"held-{identity}.json"
