"""Reading is linear in the input, within limits, and never waits: what is odd, damaged or endless is a sentence."""

import contextlib
import json
import os
import re
import socket
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mirage_dist.data import records, tables
from mirage_dist.schema import ConfigError, documents


class Counting:
    """A JSON decoder that counts the characters that it is given."""

    def __init__(self, decoder):
        self.decoder, self.count = decoder, 0

    def decode(self, text):
        self.count += len(text)
        return self.decoder.decode(text)

    def raw_decode(self, text, at):
        self.count += len(text) - at
        return self.decoder.raw_decode(text, at)


@pytest.mark.parametrize(
    "content",
    [
        lambda size: json.dumps(["x" * size]),
        lambda size: json.dumps([{"a": list(range(size // 8))}]),
        lambda size: "[" + '"' + "x" * size,  # a text that never ends
        lambda size: '{"a": "' + "x" * size + '"}',
        lambda size: "[1," + " " * size + "2]",
    ],
)
def test_a_long_record_is_read_in_time_proportional_to_its_length(tmp_path, monkeypatch, content):
    monkeypatch.setattr(records, "CHUNK", 64)
    work = []
    for size in (4_000, 64_000):
        (tmp_path / "data.json").write_text(content(size))
        decoder, sizes = Counting(documents.DECODER), []
        monkeypatch.setattr(records.documents, "DECODER", decoder)
        with contextlib.suppress(ConfigError):
            for _ in records.read(tmp_path / "data.json", sizes.append):
                pass
        monkeypatch.setattr(records.documents, "DECODER", decoder.decoder)
        assert sum(sizes) <= size + 100  # each byte is read once
        work.append(decoder.count)
    assert work[1] <= 5 * (64_000 + 100)
    assert work[1] <= 40 * max(work[0], 1)  # with the square of the length it would be 256 times


def test_blanks_without_end_are_held_once_and_refused_at_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "LARGEST", 1000)
    monkeypatch.setattr(records, "CHUNK", 100)
    sizes = []
    (tmp_path / "data.json").write_text(" \n" * 100_000)
    with pytest.raises(ConfigError, match=r"data\.json: begins with more than 64 MiB of blanks"):
        list(records.read(tmp_path / "data.json", sizes.append))
    assert sum(sizes) <= 1200


@pytest.mark.parametrize("end", ['{"a": 2}\n', ""])
def test_what_follows_a_line_that_is_too_long_is_not_passed_over(tmp_path, monkeypatch, end):
    """Cut off at the limit the line is a whole object, so that the rest of the file was lost without a word."""
    monkeypatch.setattr(records, "LARGEST", 1000)
    (tmp_path / "data.json").write_text('{"a": 1}' + " " * 2000 + "\n" + end)
    with pytest.raises(ConfigError, match="record 0: not JSON: line 1 is longer than 64 MiB"):
        list(records.read(tmp_path / "data.json"))


def deep(levels):
    return '{"a": ' + "[" * (levels - 1) + "]" * (levels - 1) + "}"


@pytest.mark.parametrize("form", ["{}", "[{}]", "{}\n"])
def test_nesting_has_one_limit_in_every_form(tmp_path, form):
    for levels, right in ((100, True), (101, False), (800, False), (100_000, False)):
        (tmp_path / "data.json").write_text(form.format(deep(levels)))
        if right:
            assert len(list(records.read(tmp_path / "data.json"))) == 1
            continue
        with pytest.raises(ConfigError, match="record 0: not JSON: nested too deep: over 100 levels: line 1"):
            list(records.read(tmp_path / "data.json"))
        with pytest.raises(ConfigError, match="nested too deep: over 100 levels"):
            records.value(tmp_path / "data.json")


def test_a_number_of_thousands_of_digits_is_named(tmp_path):
    for content in ('{"a": ' + "9" * 5000 + "}", "[" + "9" * 5000 + "]"):
        (tmp_path / "data.json").write_text(content)
        with pytest.raises(
            ConfigError, match="record 0: not JSON: a number of 5000 digits; at most 300 are read: line 1"
        ):
            list(records.read(tmp_path / "data.json"))


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet", ".arrow"])
def test_only_a_regular_file_is_read_and_nothing_waits(tmp_path, suffix):
    os.mkfifo(tmp_path / f"fifo{suffix}")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / f"socket{suffix}"))
        for file in ("fifo", "socket"):
            with pytest.raises(
                ConfigError, match=f"{file}{suffix}: cannot be read: it is a FIFO, a socket or a device"
            ):
                list(records.read(tmp_path / f"{file}{suffix}"))
    (tmp_path / f"zero{suffix}").symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match="it is a FIFO, a socket or a device"):
        list(records.read(tmp_path / f"zero{suffix}"))


@pytest.mark.parametrize(
    "content", ["[" * 10_000, "{}", '{"_data_files": 5}', '{"_data_files": [{}]}', '{"_data_files"', ""]
)
@pytest.mark.parametrize("name", ["state.json", "dataset_dict.json"])
def test_a_datasets_own_json_is_read_strictly(tmp_path, content, name):
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path / name)) + ": (not JSON|expected a list of names)"):
        list(records.read(tmp_path))


def test_a_datasets_files_lie_in_its_folder(tmp_path):
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "../../secret.arrow"}]}')
    with pytest.raises(
        ConfigError, match=r"state\.json: names '\.\./\.\./secret\.arrow'; expected a file of this folder"
    ):
        list(records.read(tmp_path))


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_a_damaged_or_odd_table_is_named(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(tables, "NESTING", replace(tables.NESTING, value=20))
    nested = pa.int64()
    for _ in range(21):
        nested = pa.list_(nested)
    whole = pa.table({"a": pa.array([None], nested)})
    file = tmp_path / f"data{suffix}"
    with pa.OSFile(str(file), "wb") as sink:
        if suffix == ".parquet":
            pq.write_table(pa.table({"a": list(range(5000))}), sink)
        else:
            with pa.ipc.new_file(sink, whole.schema) as writer:
                writer.write_table(whole)
    content = file.read_bytes()
    if suffix == ".arrow":
        with pytest.raises(ConfigError, match=r"data\.arrow: nested too deep: over 100 levels"):
            list(records.read(file))
    for wrong in (
        b"",
        content[: len(content) // 2],
        content[:3],
        b"PAR1" + bytes(100) + b"PAR1",
        b"ARROW1" + bytes(500),
    ):
        file.write_bytes(wrong)
        with pytest.raises(ConfigError, match=rf"data{suffix}: cannot be read: ."):
            list(records.read(file))
