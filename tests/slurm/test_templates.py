"""What the scripts ask of Slurm and what they tell its processes; a stand-in takes the place of the training."""

import os
import shlex
import shutil
import sys

import pytest
from cluster import HERE, cluster

from mirage_dist.config import REPOSITORY

pytestmark = pytest.mark.slurm
TEMPLATES = ("sft", "unlearn_npo", "unlearn_rmu", "eval_attacks", "sweep", "mirage", "doctor")
# A partition as sites have them whose preemption first asks, and waits.
GRACE = "PartitionName=grace Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=20"
SMALL = ("--nodes=2", "--ntasks-per-node=1", "--gres=gpu:0", "--cpus-per-task=1")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    for started in cluster(tmp_path_factory.mktemp("slurm"), LAB_CONF=GRACE):
        started.environment |= {"MIRAGE_PYTHON": str(HERE / "standin.py"), "STANDIN_PYTHON": sys.executable}
        yield started


@pytest.mark.parametrize("script", TEMPLATES)
def test_slurm_accepts_the_script_as_it_is(slurm, script):
    slurm.ask("sbatch", "--test-only", f"{REPOSITORY}/slurm/{script}.sh")
    assert slurm.ask("sbatch", "--test-only", "--nodes=99", f"{REPOSITORY}/slurm/{script}.sh", check=False).returncode


@pytest.mark.parametrize("script", TEMPLATES)
def test_every_value_can_be_overridden_on_the_command_line(slurm, script):
    options = ("--hold", "--job-name=mine", "--nodes=2", "--ntasks-per-node=3", "--cpus-per-task=2", "--gres=gpu:4")
    more = ("--time=00:07:00", "--output=there.txt", "--partition=high", "--no-requeue", "--array=5", "--mem=2G")
    job = slurm.submit(script, options=(*options, *more))
    fields = slurm.job(job)
    slurm.ask("scancel", job)
    wanted = {"JobName": "mine", "NumNodes": "2-2", "NumTasks": "6", "CPUs/Task": "2", "TresPerNode": "gres:gpu:4"}
    wanted |= {"TimeLimit": "00:07:00", "Partition": "high", "Requeue": "0", "ArrayTaskId": "5", "MinMemoryNode": "2G"}
    assert {name: fields[name] for name in wanted} == wanted
    assert fields["StdOut"].endswith("there.txt")


def test_ranks_and_overrides_arrive(slurm):
    words = (
        "train.lr=5e-7",
        "data.streams.forget=[{format: samples, path: /a b/forget.jsonl}]",
        "run.name='$HOME * \"'",
    )
    job = slurm.submit(
        "unlearn_npo",
        *words,
        options=("--nodes=2", "--ntasks-per-node=2", "--gres=gpu:2", "--cpus-per-task=3"),
        # Left over from a shell that was itself a rank.
        **{"RANK": "7", "WORLD_SIZE": "9", "LOCAL_RANK": "7", "MASTER_ADDR": "elsewhere", "NCCL_DEBUG": "INFO"},
    )
    slurm.ended(job)
    starts = slurm.starts(job)
    assert [start["words"] for start in starts] == [["train", f"{REPOSITORY}/configs/train/npo.yaml", *words]] * 4
    env = [start["env"] for start in starts]
    assert sorted(e["SLURM_PROCID"] for e in env) == ["0", "1", "2", "3"]
    first = next(e["SLURMD_NODENAME"] for e in env if e["SLURM_PROCID"] == "0")
    for e in env:
        assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & set(e)
        assert (e["SLURM_NTASKS"], e["SLURM_CPUS_PER_TASK"], e["CUDA_VISIBLE_DEVICES"]) == ("4", "3", "0,1")
        assert (e["MASTER_ADDR"], e["MASTER_PORT"]) == (first, str(10000 + int(job) % 20000))
        assert (e["NCCL_DEBUG"], e["GLOO_SOCKET_IFNAME"], e["HF_HUB_OFFLINE"]) == ("INFO", "lo", "1")
    assert len({(e["SLURM_NODEID"], e["TRITON_CACHE_DIR"]) for e in env}) == 4


def test_a_job_from_the_repository_needs_no_variable_and_export_hides_nothing(slurm):
    variables = ",".join(f"{name}={slurm.environment[name]}" for name in ("MIRAGE_PYTHON", "TMPDIR", "PATH"))
    options = (*SMALL, f"--output={slurm.work}/%x-%j.log", f"--export={variables}")
    command = ("sbatch", "--parsable", *options, "slurm/sft.sh", "configs/train/demo_sft.yaml", "seed=3")
    job = slurm.ask("env", "-C", str(REPOSITORY), "-u", "MIRAGE_HOME", *command).stdout.strip()
    assert slurm.ended(job)["JobState"] == "COMPLETED", slurm.log(job)
    assert [s["words"] for s in slurm.starts(job)] == [["train", "configs/train/demo_sft.yaml", "seed=3"]] * 2


def test_a_dry_run_comes_first_where_it_is_wanted_and_stops_the_job_when_it_fails(slurm):
    passed = slurm.submit("unlearn_npo", "seed=3", options=SMALL, MIRAGE_DRY_RUN="1")
    failed = slurm.submit("sft", "fail=1:2", "seconds=9", options=SMALL, MIRAGE_DRY_RUN="1")
    stopped = slurm.submit("unlearn_rmu", "seconds=9", "again=0", options=SMALL, MIRAGE_DRY_RUN="1")
    slurm.until(lambda: len(slurm.starts(stopped)) == 2, "two ranks", stopped)
    slurm.ask("scancel", "--batch", "--signal=USR1", stopped)

    def dry(job: str) -> list[bool]:
        return ["train.dry_run=true" in start["words"] for start in slurm.starts(job)]

    assert slurm.ended(passed)["JobState"] == "COMPLETED", slurm.log(passed)
    assert dry(passed) == [True, False] * 2  # by rank, then by step
    assert "the dry run has passed" in slurm.log(passed)
    end = slurm.ended(failed)
    assert (end["JobState"], end["ExitCode"]) == ("FAILED", "2:0"), slurm.log(failed)
    assert dry(failed) == [True] * 2
    # A job that comes back has been tried already.
    end = slurm.ended(stopped)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1"), slurm.log(stopped)
    assert dry(stopped) == [True, False] * 2


def test_an_array_of_evaluation_workers_shares_out_the_questions(slurm):
    options = ("--array=2-4%2", "--nodes=1", "--ntasks-per-node=2", "--gres=gpu:2", "--cpus-per-task=1")
    job = slurm.submit("eval_attacks", "run.dir=runs/x", options=options)
    slurm.until(lambda: len(slurm.starts(job)) == 6, "six workers", job)
    starts = slurm.starts(job)
    assert sorted(start["words"][-1] for start in starts) == [f"{i}/6" for i in range(6)]
    assert {tuple(start["words"][:-1]) for start in starts} == {
        ("eval", f"{REPOSITORY}/configs/eval/vlguard.yaml", "run.dir=runs/x", "--worker")
    }
    assert {start["env"]["CUDA_VISIBLE_DEVICES"] for start in starts} <= set("01234567")
    assert len({(start["env"]["SLURM_JOB_ID"], start["env"]["CUDA_VISIBLE_DEVICES"]) for start in starts}) == 6


@pytest.mark.parametrize(
    ("options", "shares"),
    [
        (("--ntasks-per-node=2", "--gres=gpu:8"), ["0,1,2,3", "4,5,6,7"]),
        (("--ntasks-per-node=3", "--gres=gpu:8"), ["0,1", "2,3", "4,5"]),
        (("--ntasks-per-node=1", "--gres=gpu:4"), ["0,1,2,3"]),
        (("--ntasks-per-node=3", "--gres=gpu:2"), ["0", "0", "1"]),
        (("--gres=none", "--ntasks-per-node=2", "--gpus-per-task=4"), ["0,1,2,3", "4,5,6,7"]),
    ],
)
def test_evaluation_workers_share_out_the_gpus_of_a_node(slurm, options, shares):
    """Where there are fewer tasks than GPUs, each has several, of its own: for generation.tensor_parallel."""
    alone = ("--array=0", "--nodes=1", "--cpus-per-task=1")
    job = slurm.submit("eval_attacks", "run.dir=runs/x", options=(*alone, *options))
    slurm.ended(job)
    assert sorted(start["env"]["CUDA_VISIBLE_DEVICES"] for start in slurm.starts(job)) == shares


def test_an_element_of_a_sweep_trains_and_evaluates_its_point(slurm, tmp_path):
    """The words arrive as they were; what is trained is not trained again, and its own tasks share an evaluation."""
    words = ["configs/train/npo.yaml", "run.name='a  $b'", "seconds=0"]
    train, suite = shlex.join(["train", *words]), shlex.join(["eval", "configs/eval/demo.yaml", "x=1"])
    (tmp_path / "b/export").mkdir(parents=True)
    file = tmp_path / "points.tsv"
    rows = [["a", f"{tmp_path}/a", train, suite], ["b", f"{tmp_path}/b", train, suite], ["c", f"{tmp_path}/c", suite]]
    file.write_text("".join("\t".join(row) + "\n" for row in rows))
    options = ("--array=0-3", "--nodes=1", "--ntasks-per-node=2", "--gres=gpu:2", "--cpus-per-task=1")
    job = slurm.submit("sweep", str(file), options=options)
    slurm.ended(job)
    starts = [start["words"] for start in slurm.starts(job)]
    assert starts.count(["train", *words]) == 2  # two ranks of a
    for place in ("0/2", "1/2"):
        assert starts.count(["eval", "configs/eval/demo.yaml", "x=1", "--worker", place]) == 3
    assert len(starts) == 8
    log = slurm.log(f"{job}_3")
    assert "has 3 points; --array=0-2 are all of them" in log


def test_an_array_with_gaps_is_refused(slurm):
    job = slurm.submit("eval_attacks", options=("--array=1,5", "--nodes=1", "--gres=gpu:0"))
    slurm.until(lambda: slurm.log(f"{job}_*").count("must be one range") == 2, "the message", job)


# How a job is told to stop; whether it starts again; the state it ends in and the status of the batch script.
# The first line of each that says `batch` reaches the batch script only, `step` the ranks only, `job` all.
STOPS = {
    "batch USR1": (("scancel", "--batch", "--signal=USR1", "{job}"), 1, "COMPLETED", "0:0"),
    "step USR1": (("scancel", "--signal=USR1", "{job}"), 1, "COMPLETED", "0:0"),
    "step TERM": (("scancel", "--signal=TERM", "{job}"), 1, "COMPLETED", "0:0"),
    "batch TERM": (("scancel", "--batch", "--signal=TERM", "{job}"), 0, "FAILED", "75:0"),
    "job scancel": (("scancel", "{job}"), 0, "CANCELLED", "75:0"),
    "job requeue": (("scontrol", "requeue", "{job}"), 1, "COMPLETED", "0:0"),
}


@pytest.fixture(scope="module")
def stopped(slurm):
    """Every way at once, for the nodes are wide: name -> job."""
    jobs = {name: slurm.submit("unlearn_npo", "seconds=8", options=SMALL) for name in STOPS}
    for job in jobs.values():
        slurm.until(lambda job=job: len(slurm.starts(job)) == 2, "two ranks", job)
    for name, job in jobs.items():
        slurm.ask(*(word.format(job=job) for word in STOPS[name][0]))
    return jobs


@pytest.mark.parametrize("how", STOPS)
def test_a_job_that_is_asked_to_stop(slurm, stopped, how):
    _, restarts, state, status = STOPS[how]
    fields = slurm.ended(stopped[how])
    log = slurm.log(stopped[how])
    assert (fields["Restarts"], fields["JobState"], fields["ExitCode"]) == (str(restarts), state, status), log
    assert "stopped on request" in log
    assert len(slurm.starts(stopped[how])) == 2 * (1 + restarts)


def test_a_stop_before_the_ranks_are_there_is_requeued(slurm):
    job = slurm.submit("unlearn_npo", "seconds=3", options=SMALL)
    slurm.until(lambda: "mirage train" in slurm.log(job), "the batch script", job)
    slurm.ask("scancel", "--batch", "--signal=USR1", job)
    assert (slurm.ended(job)["JobState"], slurm.job(job)["Restarts"]) == ("COMPLETED", "1"), slurm.log(job)


def test_a_request_that_a_step_takes_and_does_not_heed_is_made_again(slurm, tmp_path):
    """As when Slurm has accepted the signal for a step that it is setting up: only the first call does nothing."""
    deaf = tmp_path / "scancel"
    deaf.write_text(f'#!/bin/sh\nmkdir "{tmp_path}/once" 2>/dev/null || exec {shutil.which("scancel")} "$@"\n')
    deaf.chmod(0o755)
    job = slurm.submit("unlearn_npo", "seconds=60", "again=0", options=SMALL, PATH=f"{tmp_path}:{os.environ['PATH']}")
    slurm.until(lambda: len(slurm.starts(job)) == 2, "two ranks", job)
    slurm.ask("scancel", "--batch", "--signal=USR1", job)
    assert (slurm.ended(job)["JobState"], slurm.job(job)["Restarts"]) == ("COMPLETED", "1"), slurm.log(job)


def test_preemption_with_a_grace_time_signals_only_the_ranks_and_is_requeued(slurm):
    job = slurm.submit("unlearn_npo", "seconds=4", options=(*SMALL, "--partition=grace"))
    slurm.until(lambda: len(slurm.starts(job)) == 2, "two ranks", job)
    other = slurm.ask(
        "sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive", "--wrap=true"
    ).stdout.strip()
    assert (slurm.ended(job)["JobState"], slurm.job(job)["Restarts"]) == ("COMPLETED", "1"), slurm.log(job)
    assert slurm.ended(other)["JobState"] == "COMPLETED"


@pytest.mark.parametrize(("fail", "status"), [("0:1", "1:0"), ("1:2", "2:0")])
def test_a_rank_that_fails_ends_the_job_which_is_not_started_again(slurm, fail, status):
    # The other rank is told to stop, says 75 like a rank that saved, and would run for two minutes.
    job = slurm.submit("unlearn_npo", "seconds=120", f"fail={fail}", options=SMALL)
    fields = slurm.ended(job, seconds=30)
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("FAILED", status, "0"), slurm.log(job)


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_launcher_places_the_ranks_and_passes_on_the_stop_and_its_status(slurm, launcher):
    options = ("--nodes=2", "--ntasks-per-node=1", "--gres=gpu:2", "--cpus-per-task=4")
    job = slurm.submit("unlearn_npo", "seconds=5", options=options, MIRAGE_LAUNCHER=launcher)
    slurm.until(lambda: len(slurm.starts(job)) == 4, "four workers", job)
    slurm.ask("scancel", "--batch", "--signal=USR1", job)
    fields = slurm.ended(job)
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("COMPLETED", "0:0", "1"), slurm.log(job)
    env = [start["env"] for start in slurm.starts(job)]
    assert sorted(e["RANK"] for e in env) == sorted("01230123")
    for e in env:
        assert (int(e["RANK"]) // 2, int(e["RANK"]) % 2) == (int(e["SLURM_NODEID"]), int(e["LOCAL_RANK"]))
        assert (e["WORLD_SIZE"], e["MASTER_PORT"]) == ("4", str(10000 + int(job) % 20000))
        assert e["MASTER_ADDR"] == min(e["SLURMD_NODENAME"] for e in env)


def test_a_term_to_deepspeeds_launcher_which_answers_1_is_a_stop_when_its_workers_stopped(slurm):
    options = ("--nodes=2", "--ntasks-per-node=1", "--gres=gpu:1", "--cpus-per-task=1")
    words = ("seconds=60", "again=1")
    job = slurm.submit("unlearn_npo", *words, options=options, MIRAGE_LAUNCHER="deepspeed")
    slurm.until(lambda: len(slurm.starts(job)) == 2, "two workers", job)
    slurm.ask("scancel", "--signal=TERM", job)
    fields = slurm.ended(job)
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("COMPLETED", "0:0", "1"), slurm.log(job)


# Fails as often as told, for each command of its own, as when the controller is busy.
BUSY = """#!/bin/bash
[[ $2 != hostnames ]] || exec {real} "$@"
count=$TMPDIR/calls-$SLURM_JOB_ID-{name}-${{1//[^a-z]/}}
echo >>"$count"
if (($(wc -l <"$count") <= {failures})); then
  echo "slurm_{name} error: Unable to contact slurm controller" >&2
  exit 1
fi
exec {real} "$@"
"""


def busy(slurm, failures: int, *names: str) -> dict[str, str]:
    """The PATH of a job whose Slurm commands fail at first."""
    folder = slurm.root / f"busy-{failures}"
    folder.mkdir()
    for name in names:
        program = folder / name
        program.write_text(BUSY.format(name=name, failures=failures, real=shutil.which(name)))
        program.chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


def test_before_the_time_limit_a_request_is_tried_again_until_it_has_been_passed_on(slurm):
    """The limit is reached: whoever is not requeued ends TIMEOUT."""
    options = (*SMALL, "--time=1", "--signal=B:USR1@40")
    often, never = busy(slurm, 2, "scontrol", "scancel", "squeue"), busy(slurm, 1000, "scancel")
    plain, tried, lost = (
        slurm.submit("unlearn_npo", "seconds=200", "again=1", options=options, **environment)
        for environment in ({}, often, never)
    )
    for job in (plain, tried):
        fields = slurm.ended(job)
        assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("COMPLETED", "0:0", "1"), slurm.log(job)
    log = slurm.log(tried)
    assert "USR1 could not be passed on to the processes, trying again: slurm_" in log
    assert "USR1 is passed on" in log
    assert "stopped on request; not requeued, trying again: slurm_" in log
    assert "stopped on request; requeued" in log
    assert slurm.ended(lost)["JobState"] == "TIMEOUT"
    assert "USR1 could not be passed on to the processes, trying again: slurm_scancel error" in slurm.log(lost)


def test_a_job_that_may_not_be_requeued_ends_and_says_so(slurm):
    job = slurm.submit("unlearn_npo", "seconds=60", options=(*SMALL, "--no-requeue"))
    slurm.until(lambda: len(slurm.starts(job)) == 2, "two ranks", job)
    slurm.ask("scancel", "--batch", "--signal=USR1", job)
    assert slurm.ended(job)["ExitCode"] == "75:0"
    assert "this job may not be requeued" in slurm.log(job)


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_rank_that_fails_under_a_launcher_ends_the_job(slurm, launcher):
    options = ("--nodes=2", "--ntasks-per-node=1", "--gres=gpu:1", "--cpus-per-task=1")
    job = slurm.submit("unlearn_npo", "seconds=120", "fail=1:1", options=options, MIRAGE_LAUNCHER=launcher)
    fields = slurm.ended(job, seconds=60)
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("FAILED", "1:0", "0"), slurm.log(job)
    assert len(slurm.starts(job)) == 2
