"""Training and evaluation as jobs of a real Slurm: stopped in every way a cluster has, they come to the same end."""

import json
import os
import re
import signal
import sys
from pathlib import Path

import forkserver
import pytest
from cluster import Cluster, cluster
from conftest import metrics
from faults.processes import worker

from mirage_dist.config import REPOSITORY
from mirage_dist.data import formats, sources
from mirage_dist.embedded import world as embedded_world

pytestmark = pytest.mark.slurm
STEPS = 120
RECIPE = "configs/train/demo_npo.yaml"
SHORT = (f"train.max_steps={STEPS}", "train.global_batch=8", "train.micro_batch=4", "train.save_every=1000")
ONE_EACH = ("--ntasks-per-node=1", "--gres=gpu:0", "--cpus-per-task=1")
TWO_NODES = ("--nodes=2", *ONE_EACH)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    # After the failure of a node two are left.
    settings = {"LAB_NODES": "3", "LAB_NODE_TIMEOUT": "5", "LAB_KILL_WAIT": "10"}
    yield from cluster(tmp_path_factory.mktemp("slurm"), MIRAGE_PYTHON=forkserver.python(), **settings)


class Run:
    """`sbatch slurm/unlearn_npo.sh` on two nodes, into a run directory of its own."""

    def __init__(self, slurm: Cluster, toy, name: str, *more: str, fresh: bool = False) -> None:
        """fresh: each rank starts from nothing, as a user's does; otherwise the libraries are there (`forkserver`)."""
        self.slurm, self.root = slurm, toy.root / "slurm" / name
        self.words = (RECIPE, *toy.overrides("npo", self.root), *SHORT, *more)
        python = sys.executable if fresh else slurm.environment["MIRAGE_PYTHON"]
        self.job = slurm.submit("unlearn_npo", *self.words, options=TWO_NODES, MIRAGE_PYTHON=python)

    def steps(self) -> list[int]:
        return [line["step"] for line in metrics(self.root)] if (self.root / "metrics.jsonl").is_file() else []

    def reach(self, step: int) -> None:
        self.slurm.until(lambda: len(self.steps()) >= step, f"step {step}", self.job)

    def saved(self) -> list[int]:
        """Steps of the committed checkpoints."""
        return [int(file.parent.name[5:]) for file in sorted(self.root.glob("checkpoints/step-*/manifest.json"))]

    def resumed(self) -> list[int]:
        """The steps that its starts went on from."""
        return [int(step) for step in re.findall(r"resumed from \S+ at step (\d+)", self.slurm.log(self.job))]

    def restarted(self) -> None:
        self.slurm.until(lambda: self.slurm.job(self.job)["Restarts"] == "1", "a requeue", self.job)

    def process(self, rank: int) -> int:
        """The process id of a rank."""
        variables = {f"SLURM_JOB_ID={self.job}", f"SLURM_PROCID={rank}"}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environment = set((folder / "environ").read_text().split("\0"))
                command = (folder / "cmdline").read_text()
            except OSError:
                continue
            if (
                variables <= environment
                and "\0mirage_dist.cli\0" in command
                and (number := worker(int(folder.name))) is not None
            ):
                return number
        raise AssertionError(f"no process is rank {rank}")


def completed(run: Run, restarts: int) -> None:
    state = run.slurm.ended(run.job)
    log = run.slurm.log(run.job)
    assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("COMPLETED", "0:0", str(restarts)), log


def same(run: Run, other: Run) -> None:
    """Each step once, in order, with the same loss to the last bit, and the same model."""
    assert run.steps() == list(range(1, STEPS + 1))
    assert [line["loss"] for line in metrics(run.root)] == [line["loss"] for line in metrics(other.root)]
    weights = "export/model.safetensors"
    assert (run.root / weights).read_bytes() == (other.root / weights).read_bytes()


@pytest.fixture(scope="module")
def whole(slurm, toy) -> Run:
    """The run that nothing happens to."""
    run = Run(slurm, toy, "whole", fresh=True)
    slurm.ended(run.job)
    return run


def test_two_nodes_train_to_the_end(slurm, whole):
    completed(whole, restarts=0)
    assert whole.steps() == list(range(1, STEPS + 1))
    assert whole.saved() == [STEPS]
    assert "on 2 × cpu" in slurm.log(whole.job)
    assert slurm.job(whole.job)["NumNodes"] == "2"


def test_usr1_before_the_time_limit_saves_requeues_and_resumes(slurm, toy, whole):
    run = Run(slurm, toy, "usr1")
    run.reach(10)
    seen = len(run.steps())
    slurm.ask("scancel", "--batch", "--signal=USR1", run.job)
    run.restarted()
    completed(run, restarts=1)
    assert len(run.resumed()) == 1
    assert seen <= run.resumed()[0] < STEPS
    same(run, whole)


def test_a_preempted_job_saves_and_resumes(slurm, toy, whole):
    run = Run(slurm, toy, "preempted")
    run.reach(10)
    seen = len(run.steps())
    slurm.ask("sbatch", "--partition=high", "--nodes=3", "--exclusive", "--wrap=true")
    run.restarted()
    completed(run, restarts=1)
    assert seen <= run.resumed()[0] < STEPS
    same(run, whole)


def test_a_cancelled_job_saves_stays_away_and_can_be_finished_on_one_node(slurm, toy, whole):
    run = Run(slurm, toy, "cancelled")
    run.reach(10)
    seen = len(run.steps())
    slurm.ask("scancel", run.job)
    state = slurm.ended(run.job)
    assert (state["JobState"], state["Restarts"]) == ("CANCELLED", "0")
    assert seen <= run.saved()[0] < STEPS
    run.job = slurm.submit("unlearn_npo", *run.words, options=("--nodes=1", *ONE_EACH))
    assert slurm.job(run.job)["Restarts"] == "0"
    completed(run, restarts=0)
    assert "on 1 × cpu" in slurm.log(run.job)
    assert run.steps() == list(range(1, STEPS + 1))
    assert metrics(run.root)[-1]["loss"] == pytest.approx(metrics(whole.root)[-1]["loss"], rel=1e-5)


def test_a_rank_that_dies_ends_the_job_at_once_and_for_good(slurm, toy):
    run = Run(slurm, toy, "crashed")
    run.reach(3)
    os.kill(run.process(1), signal.SIGKILL)
    state = slurm.ended(run.job, seconds=30)
    assert (state["JobState"], state["Restarts"], state["ExitCode"]) == ("FAILED", "0", "137:0"), slurm.log(run.job)


def test_after_a_node_failure_slurm_starts_the_job_elsewhere_and_the_orphan_does_no_harm(slurm, toy, whole):
    run = Run(slurm, toy, "node_failure", "train.save_every=10")
    run.reach(12)
    nodes = slurm.ask("scontrol", "show", "hostnames", slurm.job(run.job)["NodeList"]).stdout.split()
    orphan = run.process(1)
    # The node hangs and its daemon is gone: its rank will wake up when the job runs elsewhere.
    os.kill(orphan, signal.SIGSTOP)
    slurm.lab("kill-node", nodes[1])
    try:
        run.restarted()
        slurm.until(run.resumed, "a resume", run.job)
        assert nodes[1] not in slurm.ask("scontrol", "show", "hostnames", slurm.job(run.job)["NodeList"]).stdout.split()
    finally:
        os.kill(orphan, signal.SIGCONT)
    completed(run, restarts=1)
    slurm.lab("start-node", nodes[1])
    assert run.resumed()[0] >= 10
    same(run, whole)


def test_starts_that_are_asked_to_stop_before_training_begins_do_not_count(slurm, toy):
    run = Run(slurm, toy, "asked", "train.max_restarts=1", fresh=True)
    noted = run.root / "starts.jsonl"
    for start in (1, 2):
        slurm.until(lambda n=start: noted.is_file() and len(noted.read_text().splitlines()) == n, "a start", run.job)
        slurm.ask("scancel", "--batch", "--signal=USR1", run.job)
        slurm.until(lambda n=start: slurm.job(run.job)["Restarts"] == str(n), "a requeue", run.job)
        assert run.saved() == []
    # A start that does not get on, and was not asked to stop, has the last line.
    lines = [json.loads(line) for line in noted.read_text().splitlines()]
    assert [line["stopped"] for line in lines] == [True, True]
    noted.write_text("".join(json.dumps(line | {"stopped": n == 1}) + "\n" for n, line in enumerate(lines)))
    state = slurm.ended(run.job)
    assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("FAILED", "1:0", "2"), slurm.log(run.job)
    assert "has started 1 times from step 0" in slurm.log(run.job)


# ---------------------------------------------------------------------------------------------- the pipeline


@pytest.fixture(scope="module")
def chain(toy) -> list[str]:
    """The words that make slurm/pipeline.sh work on the small world, but for where the run goes."""
    world = embedded_world.load(str(toy.root / "world"))
    given = formats.source("vlguard", f"{toy.root}/world/safety-0.95/train.json", f"{toy.root}/world", split="unsafes")
    unsafe = sources.read(given).samples
    rows = [
        {"id": s.id, "question": s.question, "response": world.answer(s.question, world.label(s.image or ""))}
        for s in unsafe
    ]
    harvest = toy.root / "harvest.jsonl"
    harvest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepared = toy.root / "prepared"
    sizes = {"base_samples": 100, "safety_samples": 24, "general_samples": 24, "eval_samples": 8}
    return [
        *ONE_EACH,
        "--mem=1G",
        "seed=21",
        f"world.dir={toy.root}/world",
        "prepare:configs/prepare/demo.yaml",
        *(f"world.{name}={size}" for name, size in sizes.items()),
        f"prepare:harvest={harvest}",
        f"prepare:out={prepared}",
        RECIPE,
        f"model.path={toy.root}/model",
        *(f"data.streams.{n}=[{{format: samples, path: {prepared}/{n}.jsonl}}]" for n in ("forget", "retain")),
        "train:--nodes=2",
        "train.max_steps=3",
        "train.global_batch=8",
        "train.micro_batch=4",
        "eval:configs/eval/demo.yaml",
        "eval:--array=0-2%2",
        "eval:generation.max_new_tokens=3",
    ]


def submitted(slurm: Cluster, *words: str) -> dict[str, str]:
    """Link -> job."""
    output = slurm.ask(f"{REPOSITORY}/slurm/pipeline.sh", "npo", *words).stdout
    return dict(re.findall(r"^(prepare|train|eval|report) +(\d+)$", output, re.MULTILINE))


def test_the_pipeline_prepares_trains_evaluates_and_reports(slurm, toy, chain):
    root = toy.root / "slurm/chain"
    jobs = submitted(slurm, *chain, f"run.dir={root}")
    assert list(jobs) == ["prepare", "train", "eval", "report"]
    assert slurm.ended(jobs["report"])["JobState"] == "COMPLETED", "".join(
        slurm.log(job) for job in (*jobs.values(), f"{jobs['eval']}_*")
    )
    assert len(metrics(root)) == 3
    rows = [json.loads(line)["key"] for file in root.glob("evals/demo/rows/*.jsonl") for line in file.open()]
    assert len(rows) == len(set(rows)) == 8 * (5 + 3 + 1)
    assert (root / "report/index.html").is_file()


def test_a_link_that_fails_takes_the_rest_of_the_chain_with_it(slurm, toy, chain):
    jobs = submitted(slurm, *chain, f"run.dir={toy.root}/slurm/broken", "skip:prepare", "train.lr=much")
    assert list(jobs) == ["train", "eval", "report"]
    assert slurm.ended(jobs["train"])["ExitCode"] == "2:0"
    for link in ("eval", "report"):
        assert slurm.ended(jobs[link])["JobState"] == "CANCELLED"
    assert not (toy.root / "slurm/broken").exists()


def test_a_chain_of_which_slurm_refuses_a_link_never_starts(slurm, toy, chain):
    command = (f"{REPOSITORY}/slurm/pipeline.sh", "npo", *chain, "run.dir=runs/refused", "eval:--partition=nowhere")
    done = slurm.ask(*command, check=False)
    assert done.returncode == 1
    assert "sbatch refused the link eval" in done.stderr
    states = [slurm.job(job)["JobState"] for job in re.findall(r"^\w+ +(\d+)$", done.stdout, re.MULTILINE)]
    assert states == ["CANCELLED", "CANCELLED"]
