"""Every verb that writes, at places where it cannot, beside another one, and killed: its output is whole or absent."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import forkserver
import pytest
from conftest import DEADLINE, until
from faults.events import Watch, draw
from faults.kills import FOREIGN, Start
from faults.processes import send, worker
from faults.verbs import ALL
from places import FILLED, IN_THE_WAY, KIBIBYTES, folder_with_files, linked_folder_with_files, litter, mounted, tree
from toy import Toy
from verbs import ENVIRONMENT, Done, Verb, run_here, verbs

from mirage_dist import cli, disk
from mirage_dist import config as configs

VERBS = ("prepare", "audit", "train", "eval", "eval --workers", "erasure", "report", "export")
AS_EVAL = ("eval --workers", "erasure")  # they begin with what `eval` does at its output
pytestmark = pytest.mark.usefixtures("plain_environment")


class Whole(NamedTuple):
    """A verb that nobody disturbed. out: its output path. counts: the events below `out`'s root, by kind."""

    out: str
    result: object
    seconds: float
    counts: Mapping[str, int]


@pytest.fixture(scope="module")
def made(tmp_path_factory, plain_environment) -> tuple[dict[str, Verb], dict[str, Whole]]:
    """Every verb, and what it makes in a folder whose parents do not exist."""
    folder, root = tmp_path_factory.mktemp("outputs"), tmp_path_factory.mktemp("root")
    (folder / "toy").mkdir()
    every, wholes = verbs(Toy(folder / "toy"), root / "new/parent/train"), {}
    for name in ("train", "eval", "prepare", "audit", "report", "export", "erasure"):
        out = "new/parent/train" if name == "eval" else f"new/parent/{name}"
        begin = time.monotonic()
        with Watch(root) as watch:
            start = Start(every[name].words(root / out), forkserver.python(), folder, folder / f"{name}.log")
            while start.alive():
                watch.look(0.01)
            watch.look(0)
        assert start.wait(0) == 0, (name, start.last())
        wholes[name] = Whole(out, every[name].result(root / out), time.monotonic() - begin, watch.counts)
        assert not litter(root / out), name
    wholes["eval --workers"] = wholes["eval"]
    return every, wholes


@pytest.fixture
def verb(request, made) -> Verb:
    return made[0][request.param]


def check_refused(end: Done, path: Path) -> None:
    """One sentence that names the path."""
    assert end.status in (1, 2), end
    assert "Traceback" not in end.errors + end.output, end
    faults = [line for line in end.errors.splitlines() if line.startswith("mirage: ")]
    assert len(faults) == 1 or "see above" in faults[-1], end
    assert any(str(path) in fault for fault in faults), end


@pytest.mark.parametrize("obstacle", IN_THE_WAY)
@pytest.mark.parametrize("verb", [name for name in VERBS if name not in AS_EVAL], indirect=True)
def test_what_lies_at_the_output_is_named_or_left_alone(verb, obstacle, tmp_path):
    out = tmp_path / "parent" / "out"
    out.parent.mkdir()
    obstacle(out)
    before = tree(tmp_path)
    end = verb.run(out)
    after = tree(tmp_path)
    assert {name: after.get(name) for name in before} == before, end
    if end.status:
        check_refused(end, out.parent)
        assert after == before
    else:  # beside the files of a user
        assert obstacle in (folder_with_files, linked_folder_with_files)
    assert not [name for name in litter(tmp_path) if name not in before]


@pytest.mark.parametrize("obstacle", IN_THE_WAY[:4])
def test_a_demo_names_what_lies_at_its_output(obstacle, tmp_path, capsys):
    out = tmp_path / "parent" / "out"
    out.parent.mkdir()
    obstacle(out)
    before = tree(tmp_path)
    status = cli.main(["demo", "--out", str(out)])
    check_refused(Done(status, *capsys.readouterr()), out.parent)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("verb", [name for name in VERBS if name not in AS_EVAL], indirect=True)
def test_a_read_only_place_is_named(verb, tmp_path):
    with mounted(tmp_path / "disk", "-o", "ro") as possible:
        out = (tmp_path / "disk" if possible else Path("/sys/mirage")) / "out"
        check_refused(verb.run(out), out.parent)


@pytest.mark.parametrize("verb", VERBS, indirect=True)
def test_a_full_disk_is_named_and_the_same_command_succeeds_once_there_is_room(verb, made, tmp_path):
    """Where nothing can be mounted, every file is cut at the length that there is room for."""
    folder = tmp_path / "disk"
    with mounted(folder, "-o", "size=64m") as possible:
        (folder / "theirs").write_text("theirs")
        if possible:
            room = shutil.disk_usage(folder).free - KIBIBYTES * 1024
            (folder / FILLED).write_bytes(bytes(room))
        before = tree(folder)
        end = verb.run(folder / "out", None if possible else 500)
        check_refused(end, folder)
        after = tree(folder)
        assert {name: after.get(name) for name in before} == before
        assert not litter(folder), end
        assert verb.resumed or after == before
        (folder / FILLED).unlink(missing_ok=True)
        end = verb.run(folder / "out")
        assert end.status == 0, end
        assert verb.result(folder / "out") == made[1][verb.name].result
        assert not litter(folder)


@pytest.mark.parametrize("verb", ["audit", "report"], indirect=True)
def test_on_a_full_disk_an_earlier_output_stays_as_it_was(verb, tmp_path):
    out = tmp_path / "out"
    assert verb.run(out).status == 0
    for file in out.iterdir():
        file.write_bytes(b"earlier " + file.read_bytes())
    before = tree(tmp_path)
    check_refused(verb.run(out, 5000), out)
    assert tree(tmp_path) == before


@pytest.fixture
def start(tmp_path):
    """Starts a verb as a process of its own."""
    starts = []
    (tmp_path / "tmp").mkdir()

    def start(verb: Verb, out: Path) -> Start:
        log = tmp_path / f"{len(starts)}.log"
        starts.append(Start(verb.words(out), forkserver.python(), tmp_path / "tmp", log))
        return starts[-1]

    yield start
    for each in starts:
        each.end()
    assert not litter(tmp_path / "tmp")


def end_of(start: Start) -> Done:
    status = start.wait(DEADLINE)
    assert status is not None, start.last()
    return Done(status, "", start.last())


@pytest.mark.parametrize("verb", ["prepare", "audit", "eval", "erasure", "report", "export"], indirect=True)
def test_of_two_at_once_one_makes_the_output_and_the_other_waits_shares_or_is_refused(verb, made, tmp_path, start):
    out = tmp_path / "parent" / "out"
    ends = [end_of(each) for each in (start(verb, out), start(verb, out))]
    refused = [end for end in ends if end.status]
    assert len(refused) <= (verb.name in ("erasure", "export")), ends
    for end in refused:
        check_refused(end, out)
    assert verb.result(out) == made[1][verb.name].result
    assert not litter(out.parent)


@pytest.mark.parametrize("verb", ["train"], indirect=True)
def test_a_second_start_in_the_run_directory_of_a_living_one_is_refused(verb, made, tmp_path, start):
    out = tmp_path / "parent" / "out"
    first = start(verb, out)
    until((out / "metrics.jsonl").exists, first.process)  # it holds the directory, and no lock meanwhile
    number = worker(first.process.pid)
    assert number is not None
    send(number, signal.SIGSTOP)  # it lives, however long the second one takes
    try:
        check_refused(end_of(start(verb, out)), out)
    finally:
        send(number, signal.SIGCONT)
    end = end_of(first)
    assert end.status == 0, end
    assert verb.result(out) == made[1]["train"].result
    assert not litter(out.parent)


@pytest.mark.parametrize("seed", [2])
@pytest.mark.parametrize("verb", [name for name in VERBS if name != "train"], indirect=True)
def test_killed_at_a_random_moment_and_started_again_the_output_is_that_of_one_never_killed(
    verb, seed, made, tmp_path, start
):
    """Training: tests/distributed/test_faults.py; many kills in a row: `python -m tests.faults`."""
    rng, whole, root = random.Random(f"{seed}/{verb.name}"), made[1][verb.name], tmp_path / "root"
    out = root / whole.out
    foreign = [out.with_name(f"{out.name}{end}") / "note.txt" for end in (".0123abcd.tmp", ".0123abcd.gone", "-notes")]
    for file in foreign:
        file.parent.mkdir(parents=True)
        file.write_text(FOREIGN)
    with Watch(root) as watch:
        first = start(verb, out)
        killed = draw(rng, whole.seconds, whole.counts).wait(watch, first.alive, DEADLINE)
    if killed:
        first.kill(ALL, rng)
        assert first.quiet() is not None
    end = verb.run(out)
    if end.status:
        assert verb.name == "export", end
        check_refused(end, out)
    assert verb.result(out) == made[1][verb.name].result
    assert [file.read_text() for file in foreign] == [FOREIGN] * len(foreign)
    for file in foreign:
        shutil.rmtree(file.parent)
    assert not litter(out.parent)


def test_prepare_refuses_a_bad_place_before_it_makes_or_reads_anything(made, tmp_path):
    place = tmp_path / "out"
    place.write_text("theirs")
    for out in (place, place / "below"):
        words = [*made[0]["prepare"].words(out), f"world.dir={tmp_path}/world", "safety=[]"]
        before = tree(tmp_path)
        check_refused(run_here(words), place)
        assert tree(tmp_path) == before


def test_a_second_demo_in_one_place_is_refused(tmp_path, capsys):
    with disk.alone(tmp_path):
        status = cli.main(["demo", "--out", str(tmp_path)])
    check_refused(Done(status, *capsys.readouterr()), tmp_path)
    assert not tree(tmp_path)


@pytest.mark.parametrize("words", ["config configs/eval/demo.yaml", "config -h"])
@pytest.mark.parametrize("how", ["full", "closed", "unread"])
def test_a_result_that_cannot_be_printed_is_no_success(words, how):
    command = f"'{sys.executable}' -m mirage_dist.cli {words}"
    command += {"full": " >/dev/full", "closed": " >&-", "unread": ""}[how]
    reading, writing = os.pipe()
    os.close(reading)
    pipes = {"stdout": writing, "stderr": subprocess.PIPE}
    end = subprocess.run(["bash", "-c", command], env={**os.environ, **ENVIRONMENT}, text=True, **pipes)
    os.close(writing)
    assert end.returncode == 1
    assert "Traceback" not in end.stderr
    assert "Exception ignored" not in end.stderr
    assert end.stderr.splitlines()[-1].startswith("mirage: the standard output ")
    assert end.stderr.count("mirage: ") == 1


def test_a_bug_keeps_its_traceback_and_asks_for_a_report(monkeypatch, capsys):
    def fail(*_):
        raise KeyError("a bug")

    monkeypatch.setattr(configs, "load_any", fail)
    assert cli.main(["config", "configs/eval/demo.yaml"]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("Traceback")
    assert "KeyError: 'a bug'" in errors
    assert errors.endswith("mirage: this is a bug in mirage_dist; please report it with this traceback\n")
