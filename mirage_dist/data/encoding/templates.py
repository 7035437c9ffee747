"""Bounds for chat templates, which are programs that come with a model.

transformers renders them in jinja's sandbox: no files, no imports, no attributes with underscores, no loop over more
than 100 000 numbers. The sandbox has no bound on time and memory, so that nested loops run for ever and `'x' * 10**10`
takes all memory. Two bounds are added:

1. `check` renders example conversations in a forked child process with limits on its time and memory, once for each
   template of a process, when the processor is loaded. Nothing else stops a single long operation.
2. `bounded` stops any later rendering after `SECONDS`, between two bytecodes of the template's compiled code: what a
   template does may depend on the conversation. It costs about a microsecond.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import select
import signal
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError

from mirage_dist.schema import ConfigError

SECONDS = 2  # of processor time, for a rendering, and for all examples together
MEMORY = 1 << 29  # bytes, for the examples
LARGEST = 1 << 20  # characters of a template
LONGEST = 1 << 24  # characters of a rendered conversation
WAIT_SECONDS = 120.0  # for the child, on a machine that is busy
LOOK_SECONDS = 0.5  # between two looks at the renderings in progress
FILES = ("chat_template.jinja", "chat_template.json", "processor_config.json", "tokenizer_config.json")
TEXT = "Which of these is right, and why? "
_passed: set[tuple[str, bool]] = set()


class TooMuch(TemplateError):
    """A template exceeds a bound."""


class TooSlow(TooMuch):
    """A template exceeds the bound on time."""

    def __init__(self, message: str = f"it takes more than {SECONDS} s for a conversation") -> None:
        super().__init__(message)


def bounded(render: Callable[[], Any]) -> str:
    """The text that `render` returns, which renders a template in this thread.

    Raises TooMuch after `SECONDS` or for a text above `LONGEST`, and TemplateError for every error of the template,
    which may be of any kind.
    """
    rendering = _watched()
    try:
        text = render()
    except TemplateError:
        raise
    except Exception as error:
        raise TemplateError(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
    finally:
        rendering.done = True
    if not isinstance(text, str) or len(text) > LONGEST:
        raise TooMuch(f"it writes more than {LONGEST:,} characters for a conversation")
    return text


class _Rendering:
    """One in progress in this thread. start: processor time of the thread, in seconds."""

    def __init__(self) -> None:
        self.clock = time.pthread_getcpuclockid(threading.get_ident())
        self.start = time.clock_gettime(self.clock)
        self.done = False


_renderings: dict[int, _Rendering] = {}  # the last one of each thread
_watching_process = 0


def _watched() -> _Rendering:
    """Register a rendering of this thread with the thread that watches all. It is started once in each process."""
    global _watching_process
    if _watching_process != os.getpid():  # a fork has none of its parent's threads
        _watching_process = os.getpid()
        _renderings.clear()
        threading.Thread(target=_watch, name="chat templates", daemon=True).start()
    _renderings[threading.get_ident()] = rendering = _Rendering()
    return rendering


def _watch() -> None:
    while True:
        time.sleep(LOOK_SECONDS)
        for thread, rendering in list(_renderings.items()):
            with suppress(OSError):  # a thread that has ended
                if not rendering.done and time.clock_gettime(rendering.clock) - rendering.start > SECONDS:
                    # Raised between two bytecodes of that thread; it is in `bounded`, or was an instant ago.
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(TooSlow))


def check(folder: Path, tokenizer: Any, template: str | None, text_only: bool) -> None:
    """Raise ConfigError, naming the file, for a template that exceeds a bound or renders no conversation at all.

    folder: the model directory. template: None passes. text_only: whether messages are plain text.
    """
    if template is None or (template, text_only) in _passed:
        return
    file = next((folder / name for name in FILES if _holds_a_template(folder / name)), folder)
    if not isinstance(template, str):
        raise ConfigError(f"{file}: the chat template is no text, but {type(template).__name__}")
    if len(template) > LARGEST:
        raise ConfigError(
            f"{file}: the chat template has {len(template):,} characters, above the limit of {LARGEST:,}; give the "
            "template of the original model"
        )
    faults = _in_child(lambda: _faults(tokenizer, template, text_only))
    if isinstance(faults, str):
        raise ConfigError(
            f"{file}: the chat template exceeds a bound: {faults}; give the template of the original model"
        )
    if all(faults):
        raise ConfigError(f"{file}: the chat template renders no conversation: {faults[0]}")
    _passed.add((template, text_only))


def _holds_a_template(file: Path) -> bool:
    try:
        return file.suffix == ".jinja" or "chat_template" in json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def _examples(text_only: bool) -> list[list[dict[str, Any]]]:
    """Conversations: a question, with a picture, with a system prompt, and one of many long turns."""

    def message(role: str, text: str, pictured: bool = False) -> dict[str, Any]:
        parts = [*([{"type": "image"}] if pictured else []), {"type": "text", "text": text}]
        return {"role": role, "content": text if text_only else parts}

    def turns(count: int, length: int) -> list[dict[str, Any]]:
        text = TEXT * length
        return [message("assistant" if number % 2 else "user", text, number == 0) for number in range(count)]

    question = [message("user", TEXT)]
    return [question, turns(1, 1), [message("system", TEXT), *question], turns(2, 1), turns(31, 20)]


def _faults(tokenizer: Any, template: str, text_only: bool) -> list[str] | str:
    """For each example why it cannot be rendered, empty where it can; or the bound that the template exceeds."""
    faults = []
    for messages in _examples(text_only):
        options = {"add_generation_prompt": messages[-1]["role"] == "user", "tokenize": False}
        try:
            text = tokenizer.apply_chat_template(messages, chat_template=template, **options)
            faults.append("")
        except MemoryError:
            return _too_large()
        except Exception as error:  # of any kind, as the template's are
            faults.append(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
            continue
        if len(text) > LONGEST:
            return f"it writes more than {LONGEST:,} characters for a conversation"
    return faults


def _too_large() -> str:
    return f"it takes more than {MEMORY >> 20} MiB for a conversation"


def _in_child(work: Callable[[], Sequence[str] | str]) -> Sequence[str] | str:
    """What `work` returns in a forked process with bounds on time and memory; the bound, where it exceeds one."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():  # of a fork beside other threads, none of whose locks the child takes
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        _run(work, writing)
    os.close(writing)
    content, end = b"", time.monotonic() + WAIT_SECONDS
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        while select.select([pipe], [], [], max(0.0, end - time.monotonic()))[0]:
            if not (piece := pipe.read(1 << 16)):
                break
            content += piece
    with suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    # Killed by its limit on time, within a single operation, or by the system for want of memory.
    return json.loads(content) if content else f"it takes more than {SECONDS} s, or all memory, for a conversation"


def _run(work: Callable[[], Sequence[str] | str], writing: int) -> NoReturn:
    """The child: never returns, and runs nothing of the parent's at its end."""
    try:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        with suppress(OSError, ValueError):  # without /proc only time is bounded
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
        try:
            result = work()
        except MemoryError:
            result = _too_large()
        os.write(writing, json.dumps(result).encode())
    finally:
        os._exit(0)
