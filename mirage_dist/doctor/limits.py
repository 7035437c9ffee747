"""What the operating system, a container or a scheduler allows a process: memory, open files, threads."""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path

from mirage_dist.doctor.checks import Context, Verdict, failed, ok, warning
from mirage_dist.schema.documents import whole_number

GIB = 1 << 30
SHARED_MEMORY = 1 << 30  # bytes: NCCL's buffers between the GPUs of a node, and batches from worker processes
FILES, FILES_A_RANK = 512, 4  # open files of a rank, and its connections to each other rank
MEMORY_A_RANK = 8 * GIB  # host memory: libraries, CUDA's context, batches made ahead, a copy of a checkpoint's part
UNLIMITED = 1 << 60  # cgroup v1 writes a number near 2^63


def shared_memory(_: Context) -> Verdict:
    place = Path("/dev/shm")
    if not place.is_dir():
        return failed("/dev/shm is missing: NCCL and worker processes (data.workers) need it", "mount a tmpfs there")
    usage = shutil.disk_usage(place)
    text = f"/dev/shm: {usage.total / GIB:.1f} GiB, {usage.free / GIB:.1f} free"
    values = {"bytes": usage.total, "free": usage.free}
    if not os.access(place, os.W_OK):
        return failed(f"{text}, and not writable", "chmod 1777 /dev/shm, or ask the administrator", **values)
    if usage.free < SHARED_MEMORY:
        return warning(
            f"{text}; NCCL or worker processes may fail with a bus error",
            "start the container with --shm-size=16g or --ipc=host; remove what dead processes left there",
            **values,
        )
    return ok(text, **values)


def open_files(context: Context) -> Verdict:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = FILES + FILES_A_RANK * context.group.size
    values = {"soft": soft, "hard": hard, "needed": needed}
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return ok(f"{'unlimited' if soft == resource.RLIM_INFINITY else soft}, {needed} needed", **values)
    allowed = hard == resource.RLIM_INFINITY or hard >= needed
    remedy = "before the launch: ulimit -n " + ("65536" if hard == resource.RLIM_INFINITY else str(hard))
    if not allowed:
        remedy = "raise the hard limit: LimitNOFILE of slurmd, or /etc/security/limits.conf"
    return failed(f"a process may open {soft} files; {context.group.size} ranks need {needed}", remedy, **values)


def memory(context: Context) -> Verdict:
    """Of the cgroup that this process is in, or of the machine: the smaller, shared by the ranks of this host."""
    ranks = len(context.of_host)
    limit, killed = cgroup()
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    least = min(limit or total, total)
    where = "cgroup" if limit and limit < total else "machine"
    text = f"{least / GIB:.1f} GiB ({where}) for {ranks} rank{'s' if ranks > 1 else ''} on this host"
    values = {"bytes": least, "machine": total, "killed": killed}
    if killed:
        return warning(
            f"{text}; the kernel has killed {killed} process{'es' if killed > 1 else ''} of this cgroup for memory",
            "ask for more (sbatch --mem), or use less: data.workers, offload, the number of ranks a node",
            **values,
        )
    if least < MEMORY_A_RANK * ranks and where == "cgroup":
        return warning(f"{text}; {MEMORY_A_RANK // GIB} GiB a rank are usual", "sbatch --mem=0 takes all", **values)
    return ok(text, **values)


def cgroup(files: Path = Path("/sys/fs/cgroup"), process: Path = Path("/proc/self/cgroup")) -> tuple[int | None, int]:
    """The least memory limit of the cgroups around this process (None: no limit), and how many were killed for it."""
    try:
        lines = process.read_text().splitlines()
    except OSError:
        return None, 0
    least, killed = None, 0
    for line in lines:
        _, controllers, path = line.split(":", 2)
        names = controllers.split(",")
        if controllers and "memory" not in names:
            continue
        root = files / "memory" if controllers else files
        limit_file = "memory.limit_in_bytes" if controllers else "memory.max"
        events_file = "memory.oom_control" if controllers else "memory.events"
        own = root / path.lstrip("/")
        for folder in (own, *own.parents):
            if folder != root and root not in folder.parents:
                break
            limit = whole_number(_text(folder / limit_file))
            if limit is not None and limit < UNLIMITED:
                least = limit if least is None else min(least, limit)
        words = [each.split() for each in _text(own / events_file).splitlines()]
        counts = {each[0]: each[1] for each in words if len(each) == 2}
        killed = max(killed, whole_number(counts.get("oom_kill", "0")) or 0)
    return least, killed


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def threads(context: Context) -> Verdict:
    """Threads of all ranks of this host against the cores that they may use."""
    cores, ranks = len(os.sched_getaffinity(0)), len(context.of_host)
    given = os.environ.get("OMP_NUM_THREADS")
    number = whole_number(given or "")
    values = {"cores": cores, "ranks": ranks, "threads": number}
    if given and not number:
        return failed(f"OMP_NUM_THREADS={given[:20]!r}: no number above 0", "unset it: launch/*.sh set it", **values)
    if number is None:
        if ranks == 1:
            return ok(f"OMP_NUM_THREADS is not set; one process may use all {cores} cores", **values)
        return warning(
            f"OMP_NUM_THREADS is not set: each of {ranks} ranks starts {cores} threads on {cores} cores",
            f"export OMP_NUM_THREADS={max(1, cores // ranks)}, as launch/local.sh and launch/node.sh do",
            **values,
        )
    # Under Slurm each task may have cores of its own, so that the affinity is one rank's.
    own = "SLURM_CPUS_PER_TASK" in os.environ or "SLURM_STEP_ID" in os.environ
    wanted = number if own else number * ranks
    text = f"OMP_NUM_THREADS={number} of {ranks} rank{'s' if ranks > 1 else ''} here, on {cores} cores"
    if wanted > cores:
        share = cores if own else max(1, cores // ranks)
        if cores < ranks and number == 1:
            return warning(f"{text}: fewer cores than ranks", "ask for more (sbatch --cpus-per-task)", **values)
        return warning(
            f"{text}: threads wait for each other", f"OMP_NUM_THREADS={share}, or sbatch --cpus-per-task", **values
        )
    return ok(text, **values)
