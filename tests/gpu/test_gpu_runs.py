"""Training and evaluation on one GPU: a CPU's losses, exact resumption, and answers that no batch changes."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import launch, losses, metrics, until

from mirage_dist.config import REPOSITORY

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
STEPS = 8
SHORT = (f"train.max_steps={STEPS}", "train.global_batch=8", "train.save_every=4")
ON_CPU = ""
ON_GPU = os.environ.get("CUDA_VISIBLE_DEVICES", "0")

# name -> (recipe, visible devices, overrides)
RUNS = {
    "npo on a CPU": ("npo", ON_CPU, ("train.micro_batch=8",)),
    "rmu on a CPU": ("rmu", ON_CPU, ("train.micro_batch=8",)),
    "sft on a CPU": ("sft", ON_CPU, ("train.micro_batch=8",)),
    "npo": ("npo", ON_GPU, ("train.micro_batch=8",)),
    "rmu": ("rmu", ON_GPU, ("train.micro_batch=8",)),
    "sft": ("sft", ON_GPU, ("train.micro_batch=8",)),
    "npo accumulated": ("npo", ON_GPU, ("train.micro_batch=2",)),
    "npo packed": ("npo", ON_GPU, ("train.micro_batch=8", "data.packing=true")),
    "npo beside a frozen engine": ("npo", ON_GPU, ("train.micro_batch=8", "reference=engine")),
    "npo under ZeRO-2": ("npo", ON_GPU, ("train.micro_batch=8", "deepspeed=configs/deepspeed/zero2.json")),
    "npo offloaded": ("npo", ON_GPU, ("train.micro_batch=8", "deepspeed=configs/deepspeed/zero3_offload.json")),
    "npo in bf16": ("npo", ON_GPU, ("train.micro_batch=8", "train.dtype=bf16")),
    "npo packed in bf16": ("npo", ON_GPU, ("train.micro_batch=8", "train.dtype=bf16", "data.packing=true")),
    "rmu in bf16": ("rmu", ON_GPU, ("train.micro_batch=8", "train.dtype=bf16")),
    "sft in bf16, checkpointed": (
        "sft",
        ON_GPU,
        ("train.micro_batch=8", "train.dtype=bf16", "model.gradient_checkpointing=true"),
    ),
}


@pytest.fixture(scope="module")
def finished(toy):
    """Every run of RUNS, all started at once: name -> run directory."""
    folders, processes = {}, {}
    with pytest.MonkeyPatch.context() as patch:
        for number, (name, (recipe, visible, own)) in enumerate(RUNS.items()):
            patch.setenv("CUDA_VISIBLE_DEVICES", visible)
            folders[name] = toy.root / "runs" / str(number)
            arguments = command(toy, recipe, folders[name], *own)
            processes[name] = launch(1, *arguments, start=True, fresh=True)
    outputs = {name: process.communicate()[0] for name, process in processes.items()}
    failed = [f"{name}: {outputs[name]}" for name, process in processes.items() if process.returncode]
    assert not failed, "\n\n".join(failed)
    return folders


def command(toy, recipe: str, folder: Path, *own: str) -> tuple[str, ...]:
    return ("train", f"configs/train/demo_{recipe}.yaml", *toy.overrides(recipe, folder), *SHORT, *own)


@pytest.mark.parametrize("recipe", ["npo", "rmu", "sft"])
def test_losses_are_those_of_a_cpu(finished, recipe):
    torch.testing.assert_close(losses(finished[recipe]), losses(finished[f"{recipe} on a CPU"]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "name", ["npo accumulated", "npo packed", "npo beside a frozen engine", "npo under ZeRO-2", "npo offloaded"]
)
def test_losses_do_not_depend_on_how_a_step_is_made(finished, name):
    torch.testing.assert_close(losses(finished[name]), losses(finished["npo"]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "exact"),
    [
        ("npo in bf16", "npo"),
        ("npo packed in bf16", "npo"),
        ("rmu in bf16", "rmu"),
        ("sft in bf16, checkpointed", "sft"),
    ],
)
def test_bf16_stays_near_fp32(finished, name, exact):
    torch.testing.assert_close(losses(finished[name])[:, 0], losses(finished[exact])[:, 0], atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(("name", "killed"), [("npo", True), ("npo packed in bf16", True), ("rmu in bf16", False)])
def test_a_run_that_was_killed_or_stopped_resumes_bitwise(finished, toy, tmp_path, name, killed):
    recipe, _, own = RUNS[name]
    folder = tmp_path / "run"
    process = launch(1, *command(toy, recipe, folder, *own), start=True, fresh=True)
    until((folder / "checkpoints/step-000004/manifest.json").exists, process)
    if killed:
        for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            os.kill(int(child), signal.SIGKILL)
    else:
        process.send_signal(signal.SIGUSR1)
    output = process.communicate(timeout=60)[0]
    assert killed or process.returncode in (0, 75), output
    # What was written after the last commit would hide whether the resumed run wrote it.
    shutil.rmtree(folder / "checkpoints" / f"step-{STEPS:06d}", ignore_errors=True)
    shutil.rmtree(folder / "export", ignore_errors=True)
    done = launch(1, *command(toy, recipe, folder, *own), fresh=True)
    assert "resumed from" in done.stdout
    assert torch.equal(losses(folder, "grad_norm"), losses(finished[name], "grad_norm"))
    whole, again = (f / "checkpoints" / f"step-{STEPS:06d}" for f in (finished[name], folder))
    for file in sorted(f.name for f in whole.glob("*.safetensors")):
        assert (again / file).read_bytes() == (whole / file).read_bytes(), file


def test_metrics_say_the_memory_of_the_device_and_the_time_of_its_parts(finished):
    for m in metrics(finished["npo"]):
        assert m["memory_mib"] == m["memory"]["allocated_mib"] > 0
        assert m["memory"]["reserved_mib"] >= m["memory"]["allocated_mib"]
        parts = m["seconds"]
        assert 0 < parts["forward"] + parts["backward"] + parts["update"] < 1.1 * m["step_seconds"]


# `mirage train`, which prints the lines of ours that make the host wait for the device in a step after the second.
WAITS = """\
import sys, traceback, warnings
import torch
import mirage_dist
from mirage_dist import cli
from mirage_dist.train.loop import Loop

step, home = Loop.step, mirage_dist.__path__[0]

def note(message, *_, **__):
    frames = traceback.extract_stack()
    # A thread of autograd's that runs a hook of DeepSpeed's has no line of ours.
    last = max((i for i, frame in enumerate(frames) if frame.filename.startswith(home)), default=None)
    if last is None:
        return
    others = ("deepspeed", "transformers")  # what these wait for is not ours to change
    if "synchronizing" in str(message) and not any(o in f.filename for f in frames[last:] for o in others):
        print("WAIT", frames[last].filename, frames[last].line)

def watched(self, number, *arguments):
    if number < 2:
        return step(self, number, *arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            return step(self, number, *arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

Loop.step = watched
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("recipe", ["sft", "npo", "rmu"])
def test_the_host_waits_for_the_device_once_a_step(toy, tmp_path, recipe):
    (tmp_path / "waits.py").write_text(WAITS)
    words = command(toy, recipe, tmp_path / "run", "train.micro_batch=4", "train.save_every=100", "train.export=false")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ON_GPU, "HF_HUB_OFFLINE": "1"}
    line = [sys.executable, str(tmp_path / "waits.py"), *words]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stdout + done.stderr
    waits = [line for line in done.stdout.splitlines() if line.startswith("WAIT")]
    assert len(waits) <= STEPS - 2, waits


def test_answers_do_not_depend_on_the_batch_nor_on_the_device(finished, toy):
    runs = {"one by one": (ON_GPU, 1), "in batches": (ON_GPU, 32), "on a CPU": (ON_CPU, 32)}
    processes = {}
    for name, (visible, batch) in runs.items():
        folder = toy.root / "suites" / name.replace(" ", "-")
        arguments = [f"run.dir={folder}", f"model.path={finished['sft']}/export", f"world.dir={toy.root}/world"]
        arguments += ["world.seed=21", f"generation.batch_size={batch}"]
        arguments += [f"world.{name}={size}" for name, size in toy.sizes.items()]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": visible, "HF_HUB_OFFLINE": "1"}
        started = [sys.executable, "-m", "mirage_dist.cli", "eval", "configs/eval/demo.yaml", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes[folder] = subprocess.Popen(started, env=environment, cwd=REPOSITORY, **pipes)
    answers = []
    for folder, process in processes.items():
        output = process.communicate()[0]
        assert process.returncode == 0, output
        rows = [json.loads(line) for f in folder.glob("evals/demo/rows/worker-*.jsonl") for line in f.open()]
        answers.append({row["key"]: row["response"] for row in rows if "key" in row})
    assert len(answers[0]) > 50
    assert answers[0] == answers[1] == answers[2]
