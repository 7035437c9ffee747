"""`mirage doctor`: each verdict where what it is about is really so, exit statuses, JSON, and nothing left behind."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import launch
from hypothesis import given
from hypothesis import strategies as st
from packaging.requirements import Requirement

from mirage_dist import cli
from mirage_dist.config import REPOSITORY
from mirage_dist.doctor import communication, gpu, kernels, limits, run, semantics, services, slurm, software, storage
from mirage_dist.doctor.checks import CHECKS, SEVERITY, Check, Context, Peer, failed, ok, warning
from mirage_dist.ranks import Group
from mirage_dist.schema import RunError

ALONE = Group(0, 0, 1, torch.device("cpu"))


@pytest.fixture
def context(tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    return Context(ALONE, [Peer(0, "here", os.getpid())], tmp_path, place)


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Puts a program of this name and shell text before all others."""
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")

    def put(name, text):
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!/bin/sh\n{text}\n")
        file.chmod(0o755)

    return put


def doctor(*words, mount=None, folder=None, **environment):
    """(status, JSON report, standard error) of the command, in a mount namespace with a tmpfs at `folder` if wanted."""
    command = [sys.executable, "-m", "mirage_dist.cli", "doctor", "--json", *words]
    if mount is not None:
        script = f'mount -t tmpfs -o "{mount}" tmpfs "{folder}" && exec "$@"'
        command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh", *command]
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    done = subprocess.run(command, env=variables, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout.startswith("{"), done.stdout + done.stderr
    return done.returncode, json.loads(done.stdout), done.stderr


def by_name(report):
    return {check["name"]: check for check in report["checks"]}


def test_every_verdict_of_one_run_with_many_things_wrong(tmp_path):
    """A full disk, a package of another version, threads and files as they should not be, a key that is none."""
    full, other = tmp_path / "full", tmp_path / "other"
    full.mkdir()
    (other / "regex-2020.1.1.dist-info").mkdir(parents=True)
    (other / "regex-2020.1.1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: regex\nVersion: 2020.1.1\n")
    key = "0123456789" * 2  # half as long as a key is
    status, report, errors = doctor(
        *("--dir", str(full)),
        mount="size=1m",
        folder=full,
        PYTHONPATH=f"{other}:{REPOSITORY}",
        OMP_NUM_THREADS="500",
        WANDB_API_KEY=key,
    )
    checks = by_name(report)
    assert status == 1
    assert "doctor: 2 checks failed, see above" in errors
    assert (report["version"], report["verdict"], report["folder"]) == (1, "failed", str(full))
    assert [rank["rank"] for rank in report["ranks"]] == [0]
    assert len(checks) == len(CHECKS)
    for name, verdict, words, remedy in (
        ("write and read", "failed", "the disk accepts no more (No space left on device)", "free space"),
        ("packages", "failed", "regex 2020.1.1 (tested: >=2025.10.22)", "pip install 'regex>=2025.10.22'"),
        ("space", "warning", "0.0 of 0.0 GiB free", "--recipe CONFIG"),
        ("threads", "warning", "OMP_NUM_THREADS=500 of 1 rank here", "OMP_NUM_THREADS="),
        ("W&B", "warning", "WANDB_API_KEY is of no use: it does not have the form of a key", "wandb login"),
    ):
        assert checks[name]["verdict"] == verdict, checks[name]
        assert words in checks[name]["text"]
        assert remedy in checks[name]["remedy"]
    for name in ("python", "loss head", "steering error", "rename", "hard links", "exclusive creation", "locks"):
        assert checks[name]["verdict"] == "ok", checks[name]
    assert key not in json.dumps(report) + errors


def test_a_place_that_cannot_be_written_is_one_failure(capsys, monkeypatch):
    monkeypatch.setattr(run, "CHECKS", [c for c in CHECKS if c.group in ("storage", "file system")])
    with pytest.raises(RunError, match="doctor: 1 check failed, see above"):
        run.doctor(Path("/proc/runs"), None, as_json=True)
    checks = by_name(json.loads(capsys.readouterr().out))
    assert "/proc/runs: cannot be written: No such file or directory" in checks["write and read"]["text"]
    assert checks["rename"]["verdict"] == checks["locks"]["verdict"] == "not here"


def test_two_ranks_report_once_and_leave_nothing(tmp_path):
    done = launch(2, "doctor", "--dir", str(tmp_path / "runs"), check=False)
    lines = done.stdout.splitlines()
    for name in ("all-reduce", "all-gather", "reduce-scatter", "seen by other ranks"):
        assert [line.split()[0] for line in lines if f" {name} " in line] == ["ok"], done.stdout
    assert "by gloo over 2 ranks on 1 host" in done.stdout
    assert lines[-1].startswith("2 ranks on 1 host, ")
    assert done.returncode == (" failed" in lines[-1]), done.stdout
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_one_has_left_goes_with_the_next(tmp_path, monkeypatch):
    from mirage_dist.disk import removal
    from mirage_dist.liveness import Owner

    dead = Owner.current()
    removal.own(removal.sibling(tmp_path / "doctor"), Owner(**{**dead.record(), "process": "1"}))
    alive = removal.own(removal.sibling(tmp_path / "doctor"))
    theirs = tmp_path / "doctor.mine.tmp"
    theirs.mkdir()
    monkeypatch.setattr(run, "CHECKS", ())
    monkeypatch.setattr(run, "text", lambda _: [])
    run.doctor(tmp_path, None, as_json=False)
    assert sorted(tmp_path.iterdir()) == sorted((alive, theirs))


def test_bad_input_is_no_verdict(tmp_path, capsys):
    assert cli.main(["doctor", "train.lr=1"]) == 2
    assert "train.lr=1: belongs to a recipe; give it with --recipe CONFIG" in capsys.readouterr().err
    assert cli.main(["doctor", "--recipe", str(tmp_path / "no.yaml")]) == 2
    assert "no such file" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- software


@pytest.mark.parametrize(
    ("requirement", "status", "words"),
    [
        ("numpy>=1", "ok", "numpy "),
        ("numpy<1", "warning", "(tested: <1)"),
        ("numpy>=99,<100", "failed", "(tested: <100,>=99)"),
        ("numpy==1.0", "failed", "(tested: ==1.0)"),
        ("no-such-package>=2", "failed", "no-such-package is missing"),
    ],
)
def test_a_package_is_missing_too_old_or_newer_than_what_was_tested(requirement, status, words):
    verdict = software.compared([Requirement("torch"), Requirement(requirement)])
    assert verdict.status == status
    assert words in verdict.text
    assert verdict.remedy == ("" if status == "ok" else f"pip install '{Requirement(requirement)}'")


def test_the_ranges_of_the_checkout_are_those_that_were_installed():
    assert software.declared() is not None
    assert software.of_checkout()[0] == ">=3.11"
    names = {Requirement(r).name for r in software.of_checkout()[1]}
    assert names >= {"torch", "deepspeed", "flash-attn", "pytest"}


# --------------------------------------------------------------------------------------------------------- GPU

UUIDS = ("GPU-d0180485-9584-433c-6782-c335d5df2cb3", "GPU-777ead31-954e-837f-590f-6c4974d8e571")
# As `nvidia-smi --query-… --format=csv,noheader,nounits` prints it (the fields and their order by its --help-query-gpu,
# the uuids of NVIDIA/dcgm-exporter#94; [N/A] for what a GPU does not have, Yes and No for remapped rows).
SMI = """case "$1" in
  --query-gpu=uuid,name,*) printf '%s, NVIDIA H100 80GB HBM3, 580.65.06, 81559\\n' {0} {1} ;;
  --query-gpu=uuid,index,*) printf '{0}, 0, {errors}\\n{1}, 1, [N/A]\\n' ;;
  --query-remapped-rows=*) printf '{0}, 0, No, {failure}\\n{1}, 0, {pending}, No\\n' ;;
  --query-compute-apps=*) printf '{apps}' ;;
esac"""


def smi(**given):
    return SMI.format(*UUIDS, **{"errors": "0", "failure": "No", "pending": "No", "apps": "", **given})


def test_nvidia_smi_is_read(context, program):
    program("nvidia-smi", smi())
    assert gpu.driver(context).text == "580.65.06; 2 × NVIDIA H100 80GB HBM3"
    assert gpu.memory_errors(context) == ok("none on 1 GPU")
    assert gpu.processes(context) == ok("none")


@pytest.mark.parametrize(
    ("given", "status", "words"),
    [
        ({"errors": "3"}, "warning", "GPU 0: 3 uncorrected ECC errors since the driver was loaded"),
        ({"pending": "Yes"}, "warning", "GPU 1: memory is to be replaced at its next reset"),
        ({"failure": "Yes"}, "failed", "GPU 0 has memory that can no longer be replaced"),
        ({"errors": "[Not Supported]"}, "not here", "do not count ECC errors"),
    ],
)
def test_memory_errors_of_a_gpu(context, program, given, status, words):
    program("nvidia-smi", smi(**given))
    verdict = gpu.memory_errors(context)
    assert verdict.status == status
    assert words in verdict.text


def test_processes_on_a_gpu_are_told_from_this_jobs_ranks(context, program):
    mine = f"{UUIDS[0]}, {os.getpid()}, python, 1024\\n"
    program("nvidia-smi", smi(apps=mine))
    assert gpu.processes(context) == ok("none")
    program("nvidia-smi", smi(apps=f"{mine}{UUIDS[0]}, 4242, /usr/bin/other tool, 7000\\n"))
    assert gpu.processes(context).text == "/usr/bin/other tool (4242): 7000 MiB"


def test_a_driver_in_trouble_fails_and_one_that_hangs_too(context, program, monkeypatch):
    program("nvidia-smi", "echo 'Failed to initialize NVML: Driver/library version mismatch' && exit 18")
    assert "status 18: Failed to initialize NVML" in gpu.driver(context).text
    monkeypatch.setattr(gpu, "SMI_SECONDS", 0.1)
    program("nvidia-smi", "exec sleep 9")
    verdict = gpu.memory_errors(context)
    assert (verdict.status, verdict.text) == ("failed", "nvidia-smi has not answered within 0.1 s")


# ------------------------------------------------------------------------------------------------ kernels, ranks


def test_a_kernel_that_is_a_little_wrong_fails(context, monkeypatch):
    from mirage_dist.kernels import logprob

    assert kernels.loss_head(context).status == "ok"
    right = logprob.linear_token_logps
    monkeypatch.setattr(
        logprob, "linear_token_logps", lambda h, w, y: right(h, w, y) * (1 if h.dtype == torch.float64 else 1.00001)
    )
    verdict = kernels.loss_head(context)
    assert verdict.status == "failed"
    assert "× the tolerance in float32" in verdict.text


@given(st.lists(st.floats(90, 110), min_size=3, max_size=9), st.data())
def test_a_planted_slow_rank_is_named_and_noise_is_not(speeds, data):
    assert communication.straggler(speeds, 0.5) is None
    slow = data.draw(st.integers(0, len(speeds) - 1))
    speeds[slow] = 40.0
    assert communication.straggler(speeds, 0.5) == slow


@pytest.mark.parametrize(("ahead", "status"), [(0.2, "ok"), (-5.0, "warning"), (90.0, "failed")])
def test_the_host_whose_clock_is_off_is_named(tmp_path, ahead, status):
    peers = [Peer(n, f"host-{n}", n) for n in range(3)]
    verdict = communication.judged_clocks(Context(ALONE, peers, tmp_path), [0.0, ahead, 0.0])
    assert verdict.status == status
    assert ("rank 1 on host-1" in verdict.text) == (status != "ok")


def test_clocks_and_others_are_named_when_rank_0_is_the_odd_one(tmp_path):
    peers = [Peer(n, f"host-{n}", n) for n in range(3)]
    assert "rank 0 on host-0" in communication.judged_clocks(Context(ALONE, peers, tmp_path), [0.0, 9.0, 9.0]).text


# ------------------------------------------------------------------------------------------------- file system


def test_a_write_past_a_limit_is_a_failure_that_says_so(context):
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, before[1]))
    try:
        verdict = storage.speed(context)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (verdict.status, "File too large" in verdict.text) == ("failed", True)
    assert list(context.place.iterdir()) == []


def test_semantics_that_a_file_system_lacks_are_failures(context, monkeypatch):
    """No file system without hard links is at hand everywhere, nor one that creates a name twice."""

    def refused(*_):
        raise PermissionError(1, "Operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", refused)
        assert semantics.links(context).text.startswith("no hard links here (Operation not permitted)")
    shutil.rmtree(context.place / "links-0")
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", lambda *_: None)
        assert semantics.links(context).status == "failed"

    def in_two_steps(source, target):
        Path(target).unlink()
        Path(target).write_bytes(b"")
        Path(target).write_bytes(Path(source).read_bytes())

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", in_two_steps)
        verdict = semantics.rename(context)
    assert verdict.status == "failed"
    assert verdict.values["torn"] + verdict.values["missing"] > 0


def test_locks_that_are_not_kept_are_a_warning(context, monkeypatch):
    import fcntl

    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    verdict = semantics.locks(context)
    assert (verdict.status, verdict.values) == ("warning", {"lockf": "refused", "flock": "taken"})
    assert "flock: not kept" in verdict.text


# ------------------------------------------------------------------------------------------------------ services


@pytest.mark.parametrize(
    ("content", "source", "fault"),
    [
        ("machine api.wandb.ai login user password " + "a1" * 20, True, ""),
        ("machine api.wandb.ai login user password short", True, "it does not have the form of a key"),
        ("machine example.org login user password " + "a1" * 20, False, ""),
        ("machine", True, "line 2 of it cannot be read"),
    ],
)
def test_a_login_is_looked_for_where_wandb_looks(tmp_path, monkeypatch, content, source, fault):
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "netrc"
    file.write_text(content + "\n")
    file.chmod(0o600)
    monkeypatch.setenv("NETRC", str(file))
    assert services.login() == (str(file) if source else None, fault)
    monkeypatch.setenv("WANDB_API_KEY", "local-" + "0" * 40)
    assert services.login() == ("WANDB_API_KEY", "")


def test_what_wandb_takes_for_a_key_is_what_its_client_takes():
    from wandb.sdk.lib.wbauth.validation import check_api_key

    for key in ("a" * 40, "a" * 39, "local-" + "b" * 40, "wandb_v1_" + "c" * 60, "a.b.c", "x" * 20 + " " + "y" * 40):
        assert (services.KEY.fullmatch(key) is not None) == (check_api_key(key) is None), key


# ------------------------------------------------------------------------------------------------ limits, Slurm


def test_memory_limits_of_both_kinds_of_cgroup(tmp_path):
    new, old = tmp_path / "job/step", tmp_path / "memory/job"
    for folder in (new, old):
        folder.mkdir(parents=True)
    (new.parent / "memory.max").write_text("2000\n")
    (new / "memory.max").write_text("max\n")
    (new / "memory.events").write_text("low 0\noom_kill 3\n")
    (old / "memory.limit_in_bytes").write_text("1000\n")
    (tmp_path / "memory/memory.limit_in_bytes").write_text("9223372036854771712\n")
    process = tmp_path / "cgroup"
    process.write_text("0::/job/step\n")
    assert limits.cgroup(tmp_path, process) == (2000, 3)
    process.write_text("9:cpu:/job\n4:memory:/job\n")
    assert limits.cgroup(tmp_path, process) == (1000, 0)
    process.write_text("4:memory:/\n")
    assert limits.cgroup(tmp_path, process) == (None, 0)


def test_too_few_open_files_are_a_failure(tmp_path, context):
    many = Context(Group(0, 0, 10**6, torch.device("cpu")), context.peers, tmp_path)
    verdict = limits.open_files(many)
    assert verdict.status == "failed"
    assert f"{10**6} ranks need {512 + 4 * 10**6}" in verdict.text


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30 sec", 30), ("20", 20), ("00:15:00", 900), ("1-02:00:00", 93600), ("05:30", 330), ("UNLIMITED", None)],
)
def test_durations_of_slurm(text, seconds):
    assert slurm.seconds(text) == seconds


def test_a_controller_that_does_not_answer_fails_within_a_job(context, program, monkeypatch):
    program("scontrol", "echo 'slurm_load_ctl_conf error: Unable to contact slurm controller' >&2; exit 1")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert slurm.requeue(context).status == "not here"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    verdict = slurm.requeue(context)
    assert (verdict.status, "Unable to contact" in verdict.text) == ("failed", True)


# -------------------------------------------------------------------------------------------------------- report


@given(st.lists(st.sampled_from(SEVERITY), min_size=1, max_size=6))
def test_no_rank_that_is_worse_than_the_others_is_lost(statuses):
    makers = {"ok": ok, "warning": lambda t: warning(t, "x"), "failed": lambda t: failed(t, "x")}
    verdicts = [makers.get(s, lambda t: ok(t))(f"{s} {n}") for n, s in enumerate(statuses)]
    peers = [Peer(n, f"host-{n}", n) for n in range(len(statuses))]
    lines = run.merged(Check("name", "group", "x:y", "rank"), verdicts, peers)
    shown = "\n".join(run.text(lines))
    for number, status in enumerate(statuses):
        if status in ("warning", "failed"):
            assert f"{status} {number}" in shown
            assert len(statuses) == 1 or f"rank {number} on host-{number}" in shown
    worst = max((v.status for v in verdicts), key=SEVERITY.index)
    assert max((line.verdict.status for line in lines), key=SEVERITY.index) == worst


def test_a_check_that_raises_is_a_failure_and_not_a_traceback(context):
    verdict = run.guarded(Check("x", "y", "no_such_module:z", "main"), context)
    assert verdict.status == "failed"
    assert "ends with ModuleNotFoundError" in verdict.text


def test_every_check_is_a_function_with_a_name_of_its_own():
    import importlib

    assert len({check.name for check in CHECKS}) == len(CHECKS)
    for check in CHECKS:
        module, _, name = check.function.partition(":")
        assert callable(getattr(importlib.import_module(f"mirage_dist.doctor.{module}"), name))
    page = (REPOSITORY / "docs/doctor.md").read_text()
    assert [check.name for check in CHECKS if f"| {check.name} |" not in page] == []
