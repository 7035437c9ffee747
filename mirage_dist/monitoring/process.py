"""The handle of a process that sends a run's records: starts it, passes messages on, starts it again when it dies.

Nothing here blocks a step or raises: a sink that fails costs its records, which follow at the next start, and one
warning.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from mirage_dist.config import REPOSITORY
from mirage_dist.monitoring.sinks import TITLES, End
from mirage_dist.progress import log
from mirage_dist.signals import SIGNALS

STOP_SECONDS = 10.0  # for the last records of a run that was told to stop: a scheduler kills what takes long
END_SECONDS = 60.0
PAUSES = (0.0, 30.0, 120.0, 600.0)  # seconds before the process is started again, after its 1st, 2nd, … death


class Sender:
    """A sink's process. `tick` often, `close` at the end."""

    def __init__(
        self,
        name: str,
        sink: str,
        options: Mapping[str, Any],
        metrics: int | None = None,
        private: bool = False,
    ) -> None:
        """name: of the run, for messages. options: the sink's. metrics: a descriptor from which metrics.jsonl can be
        read. private: nobody else may read what the sink writes.
        """
        self.name, self.title, self.metrics = name, TITLES[sink], metrics
        self.opening = {"sink": sink, "options": dict(options), "metrics": metrics, "private": private}
        self.process: subprocess.Popen[bytes] | None = None
        # A process started again gets these again, since one that died may have lost what it took: a run's owner rather
        # gets an alert twice than not at all, and of each title the last one. Steps are in metrics.jsonl.
        self.kept: list[Mapping[str, Any]] = []
        self.deaths, self.again = 0, 0.0
        self.warned = False
        self.end: End = "failed"
        self._start()

    def send(self, kind: str, **content: Any) -> None:
        """Pass a message on (see `sender.hand`) as far as the process takes it now; the rest goes with later calls."""
        message = {"kind": kind, **content}
        if kind == "alert":
            self.kept = [other for other in self.kept if other.get("title") != message["title"]]
        self.kept.append(message)
        self._put(message)

    def tick(self) -> None:
        """Log what the process says; start it again when it has died and the pause is over."""
        if self.process is None or self.process.poll() is not None:
            self._mourn()
            if time.monotonic() >= self.again:
                self._start()
        self._move()

    def ending(self, end: End) -> None:
        """Tell the process to store what it has and to end; `close` waits for it."""
        self.end = end
        self._move()
        self._put({"kind": "end", "end": end})

    def close(self, seconds: float) -> None:
        """After `ending`: wait for the process, for at most so many seconds; one that dies is started again once."""
        limit, last = time.monotonic() + seconds, False
        while (status := self._status()) != 0:
            if time.monotonic() >= limit:
                self._warn(f"it did not end within {seconds:.0f} seconds")
                break
            if status is not None or self.process is None:
                self._mourn()
                if last:
                    break
                last = True
                self._start()
                self.ending(self.end)
        self._move()
        self.kill()

    def _status(self) -> int | None:
        """The process's exit status; None for one that runs, after a moment, and for none."""
        if self.process is None:
            return None
        self._move()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(0.05)
        return self.process.returncode

    def _start(self) -> None:
        self.inbox, self.outbox, self.chatter = b"", b"", ""
        command = [sys.executable, "-m", "mirage_dist.monitoring.sender"]
        path = os.pathsep.join(p for p in (str(REPOSITORY), os.environ.get("PYTHONPATH")) if p)
        # The process inherits the mask of blocked signals. Signals that come to this one meanwhile come a little later.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {*SIGNALS, signal.SIGINT})
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": path},
                pass_fds=() if self.metrics is None else (self.metrics,),
                start_new_session=True,
            )
        except OSError as error:
            self.process = None
            self._failed(f"its process cannot be started: {error}")
            return
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)
        for message in (self.opening, *self.kept):
            self._put(message)
        # An alert comes twice at most: it may be what the process before died of.
        self.kept = [message for message in self.kept if message["kind"] != "alert"]

    def _mourn(self) -> None:
        """Count a death once, and say why."""
        if self.process is None or self.process.stdin is None:
            return
        self._move()
        status = self.process.returncode
        silent = status == -signal.SIGALRM
        self._failed("it does not answer" if silent else self.chatter or f"its process ended with status {status}")
        self.kill()

    def _failed(self, cause: str) -> None:
        self._warn(cause)
        self.again = time.monotonic() + PAUSES[min(self.deaths, len(PAUSES) - 1)]
        self.deaths += 1

    def _put(self, message: Mapping[str, Any]) -> None:
        self.outbox += json.dumps(message).encode() + b"\n"
        self._move()

    def _move(self) -> None:
        """Write and read what can be written and read now."""
        if self.process is None or self.process.stdin is None or self.process.stdout is None:
            return
        with suppress(OSError):  # the process takes no more now, or has died
            while self.outbox:
                self.outbox = self.outbox[os.write(self.process.stdin.fileno(), self.outbox) :]
        with suppress(OSError):
            while block := os.read(self.process.stdout.fileno(), 1 << 16):
                self.inbox += block
        *lines, self.inbox = self.inbox.split(b"\n")
        for line in lines:
            self._hear(line.decode(errors="replace"))

    def _hear(self, line: str) -> None:
        try:
            message = json.loads(line)
            assert isinstance(message, dict)
        except (ValueError, AssertionError):
            self.chatter = line.strip() or self.chatter
            return
        if "info" in message:
            log.info(f"{self.name}: {message['info']}")
        if message.get("goes_on"):
            log.info(f"{self.name}: {message['warning']}")
        elif "warning" in message:
            self.chatter = message["warning"]

    def _warn(self, cause: str) -> None:
        if not self.warned:
            log.warning(
                f"{self.name}: {self.title} failed ({cause}). The run goes on without it, and what it lacks is sent "
                "when it works again, at the latest at the next start of the run"
            )
        self.warned = True

    def kill(self) -> None:
        """End the process if it runs, and close its pipes. W&B's service, its child, ends when its parent has."""
        if self.process is None:
            return
        with suppress(OSError):
            self.process.kill()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(1.0)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
        self.process.stdin = self.process.stdout = None
