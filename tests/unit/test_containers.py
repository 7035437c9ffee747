"""Slurm scripts in an image: the whole command line, what the image sees, signals, and what is refused.

Neither Apptainer nor pyxis is here: stand-ins record how they are started, and run the command, as the real ones do,
with its environment, its signals and its exit status. Their options are those of `apptainer exec --help` (1.3) and of
https://github.com/NVIDIA/pyxis/wiki/Usage.
"""

import os
import re
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from mirage_dist.config import REPOSITORY, home

STUBS = {
    "scontrol": 'echo "scontrol $*" >>"$CALLS"\n'
    'case "$1 $2" in "show hostnames") printf "alpha\\nbeta\\n" ;;\n'
    '"--oneliner show") echo "JobId=1 JobState=RUNNING Requeue=1 Restarts=0 BatchFlag=1 " ;; esac',
    "squeue": "echo 1.0",
    # Slurm signals every process of the step.
    "scancel": 'echo "scancel $*" >>"$CALLS"; kill "-${1#--signal=}" $(cat "$PIDS"/*)',
    "srun": '[[ $1 != --help ]] || { echo "$SRUN_HELP"; exit; }; echo $$ >"$PIDS/srun"\n'
    'printf "%s\\n" srun "$@" >>"$CALLS.srun"; while [[ $1 == --* ]]; do shift; done; exec "$@"',
    # Like Apptainer's process that waits for the container, it passes signals on to it, and ends with its status.
    "apptainer": 'printf "%s\\n" apptainer "$@" >>"$CALLS.apptainer"; echo $$ >"$PIDS/apptainer"; shift\n'
    "while [[ $1 == --* ]]; do case $1 in --nv) shift ;; *) shift 2 ;; esac; done; shift\n"
    '"$@" & child=$!; for name in USR1 TERM; do trap "kill -$name $child" $name; done\n'
    "while :; do wait $child; status=$?; kill -0 $child 2>/dev/null || exit $status; done",
    "image-python": 'printf "%s\\n" "$@" >"$CALLS.mirage"; env >"$CALLS.env"; [[ ${WAIT:-} ]] || exit "${STATUS:-0}"\n'
    'trap "exit 75" USR1 TERM; echo $$ >"$PIDS/python"; for ((;;)); do sleep 0.05; done',
}


class Job:
    """`slurm/sft.sh` as Slurm runs it, with stand-ins for all that it starts."""

    def __init__(self, root: Path) -> None:
        self.root, self.work, self.calls = root, root / "work here", root / "calls"
        for folder in (self.work, root / "bin", root / "pids"):
            folder.mkdir()
        for name, text in STUBS.items():
            (root / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
            (root / "bin" / name).chmod(0o700)
        slurm = {"JOB_ID": "1", "SUBMIT_DIR": str(self.work), "NNODES": "2", "NODEID": "0", "JOB_NODELIST": "a,b"}
        slurm |= {"STEP_NODELIST": "a,b", "STEP_ID": "0", "PROCID": "0", "LOCALID": "0", "NTASKS": "1"}
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "MIRAGE", "PYTHON", "HF_", "TMPDIR"))}
        self.environment = {
            **kept,
            **{f"SLURM_{name}": value for name, value in slurm.items()},
            "PATH": f"{root}/bin:{os.environ['PATH']}",
            "MIRAGE_HOME": str(REPOSITORY),
            "MIRAGE_PYTHON": "/no/python/of/the/host",
            "MIRAGE_CONTAINER_PYTHON": str(root / "bin/image-python"),
            "CALLS": str(self.calls),
            "PIDS": str(root / "pids"),
            "SRUN_HELP": "      --container-image=[USER@][REGISTRY#]IMAGE[:TAG]|PATH",
        }

    def start(self, *words: str, script: str = "sft", **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(REPOSITORY / f"slurm/{script}.sh"), *words],
            cwd=self.work,
            env=self.environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *words: str, **variables: str) -> tuple[int, str]:
        process = self.start(*words, **variables)
        output = process.communicate(timeout=60)[0]
        return process.returncode, output

    def lines(self, name: str) -> list[str]:
        return Path(f"{self.calls}.{name}").read_text().splitlines()


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path)


@pytest.fixture
def image(job) -> str:
    (job.root / "mirage.sif").touch()
    return str(job.root / "mirage.sif")


RECIPE = str(REPOSITORY / "configs/train/sft.yaml")
NODE = str(REPOSITORY / "launch/node.sh")
TOGETHER = ["--kill-on-bad-exit=1", "--wait=60"]


def mounts(*folders: object) -> str:
    """Those that do not lie in another: the tests' own folders lie in /tmp on many machines."""
    every = list(dict.fromkeys(["/tmp", *map(str, folders)]))
    return ",".join(f"{own}:{own}" for own in every if not any(own.startswith(f"{other}/") for other in every))


def test_apptainer_gets_the_image_the_binds_and_the_whole_command(job, image):
    status, output = job.run("train.lr=1e-5", "run.dir=a b", MIRAGE_CONTAINER=image, MIRAGE_BINDS="/srv/data,/srv/two/")
    assert status == 0, output
    seen = mounts(REPOSITORY, job.work, "/srv/data", "/srv/two")
    command = ["exec", "--nv", "--pwd", str(job.work), "--bind", seen, image, NODE, "train", RECIPE]
    command += ["train.lr=1e-5", "run.dir=a b"]
    assert job.lines("srun") == ["srun", *TOGETHER, "apptainer", *command]
    assert job.lines("apptainer") == ["apptainer", *command]
    assert job.lines("mirage") == ["-m", "mirage_dist.cli", "train", RECIPE, "train.lr=1e-5", "run.dir=a b"]


def test_pyxis_gets_the_image_the_mounts_and_the_whole_command(job):
    image = "registry.example.org#lab/mirage:0.2.0"
    status, output = job.run(
        "train.lr=1e-5", MIRAGE_CONTAINER=image, HF_HOME=str(job.root / "hub"), MIRAGE_BINDS=f"{job.root}/hub/models"
    )
    assert status == 0, output
    options = [f"--container-image={image}", f"--container-mounts={mounts(REPOSITORY, job.work, job.root / 'hub')}"]
    options += [f"--container-workdir={job.work}", "--container-mount-home"]
    assert job.lines("srun") == ["srun", *TOGETHER, *options, NODE, "train", RECIPE, "train.lr=1e-5"]
    assert not Path(f"{job.calls}.apptainer").exists()
    assert job.lines("mirage")[:3] == ["-m", "mirage_dist.cli", "train"]


def test_the_process_has_the_environment_that_it_has_without_an_image(job, image):
    """Only the image's Python is another, and packages in the home directory are not seen."""
    (job.root / "squash.sqsh").touch()
    environments = {}
    own = {"": {"MIRAGE_PYTHON": job.environment["MIRAGE_CONTAINER_PYTHON"]}}
    for kind in ("", image, str(job.root / "squash.sqsh")):
        variables = {"MIRAGE_CONTAINER": kind} if kind else own[kind]
        assert job.run(**variables)[0] == 0
        environments[kind] = {line for line in job.lines("env") if not line.startswith(("_=", "SHLVL=", "OLDPWD="))}
    bare = environments.pop("")
    assert "MASTER_ADDR=alpha" in bare
    for kind, variables in environments.items():
        added = {"MIRAGE_HOSTS=alpha beta", "PYTHONNOUSERSITE=1", f"MIRAGE_CONTAINER={kind}"}
        assert {line for line in variables - bare if not line.startswith("MIRAGE_COMMIT=")} == added
        assert bare - variables == set()


@pytest.mark.parametrize("name", ["mirage.sif", "squash.sqsh", "unpacked"])
def test_an_image_by_a_relative_name_is_that_of_the_folder_in_which_it_was_named(job, name):
    """The jobs of a chain run in other folders, and pyxis takes a name for a file's only by its first letter."""
    target = job.root / "blob-without-suffix"
    target.mkdir() if name == "unpacked" else target.touch()
    (job.work / name).symlink_to(target)
    status, output = job.run(MIRAGE_CONTAINER=name)
    assert status == 0, output
    assert f"MIRAGE_CONTAINER={job.work}/{name}" in job.lines("env")
    if name == "squash.sqsh":
        assert f"--container-image={job.work}/{name}" in job.lines("srun")
    else:
        assert f"{job.work}/{name}" in job.lines("apptainer")


@pytest.mark.parametrize("runtime", ["apptainer", "pyxis"])
def test_directories_that_variables_name_are_made_before_they_are_mounted(job, image, runtime):
    """Apptainer and enroot fail on a source that does not exist; on bare nodes all of these are made on demand."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as elsewhere:  # /tmp is mounted in any case
        variables = {name: f"{elsewhere}/{name}/new" for name in ("TMPDIR", "SLURM_TMPDIR", "HF_HOME", "MIRAGE_CACHE")}
        status, output = job.run(MIRAGE_CONTAINER=image if runtime == "apptainer" else "lab/mirage", **variables)
        assert status == 0, output
        option = next(line for line in job.lines("srun") if f"{elsewhere}/HF_HOME/new:" in line)
        mounted = {name for name, folder in variables.items() if f"{folder}:{folder}" in option}
        assert mounted == set(variables) - ({"TMPDIR", "SLURM_TMPDIR"} if runtime == "pyxis" else set())
        assert all(Path(variables[name]).is_dir() for name in mounted)
        # Once it is there, pyxis mounts it too.
        if runtime == "pyxis":
            assert job.run(MIRAGE_CONTAINER="lab/mirage", **variables)[0] == 0
            assert f"{variables['TMPDIR']}:{variables['TMPDIR']}" in "".join(job.lines("srun"))


def test_scratch_that_a_node_cannot_make_is_bad_input_that_is_not_started_again(job, image):
    status, output = job.run(MIRAGE_CONTAINER=image, TMPDIR="/dev/null/scratch")
    assert status == 2, output
    assert "/dev/null" in output
    assert not Path(f"{job.calls}.apptainer").exists()


def test_a_run_in_an_image_without_git_names_the_checkouts_commit(job, image, monkeypatch, tmp_path):
    head = subprocess.run(["git", "-C", REPOSITORY, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    commit = head.stdout.strip()
    assert job.run(MIRAGE_CONTAINER=image, MIRAGE_COMMIT="of another job")[0] == 0
    assert [line for line in job.lines("env") if line.startswith("MIRAGE_COMMIT=")] == [f"MIRAGE_COMMIT={commit}"]
    monkeypatch.setenv("MIRAGE_COMMIT", "from the variable")
    assert home.commit.__wrapped__() == commit
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert home.commit.__wrapped__() == "from the variable"
    monkeypatch.delenv("MIRAGE_COMMIT")
    assert home.commit.__wrapped__() is None


@pytest.mark.parametrize(("ending", "status"), [("0", 0), ("1", 1), ("2", 2), ("75", 75)])
def test_the_status_of_the_process_is_the_jobs(job, image, ending, status):
    assert job.run(STATUS=ending, MIRAGE_CONTAINER=image)[0] == status
    assert job.run(STATUS=ending, MIRAGE_CONTAINER="lab/mirage")[0] == status


@pytest.mark.parametrize("container", ["mirage.sif", "lab/mirage"])
@pytest.mark.parametrize("name", ["USR1", "TERM"])
def test_a_request_to_stop_reaches_the_process_and_the_job_comes_back_as_without(job, image, name, container):
    """Scratch is still to be made: what makes it has become the container's process by then, or would die instead."""
    variables = {"MIRAGE_CONTAINER": image if container == "mirage.sif" else container, "WAIT": "1"}
    process = job.start(**variables, TMPDIR=str(job.root / "scratch/own"))
    deadline = time.monotonic() + 30
    while not (job.root / "pids/python").exists() or not (job.root / "pids/python").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.Signals[f"SIG{name}"])
    if name == "TERM":  # Slurm itself sends this to the step
        for file in (job.root / "pids").iterdir():
            os.kill(int(file.read_text()), signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 75, output
    calls = job.calls.read_text()
    assert ("scancel --signal=USR1 1" in calls) == ("scontrol requeue 1" in calls) == (name == "USR1"), output
    assert ("requeued" in output) == (name == "USR1")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"MIRAGE_CONTAINER": "no.sif"}, "MIRAGE_CONTAINER=no.sif: no such image; docs/containers.md"),
        ({"MIRAGE_CONTAINER": "/no/image"}, "MIRAGE_CONTAINER=/no/image: no such image"),
        ({"MIRAGE_CONTAINER": "images/no.sqsh"}, "MIRAGE_CONTAINER=images/no.sqsh: no such image"),
        ({"MIRAGE_CONTAINER": "lab/mirage", "HF_HOME": "/dev/null/hub"}, "/dev/null/hub: cannot be made; name"),
        ({"MIRAGE_CONTAINER": "lab/mirage", "SRUN_HELP": ""}, "srun has no --container-image, so pyxis is not"),
        ({"MIRAGE_CONTAINER": "image", "MIRAGE_BINDS": "data"}, "data: expected an absolute path (MIRAGE_BINDS"),
        ({"MIRAGE_CONTAINER": "image", "HF_HOME": "/a:b"}, "/a:b: a path with a comma or a colon cannot be bound"),
    ],
)
def test_what_cannot_be_run_in_is_refused_before_anything_starts(job, variables, message):
    status, output = job.run(**variables)
    assert status == 2
    assert message in output
    assert not Path(f"{job.calls}.srun").exists()


def test_an_image_file_without_apptainer_is_refused(job, image):
    (job.root / "bin/apptainer").unlink()
    path = os.pathsep.join([str(job.root / "bin"), "/usr/bin", "/bin"])
    if subprocess.run(["bash", "-c", "command -v apptainer"], env={"PATH": path}, stdout=subprocess.DEVNULL).returncode:
        status, output = job.run(MIRAGE_CONTAINER=image, PATH=path)
        assert (status, "apptainer is not on PATH; load its module" in output) == (2, True)


def test_the_login_node_checks_recipes_in_the_image(job, image):
    """The host has no Python of its own here."""
    process = job.start("npo", script="pipeline", MIRAGE_CONTAINER=image, STATUS="2")
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 2
    assert "nothing was submitted" in output
    words = job.lines("apptainer")
    assert words[words.index(image) :][:5] == [image, f"{job.root}/bin/image-python", "-m", "mirage_dist.cli", "config"]


# ------------------------------------------------------------------------------------------------------ the images


def copied(file: str) -> list[str]:
    """What an image's build stage copies from the checkout."""
    text = (REPOSITORY / file).read_text()
    if file == "Dockerfile":
        words = [line.split()[1:-1] for line in re.findall(r"^COPY (?!--).+$", text, re.MULTILINE)]
        return sorted(word for own in words for word in own)
    return sorted(re.findall(r"^ +(\S+) /source/$", text, re.MULTILINE))


def test_both_images_are_built_from_the_same_files_and_nothing_else_is_sent():
    sources = copied("Dockerfile")
    assert sources == copied("mirage.def")
    assert all((REPOSITORY / source).exists() for source in sources)
    sent = (REPOSITORY / ".dockerignore").read_text().splitlines()
    assert sent[1] == "*"
    assert sorted(line[1:] for line in sent if line.startswith("!")) == sources


def test_both_images_have_the_same_base_pinned_and_the_same_commands():
    docker, apptainer = ((REPOSITORY / name).read_text() for name in ("Dockerfile", "mirage.def"))
    (base,) = re.findall(r"^ARG BASE=(\S+)$", docker, re.MULTILINE)
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-[a-z]+", base)
    assert re.findall(r"^From: (\S+)$", apptainer, re.MULTILINE) == [base, base]
    assert re.findall(r"^FROM (\S+)", docker, re.MULTILINE) == ["${BASE}", "${BASE}"]
    for command in (
        "pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .",
        "pip install --no-cache-dir /wheel/*.whl",
    ):
        assert command in docker
        assert command in apptainer
    assert "apt-get install --yes --no-install-recommends gcc libc6-dev" in docker
    assert "apt-get install --yes --no-install-recommends gcc libc6-dev" in apptainer


def test_the_image_runs_as_no_root_and_holds_no_secret():
    text = (REPOSITORY / "Dockerfile").read_text()
    users = re.findall(r"^USER (\S+)$", text, re.MULTILINE)
    assert users == ["1000"]
    assert "useradd --create-home --uid 1000 " in text
    assert text.index("\nUSER ") > text.rindex("\nRUN ")
    for file in ("Dockerfile", "mirage.def"):
        words = (REPOSITORY / file).read_text()
        assert not re.search(r"TOKEN|PASSWORD|API_KEY|SECRET|\bADD\b|:latest|curl|wget", words)
