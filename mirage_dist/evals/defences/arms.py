"""The arms of an evaluation: the same questions answered without a defence, and with each one.

    evals/SUITE/                     the answers without a defence
    evals/SUITE/defences/NAME/       those with one: manifest, rows, verdicts and rates of its own
    evals/SUITE/defences/NAME/guard/ what a filter's guard decided

So no rate, harvest or example of the model itself can hold a defended answer, and a defence that is added to a recipe
costs its own answers only. A filter gets the answers of the arm without a defence: no question is asked again for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mirage_dist import disk
from mirage_dist.evals import defences, judges, rows, worker
from mirage_dist.evals.defences.base import Defence
from mirage_dist.evals.defences.output_filter import REFUSAL, Seen
from mirage_dist.evals.judges import Judge, Opinion
from mirage_dist.evals.results import UNJUDGED, DefenceInfo
from mirage_dist.evals.rows import Settings
from mirage_dist.evals.sharing.claims import Claims
from mirage_dist.evals.sharing.files import BLOCKED, DEFENCES, Answers, Merged, Row, Writer, blocked, title
from mirage_dist.evals.worker import Generate
from mirage_dist.evals.worklist import Question
from mirage_dist.progress import EVERY_RANK, log
from mirage_dist.schema import ConfigError, EvalRecipe, RunError, TemplateConfig

BATCH = 256  # rows that a filter appends at once


@dataclass(frozen=True)
class Arm:
    """One way to answer a suite's questions. defence: None without one. recipe: of its `config.yaml`.

    template: with which the model is loaded. settings: see `rows.Settings`; they decide the keys of its rows.
    """

    folder: Path
    recipe: EvalRecipe
    settings: Settings
    template: TemplateConfig
    name: str = defences.NONE
    defence: Defence | None = None

    @property
    def guard(self) -> Judge | None:
        return None if self.defence is None else self.defence.guard

    def keyed(self, questions: Iterable[Question]) -> dict[str, Question]:
        """Questions by their keys, each as this arm sends it to the model."""
        if (own := self.defence) is None:
            return rows.keyed(questions, self.settings)
        return rows.keyed([replace(q, sent=own.sent(q.sample)) for q in questions], self.settings)


def of(recipe: EvalRecipe, suite: Path, settings: Settings, panel: Sequence[Judge]) -> list[Arm]:
    """The arms of an evaluation, the one without a defence first, then those that load the model in the same way.

    Warns of a filter whose guard is one of the panel. Raises ConfigError as `defences.read`, and when a guard's model
    does not exist.
    """
    made = [Arm(suite, recipe, settings, recipe.template)]
    for name, described in defences.read(recipe).items():
        defence = described.of(recipe)
        template = defence.template(recipe.template)
        if defence.guard is not None and template != recipe.template:
            raise _both(name)
        own = rows.defended(settings, template, defences.info(recipe, name, defence))
        alone = replace(recipe, defences={name: recipe.defences[name]})
        made.append(Arm(suite / DEFENCES / name, alone, own, template, name, defence))
        for judge in _same(panel, defence):
            log.warning(
                f"eval {recipe.suite}: defences.{name}: its guard is the judge {judge}, whose rates behind the "
                "filter are decided by its own verdicts; let another judge give the headline",
                extra=EVERY_RANK,
            )
    templates = [arm.template for arm in made]
    return sorted(made, key=lambda arm: templates.index(arm.template))


def answered(
    arm: Arm,
    first: Mapping[str, Question],
    later: Sequence[Sequence[Question]],
    size: int,
    claims: Claims,
    load: Callable[[], Generate],
    place: tuple[int, int],
) -> tuple[dict[str, Question], Answers]:
    """All questions by their keys, and the answers, as soon as every question is answered by whichever worker.

    first: the questions of the first round, by key. later: those of each further round of conversations. size: of a
    chunk. claims: this worker's, in the arm's folder. Raises as `worker.work`.
    """
    questions = dict(first)
    mixed = "endpoint" in arm.settings
    answers = worker.work(arm.folder, questions, rows.chunks(questions, size, mixed), claims, load, place)
    for turn in later:  # whose keys contain the answers to earlier turns
        earlier = {key: rows.place(question) for key, question in questions.items() if question.sample.turn}
        responses = {earlier[row["key"]]: row["response"] for row in answers.of(earlier)}
        own = arm.keyed(rows.resumed(question, responses) for question in turn)
        answers = worker.work(arm.folder, own, rows.chunks(own, size, mixed), claims, load, place)
        questions |= own
    return questions, answers


def filtered(arm: Arm, guard: Judge, questions: Mapping[str, Question], given: Sequence[Row], claims: Claims) -> Merged:
    """The rows behind a filter: those on disk, and those that this call writes.

    questions: of the arm without a defence, by key. given: its answers, in the same order. claims: this worker's in the
    arm's folder, who holds `judging`.
    Raises RunError when the guard was not reached for some answers: none of them is passed on or withheld then; and
    ConfigError for a defence that has a guard and changes the question too.
    """
    opinions = judges.judged(arm.folder / "guard", guard, Seen(given), claims)
    try:
        judges.require_verdicts(guard, opinions)
    except RunError as error:
        raise RunError(f"eval {title(arm.folder)}: its guard: {error}") from error
    if lost := [opinion for opinion in opinions if opinion.verdict == "failed" and not opinion.detail.get("final")]:
        reasons = ", ".join(f"{why} × {n}" for why, n in sorted(Counter(o.detail["reason"] for o in lost).items()))
        raise RunError(
            f"eval {title(arm.folder)}: its guard {guard.name} gave no verdict on {len(lost)} of {len(opinions)} "
            f"answers ({reasons}); every verdict so far is on disk, and the next start requests the others"
        )
    own = arm.keyed(questions.values())
    if any(question.sent != question.sample for question in own.values()):
        raise _both(arm.name)
    written, keys, batch = Answers(arm.folder).refresh(), list[str](), list[Row]()
    with Writer(arm.folder) as writer:
        for key, question, row, opinion in zip(own, own.values(), given, opinions, strict=True):
            keys.append(disk.digest({"question": key, "answer": disk.sha256_text(row["response"])}))
            if keys[-1] not in written:
                batch.append(_row(keys[-1], question, row, opinion))
            if len(batch) == BATCH:
                writer.append(batch)
                batch.clear()
        writer.append(batch)
    if undecided := sum(opinion.verdict in UNJUDGED for opinion in opinions):
        log.info(
            f"eval {title(arm.folder)}: {undecided} of {len(opinions)} answers are withheld because the guard's reply "
            "was no verdict",
            extra=EVERY_RANK,
        )
    return written.refresh().of(keys)


def _both(name: str) -> ConfigError:
    return ConfigError(
        f"defences.{name}: has a guard and changes what the model gets, and a guard reads the answers that the model "
        "gives without a defence; make two defences of it"
    )


def _row(key: str, question: Question, given: Row, opinion: Opinion) -> Row:
    row = rows.row(key, question, given["response"])
    row["filtered"] = opinion.verdict
    if blocked(given):  # before the guard could see an answer
        row["served"] = {"finish": BLOCKED}
    elif opinion.verdict == "harmful" or opinion.verdict in UNJUDGED:
        row["withheld"], row["response"] = given["response"], REFUSAL
    return row


def info(
    arm: Arm, defence: Defence, undefended: Iterable[str], given: Iterable[Row], panel: Sequence[Judge]
) -> DefenceInfo:
    """What `metrics.json` says about a defence (see `results.DefenceInfo`).

    undefended: the keys of the arm without a defence, in the order of the work list. given: the arm's rows.
    """
    made: DefenceInfo = {
        "name": arm.name,
        "kind": str(arm.recipe.defences[arm.name].get("kind")),
        "about": defence.about,
        "undefended": disk.digest(list(undefended)),
    }
    if defence.guard is not None:
        counts: dict[str, dict[str, list[int]]] = {}
        undecided = 0
        for row in given:
            cell = counts.setdefault(row["set"], {}).setdefault(row["attack"], [0, 0])
            cell[0] += "withheld" in row
            cell[1] += 1
            undecided += row.get("filtered") in UNJUDGED
        made["withheld"], made["undecided"] = counts, undecided
        made["same_judge"] = _same(panel, defence)
    return made


def _same(panel: Sequence[Judge], defence: Defence) -> list[str]:
    """The judges of the panel that are a filter's guard."""
    guard = defence.guard
    return [] if guard is None else [judge.name for judge in panel if judge.fingerprint == guard.fingerprint]
