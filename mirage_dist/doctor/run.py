"""The command: every check on the ranks that it is for, one report by rank 0, nothing left on disk."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mirage_dist import disk, ranks, signals
from mirage_dist.disk import removal
from mirage_dist.doctor.checks import CHECKS, SEVERITY, Check, Context, Peer, Status, Verdict, failed
from mirage_dist.doctor.storage import existing
from mirage_dist.progress import put, show
from mirage_dist.ranks import Group
from mirage_dist.schema import RunError, TrainRecipe

VERSION = 1  # of the JSON object; raised when what a member means changes
HANG_SECONDS = 0.0  # beyond `ranks.COLLECTIVE_GRACE`, after which a rank that does not come is reported
Findings = dict[str, Verdict]  # check -> this rank's verdict


def doctor(folder: Path, recipe: TrainRecipe | None, as_json: bool) -> None:
    """Make every check and print the report. Every rank calls this.

    Raises RunError on rank 0 when a check failed, and SystemExit with its status on the others.
    """
    began = time.monotonic()
    with signals.start_up():
        group, fault = _joined()
        peers = [Peer(*each) for each in ranks.everyones(group, (group.rank, _host(), os.getpid()))]
        context = Context(group, peers, folder, recipe=recipe)
        # Standard output holds one object then, and no line of the log.
        aside = redirect_stdout(sys.stderr) if as_json else nullcontext()
        with aside, _place(context):
            findings = [_gathered(context, check) for check in CHECKS]
    lines = [line for check, own in zip(CHECKS, findings, strict=True) for line in merged(check, own, context.peers)]
    if fault is not None:
        lines.insert(0, Line("ranks meet", "ranks", fault, [group.rank]))
    wrong = [line for line in lines if line.verdict.status == "failed"]
    if group.main:
        if as_json:
            put(json.dumps(record(lines, context, time.monotonic() - began), indent=1) + "\n")
        else:
            show(*text(lines), summary(lines, context, time.monotonic() - began))
    ranks.barrier(group, "the report")
    if wrong and group.main:
        raise RunError(f"doctor: {len(wrong)} check{'s' if len(wrong) > 1 else ''} failed, see above")
    if wrong:
        raise SystemExit(RunError.status)


def _host() -> str:
    """As Slurm calls it, so that it can be excluded by that name; elsewhere as it calls itself."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _joined() -> tuple[Group, Verdict | None]:
    """The group of all ranks; where they cannot meet, of rank 0 alone, and why."""
    rank, local, size = ranks.place()
    if size == 1:
        return Group(0, local, 1, _device(local)), None
    try:
        return ranks.start(HANG_SECONDS), None
    except Exception as error:  # of any library: what keeps ranks from meeting is what this command is to say
        if rank:
            raise SystemExit(RunError.status) from None
        reason = str(error).strip().splitlines() or [type(error).__name__]
        return Group(0, local, 1, _device(local)), failed(
            f"{size} ranks cannot meet: {reason[0]}",
            "MIRAGE_INTERFACE=ib0 names the network between nodes; NCCL_DEBUG=INFO says what is tried",
        )


def _device(local: int) -> Any:
    try:
        import torch
    except Exception:  # a broken install: the checks of packages and kernels report it
        return None
    if not torch.cuda.is_available() or local >= torch.cuda.device_count():
        return torch.device("cpu")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


@contextmanager
def _place(context: Context) -> Iterator[None]:
    """A folder in the file system of `context.folder`, made by rank 0 and removed in the end, also by a signal."""
    made: list[Path] = []

    def make() -> tuple[str | None, str]:
        try:
            folder = existing(context.folder)
            if os.path.lexists(context.folder) and not context.folder.is_dir():
                return None, f"{context.folder} is not a folder"
            beside = folder / "doctor"
            removal.remove_leftovers(beside)  # of one that was killed
            made.append(removal.own(removal.sibling(beside), parents=False))
        except OSError as error:
            return None, error.strerror or str(error)
        return str(made[0]), ""

    def clear() -> None:
        for folder in made:
            with suppress(OSError):
                disk.remove(folder)

    with signals.before_end(clear):
        try:
            place, context.fault = ranks.from_main(context.group, make() if context.group.main else (None, ""))
            context.place = None if place is None else Path(place)
            yield
            ranks.barrier(context.group, "the folder is no longer used")
        finally:
            clear()


def _gathered(context: Context, check: Check) -> list[Verdict | None]:
    """Every rank's verdict, None from those that this check is not for."""
    own = None
    of_host = context.of_host[0].rank == context.group.rank
    if {"main": context.group.main, "host": of_host, "rank": True, "together": True}[check.scope]:
        own = guarded(check, context)
    return ranks.everyones(context.group, own)


def guarded(check: Check, context: Context) -> Verdict:
    """The verdict; what the check raises is its failure, except a request to stop."""
    try:
        return check(context)
    except (signals.StopRequested, KeyboardInterrupt, SystemExit):
        raise
    except Exception as error:
        lines = str(error).strip().splitlines()
        return failed(
            f"ends with {type(error).__name__}{': ' + lines[0] if lines else ''}",
            "mend what it names; if nothing is wrong with it, report this",
        )


@dataclass
class Line:
    """One line of the report: a verdict, the ranks that it is of, and which they are, in words."""

    name: str
    group: str
    verdict: Verdict
    ranks: list[int]
    note: str = ""


def merged(check: Check, verdicts: Sequence[Verdict | None], peers: Sequence[Peer]) -> list[Line]:
    """The lines of a check: one where all ranks agree, otherwise one for each thing that is wrong, naming the ranks.

    Verdicts of collectives are alike everywhere: rank 0's counts, unless another one has a worse.
    """
    given = [(rank, verdict) for rank, verdict in enumerate(verdicts) if verdict is not None]
    worst = max((verdict.status for _, verdict in given), key=SEVERITY.index)
    if check.scope == "together":
        rank, verdict = next((r, v) for r, v in given if v.status == worst)
        return [Line(check.name, check.group, verdict, [r for r, _ in given])]
    if all(verdict.status == worst for _, verdict in given) and worst in ("ok", "not here"):
        unlike = len({verdict.text for _, verdict in given}) > 1
        note = f"{len(given)} {'hosts' if check.scope == 'host' else 'ranks'}" if len(given) > 1 else ""
        note += f", of which {peers[given[0][0]]}" if unlike else ""
        return [Line(check.name, check.group, given[0][1], [r for r, _ in given], note)]
    lines: dict[tuple[Status, str], Line] = {}
    for rank, verdict in given:
        if verdict.status not in ("warning", "failed"):
            continue
        line = lines.setdefault((verdict.status, verdict.text), Line(check.name, check.group, verdict, []))
        line.ranks.append(rank)
    for line in lines.values():
        if len(peers) > 1:
            more = f" and {len(line.ranks) - 1} more" if len(line.ranks) > 1 else ""
            line.note = f"{peers[line.ranks[0]]}{more}"
    return sorted(lines.values(), key=lambda line: -SEVERITY.index(line.verdict.status))


def text(lines: Sequence[Line]) -> list[str]:
    """The report: a line a verdict, below the title of its group."""
    out: list[str] = []
    width = max(len(line.name) for line in lines)
    for group in dict.fromkeys(line.group for line in lines):
        out.append(group)
        for line in (each for each in lines if each.group == group):
            verdict = line.verdict
            note = f" [{line.note}]" if line.note else ""
            mend = f" -> {verdict.remedy}" if verdict.remedy else ""
            out.append(f"  {verdict.status:<9} {line.name:<{width}}  {_one_line(verdict.text + note + mend)}")
    return out


def _one_line(words: str) -> str:
    return " ".join(words.split())


def summary(lines: Sequence[Line], context: Context, seconds: float) -> str:
    counts = {status: sum(line.verdict.status == status for line in lines) for status in SEVERITY}
    hosts = len({peer.host for peer in context.peers})
    where = f"{context.group.size} rank{'s' if context.group.size > 1 else ''} on {hosts} host"
    listed = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    return f"{where}{'s' if hosts > 1 else ''}, {seconds:.1f} s: {listed}"


def record(lines: Sequence[Line], context: Context, seconds: float) -> dict[str, Any]:
    """The JSON object (docs/doctor.md)."""
    return {
        "version": VERSION,
        "verdict": max((line.verdict.status for line in lines), key=SEVERITY.index),
        "ranks": [{"rank": peer.rank, "host": peer.host} for peer in context.peers],
        "folder": str(context.folder),
        "seconds": round(seconds, 3),
        "checks": [
            {
                "group": line.group,
                "name": line.name,
                "verdict": line.verdict.status,
                "text": line.verdict.text,
                "remedy": line.verdict.remedy or None,
                "ranks": line.ranks,
                "values": line.verdict.values,
            }
            for line in lines
        ],
    }
