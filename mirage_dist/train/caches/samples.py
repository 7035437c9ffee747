"""A run's samples as tables that are mapped into memory, with all that the checks of a first start came to.

    samples/KEY/
      stream-000.arrow     one row a sample, with the number of its picture and its digest
      lengths-000.npy      (2, n) int32: tokens of each row before truncation, and of its responses after it
      pictures.arrow       one row a picture: path, SHA-256 of its bytes, size
      data.json            what the run's data.json says
      checks.json          the rest of what the checks came to, and the size of each file; written last

KEY is the hash of everything that decides the content (see `train.caches.identity`), so a start that computes the
same KEY reads, decodes, tokenises and hashes nothing again. The folder appears whole or not at all. A row is compared
with its digest when it is read, a picture with its SHA-256 when it is opened: no later change goes unnoticed.
Answers to forget may be harmful, so the folder is its owner's alone.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypedDict, cast, overload

import numpy as np
from numpy.typing import NDArray

from mirage_dist import disk, state
from mirage_dist.data.pictures import Checked, Inspection
from mirage_dist.data.pictures.stored import pyarrow
from mirage_dist.data.sample import Sample, digest_of
from mirage_dist.data.sources import LeftOut
from mirage_dist.runs import DataSummary, StreamRecord
from mirage_dist.schema import RunError

FOLDER = "samples"  # in the run directory
KEY = re.compile(r"[0-9a-f]{16}")
ROWS = 1 << 10  # of one batch of a table
CHECKS, SUMMARY, PICTURES = "checks.json", "data.json", "pictures.arrow"
TO_INSPECT = "to-inspect.arrow"  # in a draft: the pictures before they are checked
NO_PICTURE = -1
AGAIN = "start again with data.verify=true, which makes it anew"


class StreamChecks(TypedDict):
    """One stream: what its manifest records, what was left out, and how many answers are cut to `max_length`."""

    record: StreamRecord
    left_out: LeftOut
    cut: int


class Checks(TypedDict):
    """checks.json. streams: in the recipe's order, which numbers their files. sources: files that samples were read
    from. warnings: texts of the audit. sizes: bytes of each file. lengths: SHA-256 of each stream's.
    """

    streams: dict[str, StreamChecks]
    sources: list[str]
    warnings: list[str]
    sizes: dict[str, int]
    lengths: dict[str, str]


# ------------------------------------------------------------------------------------------------------- tables


class _Batches:
    """A table of batches of ROWS rows, mapped into memory: row i is row i mod ROWS of batch i div ROWS.

    rows: how many there must be. Raises state.Damaged.
    """

    def __init__(self, file: Path, rows: int | None = None) -> None:
        self.file = file
        try:
            self._opened = pyarrow("ipc").open_file(pyarrow("lib").memory_map(str(file)))
            self.batches: int = self._opened.num_record_batches
            last = self._opened.get_batch(self.batches - 1).num_rows if self.batches else 0
        except Exception as error:  # on damaged bytes the reader may raise anything
            raise state.Damaged(f"{file}: no table that can be read: {error or type(error).__name__}") from error
        self.names: list[str] = self._opened.schema.names
        self.rows = max(0, self.batches - 1) * ROWS + last
        if rows not in (None, self.rows):
            raise state.Damaged(f"{file}: has {self.rows} rows, not {rows}")
        self._read: dict[int, list[Any]] = {}

    def row(self, number: int) -> dict[str, Any]:
        """Raises RunError when the file is damaged there."""
        batch, place = divmod(number, ROWS)
        try:
            values = [column[place].as_py() for column in self._columns(batch)]
        except Exception as error:
            why = error or type(error).__name__
            raise RunError(f"{self.file}: row {number} cannot be read: {why}; {AGAIN}") from error
        return dict(zip(self.names, values, strict=True))

    def column(self, name: str) -> Iterator[Any]:
        """Its arrays, one a batch."""
        place = self.names.index(name)
        return (self._columns(batch)[place] for batch in range(self.batches))

    def part(self, start: int, stop: int, names: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        """The values in these columns of rows [start, stop)."""
        places = [self.names.index(name) for name in names]
        for number in range(start // ROWS, -(-stop // ROWS)):
            first, last = (min(max(row - number * ROWS, 0), ROWS) for row in (start, stop))
            columns = self._columns(number)
            yield from zip(*(columns[place][first:last].to_pylist() for place in places), strict=True)

    def _columns(self, number: int) -> list[Any]:
        if number not in self._read:
            batch = self._opened.get_batch(number)
            batch.validate(full=True)  # damaged offsets would lead out of the file
            self._read[number] = batch.columns
        return self._read[number]


class Pictures:
    """The pictures of all streams, each once, by number."""

    def __init__(self, file: Path) -> None:
        self._table = _Batches(file)

    def __getitem__(self, number: int) -> Checked:
        row = self._table.row(number)
        return Checked(_path(row["path"]), row["sha256"].hex(), (row["width"], row["height"]))

    def __len__(self) -> int:
        return self._table.rows

    def every(self) -> Iterator[Checked]:
        """All of them, in order."""
        for columns in zip(*map(self._table.column, ("path", "sha256", "width", "height")), strict=True):
            for path, sha256, *size in zip(*(column.to_pylist() for column in columns), strict=True):
                yield Checked(_path(path), sha256.hex(), (size[0], size[1]))


class Digests(Mapping[str, str]):
    """Path -> SHA-256 of each picture of a table. A path from a sample brings its own; no index is kept in memory."""

    def __init__(self, pictures: Pictures) -> None:
        self._pictures = pictures

    def __getitem__(self, path: str) -> str:
        if isinstance(path, Checked):
            return path.sha256
        for picture in self._pictures.every():
            if picture == path:
                return picture.sha256
        raise KeyError(path)

    def __iter__(self) -> Iterator[str]:
        return self._pictures.every()

    def __len__(self) -> int:
        return len(self._pictures)


class Rows(Sequence[Sample]):
    """The samples of one stream. Each is made when it is read, and compared with its digest.

    Raises RunError for a row that is no longer what was written.
    """

    def __init__(self, file: Path, rows: int, pictures: Pictures, sources: Sequence[str]) -> None:
        self._table, self._pictures, self._sources = _Batches(file, rows), pictures, sources

    def __len__(self) -> int:
        return self._table.rows

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]  # raises IndexError, as a list does
        row = self._table.row(number)
        digest, picture = row.pop("digest"), row.pop("picture")
        try:
            image = None if picture == NO_PICTURE else self._pictures[picture]
            row["history"] = tuple((turn["question"], turn["answer"]) for turn in row["history"])
            row |= {"references": tuple(row["references"]), "source": self._sources[row["source"]], "image": image}
            sample = Sample(**row)
            whole = digest_of(sample, image and image.sha256) == digest.hex()
        except (IndexError, TypeError, ValueError, AttributeError):
            whole = False
        if not whole:
            raise RunError(f"{self._table.file}: row {number} is not what the checks have written; {AGAIN}")
        return sample

    def texts(self, start: int, stop: int) -> Iterator[Sample]:
        """Rows [start, stop) without their pictures, and not compared with their digests: of a table just written."""
        for row in self._table.part(start, stop, ("id", "question", "answer", "safe", "history")):
            identity, question, answer, safe, turns = row
            history = tuple((turn["question"], turn["answer"]) for turn in turns)
            yield Sample(identity, None, question, answer, safe, "", "", history)

    def pictured(self) -> NDArray[np.bool_]:
        """Whether each sample has a picture: (n,)."""
        parts = [column.to_numpy() != NO_PICTURE for column in self._table.column("picture")]
        return np.concatenate(parts) if parts else np.empty(0, np.bool_)


@dataclass(frozen=True)
class Table:
    """A run's samples in a folder. lengths: by stream, (2, n) as in the files; empty before they are measured."""

    folder: Path
    checks: Checks
    pictures: Pictures
    rows: Mapping[str, Rows]
    lengths: Mapping[str, NDArray[np.int32]]

    def summary(self) -> DataSummary:
        """The content of the run's data.json. Raises state.Damaged."""
        return cast(DataSummary, state.read("data", self.folder / SUMMARY))

    def records(self) -> dict[str, StreamRecord]:
        """What the run's manifest says of each stream."""
        return {name: stream["record"] for name, stream in self.checks["streams"].items()}


def opened(folder: Path, whole: bool = True) -> Table:
    """The table in a folder, of which nothing is read but its index and the lengths.

    whole: with lengths, which a draft does not have yet. Raises FileNotFoundError when there is none, state.Damaged
    when it is not whole.
    """
    checks = cast(Checks, state.read("samples", folder / CHECKS))
    for name, size in checks["sizes"].items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != size:
            raise state.Damaged(f"{folder / name}: expected a file of {size} bytes")
    pictures, rows, lengths = Pictures(folder / PICTURES), {}, {}
    for number, (name, stream) in enumerate(checks["streams"].items()):
        count = stream["record"]["samples"]
        rows[name] = Rows(_file("stream", number, folder), count, pictures, checks["sources"])
        if whole:
            lengths[name] = _lengths(_file("lengths", number, folder), checks["lengths"].get(name), count)
    return Table(folder, checks, pictures, rows, lengths)


def _lengths(file: Path, sha256: str | None, count: int) -> NDArray[np.int32]:
    if disk.sha256(file) != sha256:
        raise state.Damaged(f"{file}: has another SHA-256 than {CHECKS} says")
    lengths = np.load(file, mmap_mode="r", allow_pickle=False)
    if lengths.shape != (2, count):
        raise state.Damaged(f"{file}: has shape {lengths.shape}, not (2, {count})")
    return lengths


def _file(kind: str, number: int, folder: Path) -> Path:
    return folder / f"{kind}-{number:03d}.{'arrow' if kind == 'stream' else 'npy'}"


# ------------------------------------------------------------------------------------------------------ writing


def write_unchecked(folder: Path, most: Mapping[str, int]) -> None:
    """List the pictures that the ranks are to inspect. most: path -> pixels that are decoded (see `open_picture`)."""
    rows = ({"path": _raw(path), "most": pixels} for path, pixels in most.items())
    arrow = pyarrow("lib")
    _write(folder / TO_INSPECT, {"path": arrow.binary(), "most": arrow.int64()}, rows)


def unchecked(folder: Path, part: int, parts: int) -> dict[str, int]:
    """One rank's share of the pictures that `write_unchecked` lists."""
    table = _Batches(folder / TO_INSPECT)
    own = (table.row(number) for number in range(part, table.rows, parts))
    return {_path(row["path"]): row["most"] for row in own}


def write(
    folder: Path,
    streams: Mapping[str, Sequence[Sample]],
    inspected: Mapping[str, Inspection],
    left_out: Mapping[str, LeftOut],
    warnings: Sequence[str],
    summary: DataSummary,
) -> None:
    """Write the samples of all streams, which are checked but for their lengths, into a folder without a table.

    streams: in the recipe's order. inspected: path -> what was seen of each picture. left_out, warnings: see
    `Checks`. summary: what the run's data.json says. Raises OSError.
    """
    (folder / TO_INSPECT).unlink(missing_ok=True)
    pictures = {s.image: 0 for samples in streams.values() for s in samples if s.image is not None}
    numbers = {path: number for number, path in enumerate(pictures)}
    sources = {name: number for number, name in enumerate({s.source: 0 for own in streams.values() for s in own})}
    _write(folder / PICTURES, _picture_columns(), (_picture(path, inspected[path]) for path in pictures))
    checks: Checks = {"streams": {}, "sources": list(sources), "warnings": list(warnings), "sizes": {}, "lengths": {}}
    for number, (name, samples) in enumerate(streams.items()):
        total = hashlib.sha256()

        def rows(samples: Sequence[Sample] = samples, total: Any = total) -> Iterator[dict[str, Any]]:
            for sample in samples:
                digest = digest_of(sample, sample.image and inspected[sample.image].sha256)
                total.update(bytes.fromhex(digest))
                picture = NO_PICTURE if sample.image is None else numbers[sample.image]
                yield _row(sample, digest, picture, sources[sample.source])

        _write(_file("stream", number, folder), _sample_columns(), rows())
        record: StreamRecord = {"samples": len(samples), "sha256": total.hexdigest()}
        checks["streams"][name] = {"record": record, "left_out": left_out[name], "cut": 0}
    disk.write(folder / SUMMARY, state.sealed("data", summary, indent=1), private=True)
    disk.write(folder / CHECKS, state.sealed("samples", checks, indent=1), private=True)


def finish(table: Table, lengths: Mapping[str, NDArray[np.int32]], longest: int, warnings: Sequence[str] = ()) -> None:
    """Add the lengths to a draft, and the sizes of its files.

    longest: `data.max_length`. warnings: of the audit, put before those that the draft has. Raises OSError.
    """
    folder, checks = table.folder, table.checks
    checks["warnings"] = [*warnings, *checks["warnings"]]
    for number, (name, own) in enumerate(lengths.items()):
        file = _file("lengths", number, folder)
        with disk.writing(file, private=True) as handle:
            np.save(handle, own, allow_pickle=False)
        checks["lengths"][name] = disk.sha256(file)
        checks["streams"][name]["cut"] = int((own[0] > longest).sum())
    others = (entry for entry in sorted(folder.iterdir()) if entry.name != CHECKS)
    checks["sizes"] = {entry.name: entry.stat().st_size for entry in others}
    disk.write(folder / CHECKS, state.sealed("samples", checks, indent=1), private=True)


def _sample_columns() -> dict[str, Any]:
    arrow = pyarrow("lib")
    text, turn = arrow.string(), arrow.struct([("question", arrow.string()), ("answer", arrow.string())])
    return {
        "id": text,
        "question": text,
        "answer": text,
        "safe": arrow.bool_(),
        "category": text,
        "source": arrow.int32(),
        "history": arrow.list_(turn),
        "references": arrow.list_(text),
        "begun": text,
        "shown": arrow.int32(),
        "picture": arrow.int32(),
        "digest": arrow.binary(32),
    }


def _row(sample: Sample, digest: str, picture: int, source: int) -> dict[str, Any]:
    return {
        "id": sample.id,
        "question": sample.question,
        "answer": sample.answer,
        "safe": sample.safe,
        "category": sample.category,
        "source": source,
        "history": [{"question": question, "answer": answer} for question, answer in sample.history],
        "references": list(sample.references),
        "begun": sample.begun,
        "shown": sample.shown,
        "picture": picture,
        "digest": bytes.fromhex(digest),
    }


def _picture_columns() -> dict[str, Any]:
    arrow = pyarrow("lib")
    sizes = {"width": arrow.int32(), "height": arrow.int32()}
    return {"path": arrow.binary(), "sha256": arrow.binary(32), **sizes}


def _picture(path: str, inspection: Inspection) -> dict[str, Any]:
    assert inspection.size is not None  # of a picture that can be used
    width, height = inspection.size
    return {"path": _raw(path), "sha256": bytes.fromhex(inspection.sha256), "width": width, "height": height}


def _write(file: Path, columns: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> None:
    arrow, ipc = pyarrow("lib"), pyarrow("ipc")
    schema = arrow.schema(list(columns.items()))
    with disk.writing(file, private=True) as handle, ipc.new_file(handle, schema) as writer:
        every = iter(rows)
        while batch := list(islice(every, ROWS)):
            writer.write_batch(arrow.RecordBatch.from_pylist(batch, schema=schema))


def _raw(path: str) -> bytes:
    """A path whose bytes are not UTF-8 has surrogates."""
    return path.encode("utf-8", "surrogatepass")


def _path(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogatepass")
