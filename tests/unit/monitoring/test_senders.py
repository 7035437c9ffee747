"""Whatever W&B does, a run goes on at its pace with one warning, and W&B holds each step once in the end."""

import json
import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import tensorboard_scalars
from wandb.util import get_core_path

from mirage_dist import state
from mirage_dist.monitoring import sinks, wandb_files
from mirage_dist.monitoring.process import Sender

IDENTITY = "0a1b2c3d"


class Metrics:
    """A metrics.jsonl that grows, and the options of its W&B run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = (folder / "metrics.jsonl").open("a")
        self.reader = (folder / "metrics.jsonl").open("rb")
        self.options = {"mode": "offline", "project": "p", "id": IDENTITY, "dir": str(folder), "name": "n"}
        self.options |= {
            "config": {"seed": 1},
            "group": "g",
            "tags": ["t"],
            "watched": os.getpid(),
            "evaluation": False,
        }

    def sender(self, sink: str = "wandb") -> Sender:
        return Sender("run", sink, self.options, self.reader.fileno())

    def add(self, *steps: int) -> None:
        for step in steps:
            record = {"step": step, "loss": 1 / step, "terms": {"ce": 0.5, "kl": None}, "tokens_per_s": 9.0}
            self.file.write(state.sealed("metrics", record))
        self.file.flush()

    def records(self, kind: str) -> list:
        """The offline files' records of this kind, as W&B's own program reads them."""
        records = []
        for file in wandb_files.offline_files(self.folder / "wandb", IDENTITY):
            command = [get_core_path(), "leet", "inspect", "--json", "--run-file", str(file), str(file.parent)]
            lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
            records += [record[kind] for record in map(json.loads, lines) if kind in record]
        return records

    def sent(self, name: str = "") -> list:
        """Steps in the offline files, or the values of this name."""
        history = self.records("history")
        if name:
            return [record["item"][name] for record in history if name in record["item"]]
        return [int(record["step"]["num"]) for record in history]


@pytest.fixture
def metrics(tmp_path) -> Metrics:
    return Metrics(tmp_path)


def close(sender: Sender, seconds: float = 60.0) -> None:
    sender.ending("finished")
    sender.close(seconds)


def test_a_step_that_waits_for_its_held_out_loss_is_sent_when_it_has_it(metrics):
    metrics.add(1, 2)
    waiting = {"step": 3, "loss": 0.5, "terms": {}, "tokens_per_s": 9.0, "validation": None}
    metrics.file.write(state.sealed("metrics", waiting))
    metrics.file.flush()
    sender = metrics.sender()
    sender.ending("stopped")
    sender.close(60.0)
    assert metrics.sent() == [1, 2]
    other = Metrics(metrics.folder)  # the next start, which has added the loss
    (metrics.folder / "metrics.jsonl").write_text("")
    other.add(1, 2)
    other.file.write(state.sealed("metrics", {**waiting, "validation": {"loss": 0.25, "tokens": 3.0}}))
    other.add(4)
    close(other.sender())
    assert metrics.sent() == [1, 2, 3, 4]
    assert metrics.sent("validation/loss") == [0.25]


FAULTS = {
    "no such library": "raise ImportError('libthing.so.1: cannot open shared object file')",
    "a start that hangs": "import time; time.sleep(600)",
    "a start that fails": "def init(**_): raise OSError('No space left on device')\nSettings = dict",
    "a start that kills": "import os; os.kill(os.getpid(), 9)",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_wandb_costs_one_warning_and_no_time_and_its_steps_follow(metrics, monkeypatch, capsys, fault):
    broken = metrics.folder / "broken"
    broken.mkdir()
    (broken / "wandb.py").write_text(FAULTS[fault])
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", str(broken), prepend=os.pathsep)
        start = time.monotonic()
        sender = metrics.sender()
        for step in range(1, 200):
            metrics.add(step)
            sender.tick()
        sender.send("alert", title="x", text="y" * 1_000_000)  # more than the pipe takes
        assert time.monotonic() - start < 2.0
        close(sender, 3.0)
        assert time.monotonic() - start < 8.0
    assert capsys.readouterr().out.count("WARNING: run: W&B failed") == 1
    if fault == "a start that hangs":  # the rest is the same after each of them
        close(metrics.sender())
        assert metrics.sent() == list(range(1, 200))


def test_a_service_that_dies_is_started_again_and_gets_what_it_lacks(metrics, capsys):
    sender = metrics.sender()
    metrics.add(1, 2, 3)
    until(lambda: metrics.sent() == [1, 2, 3], sender)
    assert sender.process is not None
    (service,) = Path(f"/proc/{sender.process.pid}/task/{sender.process.pid}/children").read_text().split()
    metrics.add(4, 5)
    os.kill(int(service), signal.SIGTERM)  # as Slurm signals every process of a step
    os.kill(sender.process.pid, signal.SIGTERM)
    metrics.add(6, 7)
    until(lambda: sender.deaths == 1, sender)
    metrics.add(8)
    close(sender)
    assert metrics.sent() == list(range(1, 9))
    assert capsys.readouterr().out.count("WARNING") == 1
    # Another start of the run, after the files were sent and removed.
    for file in wandb_files.offline_files(metrics.folder / "wandb", IDENTITY):
        file.unlink()
    metrics.add(9, 10)
    close(metrics.sender())
    assert metrics.sent() == [9, 10]


@pytest.mark.parametrize("service_dies", ["before the alerts", "after the alerts"])
def test_alerts_of_a_service_that_dies_come_again_and_of_each_title_the_last(metrics, service_dies):
    """As at a preemption: W&B's service takes the alert "Stopped" and ends, by the same signal, before it stores it."""
    sender = metrics.sender()
    metrics.add(1)
    until(lambda: metrics.sent() == [1], sender)
    assert sender.process is not None
    (service,) = Path(f"/proc/{sender.process.pid}/task/{sender.process.pid}/children").read_text().split()
    os.kill(int(service), signal.SIGKILL if service_dies == "before the alerts" else signal.SIGSTOP)
    for title, text in (("Step skipped", "step 1"), ("Step skipped", "step 2"), ("Stopped", "SIGTERM came")):
        sender.send("alert", title=title, text=text)
    metrics.add(2)
    sender.ending("stopped")
    time.sleep(1.0)
    with suppress(ProcessLookupError):
        os.kill(int(service), signal.SIGKILL)
    sender.close(60.0)
    alerts = [(alert["title"], alert["text"]) for alert in metrics.records("alert")]
    assert alerts == [("Step skipped", "step 2"), ("Stopped", "SIGTERM came")]
    assert metrics.sent() == [1, 2]


def until(condition, sender: Sender) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        sender.tick()
        time.sleep(0.1)


def test_a_file_that_was_cut_off_is_read_up_to_there(metrics):
    close_after = metrics.sender()
    metrics.add(*range(1, 400))
    close(close_after)
    (file,) = wandb_files.offline_files(metrics.folder / "wandb", IDENTITY)
    (metrics.folder / "wandb" / f"held-{IDENTITY}.json").unlink()
    whole = file.read_bytes()
    assert len(whole) > wandb_files.BLOCK  # records that cross blocks
    assert wandb_files.held(metrics.folder / "wandb", IDENTITY).step == 399
    seen = []
    for size in range(7, len(whole), len(whole) // 40):
        file.write_bytes(whole[:size])
        seen.append(wandb_files.held(metrics.folder / "wandb", IDENTITY).step)
    assert seen == sorted(seen)
    assert seen[0] == 0
    assert 300 < seen[-1] <= 399
    file.write_bytes(whole[: len(whole) // 2] + bytes(4096))  # what a crashed machine's disk may hold
    assert 150 < wandb_files.held(metrics.folder / "wandb", IDENTITY).step < 250


def test_records_become_scalars_and_what_is_not_finite_is_left_out():
    record = {"step": 3, "loss": None, "terms": {"ce": 0.5, "kl": None}, "group_lr": {"head": 1e-3}, "skipped": True}
    assert sinks.scalars(record) == {"terms/ce": 0.5, "group_lr/head": 1e-3, "skipped": True}


def test_tensorboard_has_each_step_once_with_the_values_of_the_run_as_it_went_on(metrics):
    folder = metrics.folder / "tensorboard"
    metrics.options = {"dir": str(folder)}
    metrics.add(1, 2, 3, 4)
    first = metrics.sender("tensorboard")
    close(first)
    assert sorted(step for step, name in tensorboard_scalars(folder) if name == "loss") == [1, 2, 3, 4]
    # A start from the checkpoint of step 2: steps 3 and 4 are repeated, with other values.
    other = Metrics(metrics.folder)
    os.truncate(metrics.folder / "metrics.jsonl", 0)
    other.options = metrics.options
    other.add(1, 2)
    other.file.write(state.sealed("metrics", {"step": 3, "loss": 7.0, "terms": {}}))
    other.file.flush()
    close(other.sender("tensorboard"))
    assert {step: value for (step, name), value in tensorboard_scalars(folder).items() if name == "loss"} == {
        1: [1],
        2: [0.5],
        3: [7],
    }
