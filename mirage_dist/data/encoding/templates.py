"""Bounds for chat templates, which are programs that come with a model.

transformers renders them in jinja's sandbox: no files, no imports, no attributes with underscores, no loop over more
than 100 000 numbers. The sandbox has no bound on time and memory, so that nested loops run for ever and `'x' * 10**10`
takes all memory. Two bounds are added:

1. `check` renders example conversations in a process with limits on its time and memory (`rendering`), once for each
   template, when the processor is loaded. Nothing else stops a single long operation.
2. `bounded` stops any later rendering after `SECONDS`, between two bytecodes of the template's compiled code: what a
   template does may depend on the conversation. It costs about a microsecond.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from mirage_dist.schema import ConfigError, RunError, documents

SECONDS = 2  # of processor time, for a rendering, and for all examples together
MEMORY = 1 << 29  # bytes, for the examples
LARGEST = 1 << 20  # characters of a template
LONGEST = 1 << 24  # characters of a rendered conversation
WAIT_SECONDS = 120.0  # for `rendering`, on a machine that is busy
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
    if (bound := _exceeded(tokenizer, template, text_only)) is not None:
        raise ConfigError(
            f"{file}: the chat template exceeds a bound: {bound}; give the template of the original model"
        )
    if all(faults := _faults(tokenizer, template, text_only)):
        raise ConfigError(f"{file}: the chat template renders no conversation: {faults[0]}")
    _passed.add((template, text_only))


def _holds_a_template(file: Path) -> bool:
    try:
        return file.suffix == ".jinja" or "chat_template" in json.loads(documents.read_bytes(file))
    except (ConfigError, ValueError, TypeError, RecursionError):
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


def _exceeded(tokenizer: Any, template: str, text_only: bool) -> str | None:
    """The bound that a template exceeds, by `rendering`; None if there is none."""
    task = {
        "template": template,
        "variables": {name: str(value) for name, value in tokenizer.special_tokens_map.items()},
        "examples": _examples(text_only),
        "seconds": SECONDS,
        "memory": MEMORY,
        "longest": LONGEST,
    }
    command = [sys.executable, "-I", str(Path(__file__).with_name("rendering.py"))]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(task),
            capture_output=True,
            text=True,
            timeout=WAIT_SECONDS,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired:
        return f"no rendering after {WAIT_SECONDS:g} s"
    if done.returncode == 0:
        return json.loads(done.stdout)
    if done.returncode > 0:
        raise RunError(f"{command[-1]}: cannot render a chat template: {done.stderr.strip()[-300:]}")
    # Killed by its limit on time, within a single operation, or by the system for want of memory.
    return f"it takes more than {SECONDS} s, or all memory, for a conversation"


def _faults(tokenizer: Any, template: str, text_only: bool) -> list[str]:
    """For each example why it cannot be rendered, empty where it can."""
    faults = []
    for messages in _examples(text_only):
        options = {"add_generation_prompt": messages[-1]["role"] == "user", "tokenize": False}
        try:
            bounded(partial(tokenizer.apply_chat_template, messages, chat_template=template, **options))
            faults.append("")
        except TemplateError as error:
            cause = error.__cause__ or error
            faults.append(f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}")
    return faults
