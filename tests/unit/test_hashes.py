"""A hash that is remembered is the file's, whatever happened to the file or to the store, and is not computed twice."""

import hashlib
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
from opens import Opens

from mirage_dist import state
from mirage_dist.disk import hashes
from mirage_dist.model import directory

SETTLED = 0.05  # seconds; long for the clock of the file system that tests run on


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv(hashes.PLACE, str(tmp_path / "cache"))
    monkeypatch.delenv(hashes.INSIST, raising=False)
    monkeypatch.setattr(hashes, "SETTLED_SECONDS", SETTLED)
    return tmp_path / "cache"


@pytest.fixture
def files(tmp_path) -> list[Path]:
    folder = tmp_path / "files"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.bin").write_bytes(bytes([number]) * 1000)
    time.sleep(2 * SETTLED)
    return sorted(folder.iterdir())


def real(files) -> dict[str, str]:
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def opened(files) -> int:
    """How many files are opened to hash them, which gives the real hashes."""
    with Opens(files[0].parent) as opens:
        digests = hashes.sha256s(files)
    assert digests == real(files)
    return opens.count


def test_what_has_not_changed_is_read_once(files, monkeypatch):
    assert opened(files[:3]) == 3
    assert opened(files[:3]) == 0
    assert opened(files) == 1
    monkeypatch.setenv(hashes.INSIST, "1")
    assert opened(files) == 4
    monkeypatch.setenv(hashes.INSIST, "0")
    assert opened(files) == 0


def replace_in_place(file: Path) -> None:
    status = file.stat()
    file.write_bytes(b"x" * status.st_size)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def replace_by_rename(file: Path) -> None:
    status, other = file.stat(), file.with_name("other")
    other.write_bytes(b"y" * status.st_size)
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(other, file)


def restore_a_copy(file: Path) -> None:
    shutil.copy2(file, file.with_name("copy"))
    replace_in_place(file)
    os.replace(file.with_name("copy"), file)


@pytest.mark.parametrize("change", [replace_in_place, replace_by_rename, restore_a_copy])
def test_a_file_of_the_same_size_and_time_is_read_again(files, change):
    opened(files)
    change(files[1])
    assert hashes.sha256s(files) == real(files)
    time.sleep(2 * SETTLED)
    assert opened(files) == 1
    assert opened(files) == 0


def test_a_file_that_changes_within_a_tick_of_the_clock_is_never_taken_for_its_former_self(files):
    """Several writes share one time stamp on most file systems, and here the size too."""
    same = 0
    for number in range(300):
        files[0].write_bytes(number.to_bytes(2, "little") * 500)
        stamp = hashes.sha256(files[0]), files[0].stat().st_ctime_ns
        files[0].write_bytes((number + 1).to_bytes(2, "little") * 500)
        same += files[0].stat().st_ctime_ns == stamp[1]
        assert hashes.sha256(files[0]) == real(files)[str(files[0])] != stamp[0]
    assert same or files[0].stat().st_ctime_ns % 1000  # a clock as fine as that has no such ticks


def test_a_file_from_the_future_is_not_remembered(files):
    os.utime(files[0], (time.time() + 3600, time.time() + 3600))
    time.sleep(2 * SETTLED)
    assert [opened(files) for _ in range(2)] == [4, 1]


def record(store: Path) -> Path:
    [file] = store.rglob("*.json")
    return file


@pytest.mark.parametrize("length", [0, 1, 40, -1])
def test_a_store_that_was_cut_or_overwritten_is_as_an_empty_one(files, store, length):
    opened(files)
    raw = record(store).read_bytes()
    record(store).write_bytes(raw[:length] + bytes(20) + raw[length:][20:])
    assert [opened(files) for _ in range(2)] == [4, 0]


@pytest.mark.parametrize(
    "content",
    [
        {"folder": "/elsewhere", "files": {}},
        {"folder": "{folder}", "files": []},
        {"folder": "{folder}", "files": {"0.bin": None}},
        {"folder": "{folder}", "files": {"0.bin": [1000, 0, 0, "inode", "digest"]}},
        {"folder": "{folder}", "files": {"0.bin": [1000, 1, 2]}},
        {"folder": "{folder}", "files": {"0.bin": "{identity} no digest"}},
        {"folder": "{folder}", "files": {"0.bin": "{identity} 7"}},
        {"files": 7},
    ],
)
def test_a_whole_record_of_another_form_is_as_an_empty_one(files, store, content):
    opened(files)
    folder = str(files[0].parent)
    if "folder" in content and content["folder"] == "{folder}":
        content["folder"] = folder
        row = content["files"].get("0.bin") if isinstance(content["files"], dict) else None
        if isinstance(row, str):
            status, end = files[0].stat(), row.removeprefix("{identity} ")
            identity = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
            content["files"]["0.bin"] = [*identity, int(end) if end.isdigit() else end]
    record(store).write_text(state.sealed("hashes", content))
    assert [opened(files) for _ in range(2)] == [4, 0]


def test_a_record_of_another_user_or_a_newer_version_is_not_believed(files, store, monkeypatch):
    opened(files)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert opened(files) == 4
    monkeypatch.undo()
    monkeypatch.setenv(hashes.PLACE, str(store))
    file = record(store)
    monkeypatch.setitem(state.VERSIONS, "hashes", 2)
    file.write_text(state.sealed("hashes", {"folder": str(files[0].parent), "files": {}}))
    monkeypatch.setitem(state.VERSIONS, "hashes", 1)
    assert opened(files) == 4


@pytest.mark.parametrize("place", ["a file", "below a file", "none"])
def test_without_a_place_for_the_store_everything_is_read(files, tmp_path, monkeypatch, place):
    (tmp_path / "blocked").write_text("")
    if place == "none":
        for name in (hashes.PLACE, "XDG_CACHE_HOME", "HOME"):
            monkeypatch.setenv(name, "")
        assert hashes.place() is None
    else:
        monkeypatch.setenv(hashes.PLACE, str(tmp_path / "blocked" / ("deeper" if place == "below a file" else "")))
    assert [opened(files) for _ in range(2)] == [4, 4]


def test_the_place_is_the_users_cache_unless_a_variable_names_another(monkeypatch):
    for name, value, expected in (
        ("HOME", "/home/somebody", "/home/somebody/.cache/mirage_dist"),
        ("XDG_CACHE_HOME", "relative", "/home/somebody/.cache/mirage_dist"),
        ("XDG_CACHE_HOME", "/caches", "/caches/mirage_dist"),
        (hashes.PLACE, "/mine", "/mine"),
    ):
        if name == "HOME":
            monkeypatch.delenv(hashes.PLACE)
            monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setenv(name, value)
        assert hashes.place() == Path(expected)


def test_writers_at_the_same_time_leave_a_store_that_is_right(files, store):
    """Each knows some of the files; what one undoes of the other's is read again, and nothing is ever wrong."""
    results, errors = [], []

    def write(own):
        try:
            results.extend(hashes.sha256s(own).items() for _ in range(20))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(own,)) for own in (files[:2], files[1:3], files[2:])]
    for thread in threads:
        thread.start()
    for _ in range(20):
        shutil.rmtree(store, ignore_errors=True)
    for thread in threads:
        thread.join()
    assert not errors
    assert {pair for result in results for pair in result} == set(real(files).items())
    opened(files)
    assert opened(files) == 0


def test_of_processes_that_want_a_large_folder_at_once_one_reads_it(files, monkeypatch):
    monkeypatch.setattr(hashes, "SHARED_BYTES", 1000)
    for file in files:
        os.utime(file)  # young, so that the reader lets them settle
    with Opens(files[0].parent) as opens:
        threads = [threading.Thread(target=hashes.sha256s, args=(files,)) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert opens.count == len(files)
    assert opened(files) == 0


def test_a_reader_that_never_ends_is_not_waited_for(files, store, monkeypatch):
    monkeypatch.setattr(hashes, "SHARED_BYTES", 1000)
    folder = str(files[0].parent)
    file = hashes.place() / "hashes" / (hashlib.sha256(folder.encode()).hexdigest()[:32] + ".lock")
    file.parent.mkdir(parents=True)
    with file.open("w") as handle:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX)
        assert opened(files) == 4


def test_a_models_files_are_read_once_and_any_change_gives_another_hash(toy, tmp_path):
    model = shutil.copytree(toy.root / "model", tmp_path / "model")
    time.sleep(2 * SETTLED)
    before = directory.model_hash(model)
    with Opens(model) as opens:
        assert directory.model_hash(model) == before
        assert directory.processing_hash(model) == directory.processing_hash(model)
    assert not opens.names, opens.names
    replace_in_place(model / "model.safetensors")
    assert directory.model_hash(model) != before
