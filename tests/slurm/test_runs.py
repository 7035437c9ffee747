"""Training and evaluation as jobs of a real Slurm: stopped in every way a cluster has, they come to the same end."""

import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import forkserver
import pytest
from cluster import Cluster, cluster
from conftest import launch, metrics
from faults.processes import worker

from mirage_dist import state
from mirage_dist.config import REPOSITORY
from mirage_dist.monitoring import wandb_files

pytestmark = pytest.mark.slurm
STEPS = 120
RECIPE = "configs/train/demo_npo.yaml"
SHORT = (f"train.max_steps={STEPS}", "train.global_batch=8", "train.micro_batch=4", "train.save_every=1000")
ONE_EACH = ("--ntasks-per-node=1", "--gres=gpu:0", "--cpus-per-task=1")
TWO_NODES = ("--nodes=2", *ONE_EACH)
# In place of Apptainer, whose process passes signals on to the container's, and ends with its status.
APPTAINER = """#!/bin/bash
[[ $1 == exec ]] || exit 255
shift
while [[ $1 == --* ]]; do case $1 in --nv) shift ;; *) shift 2 ;; esac; done
[[ -e $1 ]] || exit 255
shift
"$@" &
child=$!
for name in USR1 TERM; do trap "kill -$name $child" $name; done
while :; do
  wait $child
  status=$?
  kill -0 $child 2>/dev/null || exit $status
done
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    # After the failure of a node two are left.
    settings = {"LAB_NODES": "3", "LAB_NODE_TIMEOUT": "5", "LAB_KILL_WAIT": "10"}
    yield from cluster(tmp_path_factory.mktemp("slurm"), MIRAGE_PYTHON=forkserver.python(), **settings)


class Run:
    """`sbatch slurm/unlearn_npo.sh` on two nodes, into a run directory of its own."""

    def __init__(
        self,
        slurm: Cluster,
        toy,
        name: str,
        *more: str,
        fresh: bool = False,
        options: tuple[str, ...] = TWO_NODES,
        **environment: str,
    ) -> None:
        """fresh: each rank starts from nothing, as a user's does; otherwise the libraries are there (`forkserver`)."""
        self.slurm, self.root = slurm, toy.root / "slurm" / name
        self.words = (RECIPE, *toy.overrides("npo", self.root), *SHORT, *more)
        python = sys.executable if fresh else slurm.environment["MIRAGE_PYTHON"]
        environment.setdefault("MIRAGE_PYTHON", python)
        self.job = slurm.submit("unlearn_npo", *self.words, options=options, **environment)

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
    end = run.slurm.ended(run.job)
    log = run.slurm.log(run.job)
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("COMPLETED", "0:0", str(restarts)), log


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


def test_the_doctor_sees_both_nodes_and_what_slurm_will_do(slurm, toy):
    own = toy.root / "slurm" / "doctor"
    words = ("--json", "--recipe", RECIPE, *toy.overrides("npo", own), *SHORT)
    jobs = [slurm.submit("doctor", *words, options=(*TWO_NODES, *more)) for more in ((), ("--no-requeue",))]
    reports = []
    for job in jobs:
        assert slurm.ended(job)["ExitCode"] == "0:0", slurm.log(job)
        log = slurm.log(job)
        reports.append(json.loads(log[log.index("\n{\n") : log.index("\n}\n") + 2]))
    verdicts = [{check["name"]: check["verdict"] for check in report["checks"]} for report in reports]
    assert [len({rank["host"] for rank in report["ranks"]}) for report in reports] == [2, 2]
    assert {v["seen by other ranks"] for v in verdicts} == {v["all-reduce"] for v in verdicts} == {"ok"}
    assert [v["requeue"] for v in verdicts] == ["ok", "warning"]
    assert verdicts[0]["preemption"] == verdicts[0]["time to save"] == verdicts[0]["model and data"] == "ok"
    # lab.sh's own values, as Slurm prints them
    save = next(check for check in reports[0]["checks"] if check["name"] == "time to save")
    assert save["values"]["seconds"] == int(slurm.environment["LAB_KILL_WAIT"])
    assert not own.exists()


def test_hpz_has_the_losses_of_zero3_which_goes_on_from_its_checkpoint(slurm, toy, whole):
    """Four ranks on two nodes. `whole` is of two ranks; by `schedule_steps` its first steps have the same rates."""
    tree = json.loads((REPOSITORY / "configs/deepspeed/zero3_hpz.json").read_text())
    tree["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # so small a model would not be partitioned
    (toy.root / "slurm-hpz.json").write_text(json.dumps(tree))
    own = ("train.micro_batch=auto", "train.max_steps=6", f"train.schedule_steps={STEPS}", "train.save_every=3")
    nodes = ("--nodes=2", "--ntasks-per-node=2", "--gres=gpu:0", "--cpus-per-task=1")
    run = Run(slurm, toy, "hpz", *own, f"deepspeed={toy.root}/slurm-hpz.json", "train.export=off", options=nodes)
    completed(run, restarts=0)
    log = slurm.log(run.job)
    assert "hpZ: 4 ranks on 2 nodes: each 2 ranks hold a second copy of the weights" in log
    assert "2 rows of each stream at once on 4 ranks, 1 such micro-batch a step" in log
    expected = [line["loss"] for line in metrics(whole.root)[:6]]
    assert [line["loss"] for line in metrics(run.root)] == pytest.approx(expected, rel=1e-5)
    shutil.rmtree(run.root / "checkpoints/step-000006")
    done = launch(2, "train", *run.words, "deepspeed=configs/deepspeed/zero3.json")
    assert "step-000003 at step 3" in done.stdout
    assert [line["micro_batch"] for line in metrics(run.root)] == [2, 2, 2, 4, 4, 4]
    assert [line["loss"] for line in metrics(run.root)] == pytest.approx(expected, rel=1e-5)


def test_usr1_before_the_time_limit_saves_requeues_and_resumes(slurm, toy, whole):
    """In a container, where Slurm's signals reach the process as they do without; `whole` ran without."""
    folder = slurm.root / "bin"
    folder.mkdir()
    (folder / "apptainer").write_text(APPTAINER)
    (folder / "apptainer").chmod(0o700)
    (folder / "mirage.sif").touch()
    within = {"MIRAGE_CONTAINER": str(folder / "mirage.sif"), "PATH": f"{folder}:{slurm.environment['PATH']}"}
    within |= {"MIRAGE_CONTAINER_PYTHON": slurm.environment["MIRAGE_PYTHON"], "MIRAGE_PYTHON": "/no/python"}
    run = Run(slurm, toy, "usr1", **within)
    run.reach(10)
    seen = len(run.steps())
    slurm.ask("scancel", "--batch", "--signal=USR1", run.job)
    run.restarted()
    completed(run, restarts=1)
    assert len(run.resumed()) == 1
    assert seen <= run.resumed()[0] < STEPS
    same(run, whole)


def test_a_preempted_job_saves_and_resumes_and_wandb_gets_each_step_once(slurm, toy, whole):
    """Slurm signals every process of the job: W&B's service, too."""
    run = Run(slurm, toy, "preempted", "monitor.wandb=offline")
    run.reach(10)
    seen = len(run.steps())
    slurm.ask("sbatch", "--partition=high", "--nodes=3", "--exclusive", "--wrap=true")
    run.restarted()
    completed(run, restarts=1)
    assert seen <= run.resumed()[0] < STEPS
    same(run, whole)
    identity = json.loads((run.root / "manifest.json").read_text())["wandb_id"]
    files = wandb_files.offline_files(run.root / "wandb", identity)
    sent = [
        record.history.step.num for file in files for record in wandb_files.records(file) if record.HasField("history")
    ]
    assert sent == list(range(1, STEPS + 1))


def test_a_cancelled_job_saves_stays_away_and_can_be_finished_on_one_node(slurm, toy, whole):
    run = Run(slurm, toy, "cancelled")
    run.reach(10)
    seen = len(run.steps())
    slurm.ask("scancel", run.job)
    end = slurm.ended(run.job)
    assert (end["JobState"], end["Restarts"]) == ("CANCELLED", "0")
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
    end = slurm.ended(run.job, seconds=30)
    assert (end["JobState"], end["Restarts"], end["ExitCode"]) == ("FAILED", "0", "137:0"), slurm.log(run.job)


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


def test_starts_that_stop_on_request_before_training_begins_do_not_count(slurm, toy):
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
    counted = [{**line, "stopped": n == 0} for n, line in enumerate(lines)]
    noted.write_text("".join(state.sealed("start", {k: v for k, v in c.items() if k != "seal"}) for c in counted))
    end = slurm.ended(run.job)
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("FAILED", "1:0", "2"), slurm.log(run.job)
    assert "has started 1 times from step 0" in slurm.log(run.job)
