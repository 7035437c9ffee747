"""The process that gives one run's records to one sink: `python -m mirage_dist.monitoring.sender`.

It is started by `process.Sender` with SIGTERM, SIGUSR1 and SIGINT blocked: a scheduler signals every process of a job,
and the records of the last steps are still to come. Messages come on standard input, one JSON object a line, the first
of which names the sink; its end without "end" means that the run died. What it has to say goes to standard output in
the same form; other lines there are a library's.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from mirage_dist import state
from mirage_dist.monitoring import sinks
from mirage_dist.monitoring.sinks import Sink

POLL_SECONDS = 0.2
# A call that takes longer ends this process, by SIGALRM, and the run starts another one. W&B gives up a start after 90.
CALL_SECONDS = 300
BLOCK = 1 << 16


class Lines:
    """Whole lines of a file descriptor as they come; JSON objects, others are skipped.

    Of a file (seekable) they are the lines of metrics.jsonl, of a pipe messages, which have no seal. The run itself
    names damaged lines when it starts.
    """

    def __init__(self, descriptor: int, seekable: bool) -> None:
        self.descriptor, self.offset = descriptor, 0 if seekable else None
        self.parse: Callable[[bytes], Any] = _record if seekable else json.loads
        self.rest, self.over = b"", False

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Those that can be read now: of a file up to its end, of a pipe one block's."""
        while True:
            # The descriptor's own position is shared with other processes.
            block = (
                os.read(self.descriptor, BLOCK)
                if self.offset is None
                else os.pread(self.descriptor, BLOCK, self.offset)
            )
            self.over = not block
            *lines, self.rest = (self.rest + block).split(b"\n")
            for line in lines:
                try:
                    yield self.parse(line)
                except (ValueError, state.Damaged):
                    continue
            if self.offset is None or not block:
                return
            self.offset += len(block)


def _record(line: bytes) -> dict[str, Any]:
    return state.parse("metrics", line, "metrics.jsonl")


def say(**message: Any) -> None:
    """Tell the run; nobody listens any more where it has died."""
    with suppress(OSError):
        os.write(1, json.dumps(message).encode() + b"\n")


def make(name: str, options: Mapping[str, Any]) -> Sink:
    """The sink of this name; imports its library."""
    if name == "wandb":
        from mirage_dist.monitoring.wandb_run import WandbRun

        return WandbRun(options)
    from mirage_dist.monitoring.tensorboard import TensorBoard

    return TensorBoard(options)


def serve(control: Lines) -> None:
    """Open the sink and give it everything until the end."""
    signal.alarm(CALL_SECONDS)
    opening, *messages = first(control)
    if opening["private"]:
        os.umask(0o077)
    sink = make(opening["sink"], {**opening["options"], "say": say})
    held = sink.open()
    records = None if opening["metrics"] is None else Lines(opening["metrics"], seekable=True)
    while True:
        signal.alarm(CALL_SECONDS)
        ready, _, _ = select.select([control.descriptor], [], [], 0.0 if messages else POLL_SECONDS)
        messages += list(control) if ready else []
        # After the messages: what the run had recorded before it said "end" is there.
        for record in records or ():
            if record["step"] > held and sinks.complete(record):
                signal.alarm(CALL_SECONDS)
                held = record["step"]
                sink.write(held, sinks.scalars(record))
        for message in messages:
            if hand(sink, message):
                return
        messages = []
        if control.over:
            sink.close("failed")
            return


def first(control: Lines) -> list[dict[str, Any]]:
    """At least one message."""
    while not (messages := list(control)):
        if control.over:
            raise EOFError("the run ended before it said what to do")
    return messages


def hand(sink: Sink, message: Mapping[str, Any]) -> bool:
    """Pass one message on; whether it was the last one."""
    signal.alarm(CALL_SECONDS)
    kind = message["kind"]
    if kind == "end":
        sink.close(message["end"])
    elif kind == "alert":
        sink.alert(message["title"], message["text"])
    elif kind == "log":
        sink.log(message["values"], message["table"])
    elif kind == "summary":
        sink.summary(message["values"])
    return kind == "end"


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    os.nice(5)
    status = 0
    try:
        serve(Lines(0, seekable=False))
    except BaseException as error:
        say(warning=sinks.reason(error))
        status = 1
    # Exit handlers of a library whose service has died wait for it.
    sys.stdout.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
