"""Records of Parquet and Arrow files, one at a time: of a file, a folder, or a dataset as `datasets` saves it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mirage_dist.schema import ConfigError, documents
from mirage_dist.schema.limits import NESTING

TABLES = (".parquet", ".arrow")
EMBEDDED = "picture-inside-the-dataset"  # in place of the path of a picture that is stored in the table itself


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

    Raises ConfigError for what cannot be read, and where pyarrow is not installed.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise ConfigError(f"{path}: datasets on disk need pyarrow: pip install 'mirage-dist[arrow]'")
    for file in parts(path) if path.is_dir() else [path]:
        documents.open_file(file).close()  # nothing that could wait for ever
        try:
            for batch in _batches(file):
                if any(_levels(column.type) > NESTING.value for column in batch.columns):
                    raise ConfigError(f"{file}: {documents.TOO_DEEP}")
                columns = [_column(column) for column in batch.columns]
                for values in zip(*columns, strict=True):
                    yield _without_nulls(dict(zip(batch.schema.names, values, strict=True)))
        except ConfigError:
            raise
        except Exception as error:  # on damaged bytes and rare types a reader may raise anything
            raise ConfigError(f"{file}: cannot be read: {error or type(error).__name__}") from error
        on_bytes(file.stat().st_size)


def _pyarrow(part: str) -> Any:
    """A module of pyarrow, which is optional: a type checker may not have it either."""
    return importlib.import_module(f"pyarrow.{part}")


def _batches(file: Path) -> Iterator[Any]:
    """Record batches; bytes of pictures are left on the disk where the format allows."""
    if file.suffix == ".parquet":
        table = _pyarrow("parquet").ParquetFile(file)
        names = [table.schema.column(i).path for i in range(len(table.schema))]
        yield from table.iter_batches(1024, columns=[name for name in names if not name.endswith(".bytes")])
        return
    ipc = _pyarrow("ipc")
    with _pyarrow("lib").memory_map(str(file)) as source:
        if source.read(6) != b"ARROW1":
            source.seek(0)
            yield from ipc.open_stream(source)  # as `datasets` writes
        else:
            opened = ipc.open_file(source)
            yield from (opened.get_batch(i) for i in range(opened.num_record_batches))


def _levels(kind: Any) -> int:
    """How deep a column's type is nested; counted up to the limit."""
    level, count = [kind], 0
    while level and count <= NESTING.value:
        level, count = [one.field(i).type for one in level for i in range(one.num_fields)], count + 1
    return count


def _column(column: Any) -> list[Any]:
    """A column's values; a picture ({"bytes", "path"}) is its path."""
    if not (_pyarrow("types").is_struct(column.type) and column.type.get_field_index("path") >= 0):
        return column.to_pylist()
    present = column.is_valid().to_pylist()
    return [
        (path or EMBEDDED) if valid else None
        for path, valid in zip(column.field("path").to_pylist(), present, strict=True)
    ]


def _without_nulls(value: Any) -> Any:
    """The value without fields that are null, since in a table every record has every field."""
    if isinstance(value, dict):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value
