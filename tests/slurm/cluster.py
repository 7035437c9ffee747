"""A real Slurm for a test: started by lab.sh, asked by Slurm's own commands. Nothing of Slurm is imitated."""

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from mirage_dist.config import REPOSITORY

HERE = Path(__file__).parent
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


class Cluster:
    """Submits from a folder of its own, where the logs of the jobs are."""

    def __init__(self, root: Path, **settings: str) -> None:
        self.root, self.work, self.temporary = root, root / "work", root / "tmp"
        self.work.mkdir()
        self.temporary.mkdir()
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "MIRAGE"))}
        self.environment = {
            **inherited,
            "SLURM_CONF": str(root / "lab/etc/slurm.conf"),
            "MIRAGE_HOME": str(REPOSITORY),
            "MIRAGE_PYTHON": sys.executable,
            "MIRAGE_INTERFACE": "lo",
            "OMP_NUM_THREADS": "1",
            "TMPDIR": str(self.temporary),
            **settings,
        }
        self.lab("start")

    def lab(self, action: str, *words: str) -> None:
        # Daemons inherit what is open: a pipe would be waited for until they end.
        output = (self.root / f"lab-{action}.txt").open("w+")
        command = [str(HERE / "lab.sh"), action, str(self.root / "lab"), *words]
        status = subprocess.run(command, env=self.environment, stdout=output, stderr=output).returncode
        output.seek(0)
        assert status == 0, output.read()

    def ask(
        self, *command: str, check: bool = True, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """One of Slurm's commands, or a script of the project."""
        variables = {**self.environment, **(environment or {})}
        done = subprocess.run(command, cwd=self.work, env=variables, capture_output=True, text=True)
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done

    def submit(self, script: str, *words: str, options: tuple[str, ...] = (), **environment: str) -> str:
        """The id of a job of `slurm/SCRIPT.sh WORDS`."""
        command = ("sbatch", "--parsable", *options, f"{REPOSITORY}/slurm/{script}.sh", *words)
        return self.ask(*command, environment=environment).stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says, such as {"JobState": "RUNNING", "Restarts": "0", …}."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.ask("scontrol", "--oneliner", "show", "job", job).stdout))

    def over(self, job: str) -> bool:
        """Whether the job, or every element of the array, has ended for good; a requeued one has not."""
        jobs = self.ask("scontrol", "--oneliner", "show", "job", job).stdout
        return set(re.findall(r" JobState=(\w+)", jobs)) <= set(ENDED)

    def until(self, true: Callable[[], object], what: str, job: str, seconds: float = 300) -> None:
        """Wait for something to become true; when the job is over, or it takes too long, its log says why not."""
        end = time.monotonic() + seconds
        while not true():
            over = self.over(job) and not true()
            if over or time.monotonic() > end:
                problem = "the job ended without" if over else f"not within {seconds} s"
                pytest.fail(f"{problem}: {what}\n{self.log(job)}\n{self.daemons()}")
            time.sleep(0.1)

    def ended(self, job: str, seconds: float = 300) -> dict[str, str]:
        """Wait for the job to be over; what Slurm says of it then."""
        self.until(lambda: self.over(job), "the job's end", job, seconds)
        return self.job(job)

    def log(self, job: str) -> str:
        return "".join(file.read_text() for file in sorted(self.work.glob(f"*-{job}.log")))

    def daemons(self) -> str:
        """The state of the nodes and the ends of the daemons' logs, for a failure that is Slurm's own."""
        ends = [(file.name, file.read_text().splitlines()[-12:]) for file in sorted((self.root / "lab/log").iterdir())]
        logs = (f"{name}:\n" + "\n".join(lines) for name, lines in ends)
        return "\n".join((self.ask("sinfo", "--Node", "--long", check=False).stdout, *logs))

    def starts(self, job: str) -> list[dict]:
        """What the stand-in noted: {"words", "env"} of each start of each task of a job or of an array's elements."""
        notes = [json.loads(file.read_text()) for file in sorted(self.temporary.glob("start-*.json"))]
        return [note for note in notes if job in (note["env"]["SLURM_JOB_ID"], note["env"].get("SLURM_ARRAY_JOB_ID"))]


def cluster(root: Path, **settings: str) -> Iterator[Cluster]:
    """For fixtures: a Slurm that is gone afterwards; `settings` as in lab.sh. Skips where Slurm is not installed."""
    path = f"{os.environ['PATH']}:/usr/sbin"
    missing = [name for name in ("slurmctld", "slurmd", "sbatch", "munged") if not shutil.which(name, path=path)]
    if missing:
        pytest.skip(f"{', '.join(missing)} not found; as root on Debian or Ubuntu: tests/slurm/lab.sh install")
    with (Path(tempfile.gettempdir()) / "mirage-slurm.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # its ports are fixed, and another test process may have one
        started = Cluster(root, **settings)
        try:
            yield started
        finally:
            started.lab("clean")
