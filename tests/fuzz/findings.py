"""What is wrong with a case that has ended: a traceback, a hang, memory, a changed file, a result that is not."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mirage_dist import signals
from tests.fuzz.sandbox import Outcome
from tests.fuzz.verbs import Verb
from tests.fuzz.world import FOREIGN

STATUSES = (0, 1, 2, signals.STOPPED)
MEMORY = 2 << 30  # bytes beyond those of the libraries
LONGEST = 64 << 20  # bytes of a file that is hashed
MESSAGE = 6000  # characters; more is a page that nobody reads
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

Tree = Mapping[str, tuple[Any, ...]]


@dataclass(frozen=True)
class Finding:
    """kind: traceback, status, hang, memory, changed, not made, believed, controls, no message. where: what repeats."""

    kind: str
    where: str
    text: str


def tree(folder: Path) -> Tree:
    """Every path below a folder with its kind and content."""
    entries: dict[str, tuple[Any, ...]] = {}
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(parent, name)
            entries[str(path.relative_to(folder))] = _entry(path)
    return entries


def _entry(path: Path) -> tuple[Any, ...]:
    state = path.lstat()
    if stat.S_ISLNK(state.st_mode):
        return ("link", os.readlink(path))
    if stat.S_ISREG(state.st_mode):
        content = hashlib.sha1(path.read_bytes()).hexdigest() if state.st_size <= LONGEST else ""
        return ("file", state.st_size, content)
    return ("folder",) if stat.S_ISDIR(state.st_mode) else ("special", stat.S_IFMT(state.st_mode))


def of(case: Mapping[str, Any], verb: Verb, outcome: Outcome, folder: Path, before: Tree, wanted: Any) -> list[Finding]:
    """All that is wrong. wanted: the result of the verb on the whole world."""
    made: list[Finding] = []
    if outcome.hang:
        made.append(Finding("hang", outcome.hang.partition("; ")[2], outcome.hang))
    elif "Traceback (most recent call last)" in outcome.stderr:
        made.append(Finding("traceback", last_frame(outcome.stderr), outcome.stderr[-3000:]))
    elif outcome.status not in STATUSES:
        made.append(Finding("status", str(outcome.status), outcome.stderr[-1500:]))
    elif outcome.status and not (outcome.stderr + outcome.stdout).strip():
        made.append(Finding("no message", case["verb"], ""))
    if outcome.memory > MEMORY:
        made.append(Finding("memory", case["verb"], f"{outcome.memory >> 20} MiB"))
    if match := CONTROLS.search(outcome.stdout + outcome.stderr):
        made.append(Finding("controls", case["verb"], (outcome.stdout + outcome.stderr)[max(match.start() - 200, 0) :]))
    if outcome.status in (1, 2) and len(outcome.stderr) > MESSAGE:
        made.append(Finding("long message", case["verb"], f"{len(outcome.stderr)}: {outcome.stderr[:500]}"))
    if lost := changed(before, tree(folder), verb):
        made.append(Finding("changed", lost[0], ", ".join(lost[:5])))
    if outcome.status == 0 and not outcome.hang:
        made += wrong_result(case, verb, folder, wanted)
    return made


def changed(before: Tree, after: Tree, verb: Verb) -> list[str]:
    """Files that are not the verb's own, and are not as they were."""
    return [
        path
        for path, entry in before.items()
        if after.get(path) != entry and (is_foreign(path) or not owned(path, verb))
    ]


def is_foreign(path: str) -> bool:
    return any(path == name or path.startswith(f"{name}/") for name in FOREIGN)


def owned(path: str, verb: Verb) -> bool:
    return any(path == name or path.startswith(f"{name}/") for name in verb.owned)


def wrong_result(case: Mapping[str, Any], verb: Verb, folder: Path, wanted: Any) -> list[Finding]:
    """Status 0 promises that the thing asked for exists; and damage to state must not change what it is."""
    if case["overrides"] or case["environment"] or any(c["kind"] in ("recipe", "place") for c in case["changes"]):
        return []  # something else may have been asked for
    if verb.made and not (folder / verb.made).exists():
        return [Finding("not made", verb.made, "status 0")]
    if verb.result is None or wanted is None or any(change["kind"] != "state" for change in case["changes"]):
        return []
    try:
        result = verb.result(folder)
    except (OSError, ValueError, LookupError, TypeError) as error:
        return [Finding("not made", str(verb.made), f"status 0, but {error!r}")]
    if result == wanted:
        return []
    return [
        Finding("believed", case["verb"], f"status 0, and the result differs: {result!r:.600} wanted {wanted!r:.600}")
    ]


def last_frame(text: str) -> str:
    """The innermost line of ours in the last traceback, and the error's class."""
    frames = re.findall(r'File "[^"]*/(mirage_dist/[^"]+)", line \d+, in (\S+)', text)
    errors = re.findall(r"^(\w[\w.]*)(?::|$)", text.rpartition("Traceback (most recent call last)")[2], re.M)
    classes = [name for name in errors if name != "mirage"]
    return f"{':'.join(frames[-1]) if frames else '?'} {classes[-1] if classes else ''}"
