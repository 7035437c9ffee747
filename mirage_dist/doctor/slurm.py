"""What Slurm will do to a job: requeue it, preempt it, warn it before its time limit, and give it time to save."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from functools import cache

from mirage_dist.doctor.checks import Context, Verdict, failed, not_here, ok, warning

SECONDS = 20.0  # a controller that is busy answers late
EARLY = 60  # seconds: Slurm sends the signal of --signal up to so much too early, and as late as its grid allows
NOT_HERE = "no Slurm: scontrol is not here"


class Silent(Exception):
    """scontrol does not answer; the message says how."""


@cache
def scontrol(*words: str) -> str:
    """What `scontrol WORDS` prints. Raises Silent."""
    try:
        done = subprocess.run(["scontrol", *words], capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Silent(f"scontrol {' '.join(words)}: {error}") from None
    if done.returncode:
        raise Silent(f"scontrol {' '.join(words)}: {' '.join((done.stderr or done.stdout).splitlines()[-1:])}")
    return done.stdout


def configuration() -> dict[str, str]:
    """`scontrol show config`: name -> value, as printed (`KillWait                = 30 sec`)."""
    return dict(re.findall(r"^(\S+)\s*= ?(.*?)\s*$", scontrol("show", "config"), re.MULTILINE))


def job() -> dict[str, str] | None:
    """`scontrol show job` of this process's job; None outside one."""
    number = os.environ.get("SLURM_JOB_ID")
    return None if number is None else _fields(scontrol("--oneliner", "show", "job", number))


def partition() -> dict[str, str]:
    """Of this job; outside one, of the default partition."""
    name = os.environ.get("SLURM_JOB_PARTITION")
    shown = scontrol("--oneliner", "show", "partition", *([name] if name else [])).splitlines()
    every = [_fields(line) for line in shown if line.strip()]
    return next((each for each in every if name or each.get("Default") == "YES"), every[0] if every else {})


def _fields(line: str) -> dict[str, str]:
    return dict(re.findall(r"(\S+?)=(\S*)", line))


def seconds(text: str) -> int | None:
    """A duration of Slurm's: `30 sec`, `00:02:00`, `1-00:00:00`, `20`; None for UNLIMITED and what is none."""
    if match := re.fullmatch(r"([0-9]+)(?: sec)?", text):
        return int(match[1])
    if match := re.fullmatch(r"(?:([0-9]+)-)?(?:([0-9]+):)?([0-9]+):([0-9]+)", text):
        days, hours, minutes, rest = (int(part or 0) for part in match.groups())
        return ((24 * days + hours) * 60 + minutes) * 60 + rest
    return None


def _here() -> Verdict | None:
    """Why there is nothing to check; None where there is Slurm and it answers."""
    if shutil.which("scontrol") is None:
        return not_here(NOT_HERE)
    try:
        configuration()
    except Silent as error:
        if "SLURM_JOB_ID" in os.environ:
            return failed(str(error), "requeues go through it; ask the administrator")
        return not_here(str(error), "export SLURM_CONF, or run this on a node of the cluster")
    return None


def requeue(_: Context) -> Verdict:
    """Whether a job that stopped in order comes back."""
    if (without := _here()) is not None:
        return without
    own, allowed = job(), configuration().get("JobRequeue")
    values = {"JobRequeue": allowed, "Requeue": None if own is None else own.get("Requeue")}
    if own is not None and own.get("Requeue") == "0":
        return warning(
            "this job may not be requeued: after a stop it has to be submitted again",
            "sbatch --requeue, as slurm/*.sh ask for",
            **values,
        )
    if own is None and allowed == "0":
        return warning("JobRequeue=0: jobs are requeued only with --requeue", "slurm/*.sh ask for it", **values)
    return ok("this job may be requeued" if own else f"JobRequeue={allowed}", **values)


def preemption(_: Context) -> Verdict:
    """What becomes of a job that another one takes precedence over."""
    if (without := _here()) is not None:
        return without
    config, own = configuration(), partition()
    kind = config.get("PreemptType", "")
    modes = (own.get("PreemptMode") or config.get("PreemptMode", "OFF")).split(",")
    values = {"PreemptType": kind, "PreemptMode": ",".join(modes), "GraceTime": own.get("GraceTime")}
    name = own.get("PartitionName", "?")
    if kind.endswith("none") or "OFF" in modes:
        return ok(f"none in partition {name}", **values)
    if "CANCEL" in modes:
        return warning(
            f"partition {name} cancels a job that is preempted: it saves if time allows, and does not come back",
            "submit it again, it resumes; or choose a partition with PreemptMode=REQUEUE",
            **values,
        )
    if "SUSPEND" in modes or "GANG" in modes:
        return warning(
            f"partition {name} suspends a job that is preempted: its collectives may time out",
            "raise train.hang_seconds, or choose a partition with PreemptMode=REQUEUE",
            **values,
        )
    return ok(f"partition {name}: {','.join(modes)}, {own.get('GraceTime', '0')} s of grace", **values)


def time_to_save(context: Context) -> Verdict:
    """Seconds between TERM and KILL against a save of the recipe's state at the measured speed."""
    if (without := _here()) is not None:
        return without
    grace = max(seconds(configuration().get("KillWait", "")) or 0, seconds(partition().get("GraceTime", "")) or 0)
    text = f"{grace} s between TERM and KILL (KillWait, GraceTime)"
    size, speed = context.measured.get("checkpoint"), context.measured.get("write")
    if not size or not speed:
        return ok(f"{text}; --recipe CONFIG compares it with a save", seconds=grace)
    # Every host writes its part at once; the measured speed is one host's while all wrote.
    hosts = len({peer.host for peer in context.peers})
    needed = size / hosts / speed
    values = {"seconds": grace, "save_seconds": needed}
    text = f"{text}; a save takes about {needed:.0f} s"
    if needed > grace:
        return warning(
            f"{text}: a preempted job loses the steps since its last save",
            "set train.save_every by what you can lose; ask for a longer GraceTime; or use a faster file system",
            **values,
        )
    return ok(text, **values)


def time_limit(context: Context) -> Verdict:
    """The job's time limit and the signal before it (--signal), which slurm/*.sh turn into a save and a requeue."""
    if (without := _here()) is not None:
        return without
    own = job()
    if own is None:
        return not_here("not in a job", "sbatch slurm/doctor.sh")
    limit = own.get("TimeLimit", "")
    wanted = signal()
    values = {"TimeLimit": limit, "signal": wanted}
    if seconds(limit) is None:
        return ok(f"time limit {limit or 'unknown'}", **values)
    if wanted is None:
        return not_here(
            f"time limit {limit}; the job's script has no --signal line (an option of sbatch is not shown by Slurm)",
            "#SBATCH --signal=B:USR1@300, as slurm/*.sh have it",
            **values,
        )
    early = int(wanted.rpartition("@")[2]) if "@" in wanted else EARLY
    text = f"time limit {limit}, --signal={wanted}"
    if not wanted.startswith("B:"):
        return warning(f"{text}: the batch script does not get it", "--signal=B:USR1@SECONDS", **values)
    size, speed = context.measured.get("checkpoint"), context.measured.get("write")
    if size and speed:
        # A save may have begun just before, and has to end first.
        needed = 2 * size / len({peer.host for peer in context.peers}) / speed
        text += f"; two saves take about {needed:.0f} s"
        if needed > early:
            return warning(text, f"--signal=B:USR1@{int(1.5 * needed) + EARLY}", **values, save_seconds=needed)
    return ok(text, **values)


def signal() -> str | None:
    """--signal by the lines of this job's script."""
    try:
        script = scontrol("write", "batch_script", os.environ["SLURM_JOB_ID"], "-")
    except Silent:  # no batch job, as with salloc
        return None
    match = re.search(r"^#SBATCH\s+--signal[= ](\S+)", script, re.MULTILINE)
    return match and match[1]
