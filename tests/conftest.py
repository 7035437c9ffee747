"""Training runs as users start them, on a small embedded world (`toy`), and what tests read of them."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import forkserver
import pytest
import real as real_models
import torch
from families import models as family_models
from hypothesis import settings
from toy import Toy

from mirage_dist import progress
from mirage_dist.config import REPOSITORY
from mirage_dist.disk import hashes
from mirage_dist.liveness import Owner
from mirage_dist.ranks import Group
from mirage_dist.train.context import Run
from mirage_dist.train.lease import Lease
from mirage_dist.train.views import Views

settings.register_profile("untimed", deadline=None)  # tests state properties; a busy machine has none of its own
settings.load_profile("untimed")

DEADLINE = 180.0  # seconds, on a busy machine


@pytest.fixture(autouse=True)
def _every_warning_is_new():
    """A warning appears once a process, and one process runs all tests."""
    progress.handler.warnings.clear()


def pytest_configure(config: pytest.Config) -> None:
    """A folder for the servers of `forkserver`, one for all processes of this session."""
    if forkserver.VARIABLE not in os.environ:
        folder = Path(tempfile.mkdtemp(prefix="mirage-forkserver-"))
        (folder / "session").write_text(str(os.getpid()))
        os.environ[forkserver.VARIABLE] = str(folder)
        config.add_cleanup(lambda: shutil.rmtree(folder))
        os.environ[hashes.PLACE] = str(folder / "cache")  # not this user's


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files in the order in which three test processes on two cores, a file each, are done soonest.

    Slurm's tests mostly wait, so others can run beside them; but there is one Slurm at a time (see `cluster.py`).
    Short files come last: all processes end at about the same time.
    """
    slurm = ("test_runs.py", "test_pipeline.py", "test_templates.py")
    order = (slurm[0], "families", "fuzz", "distributed", slurm[1], "outputs", "browser", slurm[2], "unit")
    items.sort(key=lambda item: min((order.index(p) for p in item.path.parts if p in order), default=0))


class Engine(torch.nn.Module):
    """A policy as the loop wants it, of one process and without DeepSpeed."""

    def __init__(self, policy):
        super().__init__()
        self.module = policy

    def forward(self, *arguments):
        return self.module(*arguments)


def terms_and_gradients(objective, feed, window, policy, compared):
    """Values of the objective's terms in one step of this process alone, and gradients of the trained parameters."""
    views = Views(Engine(policy), objective.needs, compared if objective.needs.reference else None)
    counts, values = feed.counts(window), {}
    for micro in window:
        terms = objective(views(micro))
        sum(t.weight / counts[t.count] * t.sum for t in terms).backward()
        for t in terms:
            values[t.name] = values.get(t.name, 0) + t.sum.detach() / counts[t.count]
    return values, {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}


def run_of(recipe, objective, feed, engine, base: str = "base") -> Run:
    """The context of a run of this process alone, without DeepSpeed; its lease owns nothing yet."""
    alone = Group(0, 0, 1, torch.device("cpu"))
    lease = Lease(Path(recipe.run.dir), Owner("test"))
    return Run(recipe, alone, objective, feed, engine, {}, {"base_hash": base}, lease)


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> Toy:
    return Toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def family(tmp_path_factory) -> Callable[[str], Path]:
    """Name (see `families.models.FAMILIES`) -> a tiny random model directory of that family, made when first used."""
    folder = tmp_path_factory.mktemp("families")
    return cache(lambda name: family_models.make(name, folder / name))


@pytest.fixture(scope="session")
def real() -> real_models.Real:
    """The first layers of a real language model, as text model and as LLaVA (see `real.py`)."""
    return real_models.once()


def launch(ranks: int, *arguments: str, check: bool = True, start: bool = False, fresh: bool = False):
    """`launch/local.sh RANKS ARGUMENTS`, to its end, or (start) as a running process.

    fresh: each rank starts from nothing, as a user's does; otherwise the libraries are there (see `forkserver`).
    """
    python = sys.executable if fresh else forkserver.python()
    environment = {**os.environ, "MIRAGE_PYTHON": python, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [str(REPOSITORY / "launch/local.sh"), str(ranks), *arguments]
    if start:
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def metrics(run: Path) -> list[dict]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name != "seal"} for record in records]


def tensorboard_scalars(folder: Path) -> dict[tuple[int, str], list[float]]:
    """(step, name) -> the values in the event files of a folder."""
    from tensorboardX.proto.event_pb2 import Event

    values: dict[tuple[int, str], list[float]] = {}
    for file in folder.glob("events.out.tfevents.*"):
        data, at = file.read_bytes(), 0
        while at < len(data):  # TFRecord: length, its CRC, the record, its CRC
            size = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + size])
            at += 16 + size
            for value in event.summary.value:
                values.setdefault((event.step, value.tag), []).append(value.simple_value)
    return values


def losses(run: Path, *also: str) -> torch.Tensor:
    """(steps, 1 + terms + also): the loss, its terms, and other metrics by name."""
    return torch.tensor([[m["loss"], *m["terms"].values(), *(m[name] for name in also)] for m in metrics(run)])


def plain_step(policy, optimizer, loss, rate: float, clip: float) -> float:
    """A step as any PyTorch loop makes it: rate, gradient, clip, update. Returns the loss."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), clip)
    optimizer.step()
    return loss.item()


def until(seen, process: subprocess.Popen):
    """Wait until `seen()` is true while a run goes on."""
    deadline = time.monotonic() + DEADLINE
    while not seen():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def steps_done(folder: Path) -> int:
    try:
        return len((folder / "metrics.jsonl").read_text().splitlines())
    except OSError:
        return 0


@pytest.fixture(scope="module")
def plain_environment():
    """Not a job of the Slurm that these tests may run in; a rank that does not end by asking is killed soon."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith("SLURM_")]:
            patch.delenv(name)
        patch.setenv("MIRAGE_KILL_SECONDS", "2")
        yield


@pytest.fixture
def serve():
    """Starts chat servers (see `unit/evals/chat_server.py`) that end with the test."""
    from chat_server import Server

    servers = []

    def start(script, **options):
        servers.append(Server(script, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.closing.set()
        server.shutdown()
        server.server_close()
