"""GPUs: what PyTorch sees, and what nvidia-smi says of driver, memory errors and other processes."""

from __future__ import annotations

import csv
import io
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from mirage_dist.doctor.checks import Context, Verdict, failed, not_here, ok, warning
from mirage_dist.ranks import everyones
from mirage_dist.schema.documents import whole_number

SMI_SECONDS = 30.0  # a driver in trouble lets nvidia-smi hang
GIB = 1 << 30
BUSY = 2 * GIB  # bytes in use on a GPU on which only this process's context should be
BF16 = (8, 0)  # compute capability from which on a GPU multiplies bfloat16
ATTRIBUTES = ("uuid", "name", "driver_version", "memory.total")
REMAPPED = ("gpu_uuid", "remapped_rows.uncorrectable", "remapped_rows.pending", "remapped_rows.failure")


class Unavailable(Exception):
    """nvidia-smi is not there or gives no answer; the message says which."""


def smi(kind: str, fields: Sequence[str]) -> list[dict[str, str]]:
    """`nvidia-smi --query-KIND`: a mapping of fields for each row, values as printed. Raises Unavailable.

    One field that a driver does not know makes it refuse the whole query, so unlike fields are asked for apart.
    """
    command = ["nvidia-smi", f"--query-{kind}={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SMI_SECONDS)
    except FileNotFoundError:
        raise Unavailable("nvidia-smi is not here") from None
    except subprocess.TimeoutExpired:
        raise Unavailable(f"nvidia-smi has not answered within {SMI_SECONDS:g} s") from None
    except OSError as error:
        raise Unavailable(f"nvidia-smi cannot be started: {error}") from None
    if done.returncode:
        last = (done.stdout + done.stderr).strip().splitlines()[-1:]
        raise Unavailable(f"nvidia-smi ended with status {done.returncode}: {' '.join(last)}")
    rows = csv.reader(io.StringIO(done.stdout), skipinitialspace=True)
    return [dict(zip(fields, map(str.strip, row), strict=True)) for row in rows if len(row) == len(fields)]


def number(text: str) -> int | None:
    """A printed number; None for what nvidia-smi writes where there is none ([N/A], [Not Supported])."""
    return whole_number(text.strip().removesuffix(" MiB"))


def there() -> bool:
    """Whether this machine has a GPU of NVIDIA's, whatever PyTorch says."""
    return Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidiactl").exists()


def device(context: Context) -> Verdict:
    """The GPU of this rank, its compute capability and its memory."""
    import torch

    if not torch.cuda.is_available():
        if not there():
            return not_here("no GPU: ranks compute on the CPU, over gloo")
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible == "":
            return warning(
                "this machine has a GPU, but CUDA_VISIBLE_DEVICES is empty", "ask Slurm for GPUs (--gres), or unset it"
            )
        if torch.version.cuda is None:
            return failed(
                f"this machine has a GPU, but PyTorch {torch.__version__} is a build without CUDA",
                "install a CUDA build: pip install --force-reinstall torch, without PyTorch's CPU index",
            )
        return failed(
            f"PyTorch {torch.__version__} (CUDA {torch.version.cuda}) cannot use this machine's GPU",
            "run nvidia-smi: is the driver as new as that CUDA, and the GPU healthy?",
        )
    local = context.group.local_rank
    if local >= torch.cuda.device_count():
        return failed(
            f"local rank {local} has no GPU: this process sees {torch.cuda.device_count()}",
            "start one process a GPU (--ntasks-per-node with --gres)",
        )
    gpu = torch.cuda.get_device_properties(local)
    free, total = torch.cuda.mem_get_info(local)
    capability = (gpu.major, gpu.minor)
    text = (
        f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {total / GIB:.1f} GiB ({free / GIB:.1f} free), "
        f"PyTorch for CUDA {torch.version.cuda}"
    )
    values = {"name": gpu.name, "capability": f"{gpu.major}.{gpu.minor}", "bytes": total, "free": free}
    wanted = context.recipe is None or context.recipe.train.dtype == "bf16"
    if wanted and capability < BF16:
        return failed(f"{text}; bfloat16 needs 8.0 or more", "train.dtype=fp32, or newer GPUs", **values)
    if total - free > BUSY:
        return warning(
            f"{text}: {(total - free) / GIB:.1f} GiB are in use already",
            "see which processes (nvidia-smi), and end those that are yours",
            **values,
        )
    return ok(text, **values)


def sharing(context: Context) -> Verdict:
    """Whether each rank has a GPU of its own."""
    import torch

    own = None
    if torch.cuda.is_available() and context.group.local_rank < torch.cuda.device_count():
        own = str(getattr(torch.cuda.get_device_properties(context.group.local_rank), "uuid", context.group.local_rank))
    places = list(zip(context.peers, everyones(context.group, own), strict=True))
    without = [peer for peer, gpu in places if gpu is None]
    if len(without) == len(places):
        return not_here("no GPU")
    if without:
        return failed(f"{without[0]} has no GPU, others have one", "ask for the same GPUs on every node (--gres)")
    first: dict[tuple[str, str], str] = {}
    for peer, gpu in places:
        if (other := first.setdefault((peer.host, str(gpu)), str(peer))) != str(peer):
            return failed(
                f"{peer} and {other} have the same GPU",
                "start one process a GPU; with Slurm: --ntasks-per-node equal to the GPUs of --gres",
            )
    return ok(f"{len(places)} rank{'s' if len(places) > 1 else ''}, a GPU each")


def driver(_: Context) -> Verdict:
    try:
        rows = smi("gpu", ATTRIBUTES)
    except Unavailable as error:
        return _without(error)
    drivers = {row["driver_version"] for row in rows}
    names = {name: sum(row["name"] == name for row in rows) for name in dict.fromkeys(row["name"] for row in rows)}
    text = f"{', '.join(sorted(drivers))}; " + ", ".join(f"{count} × {name}" for name, count in names.items())
    values = {"driver": sorted(drivers), "gpus": rows}
    if len(names) > 1:
        return warning(f"{text}: unlike GPUs in one node wait for the slowest", "ask for one type (--gres)", **values)
    return ok(text, **values)


def memory_errors(_: Context) -> Verdict:
    """Uncorrected ECC errors since the driver was loaded, and rows that are to be replaced or cannot be any more."""
    try:
        rows = smi("gpu", ("uuid", "index", "ecc.errors.uncorrected.volatile.total"))
    except Unavailable as error:
        return _without(error)
    try:
        remapped = {row["gpu_uuid"]: row for row in smi("remapped-rows", REMAPPED)}
    except Unavailable:  # before Ampere
        remapped = {}
    dead, hurt, counted = [], [], 0
    for row in rows:
        errors = number(row["ecc.errors.uncorrected.volatile.total"])
        own = remapped.get(row["uuid"], {})
        failure = own.get("remapped_rows.failure", "").lower() in ("yes", "1")
        pending = own.get("remapped_rows.pending", "").lower() in ("yes", "1")
        counted += errors is not None
        if failure:
            dead.append(f"GPU {row['index']} has memory that can no longer be replaced")
        elif errors:
            hurt.append(f"GPU {row['index']}: {errors} uncorrected ECC errors since the driver was loaded")
        elif pending:
            hurt.append(f"GPU {row['index']}: memory is to be replaced at its next reset")
    if dead:
        return failed("; ".join([*dead, *hurt]), "take this node out (sbatch --exclude) and report it", gpus=rows)
    if hurt:
        return warning("; ".join(hurt), "have the GPU reset; take the node out if it comes back", gpus=rows)
    if not counted:
        return not_here("these GPUs do not count ECC errors")
    return ok(f"none on {counted} GPU{'s' if counted > 1 else ''}")


def processes(context: Context) -> Verdict:
    """Processes on this host's GPUs that are none of this job's ranks."""
    try:
        rows = smi("compute-apps", ("gpu_uuid", "pid", "process_name", "used_memory"))
    except Unavailable as error:
        return _without(error)
    own = {peer.pid for peer in context.of_host}
    others = [row for row in rows if number(row["pid"]) not in own]
    if not others:
        return ok("none")
    # In a container of its own process numbers, nvidia-smi shows the host's: this job's own ranks may be among them.
    shown = ", ".join(f"{row['process_name']} ({row['pid']}): {row['used_memory']} MiB" for row in others[:4])
    more = f" and {len(others) - 4} more" if len(others) > 4 else ""
    if len(others) == len(rows) == len(own):
        return ok(f"as many as this job has ranks, with numbers of another container: {shown}{more}")
    return warning(f"{shown}{more}", "end those that are yours; otherwise ask for whole nodes (sbatch --exclusive)")


def _without(error: Unavailable) -> Verdict:
    if shutil.which("nvidia-smi") is None and not there():
        return not_here("no GPU of NVIDIA's")
    if shutil.which("nvidia-smi") is None:
        return not_here(str(error), "install NVIDIA's utilities, or add them to the container")
    return failed(str(error), "the driver is in trouble: take this node out (sbatch --exclude) and report it")
