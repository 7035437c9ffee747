"""`mirage eval CONFIG --status`: the progress of a suite, from its files alone, on any machine that sees them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from mirage_dist.evals import manifest, results
from mirage_dist.evals.sharing import claims
from mirage_dist.evals.sharing.files import COMPLETE, DEFENCES, Damage, lines, row_key, suite_dir
from mirage_dist.evals.sharing.usage import Usage, described
from mirage_dist.schema import ConfigError, EvalRecipe, PriceConfig, RunError

# The set and the attack of a raw row. JSON escapes quotes in strings, so no text of a row can look like a field.
PLACE = re.compile(rb'"set": ("(?:[^"\\]|\\.)*"), .*?"attack": ("(?:[^"\\]|\\.)*")')

SERVED = re.compile(rb'"served": (\{(?:[^"{}]|"(?:[^"\\]|\\.)*")*\})')


@dataclass
class Count:
    """Numbers of questions of one set and attack: in total, answered, and claimed by workers that may be alive."""

    total: int
    done: int = 0
    claimed: int = 0

    @property
    def missing(self) -> int:
        return self.total - self.done - self.claimed


@dataclass
class Status:
    """counts: by set and attack. workers: those not known to be dead. rows_per_s: the sum of their rates.

    cut, damage, repeated: see `sharing.files.Answers`. measured: whether `metrics.json` is whole. usage: of
    an endpoint's answers.
    """

    counts: dict[tuple[str, str], Count]
    workers: int = 0
    rows_per_s: float = 0.0
    cut: int = 0
    damage: Damage = field(default_factory=Damage)
    repeated: int = 0
    measured: bool = False
    usage: Usage = field(default_factory=Usage)
    notes: list[str] = field(default_factory=list)

    @property
    def done(self) -> int:
        return sum(count.done for count in self.counts.values())

    @property
    def total(self) -> int:
        return sum(count.total for count in self.counts.values())

    def text(self, price: PriceConfig | None = None) -> str:
        """A Markdown table and a line on the workers; of an endpoint's answers also what they took."""
        table = ["| set | attack | done | claimed | missing |", "|---|---|---:|---:|---:|"]
        for (name, attack), c in self.counts.items():
            table.append(f"| {name} | {attack} | {c.done} of {c.total} | {c.claimed} | {c.missing} |")
        rate = f"{self.workers} workers at work, {self.rows_per_s:.2f} rows/s"
        left = self.total - self.done
        if left and self.rows_per_s:
            rate += f", {left / self.rows_per_s / 60:.0f} minutes left"
        end = "metrics.json is written" if self.measured else "not judged yet"
        share = self.done / self.total if self.total else 1.0
        line = f"{self.done} of {self.total} answers ({share:.1%}); {rate}; {end}"
        taken = [f"the endpoint: {described(self.usage.sums(price))}"] if self.usage.answers else []
        return "\n".join([*table, "", line, *taken, *self.notes])


def report(recipe: EvalRecipe) -> str:
    """The progress of a suite as text, and of each defence; of each checkpoint's where the recipe follows a run."""
    suite = suite_dir(recipe)
    if recipe.follow is None:
        price = recipe.model.price
        texts = [status(suite).text(price)]
        for name in recipe.defences:
            folder = suite / DEFENCES / name
            begun = (folder / "manifest.json").is_file()
            texts.append(f"defence {name}\n{status(folder).text(price) if begun else 'not started yet'}")
        return "\n\n".join(texts)
    steps = sorted(suite.glob("step-*"))
    if not any((step / "manifest.json").is_file() for step in steps):
        raise ConfigError(f"{suite}: no evaluated checkpoint of {recipe.follow}; this evaluation has not started yet")
    texts = [f"{step.name}\n{status(step).text()}" for step in steps if (step / "manifest.json").is_file()]
    return "\n\n".join([f"{len(steps)} checkpoints of {recipe.follow}", *texts])


def status(suite: Path) -> Status:
    """Read the progress; needs memory for the keys only. Raises ConfigError when the suite has no manifest yet."""
    file = suite / "manifest.json"
    if not file.is_file():
        rewrites = {f.stem: sum(1 for _ in lines(f)) for f in sorted((suite / "rewrites").glob("*.jsonl"))}
        listed = ", ".join(f"{name}: {count} lines" for name, count in rewrites.items())
        why = f"rewrites are being made first ({listed})" if rewrites else "this evaluation has not started yet"
        raise ConfigError(f"{suite}: no manifest.json; {why}")
    questions = manifest.read(suite).get("asks", {})
    counts = {(name, attack): Count(n) for name, attacks in questions.items() for attack, n in attacks.items()}
    result = Status(counts)
    try:
        results.read(suite)
        result.measured = True
    except FileNotFoundError:
        pass
    except RunError as error:
        result.notes.append(str(error))
    _count_rows(suite, result)
    _count_claims(suite, result)
    if result.cut:
        result.notes.append(f"{result.cut} half-written lines of workers that died; they are answered again")
    if result.damage:
        result.notes.append(
            f"{len(result.damage)} lines are damaged or edited; the next start asks again: {result.damage}"
        )
    if result.repeated:
        result.notes.append(f"{result.repeated} questions were answered twice; each counts once")
    return result


def require_complete(answers: Path) -> None:
    """Raise RunError when `answers`, the rows of an evaluation or a folder of several, lack some of their answers.

    Files that no evaluation wrote are left alone.
    """
    if not answers.is_dir():
        return
    for suite in sorted({answers.parent, *(folder.parent for folder in answers.rglob("rows"))}):
        if not (suite / "manifest.json").is_file():
            continue
        state = status(suite)
        if state.done < state.total:
            raise RunError(f"{suite}: {state.done} of {state.total} answers; {COMPLETE}")


def require_judged(suite: Path) -> None:
    """Raise RunError when this is a suite whose evaluation has begun and has not come to its rates yet."""
    if (suite / "manifest.json").is_file() and not (suite / "metrics.json").is_file():
        state = status(suite)
        raise RunError(f"{suite}: {state.done} of {state.total} answers, not judged yet; {COMPLETE}")


def _count_rows(suite: Path, result: Status) -> None:
    seen: set[bytes] = set()
    places: dict[tuple[bytes, ...], Count | None] = {}
    for file in sorted((suite / "rows").glob("worker-*.jsonl")):
        end = 0
        for number, (offset, line) in enumerate(lines(file), start=1):
            end = offset + len(line)
            key, condition = row_key(line, file), PLACE.search(line)
            if key is None or condition is None:
                result.damage.add(file, number)
                continue
            identity = bytes.fromhex(key)
            if identity in seen:
                result.repeated += 1
                continue
            seen.add(identity)
            raw = condition.groups()
            if raw not in places:
                place = (json.loads(raw[0]), json.loads(raw[1]))
                places[raw] = result.counts.get(place)
            if count := places[raw]:
                count.done += 1
                if b'"filtered": ' not in line and (served := SERVED.search(line)):  # else another arm's answer
                    result.usage.add(json.loads(served[1]))
        result.cut += file.stat().st_size > end


def _count_claims(suite: Path, result: Status) -> None:
    folder = suite / "claims"
    for owner, rows in claims.holding(folder):
        if owner.alive() is not False:
            for name, attacks in rows.items():
                for attack, n in attacks.items():
                    count = result.counts.get((name, attack))
                    # Rows may be on disk although their claim is not released yet.
                    if count is not None:
                        count.claimed = min(count.claimed + n, count.total - count.done)
    for owner, beat in claims.workers(folder):
        if owner.alive() is not False:
            result.workers += 1
            result.rows_per_s += beat["rows"] / beat["seconds"] if beat else 0.0
