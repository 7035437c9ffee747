"""Workers of several GPUs (`generation.tensor_parallel`): which GPUs each gets, what is refused, what vLLM is given.

A recorder stands in for vLLM's constructor; test_vllm.py runs the real one where it is installed.
"""

import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from mirage_dist import cli, liveness, signals
from mirage_dist.config import REPOSITORY
from mirage_dist.evals import pool
from mirage_dist.evals.models import vllm as engines
from mirage_dist.evals.models.vllm import VLLM
from mirage_dist.schema import ConfigError, EvalModelConfig, GenerationConfig, RunError

MODEL = EvalModelConfig(path="models/large")
KEY = r"generation\.tensor_parallel=4: "


def four(**others) -> GenerationConfig:
    return GenerationConfig(backend="vllm", tensor_parallel=4, **others)


@pytest.mark.parametrize("backend", ["hf", "my_lab.engines:Mine"])
def test_a_backend_on_one_gpu_refuses_several(backend, capsys):
    words = ["eval", "configs/eval/demo.yaml", "--check", f"generation.backend={backend}"]
    assert cli.main([*words, "generation.tensor_parallel=2"]) == 2
    message = f"generation.tensor_parallel=2: belongs to backend vllm, and backend={backend} runs a model on one GPU"
    assert message in capsys.readouterr().err
    for count in (1, 4):
        assert cli.main([*words[:3], "generation.backend=vllm", f"generation.tensor_parallel={count}"]) == 0
    assert cli.main([*words[:3], "generation.backend=vllm", "generation.tensor_parallel=0"]) == 2


def test_workers_have_groups_of_gpus_of_their_own(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,6,5,4,3,2,1,0")
    groups = [pool.environment(i, 2, 4)["CUDA_VISIBLE_DEVICES"] for i in range(2)]
    assert groups == ["7,6,5,4", "3,2,1,0"]
    # Workers of one GPU may share it, as before.
    assert [pool.environment(i, 10)["CUDA_VISIBLE_DEVICES"] for i in range(10)] == list("7654321076")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert pool.environment(0, 2, 4)["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize(
    ("visible", "workers", "message"),
    [
        ("0,1", 1, "a worker needs 4 GPUs of one machine, and this process sees 2"),
        (
            "0,1,2,3,4,5",
            1,
            "this process sees 6 GPUs, of which 2 would be left over; .* show it 4 of them by CUDA_VISIBLE_DEVICES",
        ),
        ("0,1,2,3", 2, "2 workers need 8 GPUs, and this machine shows 4; at most --workers 1"),
    ],
)
def test_gpus_that_do_not_suffice_are_an_error_before_any_worker_starts(monkeypatch, visible, workers, message):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")  # a worker that starts is another error
    with pytest.raises(ConfigError, match=KEY + message):
        pool.run("a.yaml", [], workers, 4)


def test_the_recipe_of_workers_says_how_many_gpus_each_has(monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    words = ["generation.backend=vllm", "generation.tensor_parallel=4", "--workers", "1"]
    assert cli.main(["eval", "configs/eval/demo.yaml", *words]) == 2
    assert "generation.tensor_parallel=4: a worker needs 4 GPUs" in capsys.readouterr().err


def test_a_worker_looks_at_its_gpus(monkeypatch):
    for visible in (0, 4, 8):  # 0: a build of vLLM for CPUs starts processes, or vLLM says itself that it has no GPU
        monkeypatch.setattr(torch.cuda, "device_count", lambda visible=visible: visible)
        VLLM.check(four())
        VLLM.check(GenerationConfig(backend="vllm"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 6)
    with pytest.raises(ConfigError, match=KEY):
        VLLM.check(four())


# ------------------------------------------------------------------------------------------ what vLLM gets


def started(generation: GenerationConfig, error: Exception | None = None) -> dict:
    """What vLLM's constructor gets. error: what it raises."""
    seen = {}

    def recorder(**options):
        seen.update(options)
        if error is not None:
            raise error

    engines.start(SimpleNamespace(LLM=recorder), MODEL, generation, 64, True)
    return seen


def test_one_gpu_takes_no_processes_and_several_take_one_each():
    one, several = started(GenerationConfig(backend="vllm")), started(four())
    assert {name: several[name] for name in several.keys() - one.keys()} == {
        "tensor_parallel_size": 4,
        "distributed_executor_backend": "mp",
        "worker_extension_cls": "mirage_dist.evals.models.vllm_worker.Dependent",
    }


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (
            ValueError("1 validation error\n  Total number of attention heads (30) must be divisible by tensor (4)."),
            ConfigError,
            KEY + "vLLM shares out attention heads among GPUs, and models/large has 30; choose a divisor",
        ),
        (Exception("WorkerProc initialization failed"), RunError, KEY + "vLLM did not start, and the cause is above"),
        (ValueError("No available memory for the cache blocks."), RunError, "too little memory for 16 rows"),
        (ValueError("no such architecture"), ConfigError, "models/large: vLLM cannot load it: no such architecture"),
    ],
)
def test_an_error_of_vllm_names_the_key_of_the_recipe(error, kind, message):
    with pytest.raises(kind, match=message):
        started(four(), error)


def test_a_signal_that_ends_a_process_of_the_start_is_a_request_to_stop(monkeypatch):
    monkeypatch.setattr(signals, "received", lambda: "SIGTERM")
    with pytest.raises(signals.StopRequested, match="stopped by SIGTERM while vLLM started"):
        started(four(), Exception("WorkerProc initialization failed"))


def test_what_cannot_be_a_process_of_a_gpu_is_raised_as_it_is():
    with pytest.raises(KeyError):
        started(GenerationConfig(backend="vllm"), KeyError("a fault of vLLM's"))


# ------------------------------------------------------------------------------------- processes of the GPUs

SCRIPT = """
import json, multiprocessing, os, signal, sys, time

def hold(ready, orphan):
    parent = multiprocessing.parent_process().pid
    while orphan and os.getppid() == parent:
        time.sleep(0.01)
    import mirage_dist.evals.models.vllm_worker
    if not orphan:
        ready.send([signal.getsignal(s) == signal.SIG_IGN for s in (signal.SIGUSR1, signal.SIGTERM)])
    time.sleep(120)

if __name__ == "__main__":
    orphan = sys.argv[1] == "True"
    context = multiprocessing.get_context("spawn")
    reading, writing = context.Pipe(duplex=False)
    child = context.Process(target=hold, args=(writing, orphan), daemon=True)
    child.start()
    print(json.dumps([child.pid, orphan or reading.recv()]), flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("orphan", [False, True])
def test_a_process_of_a_gpu_dies_with_its_worker_and_of_no_signal_to_the_step(tmp_path, orphan):
    """At once, whatever it is at; also when the worker had ended (orphan) before it came to look."""
    file = tmp_path / "worker.py"
    file.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen([sys.executable, file, str(orphan)], env=environment, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid, ignored = json.loads(parent.stdout.readline())
        assert orphan or ignored == [True, True]
        assert liveness.process_start(pid) is not None
        parent.kill()
    deadline = time.monotonic() + (50 if orphan else 5)  # an orphan has to import the package first
    while liveness.process_start(pid) is not None:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_importing_it_elsewhere_changes_nothing():
    assert multiprocessing.parent_process() is None
    from mirage_dist.evals.models import vllm_worker

    before = [signal.getsignal(number) for number in signals.SIGNALS]
    importlib.reload(vllm_worker)
    assert [signal.getsignal(number) for number in signals.SIGNALS] == before
    assert not [name for name in vars(vllm_worker.Dependent) if not name.startswith("__")]  # vLLM would mix it in
