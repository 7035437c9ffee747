"""What each process of vLLM on several GPUs imports before it takes its GPU (`worker_extension_cls`): it lives as long
as the worker of the evaluation wants.

By itself such a process looks for the worker's end only once the weights are loaded, and leaves after its current step:
16 seconds after a SIGKILL where this was measured, and it keeps the GPU until then. And a SIGTERM or SIGUSR1, which
Slurm sends to every process of a step, ends it together with the batch that the worker is to finish before it stops.
"""

from __future__ import annotations

import multiprocessing
import signal

from mirage_dist import liveness, signals


class Dependent:
    """Adds nothing to vLLM's own class of workers; importing this module is what counts."""


if (parent := multiprocessing.parent_process()) is not None and parent.pid is not None:
    liveness.die_with_parent(parent.pid)
    for number in signals.SIGNALS:
        signal.signal(number, signal.SIG_IGN)
