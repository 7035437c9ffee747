"""Removal of folders: only what this package made, whole, and whoever else is at work there."""

import errno
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from mirage_dist import disk
from mirage_dist.disk import removal
from mirage_dist.liveness import Owner
from mirage_dist.schema import ConfigError


def test_only_leftovers_of_dead_makers_are_removed(tmp_path):
    """Neither for a name alone, nor while the maker lives, nor where nobody here can see whether it does."""
    dead = Owner.current().record() | {"process": "1"}  # another process had this number
    ours = ["o[u]t.01234567.tmp", "o[u]t.89abcdef.gone"]
    others = [
        "o[u]t",
        "o[u]t.tmp",
        "o[u]t.0123456.tmp",
        "o[u]t.01234567.tmp.bak",
        "o[u]t2.01234567.tmp",
        "out.01234567.tmp",
    ]
    for name in ours + others:
        disk.own(tmp_path / name, Owner.from_record(dead))
        (tmp_path / name / "file").write_text("")
    disk.own(tmp_path / "o[u]t.aaaaaaaa.tmp")
    disk.own(tmp_path / "o[u]t.bbbbbbbb.tmp", Owner.from_record(dead | {"host": "elsewhere"}))
    (tmp_path / "o[u]t.cccccccc.tmp").mkdir()
    (tmp_path / "o[u]t.cccccccc.tmp/theirs").write_text("")
    kept = [*others, *(f"o[u]t.{c * 8}.tmp" for c in "abc")]
    assert [path.name for path in disk.leftovers(tmp_path / "o[u]t")] == ours
    disk.remove_leftovers(tmp_path / "o[u]t")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)
    disk.remove_leftovers(tmp_path / "missing" / "out")


def test_a_maker_that_was_killed_leaves_what_the_next_removes(tmp_path):
    """Also in a container, where every maker has the same process number."""
    script = (
        "import os, sys; from pathlib import Path; from mirage_dist import disk\n"
        "with disk.folder(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'half').write_text('half'); os.kill(os.getpid(), 9)\n"
    )
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", script, str(tmp_path / "out")]).returncode == -9
        assert len(list(tmp_path.iterdir())) == 1
    with disk.folder(tmp_path / "out") as folder:
        (folder / "file").write_text("whole")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["out", "out/file"]


@pytest.mark.parametrize("write", ["files", "folder"])
def test_what_a_maker_left_that_was_killed_once_the_output_had_its_name_is_removed(tmp_path, write):
    """Also by a later writer that is refused."""
    left = disk.own(tmp_path / "out.01234567.tmp", Owner.from_record(Owner.current().record() | {"process": "1"}))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/sign").write_text("ours, earlier")
    if write == "files":
        with disk.files(tmp_path / "out", ("sign", "ours")) as folder:
            (folder / "sign").write_text("ours")
    else:
        with pytest.raises(ConfigError, match="out exists"), disk.folder(tmp_path / "out"):
            pass
    assert not left.exists()
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["out", "out/sign"]


def test_an_interrupted_removal_is_still_known_as_ours(tmp_path, monkeypatch):
    folder = disk.own(tmp_path / "folder")
    (folder / "a").write_text("")
    (folder / "b").mkdir()

    def fail(path):
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(removal, "REMOVAL_PAUSE", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(removal.shutil, "rmtree", fail)
        with pytest.raises(OSError, match="cannot be removed"):
            disk.remove_own(folder)
    (gone,) = tmp_path.iterdir()
    assert disk.remove_own(gone)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_somebody_else_made_is_neither_taken_nor_removed(tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "file").write_text("theirs")
    (tmp_path / "link").symlink_to(theirs)
    for path in (theirs, tmp_path / "link", tmp_path / "missing", theirs / "file"):
        assert not disk.remove_own(path)
    with pytest.raises(ConfigError, match="mirage_dist did not make it; move it away"):
        disk.own(theirs)
    assert (theirs / "file").read_text() == "theirs"


def test_removal_follows_no_link_and_misses_nothing(tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("theirs")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link").symlink_to(kept)
    (tmp_path / "link").symlink_to(kept)
    (tmp_path / "file").write_text("")
    for name in ("folder", "link", "file", "missing"):
        disk.remove(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (kept / "file").read_text() == "theirs"


def test_a_detached_folder_is_out_of_reach_of_its_former_owner(tmp_path):
    folder = tmp_path / "work-a.tmp"
    folder.mkdir()
    gone = disk.detach(folder)
    with pytest.raises(FileNotFoundError):
        disk.write(tmp_path / "file", "late", workspace=folder)
    assert disk.detach(gone).name.count(".gone") == 1


def test_a_removal_ends_although_somebody_still_writes(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    real, calls = disk.Path.rmdir, []

    def rmdir(path):
        calls.append(path)
        real(path)
        if len(calls) < 3:
            path.mkdir()  # a former owner that holds the folder open

    monkeypatch.setattr(disk.Path, "rmdir", rmdir)
    monkeypatch.setattr(removal, "REMOVAL_PAUSE", 0.0)
    disk.remove(folder)
    assert len(calls) == 3
    assert list(tmp_path.iterdir()) == []


def test_a_maker_that_died_before_its_mark_leaves_nothing_for_an_hour(tmp_path):
    (tmp_path / "out.01234567.tmp").mkdir()
    (tmp_path / "out.89abcdef.tmp").mkdir()
    (tmp_path / "out.89abcdef.tmp" / removal.UNFINISHED).write_text("{")
    (tmp_path / "theirs.01234567.tmp").mkdir()
    (tmp_path / "theirs.01234567.tmp/file").write_text("theirs")
    disk.remove_leftovers_in(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs.01234567.tmp"]


def test_a_living_maker_gets_its_folder_although_others_remove_what_has_no_mark(tmp_path):
    ended = threading.Event()

    def remove():
        while not ended.is_set():
            disk.remove_leftovers(tmp_path / "out")
            ended.wait(0.0005)

    with ThreadPoolExecutor(3) as pool:
        removers = [pool.submit(remove) for _ in range(3)]
        try:
            for number in range(300):
                folder = disk.own(tmp_path / f"out.{number:08x}.tmp")
                (folder / "file").write_text("whole")
                assert {entry.name for entry in folder.iterdir()} == {disk.MARK, "file"}
        finally:
            ended.set()
        assert [future.result() for future in removers] == [None] * 3
