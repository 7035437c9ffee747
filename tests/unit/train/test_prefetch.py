"""Batches made ahead by other processes are those that the step would make, in order; the step itself never waits."""

import os
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest
import torch
from conftest import Engine
from torch.utils._python_dispatch import TorchDispatchMode

import mirage_dist
from mirage_dist import config as configs
from mirage_dist.model import load, reference
from mirage_dist.objectives.base import make
from mirage_dist.ranks import Group
from mirage_dist.schema import ConfigError, TrainRecipe
from mirage_dist.train.feed import Feed
from mirage_dist.train.planning.streams import read_streams
from mirage_dist.train.prefetch import made
from mirage_dist.train.views import Views

# Lines of the kernels' eager twins, which run only where there is no GPU to wait for.
ON_A_CPU = (
    "steer.py: difference.index_fill_",
    "rows.py: elif tensor.is_cuda or factor.item()",
    "passes.py: if outside_N.any()",
)
ALONE = Group(0, 0, 1, torch.device("cpu"))


def feed_of(toy, tmp_path, name, *own):
    overrides = [*toy.overrides(name, tmp_path / "run"), "train.global_batch=8", "train.micro_batch=4", *own]
    recipe = configs.load(f"configs/train/demo_{name}.yaml", overrides, TrainRecipe)
    objective = make(recipe.objective)
    return (
        recipe,
        objective,
        Feed(recipe, objective.needs, read_streams(recipe, objective.needs), load.processor(recipe.model)),
    )


def test_windows_made_ahead_are_those_made_in_turn(toy, tmp_path):
    _, _, feed = feed_of(toy, tmp_path, "npo", "data.workers=2", "train.max_steps=7")
    steps = range(2, 7)  # a resumed run begins somewhere
    for step, window in zip(steps, feed.windows(steps, ALONE), strict=True):
        for mine, own in zip(window, feed.window(step, ALONE), strict=True):
            assert (mine.samples, mine.rows, mine.counts) == (own.samples, own.rows, own.counts)
            assert torch.equal(mine.mask_BS, own.mask_BS)
            for name, tensor in own.batch.inputs.items():
                assert torch.equal(mine.batch.inputs[name], tensor)


@pytest.mark.parametrize("workers", [0, 2])
def test_order_is_kept_errors_come_in_their_turn_and_no_process_is_left(workers):
    def make_one(item):
        if item == 5:
            raise ConfigError("item 5 is bad")
        return item, os.getpid()

    batches = made(make_one, range(9), workers)
    results = [next(batches) for _ in range(5)]
    assert [item for item, _ in results] == [0, 1, 2, 3, 4]
    assert len({pid for _, pid in results} - {os.getpid()}) == workers
    with pytest.raises(ConfigError, match="item 5 is bad"):
        next(batches)
    assert gone({pid for _, pid in results} - {os.getpid()})


def test_a_stop_signal_to_every_process_ends_no_worker_before_its_rank_closes_it():
    with closing(made(lambda item: (item, os.getpid()), range(20), 2)) as batches:
        workers = {next(batches)[1], next(batches)[1]}
        for pid in workers:
            for number in (signal.SIGTERM, signal.SIGUSR1):
                os.kill(pid, number)
        assert [next(batches)[0] for _ in range(10)] == list(range(2, 12))  # stopped in the middle
    assert len(workers) == 2
    assert gone(workers)


STUCK = """
import mmap, os, signal, sys, time
from torch.utils.data import _utils
from mirage_dist.train import prefetch

forks, stuck = mmap.mmap(-1, 1), int(sys.argv[1])

def in_the_child():  # within fork() itself, where nothing of the worker's has run
    forks[0] += 1
    if forks[0] == 2 or stuck > 1:
        signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))
        time.sleep(600)

os.register_at_fork(after_in_child=in_the_child)
prefetch.START_SECONDS = 1.0
_utils.MP_STATUS_CHECK_INTERVAL = 0.2  # seconds that torch waits for each to end
batches = prefetch.made(lambda item: (item, os.getpid()), range(9), 2)
results = list(batches)
assert [item for item, _ in results] == list(range(9)) and len({pid for _, pid in results}) == 2
print(forks[0])
"""


def test_a_worker_that_hangs_in_its_fork_is_replaced_and_no_batch_is_lost():
    done = subprocess.run([sys.executable, "-c", STUCK, "1"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["WARNING: a batch worker did not start in 1 s; all are started again", "4"]


def test_workers_that_never_start_are_an_error_that_says_what_to_do():
    done = subprocess.run([sys.executable, "-c", STUCK, "2"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert "data.workers=2: batch workers did not start, 3 times in a row; data.workers=0 uses none" in done.stderr


def gone(workers: set[int]) -> bool:
    end = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(Path(f"/proc/{pid}").exists() for pid in workers)


class Waits(TorchDispatchMode):
    """Counts, by our own line, the operations that make the host wait for a device: reads of values and of shapes."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "item", "bincount")

    def __init__(self):
        super().__init__()
        self.lines = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in self.NAMES:
            ours = [f for f in traceback.extract_stack() if f.filename.startswith(mirage_dist.__path__[0])]
            # What transformers does in its forward is not ours to change.
            if ours and not any("transformers" in f.filename for f in traceback.extract_stack()):
                self.lines[f"{Path(ours[-1].filename).name}: {ours[-1].line}"] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("sft", ()),
        ("sft", ("data.packing=true",)),
        ("npo", ()),
        ("npo", ("objective.retain=kl", "objective.kl_positions=all")),
        ("rmu", ()),
        ("rmu", ("objective.ce_weight=0",)),
        ("rmu", ("objective.average=sequences", "objective.ce_average=sequences")),
    ],
)
def test_nothing_of_ours_waits_for_the_device_between_the_batch_and_its_gradients(toy, tmp_path, name, own):
    recipe, objective, feed = feed_of(toy, tmp_path, name, *own)
    policy, other = (load.policy(recipe.model, "fp32", {}) for _ in range(2))
    objective.start(policy.hidden_size, 0)
    compared = reference.Frozen(Engine(other)) if objective.needs.reference else None
    views = Views(Engine(policy), objective.needs, compared)
    (micro, _) = feed.window(0, ALONE)
    with Waits() as waits:
        terms = objective(views(micro))
        sum(t.weight * t.sum for t in terms).backward()
    assert {line for line in waits.lines if not line.startswith(ON_A_CPU)} == set()
