"""Records of Parquet and Arrow files, one at a time: of a file, a folder, or a dataset as `datasets` saves it.

A picture that is stored in the table is a reference in its record (see `data.pictures.stored`); its bytes stay where
they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mirage_dist.data.pictures import Reference, read_anew
from mirage_dist.data.pictures.stored import pyarrow
from mirage_dist.schema import ConfigError, documents
from mirage_dist.schema.limits import NESTING

TABLES = (".parquet", ".arrow")
BYTES, PATH = "bytes", "path"  # the fields of a picture's column, as `datasets` writes it


@dataclass(frozen=True)
class Binary:
    """What a record has of a column of bytes: where they are stored. Only a format knows whether they are a picture."""

    reference: Reference


Stored = Callable[[Reference], Any]  # what a record has of bytes that are not read
Batch = tuple[int, dict[str, Any]]  # rows, and column -> array, or `Stored`


def parts(path: Path) -> list[Path]:
    """The files of a folder of tables, in order. Raises ConfigError for a folder that holds none."""
    if (path / "dataset_dict.json").is_file():
        splits = _strings(path / "dataset_dict.json", "splits", lambda name: name)
        raise ConfigError(f"{path}: holds several splits ({', '.join(splits)}); name the folder of one split")
    if (path / "state.json").is_file():
        names = _strings(path / "state.json", "_data_files", lambda part: part["filename"])
        if outside := [name for name in names if "/" in name or name in ("", ".", "..")]:
            raise ConfigError(f"{path / 'state.json'}: names {outside[0]!r:.200}; expected a file of this folder")
        return [path / name for name in names]
    files = sorted(file for file in path.glob("*") if file.suffix in TABLES)
    if not files:
        raise ConfigError(f"{path}: no such file, or a folder without a dataset (state.json, *.parquet or *.arrow)")
    if len({file.suffix for file in files}) > 1:
        raise ConfigError(f"{path}: holds Parquet and Arrow files; name the files of one kind")
    return files


def _strings(file: Path, field: str, name: Callable[[Any], Any]) -> list[str]:
    """The names that a list of a dataset's own JSON holds. Raises ConfigError for anything else."""
    try:
        names: list[Any] = [name(part) for part in documents.read_json(file)[field]]
    except (KeyError, TypeError):
        names = [None]
    if not all(isinstance(each, str) for each in names):
        raise ConfigError(f"{file}: expected a list of names under {field!r}, as `datasets.save_to_disk` writes it")
    return names


def read(path: Path, on_bytes: Callable[[int], object]) -> Iterator[Any]:
    """The records of a table, or of all tables of a folder. on_bytes: see `records.read`.

    Raises ConfigError for what cannot be read.
    """
    for file in parts(path) if path.is_dir() else [path]:
        documents.open_file(file).close()  # nothing that could wait for ever
        try:
            yield from _records(file)
        except ConfigError:
            raise
        except Exception as error:  # on damaged bytes and rare types a reader may raise anything
            raise ConfigError(f"{file}: cannot be read: {error or type(error).__name__}") from error
        on_bytes(file.stat().st_size)


def _records(file: Path) -> Iterator[Any]:
    read_anew(file)
    first = 0
    for rows, columns in _parquet(file) if file.suffix == ".parquet" else _arrow(file):
        if any(_levels(column.type) > NESTING.value for column in columns.values() if not callable(column)):
            raise ConfigError(f"{file}: {documents.TOO_DEEP}")
        numbers = range(first, first + rows)
        values = [_values(column, numbers, partial(Reference, file, name)) for name, column in columns.items()]
        for row in zip(*values, strict=True):
            yield _without_nulls(dict(zip(columns, row, strict=True)))
        first += rows


def _arrow(file: Path) -> Iterator[Batch]:
    ipc = pyarrow("ipc")
    with pyarrow("lib").memory_map(str(file)) as source:
        if source.read(6) != b"ARROW1":
            source.seek(0)
            batches = ipc.open_stream(source)  # as `datasets` writes
        else:
            opened = ipc.open_file(source)
            batches = (opened.get_batch(i) for i in range(opened.num_record_batches))
        for batch in batches:
            yield batch.num_rows, dict(zip(batch.schema.names, batch.columns, strict=True))


def _parquet(file: Path) -> Iterator[Batch]:
    """Batches without the columns of bytes in which no row lacks any: they are not read."""
    table = pyarrow("parquet").ParquetFile(file)
    leaves = [table.schema.column(i).path for i in range(len(table.schema))]
    names = table.schema_arrow.names
    left: dict[str, Stored] = {}
    for name, kind in [] if any("." in name for name in names) else zip(names, table.schema_arrow.types, strict=True):
        leaf = name if _is_bytes(kind) else f"{name}.{BYTES}" if _is_picture(kind) else None
        if leaf in leaves and _whole(table.metadata, leaves.index(leaf)):
            left[name] = Binary if leaf == name else _picture
    read = [leaf for leaf in leaves if leaf.partition(".")[0] not in left]
    for batch in table.iter_batches(1024, columns=read):
        arrays = dict(zip(batch.schema.names, batch.columns, strict=True))
        yield batch.num_rows, {name: left.get(name, arrays.get(name)) for name in names}


def _whole(metadata: Any, leaf: int) -> bool:
    """Whether the file says that no row lacks a value of this leaf."""
    statistics = [metadata.row_group(i).column(leaf).statistics for i in range(metadata.num_row_groups)]
    return all(one is not None and one.has_null_count and one.null_count == 0 for one in statistics)


def _levels(kind: Any) -> int:
    """How deep a column's type is nested; counted up to the limit."""
    level, count = [kind], 0
    while level and count <= NESTING.value:
        level, count = [one.field(i).type for one in level for i in range(one.num_fields)], count + 1
    return count


def _is_bytes(kind: Any) -> bool:
    types = pyarrow("types")
    return types.is_binary(kind) or types.is_large_binary(kind)


def _is_picture(kind: Any) -> bool:
    """Whether a column is a picture as `datasets` writes it: its bytes, or its path, or both."""
    if not pyarrow("types").is_struct(kind):
        return False
    own = kind.get_field_index(BYTES)
    return kind.get_field_index(PATH) >= 0 or (own >= 0 and _is_bytes(kind.field(own).type))


def _picture(place: Reference) -> Reference:
    return place


def _values(column: Any, numbers: range, place: Callable[[int], Reference]) -> list[Any]:
    """A column's values; of a picture the place where it is stored, or else its path. numbers: of the rows."""
    if callable(column):
        return [column(place(number)) for number in numbers]
    present = column.is_valid().to_pylist()
    if _is_bytes(column.type):
        return [Binary(place(number)) if valid else None for number, valid in zip(numbers, present, strict=True)]
    if not _is_picture(column.type):
        return column.to_pylist()
    fields = column.type
    stored = column.field(BYTES).is_valid().to_pylist() if fields.get_field_index(BYTES) >= 0 else [False] * len(column)
    paths = column.field(PATH).to_pylist() if fields.get_field_index(PATH) >= 0 else [None] * len(column)
    return [
        (place(number) if inside else path) if valid else None
        for number, valid, inside, path in zip(numbers, present, stored, paths, strict=True)
    ]


def _without_nulls(value: Any) -> Any:
    """The value without fields that are null, since in a table every record has every field."""
    if isinstance(value, dict):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value
