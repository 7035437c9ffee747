"""The ranks of one job: rank, world size and device from Slurm, torchrun or nothing, and the loop's own collectives."""

from __future__ import annotations

import atexit
import logging
import os
import re
import socket
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from mirage_dist import calls, signals
from mirage_dist.schema import ConfigError, RunError
from mirage_dist.schema.documents import whole_number
from mirage_dist.schema.names import shown

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
# A collective times out this much later than the watchdog, which knows the missing rank and should report first.
COLLECTIVE_GRACE = 120.0  # seconds

# How many collectives torch's flight recorder keeps (see `train.watchdog`); an older torch calls it
# TORCH_NCCL_TRACE_BUFFER_SIZE, of which a newer one warns.
RECORDER, RECORDED = "TORCH_FR_BUFFER_SIZE", "2000"

# In the messages of gloo, NCCL and the store: another rank ended, or does not answer.
_PEER_LOST = re.compile(
    r"gloo/transport|connection (was )?(closed|reset)|broken pipe|got 0 bytes|remote process exited|ncclRemoteError",
    re.I,
)
_SOURCE = re.compile(r"^\[[^\]]*\] ")  # the file and line of a C++ message

# Numbers that every rank sends in one `meet`, so that ranks that disagree on how many they have still meet.
WIDTH = 160


@dataclass(frozen=True)
class Group:
    """This process and its job: rank in [0, size), number of ranks, and the device that this rank computes on."""

    rank: int
    local_rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0


# (rank, local rank, size) under torchrun, the DeepSpeed launcher and launch/local.sh; under srun; under Open MPI's
# mpirun; under the mpiexec of MPICH and Intel MPI.
_LAUNCHERS = (
    ("RANK", "LOCAL_RANK", "WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE"),
)
_RENDEZVOUS = ("MASTER_ADDR", "MASTER_PORT")


def place() -> tuple[int, int, int]:
    """(rank, local rank, size) from the launcher's environment variables; (0, 0, 1) without a launcher.

    Imports no torch. Raises ConfigError when only some of the launcher's variables are set, or one is no number.
    """
    return _launched()[0]


def check_rendezvous() -> None:
    """Raise ConfigError where this is one of several processes and the environment does not say where they meet.

    Imports no torch, so that it can come before everything else.
    """
    (_, _, size), by = _launched()
    if size == 1:
        return
    missing = [name for name in _RENDEZVOUS if not os.environ.get(name)]
    port = os.environ.get("MASTER_PORT", "")
    if not missing and not 0 < (whole_number(port) or 0) < 65536:
        raise ConfigError(f"MASTER_PORT={shown(port)}: expected a port, a whole number from 1 to 65535")
    if missing:
        raise ConfigError(
            f"{by}={size} makes this one of {size} processes, but {' and '.join(missing)} "
            f"{'are' if len(missing) > 1 else 'is'} not set, so they cannot reach each other. On one machine start "
            f"them with launch/local.sh {size} train …, on Slurm with sbatch slurm/….sh or srun launch/node.sh train "
            "…; otherwise set MASTER_ADDR to the host of rank 0 and MASTER_PORT to a free port there, alike for all "
            "processes. For a single process set RANK=0 LOCAL_RANK=0 WORLD_SIZE=1"
        )


def _launched() -> tuple[tuple[int, int, int], str]:
    """What `place` returns, and the name of the variable that gives the size."""
    for names in _LAUNCHERS:
        if names[0] == "SLURM_PROCID" and "SLURM_STEP_ID" not in os.environ:
            continue  # in a job, but not started by srun: a process alone
        given = {name: os.environ.get(name) or None for name in names}
        numbers = {name: _number(name, value) for name, value in given.items() if value is not None}
        size = numbers.get(names[2], 1)
        if len(numbers) == len(names):
            rank, local = numbers[names[0]], numbers[names[1]]
            if rank >= size:
                raise ConfigError(f"{names[0]}={rank}: expected a rank from 0 to {names[2]} - 1 ({names[2]}={size})")
            return (rank, local, size), names[2]
        if size > 1 or names[0] == "RANK" in numbers:
            present = " and ".join(f"{name}={value}" for name, value in numbers.items())
            missing = " and ".join(name for name in names if name not in numbers)
            raise ConfigError(
                f"{present} is set but not {missing}: start the run with launch/local.sh, torchrun or srun, or set "
                "RANK, LOCAL_RANK and WORLD_SIZE"
            )
    return (0, 0, 1), ""


def _number(name: str, value: str) -> int:
    number = whole_number(value)
    if number is None or (name == "WORLD_SIZE" and number == 0):
        raise ConfigError(f"{name}={shown(value)}: expected a whole number{' above 0' if name == 'WORLD_SIZE' else ''}")
    return number


def check_environment() -> None:
    """Raise ConfigError for a variable of Slurm's that this package reads and that Slurm does not write so.

    Somebody has set it by hand, or copied it from another job. An empty one counts as absent.
    """
    for name in ("SLURM_RESTART_COUNT", "SLURM_PROCID"):
        if value := os.environ.get(name):
            _number(name, value)
    if (job := os.environ.get("SLURM_JOB_ID")) and not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,79}", job):
        raise ConfigError(
            f"SLURM_JOB_ID={shown(job)}: expected a job's number, or an environment without this variable"
        )


def start(hang_seconds: float = 1800.0) -> Group:
    """Join the process group (NCCL on GPUs, gloo elsewhere) and choose the device.

    hang_seconds: a rank that makes no progress for this long ends the run (see `train.watchdog`).
    Raises ConfigError when this machine has fewer GPUs than local ranks.
    """
    import torch

    name_accelerator()
    import deepspeed
    import deepspeed.ops

    rank, local, size = place()
    if torch.cuda.is_available() and local >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {local}: this machine shows {torch.cuda.device_count()} GPUs; start one process a GPU, or all "
            "of them without (CUDA_VISIBLE_DEVICES=)"
        )
    quieten(rank)
    os.environ.setdefault(RECORDER, RECORDED)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(local), WORLD_SIZE=str(size))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # DeepSpeed would compile an extension that training never calls: half a minute, and a compiler needed.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    timeout = timedelta(seconds=hang_seconds + COLLECTIVE_GRACE)
    # At the exit, so that a rank that fails has printed why before the others notice that it has left.
    atexit.register(finish)
    _join(size, "nccl" if device.type == "cuda" else "gloo", timeout)
    return Group(rank, local, size, device)


def _join(size: int, backend: str, timeout: timedelta) -> None:
    import deepspeed
    import torch.distributed as dist

    # A process alone meets nobody, wherever variables left over from another launch point: the system gives its store a
    # port that nobody else can have drawn. One under torchrun meets torchrun.
    if size == 1 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and not dist.is_initialized():
        own: Any = dist  # whose stub does not name the store
        store = own.TCPStore("127.0.0.1", 0, world_size=1, is_master=True, timeout=timeout)
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    try:
        deepspeed.init_distributed(backend, timeout=timeout, verbose=False)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        port = os.environ.get("MASTER_PORT")
        raise RunError(
            f"MASTER_PORT={port}: another program of this machine listens there. Start again; launch/local.sh draws a "
            "free port where MASTER_PORT is unset"
        ) from error


def quieten(rank: int) -> None:
    """Silence what a user cannot act on: libraries warn of their own deprecations at every step."""
    import deepspeed.utils

    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    deepspeed.utils.logger.setLevel(logging.WARNING if rank == 0 else logging.ERROR)
    no_bars_in_logs(rank)


def name_accelerator() -> None:
    """Name the CPU as DeepSpeed's accelerator where no GPU exists; otherwise its import warns on every rank."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def no_bars_in_logs(rank: int = 0) -> None:
    """Switch off transformers' bars for reading and writing weights, of which a log would keep every state."""
    name_accelerator()
    import transformers

    if rank or not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    # It warns of layers that tensor parallelism would not split, whether or not there is any.
    logging.getLogger("transformers.distributed.tensor_parallel").setLevel(logging.ERROR)


def finish() -> None:
    """Leave the process group if this process is in it, so that its exit waits for no other rank."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def peer_lost(error: BaseException) -> str | None:
    """How a collective failed because another rank ended (such as "Connection reset by peer"); None for other errors.

    Such an error is a consequence: the rank that ended first, or its launcher, knows the cause.
    """
    if not isinstance(error, RuntimeError) or isinstance(error, RunError):
        return None
    line = next((line for line in str(error).splitlines() if _PEER_LOST.search(line)), None)
    return line and _SOURCE.sub("", line.strip()).partition(". ")[0]


def exit_well(status: int = 0) -> NoReturn:
    """End this process with a status that says it did what it was to do, without the interpreter's teardown.

    Threads of the communication backend now and then abort there ("terminate called without an active exception",
    once in some sixty runs), after all is committed; the exit status has to say how the run ended.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):  # closed, or full: whoever wrote there knows
            stream.flush()
    os._exit(status)


def meet(group: Group, values: Sequence[float] | torch.Tensor, call: str) -> torch.Tensor:
    """Every rank's values: (size, n) float64, on the group's device; the host does not wait for a GPU.

    values: numbers, or a float64 tensor (n,) on the device. `call` says what this rank is about to do. Ranks that say
    different things raise RuntimeError naming both, where the next collective would have hung (the uniform-call guard,
    see `calls`): on a CPU here, on a GPU in the first call that finds the names on the host, `gather` at the latest.
    """
    import torch
    import torch.distributed as dist

    calls.check()
    calls.begin(call)
    own = values if isinstance(values, torch.Tensor) else on_device(group, values)
    if group.size == 1:
        return own[None]
    if len(own) > WIDTH - calls.HEAD:
        raise RuntimeError(f"{call}: {len(own)} values, at most {WIDTH - calls.HEAD} fit")
    head = calls.head(call, len(own))
    row = torch.nn.functional.pad(torch.cat([on_device(group, head), own]), (0, WIDTH - calls.HEAD - len(own)))
    numbers = row.new_empty(group.size * WIDTH)
    dist.all_gather_into_tensor(numbers, row)
    table = numbers.view(group.size, WIDTH)
    calls.compare(table[:, : calls.HEAD], head[0])
    return table[:, calls.HEAD : calls.HEAD + len(own)]


def on_device(group: Group, values: Sequence[float]) -> torch.Tensor:
    """Numbers of the host on the group's device: (n,) float64, without a wait for it."""
    import torch

    own = torch.tensor([*values], dtype=torch.float64, pin_memory=group.device.type == "cuda")
    return own.to(group.device, non_blocking=True)


def gather(group: Group, values: Sequence[float], call: str) -> torch.Tensor:
    """Every rank's values: (size, len(values)) float64, on the CPU; raises as `meet`, at once."""
    table = meet(group, values, call).cpu()
    calls.check()
    return table


def store() -> Any:
    """The process group's key-value store."""
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()


def from_main(group: Group, value: T) -> T:
    """Rank 0's value on every rank; the values that other ranks pass are ignored."""
    import torch.distributed as dist

    barrier(group, "a value of rank 0")
    if group.size == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, device=group.device)
    return values[0]


def on_main(group: Group, work: Callable[[], T | None]) -> T | None:
    """What `work` returns on rank 0, on every rank; only rank 0 calls it.

    All ranks end alike: one that waited here would report a lost connection, perhaps before the cause is logged. Raises
    rank 0's ConfigError or RunError there, and SystemExit with its status on the others.
    """
    value, fault = None, None
    try:
        if group.main:
            value = work()
    except (ConfigError, RunError) as error:
        fault = error
    status, value = from_main(group, (fault.status if fault else 0, value))
    if fault is not None:
        raise fault
    if status:
        raise SystemExit(status)
    return value


def everyones(group: Group, value: T) -> list[T]:
    """Every rank's value, in the order of ranks."""
    import torch.distributed as dist

    barrier(group, "a value of every rank")
    values: list[Any] = [value]
    if group.size > 1:
        values = [None] * group.size
        dist.all_gather_object(values, value)
    return values


def gathered(group: Group, value: T) -> list[T]:
    """On rank 0 every rank's value, in the order of ranks; on the others an empty list."""
    import torch.distributed as dist

    barrier(group, "a value for rank 0")
    values: list[Any] = [value]
    if group.size > 1:
        values = [None] * group.size if group.main else []
        dist.gather_object(value, values if group.main else None)
    return values


def together(group: Group, work: Callable[[], T]) -> T:
    """`on_main`, for bad input that every rank is to report alike: rank 0's ConfigError is raised on all of them."""
    fault: str | None = None

    def tried() -> T | None:
        nonlocal fault
        try:
            return work()
        except ConfigError as error:
            fault = str(error)
            return None

    value: Any = on_main(group, tried)
    if (fault := from_main(group, fault)) is not None:
        raise ConfigError(fault)
    return value


def stop_here(group: Group, call: str) -> None:
    """Raise StopRequested on every rank when a signal has reached any of them. Call it where nothing is uncommitted."""
    if gather(group, [signals.received() is not None], call).any():
        raise signals.StopRequested(f"stopped on request at {call!r}; nothing was left to commit")


def barrier(group: Group, call: str) -> None:
    """Wait for every rank at the same point."""
    gather(group, [], call)


def free_port() -> int:
    """A TCP port of this machine that is free at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
