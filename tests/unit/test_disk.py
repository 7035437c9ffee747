"""Files and folders appear whole or not at all, with the right mode; digests."""

import errno
import hashlib
import json
import os
import re
import resource
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirage_dist import disk
from mirage_dist.schema import ConfigError, RunError


@contextmanager
def umask(value: int):
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@given(content=st.lists(st.text(st.characters(exclude_categories=["Cs"])) | st.binary(), max_size=5))
def test_content_in_any_form_is_written_and_hashed(tmp_path_factory, content):
    file = tmp_path_factory.mktemp("disk") / "new" / "file"
    written = disk.write(file, content)
    expected = b"".join(piece.encode() if isinstance(piece, str) else piece for piece in content)
    assert file.read_bytes() == expected
    assert written == disk.Written(len(expected), hashlib.sha256(expected).hexdigest())
    assert disk.sha256(file) == written.sha256 == disk.sha256_text(expected)


def test_pieces_longer_than_a_chunk_and_of_wider_elements_are_written_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "CHUNK_BYTES", 7)
    values = np.arange(100, dtype=np.float32)
    written = disk.write(tmp_path / "file", [b"head", values.data])
    assert (tmp_path / "file").read_bytes() == b"head" + values.tobytes()
    assert written.bytes == 404


def cut(at: int):
    yield "new " * at
    raise RuntimeError("the source of the content failed")


@pytest.mark.parametrize("function", [disk.write, disk.create])
@pytest.mark.parametrize("at", [0, 1, 100_000])
def test_a_write_that_fails_half_way_leaves_the_old_file_and_no_temporary(tmp_path, function, at):
    file = tmp_path / "file"
    file.write_text("old")
    with pytest.raises(RuntimeError):
        function(file, cut(at))
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_system_call_leaves_the_old_file_and_no_temporary(tmp_path, monkeypatch, call):
    file = tmp_path / "file"
    disk.write(file, "old")

    def fail(*_):
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="input/output"):
        disk.write(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_durable_file_is_synced_before_it_gets_its_name_and_its_folder_after(tmp_path, monkeypatch):
    calls, real = [], {name: getattr(os, name) for name in ("fsync", "replace", "link")}

    def fsync(descriptor):
        calls.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real["fsync"](descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    for name in ("replace", "link"):
        monkeypatch.setattr(os, name, lambda a, b, name=name: (calls.append(name), real[name](a, b)))
    disk.write(tmp_path / "a", "text")
    disk.create(tmp_path / "b", "text")
    assert [re.sub(r"\.[0-9a-f]{8}\.tmp", "", c) for c in calls] == [
        *(str(tmp_path / "a" / "a"), "replace", str(tmp_path)),
        *(str(tmp_path / "b" / "b"), "link", str(tmp_path)),
    ]
    calls.clear()
    disk.write(tmp_path / "a", "text", durable=False)
    assert calls == ["replace"]


def test_of_several_creators_exactly_one_wins_and_nobody_replaces(tmp_path):
    file, start = tmp_path / "folder" / "file", threading.Barrier(8)

    def attempt(number: int) -> bool:
        start.wait()
        return disk.create(file, str(number) * 1000, durable=False)

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(attempt, range(8)))
    assert sum(results) == 1
    assert file.read_text() == str(results.index(True)) * 1000
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize(("mask", "plain"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664), (0o000, 0o666)])
def test_modes_follow_the_umask_unless_private(tmp_path, mask, plain):
    with umask(mask):
        disk.write(tmp_path / "plain", "")
        disk.write(tmp_path / "private", "", private=True)
        disk.create(tmp_path / "created", "")
        with disk.folder(tmp_path / "folder") as folder:
            (folder / "sub").mkdir(mode=0o700)
            os.close(os.open(folder / "sub" / "weights", os.O_CREAT | os.O_WRONLY, 0o600))  # as safetensors does
        with disk.folder(tmp_path / "own", private=True) as own:
            (own / "answers").write_text("")
    assert mode(tmp_path / "plain") == mode(tmp_path / "folder" / "sub" / "weights") == plain
    assert mode(tmp_path / "folder") == mode(tmp_path / "folder" / "sub") == 0o777 & ~mask
    assert mode(tmp_path / "private") == mode(tmp_path / "created") == mode(tmp_path / "own" / "answers") == 0o600
    assert mode(tmp_path / "own") == 0o700


def test_a_library_that_seeks_writes_through_a_handle(tmp_path):
    with disk.writing(tmp_path / "part.npz") as handle:
        np.savez(handle, values=np.arange(3))
        assert not (tmp_path / "part.npz").exists()
    assert np.load(tmp_path / "part.npz")["values"].tolist() == [0, 1, 2]
    with suppress(KeyError), disk.writing(tmp_path / "other") as handle:
        handle.write(b"half")
        raise KeyError
    assert [file.name for file in tmp_path.iterdir()] == ["part.npz"]


def test_a_workspace_that_was_removed_does_not_come_back(tmp_path):
    workspace, file = tmp_path / "workspace", tmp_path / "file"
    for call in (
        lambda: disk.write(file, "text", workspace=workspace),
        lambda: disk.create(file, "text", workspace=workspace),
        lambda: disk.folder(tmp_path / "folder", workspace=workspace).__enter__(),
    ):
        with pytest.raises(FileNotFoundError):
            call()
    assert list(tmp_path.iterdir()) == []
    workspace.mkdir()
    disk.write(file, "text", workspace=workspace)
    assert file.read_text() == "text"
    assert list(workspace.iterdir()) == []


@pytest.mark.parametrize("number", disk.REFUSALS)
def test_a_disk_that_accepts_no_more_data_is_named(tmp_path, number):
    with pytest.raises(RunError) as raised, disk.refusals(tmp_path, "every checkpoint in it is whole"):
        raise OSError(number, os.strerror(number))
    reason = f"[Errno {number}] {os.strerror(number)}"
    assert str(raised.value) == f"{tmp_path}: cannot be written ({reason}); every checkpoint in it is whole"


@pytest.mark.parametrize("size", [200, 1_000_000])
def test_a_disk_that_stops_accepting_data_half_way_is_named_and_keeps_nothing(tmp_path, size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(RunError, match="File too large"), disk.refusals(tmp_path, "nothing is lost"):
            disk.write(tmp_path / "file", "x" * size)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_other_errors_pass_unchanged(tmp_path):
    with pytest.raises(PermissionError), disk.refusals(tmp_path, "…"):
        raise PermissionError(errno.EACCES, "no")


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    out = tmp_path / "new" / "out"
    with disk.folder(out) as folder:
        (folder / "file").write_text("text")
        assert not out.exists()
    assert (out / "file").read_text() == "text"
    assert list(out.parent.iterdir()) == [out]
    with pytest.raises(ConfigError, match="exists"), disk.folder(out):
        pytest.fail("the block must not start")
    with suppress(KeyError), disk.folder(tmp_path / "other") as folder:
        (folder / "file").write_text("half")
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize("shared", [False, True])
def test_of_two_writers_of_a_folder_the_first_one_wins(tmp_path, shared):
    out = tmp_path / "out"
    out.mkdir()  # an empty folder is replaced

    def second() -> None:
        with disk.folder(out, shared=shared) as folder:
            (folder / "file").write_text("second")
            with disk.folder(out, shared=shared) as other:
                (other / "file").write_text("first")

    if shared:
        second()
    else:
        with pytest.raises(ConfigError, match="another process"):
            second()
    assert (out / "file").read_text() == "first"
    assert list(tmp_path.iterdir()) == [out]


def test_a_folder_that_was_removed_while_it_was_filled_is_not_published(tmp_path):
    out, workspace = tmp_path / "out", tmp_path / "workspace"
    workspace.mkdir()

    def fill() -> None:
        with disk.folder(out, workspace=workspace) as folder:
            os.rename(workspace, tmp_path / "gone")
            folder.mkdir(parents=True)  # as save_pretrained does
            (folder / "file").write_text("half of the files")

    with pytest.raises(RunError, match="was removed while it was written"):
        fill()
    assert not out.exists()


def test_what_is_published_replaces_a_file_and_an_empty_folder(tmp_path):
    (tmp_path / "new").write_text("new")
    (tmp_path / "file").write_text("old")
    disk.publish(tmp_path / "new", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "new"
    (tmp_path / "step.tmp").mkdir()
    (tmp_path / "step.tmp" / "shard").write_text("")
    disk.publish(tmp_path / "step.tmp", tmp_path / "step")
    assert (tmp_path / "step" / "shard").exists()


def test_files_are_hashed_with_their_names(tmp_path):
    for folder, names in {"a": ("x", "y"), "b": ("y", "x"), "c": ("x", "z")}.items():
        (tmp_path / folder).mkdir()
        for content, name in enumerate(names):
            (tmp_path / folder / name).write_text(str(content))
    values = {folder: disk.sha256_files((tmp_path / folder).iterdir(), tmp_path / folder) for folder in "abc"}
    assert len(set(values.values())) == 3
    assert values["a"] == disk.sha256_files(sorted((tmp_path / "a").iterdir(), reverse=True), tmp_path / "a")
    name, content = b"x", hashlib.sha256(b"0").digest()
    other = hashlib.sha256(name + b"\0" + content + b"y\0" + hashlib.sha256(b"1").digest()).hexdigest()
    assert values["a"] == other


trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(tree=trees)
def test_the_digest_of_a_tree_is_that_of_its_sorted_json(tree):
    assert disk.digest(tree) == hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
    assert disk.digest({"a": tree, "b": 1}) == disk.digest({"b": 1, "a": tree})
    assert disk.digest({"a": tree, "b": 1}) != disk.digest({"a": tree, "b": 2})


def test_what_json_cannot_hold_has_a_digest_only_where_the_caller_says_how():
    with pytest.raises(TypeError):
        disk.digest({"value": 1j})
    assert disk.digest({"value": 1j}, default=str) == disk.digest({"value": "1j"})


def test_the_module_imports_no_torch():
    code = "import sys, mirage_dist.disk; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
