"""A dry run leaves the run as it was, needs at least the memory that the run needs, and restores what it saved."""

import re
import signal
from pathlib import Path

import pytest
from conftest import launch, metrics, until

from mirage_dist.disk import removal
from mirage_dist.liveness import Owner

pytestmark = pytest.mark.usefixtures("plain_environment")
RECIPE = "configs/train/demo_npo.yaml"
SHORT = ("train.max_steps=8", "train.global_batch=16", "train.micro_batch=4", "train.save_every=4")
DRY = "train.dry_run=true"


def tree(folder: Path) -> dict[str, tuple]:
    """Content and modification time of everything below a folder."""
    entries = {str(p.relative_to(folder)): p for p in folder.rglob("*")}
    return {n: (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"") for n, p in entries.items()}


@pytest.fixture(scope="module")
def run(toy):
    """A finished run of two ranks, alone in its folder."""
    folder = toy.root / "dry" / "npo"
    launch(2, "train", RECIPE, *toy.overrides("npo", folder), *SHORT)
    return folder


@pytest.fixture(scope="module")
def words(toy, run):
    return ("train", RECIPE, *toy.overrides("npo", run), *SHORT, DRY)


@pytest.fixture(scope="module")
def report(run, words):
    """(what a dry run beside the finished run printed, that folder before it, and after it)."""
    before = tree(run.parent)
    # As a dry run that was killed leaves it: its process is dead.
    dead = Owner(**{**Owner.current().record(), "process": "1"})
    removal.own(removal.sibling(run.with_name("npo.dry_run")), dead)
    output = launch(2, *words).stdout
    return output, before, tree(run.parent)


def test_the_run_is_byte_for_byte_what_it_was(report):
    output, before, after = report
    assert before == after
    assert "nothing of the run was touched" in output


def mib(text: str) -> float:
    number, unit = re.fullmatch(r"([\d.]+) (MiB|GiB)", text).groups()
    return float(number) * {"MiB": 1, "GiB": 1024}[unit]


def test_the_predicted_peak_is_no_less_than_the_runs(report, run):
    predicted = re.search(r"peak memory +([\d.]+ [MG]iB) of ", report[0])[1]
    assert mib(predicted) >= max(line["memory_mib"] for line in metrics(run))
    phases = re.findall(r"^    (\w.*?)  +([\d.]+ [MG]iB)$", report[0], re.MULTILINE)
    assert [name for name, _ in phases] == [
        "libraries and data",
        "model and engine",
        "reference",
        "data",
        "forward and backward",
        "update",
        "save",
        "load",
    ]
    assert max(mib(size) for _, size in phases) * 1.05 == pytest.approx(mib(predicted), abs=0.2)


def test_the_report_has_time_disk_and_a_state_that_came_back(report, run):
    output = report[0]
    assert "(bitwise what was saved)" in output
    assert re.search(r"step +[\d.]+ s +\(the first", output)
    assert re.search(r"the whole run +about .+\(until 20\d\d-\d\d-\d\d \d\d:\d\d if it starts now; at most", output)
    assert "8 steps; an average batch has" in output
    # The checkpoint of a state that has made its steps is as large as the run's own.
    [saved] = re.findall(r"save +[\d.]+ s +\(([\d.]+ [MG]iB)\)", output)
    own = sum(f.stat().st_size for f in (run / "checkpoints/step-000008").iterdir())
    assert mib(saved) == pytest.approx(own / 2**20, abs=0.1)


def test_term_in_the_middle_leaves_nothing(run, words):
    before = tree(run.parent)

    def leftovers():
        return [p for p in run.parent.iterdir() if p != run]

    process = launch(2, *words, start=True)
    until(lambda: leftovers() and any(leftovers()[0].glob("work-*.tmp")), process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert tree(run.parent) == before


def test_state_of_another_stage_and_objective_comes_back(toy):
    folder = toy.root / "dry_rmu" / "rmu"
    own = ("deepspeed=configs/deepspeed/zero2.json", "train.save_in_background=false", "train.export=merged")
    done = launch(1, "train", "configs/train/demo_rmu.yaml", *toy.overrides("rmu", folder), *SHORT, *own, DRY)
    assert "(bitwise what was saved)" in done.stdout
    assert not folder.parent.exists()
