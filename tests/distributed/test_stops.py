"""Stops where no step is running, and what W&B gets to know: set-up, the reference cache, a preempted run's records."""

import json
import os
import random
import re
import signal
import struct
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import forkserver
import pytest
from conftest import launch, metrics, tensorboard_scalars, until
from faults.processes import send, worker
from wandb.proto import wandb_internal_pb2

from mirage_dist.config import REPOSITORY

SHORT = ("train.max_steps=8", "train.global_batch=8", "train.micro_batch=4", "train.export=false")


def command(toy, folder, *own):
    return ("train", "configs/train/demo_npo.yaml", *toy.overrides("npo", folder), *SHORT, *own)


def test_a_signal_during_set_up_ends_the_run_before_there_is_anything_to_commit(toy, tmp_path):
    process = launch(2, *command(toy, tmp_path / "run"), start=True, fresh=True)
    output = ""
    for line in process.stdout:
        output += line
        if "stream forget" in line:
            process.send_signal(signal.SIGUSR1)
            break
    output += process.communicate(timeout=120)[0]
    assert process.returncode == 75, output
    assert "nothing was left to commit" in output
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))
    assert not list((tmp_path / "run").glob("work-*"))


def handles(pid: int, number: int) -> bool:
    caught = re.search(r"^SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return caught is not None and bool(int(caught[1], 16) >> (number - 1) & 1)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_start_stops_in_order_at_any_moment(toy, tmp_path, monkeypatch, ranks):
    """While Python starts, while the libraries are imported, and at moments that differ from one test run to the next;
    none of these starts counts for train.max_restarts."""
    monkeypatch.setenv("SLURM_JOB_ID", "4243")
    folder = tmp_path / "run"
    seconds = [0.0, 0.5, *(random.uniform(0.0, 1.5) for _ in range(4))]
    for start, delay in enumerate(seconds):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(start))
        arguments = command(toy, folder, "train.max_restarts=1", "train.max_steps=1000", "train.save_every=1000")
        process = launch(ranks, *arguments, start=True, fresh=start < 2)
        until(lambda p=process: handles(p.pid, signal.SIGUSR1), process)  # before that bash itself would be killed
        time.sleep(delay)
        process.send_signal(random.choice([signal.SIGTERM, signal.SIGUSR1]))
        output = process.communicate(timeout=120)[0]
        assert process.returncode == 75, (delay, output)
        assert "Traceback" not in output, (delay, output)
        assert not list(folder.glob("work-*"))


STUB = """#!/bin/sh
[ "$1" != -c ] || { echo "29500 pid:[1] 1"; exit; }
trap 'exit 75' USR1 TERM
for i in 1 2 3 4 5 6 7 8 9 10; do sleep 0.1; done
exit 3
"""


def test_the_launcher_loses_no_request_while_it_starts(tmp_path, monkeypatch):
    """With a program in place of Python that starts at once: bash once lost one in four that came in this time."""
    (tmp_path / "python").write_text(STUB)
    (tmp_path / "python").chmod(0o700)
    monkeypatch.setenv("MIRAGE_PYTHON", str(tmp_path / "python"))
    command = [str(REPOSITORY / "launch/local.sh"), "2", "train"]
    for delay in random.Random(0).choices([n / 1000 for n in range(25)], k=40):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        until(lambda p=process: handles(p.pid, signal.SIGUSR1), process)
        time.sleep(delay)
        process.send_signal(signal.SIGUSR1)
        assert (process.communicate()[0], process.returncode) == ("", 75), delay


FILL = """
import sys
from mirage_dist import config, ranks, schema, signals
from mirage_dist.data import stream
from mirage_dist.model import load
from mirage_dist.train import context, engine, feed, lease
from mirage_dist.train.caches import reference as reference_cache
from mirage_dist.train.planning import check
reference_cache.BATCHES_A_PART = 1
recipe = config.load(sys.argv[1], sys.argv[2:], schema.TrainRecipe)
checked = check.check_recipe(recipe, 1)
objective, streams = checked.objective, check.check_inputs(checked)
here = ranks.start()
built = engine.build(recipe, checked.deepspeed, here)
source = feed.Feed(recipe, objective.needs, streams, load.processor(recipe.model))
calls = []
def filled():
    cache, samples = reference_cache.fill(run), [("forget", n) for n in range(len(source.samples["forget"]))]
    values = [float(cache.rows([sample], here.device).double().sum()) for sample in samples]
    return len(calls), sum(values), len(values)
built.module.register_forward_hook(lambda *_: calls.append(1))
from pathlib import Path
held = lease.acquire(Path(recipe.run.dir))
run = context.Run(recipe, here, objective, source, built, checked.deepspeed, {"base_hash": "hash"}, held)
results = []
for stops in (2, None, None):
    signals.clear()
    calls.clear()
    save = reference_cache.reference.LogProbs.save
    def interrupted(self, handle):
        save(self, handle)
        if len(calls) == stops:
            signals.handler(10, None)
    reference_cache.reference.LogProbs.save = interrupted
    try:
        results.append(filled())
    except signals.StopRequested:
        results.append(len(calls))
    reference_cache.reference.LogProbs.save = save
(file,) = (Path(recipe.run.dir) / "reference").glob("*/*")
for damage in (lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:-100] + bytes(10) + b[-90:]):
    file.write_bytes(damage(file.read_bytes()))
    calls.clear()
    results.append(filled())
held.release()
whole = reference_cache.reference.LogProbs()
for rows in source.every_sample(("forget",), here):
    reference_cache.add(whole, built, source.collate(rows), "forget")
print("RESULTS", results, sum(float(whole.table[key].double().sum()) for key in sorted(whole.table)))
ranks.exit_well()
"""


def test_a_stopped_reference_cache_goes_on_with_what_is_missing_and_is_the_same(toy, tmp_path):
    (tmp_path / "fill.py").write_text(FILL)
    overrides = [*toy.overrides("npo", tmp_path / "run"), *SHORT]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    line = [forkserver.python(), str(tmp_path / "fill.py"), "configs/train/demo_npo.yaml", *overrides]
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results, _, whole = done.stdout.rpartition("RESULTS ")[2].strip().rpartition(" ")
    stopped, resumed, again, *mended = eval(results)
    whole = float(whole)
    # 20 samples in batches of 4: two parts before the stop, three after it, none in a third call; bitwise as in one go.
    assert stopped == 2
    assert resumed == (3, whole, 20)
    assert again == (0, whole, 20)
    # A file that was cut off, emptied or overwritten in its middle is computed again, and said to be damaged.
    assert mended == [(5, whole, 20)] * 3
    assert done.stdout.count("damaged") == 3


def records(file: Path):
    """The protobuf records of an offline run: blocks of 32 KiB, each record in one or several chunks."""
    data, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        if kind == 0:
            return
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last chunk
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def command_of(number: int) -> str:
    """Its command line; empty when it has ended."""
    with suppress(OSError):
        return Path(f"/proc/{number}/cmdline").read_text()
    return ""


def below(number: int) -> list[int]:
    """This process and all that descend from it, a rank's children too."""
    number = worker(number) or number
    lists = Path(f"/proc/{number}/task").glob("*/children")
    children = [int(word) for file in lists for word in file.read_text().split()]
    return [number, *(process for child in children for process in below(child))]


LONG = ("train.save_every=5", "train.max_steps=120")


def test_term_to_every_process_of_a_run_saves_it_and_wandb_and_tensorboard_have_each_step_once(toy, tmp_path):
    """As Slurm preempts: the signal reaches W&B's service too, which ends with what it has not written."""
    folder = tmp_path / "run"
    arguments = command(toy, folder, "monitor.wandb=offline", "monitor.tensorboard=true", *LONG)
    process = launch(2, *arguments, start=True)
    deadline = time.monotonic() + 120
    while not list(folder.glob("wandb/offline-run-*/*.wandb")):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    everyone = below(process.pid)
    assert all(any(name in command_of(number) for number in everyone) for name in ("monitoring.sender", "wandb-core"))
    for number in everyone:
        send(number, signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 75, output
    assert output.count("W&B failed") <= 1
    assert output.count("TensorBoard failed") <= 1
    assert "Traceback" not in output
    before = offline(folder)
    # The newest checkpoint is lost: steps that W&B has are made again and must not be sent again.
    stopped = len(metrics(folder))
    assert stopped < 120
    newest = folder / f"checkpoints/step-{stopped:06d}"
    newest.rename(tmp_path / "lost")
    launch(2, *arguments)
    first, second = records_of(before), records_of([file for file in offline(folder) if file not in before])
    assert {r.run.run_id for r in [*first, *second] if r.WhichOneof("record_type") == "run"} == {before[0].stem[4:]}
    assert any(r.WhichOneof("record_type") == "preempting" for r in first)
    assert not any(r.WhichOneof("record_type") == "preempting" for r in second)
    (configuration, *_) = (r.run.config.update for r in first if r.WhichOneof("record_type") == "run")
    config = {item.key: json.loads(item.value_json) for item in configuration if item.key}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert config["manifest"].items() <= manifest.items()
    assert config["manifest"].keys() >= {"git_commit", "config_hash", "base_hash", "data", "versions"}
    assert config["train"]["max_steps"] == 120
    assert config["slurm"].keys() >= {"job_id"}
    assert any("Stopped" in r.alert.title for r in first if r.WhichOneof("record_type") == "alert")
    steps = [r.history.step.num for r in [*first, *second] if r.WhichOneof("record_type") == "history"]
    assert steps == list(range(1, 121))
    assert [m["step"] for m in metrics(folder)] == list(range(1, 121))
    shown = {step: v for (step, name), v in tensorboard_scalars(folder / "tensorboard").items() if name == "loss"}
    assert shown == {m["step"]: [pytest.approx(m["loss"])] for m in metrics(folder)}


def offline(folder: Path) -> list[Path]:
    """The files of W&B's offline runs, in the order of their starts."""
    return sorted((folder / "wandb").glob("offline-run-*/*.wandb"), key=lambda file: file.parent.stat().st_ctime)


def records_of(files: list[Path]) -> list:
    return [record for file in files for record in records(file)]
