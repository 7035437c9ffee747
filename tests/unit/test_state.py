import json
import os
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirage_dist import state
from mirage_dist.schema import ConfigError
from mirage_dist.schema.limits import Limit

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
trees = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)
objects = st.dictionaries(st.text().filter(lambda name: name != "seal"), trees, min_size=1)
surrogates = st.binary(min_size=1).map(os.fsdecode)  # as in a path whose bytes are not UTF-8


@given(objects | st.dictionaries(surrogates, surrogates, min_size=1), st.sampled_from([None, 1]))
def test_what_is_read_is_what_was_written(content: dict, indent: int | None):
    text = state.sealed("row", content, indent)
    assert state.parse("row", text.encode(), "x") == content
    assert {k: v for k, v in json.loads(text).items() if k != "seal"} == content  # ordinary JSON for others


@given(objects, st.sampled_from([None, 1]), st.data())
def test_a_changed_or_cut_object_is_damaged(content: dict, indent: int | None, data: st.DataObject):
    """Any one byte that changes, and any cut, is noticed or leaves the content as it was."""
    raw = bytearray(state.sealed("row", content, indent).encode())
    place = data.draw(st.integers(0, len(raw) - 1))
    if data.draw(st.booleans()):
        del raw[place:]
    else:
        raw[place] ^= data.draw(st.integers(1, 255))
    with suppress(state.Damaged, ConfigError):
        assert state.parse("row", bytes(raw), "x") == content


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "no whole object"),
        (b"{}", "no whole object"),
        (b'{"a": 1}\n', "no whole object"),
        (b"\0" * 300, "no whole object"),
        (state.sealed("claim", {"a": 1}).encode(), "holds a 'claim' object where a 'row' object belongs"),
        (state.sealed("row", {"a": 1}).replace("1", "2", 1).encode(), "does not have the checksum"),
        (state.sealed("row", {"a": 1}).encode() * 2, "does not have the checksum"),
        (state.sealed("row", {"a": 1}).replace("row 1", "row 0").encode(), "of an older version"),
    ],
)
def test_what_is_wrong_is_named(raw: bytes, message: str):
    with pytest.raises(state.Damaged, match=message):
        state.parse("row", raw, "x")


def test_a_newer_format_is_refused_as_such():
    with pytest.raises(ConfigError, match="format row 7; this version of mirage_dist reads row 1"):
        state.parse("row", state.sealed("row", {"a": 1}).replace("row 1", "row 7").encode(), "x")


def test_lines_are_read_from_an_offset_and_within_a_limit(tmp_path, monkeypatch):
    file = tmp_path / "rows.jsonl"
    texts = [state.sealed("row", {"a": number}).encode() for number in range(3)]
    file.write_bytes(b"".join(texts) + b"cut")
    second = len(texts[0])
    assert [line for _, line in state.lines(file)] == [*texts, b"cut"]
    assert next(state.lines(file, second)) == (second, texts[1])
    monkeypatch.setattr(state, "LINE", Limit("line", len(texts[0]), "bytes", ""))
    assert len(list(state.lines(file))) == 4
    file.write_bytes(texts[0] + b"x" * 1000)
    with pytest.raises(state.Damaged, match=f"the line at byte {second} is longer than {second} bytes"):
        list(state.lines(file))


@pytest.mark.parametrize("place", ["nowhere", "zero", "fifo", "folder"])
def test_lines_of_what_is_no_regular_file(tmp_path, place):
    file = tmp_path / "rows.jsonl"
    if place == "zero":
        file.symlink_to("/dev/zero")
    elif place == "fifo":
        os.mkfifo(file)
    elif place == "folder":
        file.mkdir()
    with pytest.raises(state.Damaged, match="cannot be read"):
        next(state.lines(file))


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError):
        state.read("run", tmp_path / "manifest.json")
    for name, make in (("link", lambda f: f.symlink_to("/dev/full")), ("fifo", os.mkfifo), ("folder", os.mkdir)):
        make(tmp_path / name)
        with pytest.raises(state.Damaged, match=f"{name}: cannot be read"):
            state.read("run", tmp_path / name)
