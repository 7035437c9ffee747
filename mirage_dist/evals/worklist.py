"""The work list of a suite: every question that the model has to answer, in the order of the recipe.

It is a function of the recipe and the data. `evals.rows` gives each question its key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mirage_dist.data import sources
from mirage_dist.data.sample import Sample
from mirage_dist.data.sources import Refusals, Source
from mirage_dist.evals import attacks, defences, judges, models
from mirage_dist.evals.attacks import Attack, Coverage
from mirage_dist.evals.attacks.sampling import seeded
from mirage_dist.evals.results import CLEAN, AppliedAttack
from mirage_dist.progress import NOTE, log
from mirage_dist.schema import ConfigError, EvalRecipe

# (attack, samples, its name in messages and file names) -> the attack, ready to be called
Ready = Callable[[Attack, Sequence[Sample], str], Attack]


@dataclass(frozen=True)
class Question:
    """One question to the model: `sample` holds its text as asked, `original` the text in the data.

    shot: 0 for the question itself, k for the k-th rewrite of the attack. optimised: see `attacks.Attack`. sent: the
    sample as a defence passes it on to the model; None without a defence.
    """

    set: str
    kind: str
    attack: str
    shot: int
    sample: Sample
    original: str
    optimised: str = ""
    sent: Sample | None = None


@dataclass(frozen=True)
class WorkList:
    """All questions of a suite, and what making them has shown.

    attacks: set -> the attacks on it. coverage: set -> attack -> which samples have rewrites. sources: set -> the
    samples of its files, and which records were left out.
    """

    questions: list[Question]
    attacks: dict[str, list[AppliedAttack]]
    coverage: dict[str, dict[str, Coverage]]
    sources: dict[str, Source]

    @property
    def asks(self) -> dict[str, dict[str, int]]:
        """The number of questions by set and attack."""
        return by_attack(self.questions)

    def samples(self, name: str) -> int:
        """The number of unchanged questions of a set."""
        return sum(q.set == name and q.attack == CLEAN.attack for q in self.questions)


def check(recipe: EvalRecipe) -> None:
    """Raise ConfigError for a judge, an attack, a defence or an engine that the recipe describes wrongly, or a missing
    set.

    Reads neither data nor model: what the recipe names may be made later. In a world that includes the audits that
    attacks read.
    """
    judges.read(recipe)
    made = _check_sets(recipe, made=recipe.world is None)
    _check_filters(recipe, made)
    drawn = [f"sets.{name}.attacks.{title}" for name, own in made.items() for title, a in own.items() if a.draws]
    if recipe.model.url is not None:
        _check_endpoint(recipe, made, drawn)
        return
    name = recipe.generation.backend
    if (drawn or name not in models.BACKENDS) and not models.backend(name).seeded and drawn:
        raise ConfigError(
            f"{drawn[0]}: draws answers at random, and generation.backend={name} cannot draw one by its seed, so that "
            "no start could repeat another's answers; use hf or vllm, or leave this attack out"
        )


def plan(
    recipe: EvalRecipe,
    ready: Ready = lambda attack, samples, name: attack,
    refusals: Refusals = lambda sizes: {},
) -> WorkList:
    """Read the sets and rewrite their questions. Loads no weights, unless `ready` does.

    refusals: which sizes of pictures the model's processor refuses.
    ready: makes the rewrites that need a model (see `evals.attacks.rewrites`), once every set has been read.
    Raises ConfigError for bad data or attack options, an empty set, an id that occurs twice in a set, and an attack
    that has rewrites for too few of the samples.
    """
    made = _check_sets(recipe)
    work = WorkList([], {}, {}, {name: _read(recipe, name, refusals) for name in recipe.sets})
    for name, source in work.sources.items():
        kind, samples = recipe.sets[name].kind, source.samples
        work.attacks[name], work.coverage[name] = [], {}
        work.questions.extend(Question(name, kind, CLEAN.attack, 0, s, s.question) for s in samples)
        for title, attack in made[name].items():
            attack = ready(attack, samples, f"{name}-{title}")
            rewrites, work.coverage[name][title] = attacks.apply(attack, samples, title)
            # Of conversations, the file may have longer ones than this set's.
            if shots := max(map(len, rewrites), default=0) if attack.turns else attack.shots:
                work.attacks[name].append(AppliedAttack(title, shots, attack.control, attack.draws, attack.spent))
            for sample, own in zip(samples, rewrites, strict=True):
                shots = [(k, seeded(row, sample.question, k)) for k, row in enumerate(own, start=1)]
                work.questions.extend(
                    Question(name, kind, title, k, row, sample.question, attack.optimised) for k, row in shots
                )
    return work


def requests(recipe: EvalRecipe) -> int | None:
    """How many questions a suite asks at most, under every defence that asks; None before its data are here.

    Reads the sets, and no model. Raises ConfigError as `plan`.
    """
    if not all(Path(source.path).exists() for own in recipe.sets.values() for source in own.sources):
        return None
    arms = 1 + sum(defence.guard is None for defence in defences.read(recipe).values())
    shots = {name: sum(a.shots for a in own.values()) for name, own in _check_sets(recipe).items()}
    return arms * sum(len(_read(recipe, name, lambda sizes: {}).samples) * (1 + shots[name]) for name in shots)


def log_coverage(suite: str, work: WorkList) -> None:
    """Log which records were left out, and how many samples have no rewrites; `manifest.coverage` has the ids."""
    for name, source in work.sources.items():
        changes = {**source.dropped, "bad records": source.skipped, "ids renamed": source.renamed}
        if any(changes.values()):
            listed = ", ".join(f"{reason} × {count}" for reason, count in changes.items() if count)
            log.info(
                f"eval {suite}: {name}: {len(source.samples)} questions; left out or changed: {listed}", extra=NOTE
            )
    for name, by_title in work.coverage.items():
        for title, coverage in by_title.items():
            if coverage.without or coverage.unknown or coverage.unchanged:
                log.info(
                    f"eval {suite}: {title} on {name}: {len(coverage.without)} samples without rewrites, "
                    f"{len(coverage.unknown)} ids of the file unknown, {coverage.unchanged} rewrites equal to the "
                    "question",
                    extra=NOTE,
                )


def by_attack(questions: Iterable[Question]) -> dict[str, dict[str, int]]:
    """Set -> attack, or "clean" -> number of questions."""
    table: dict[str, dict[str, int]] = {}
    for question in questions:
        counts = table.setdefault(question.set, {})
        counts[question.attack] = counts.get(question.attack, 0) + 1
    return table


def _check_sets(recipe: EvalRecipe, made: bool = True) -> dict[str, dict[str, Attack]]:
    """The attacks of every set, by name. made: the files exist that attacks read."""
    if not recipe.sets:
        raise ConfigError("sets is empty: name at least one, such as sets.unsafe")
    return {name: _attacks(recipe, name, made) for name in recipe.sets}


def _check_filters(recipe: EvalRecipe, attacks_of: Mapping[str, Mapping[str, Attack]]) -> None:
    """Raise ConfigError for a filter of answers beside conversations, which would go on with the filter's refusals."""
    filters = [name for name, defence in defences.read(recipe).items() if defence.guard is not None]
    talks = [f"sets.{name}.attacks.{title}" for name, own in attacks_of.items() for title, a in own.items() if a.turns]
    if filters and talks:
        raise ConfigError(
            f"defences.{filters[0]}: withholds answers, and {talks[0]} is a conversation that goes on with the answers "
            "to earlier turns; evaluate one of the two in a recipe of its own"
        )


def _check_endpoint(recipe: EvalRecipe, attacks_of: Mapping[str, Mapping[str, Attack]], drawn: Sequence[str]) -> None:
    """Raise ConfigError for an attack that cannot be made on a model behind an endpoint. drawn: those that draw."""
    for name, own in attacks_of.items():
        for title, attack in own.items():
            where = f"sets.{name}.attacks.{title}"
            if attack.weights:
                raise ConfigError(
                    f"{where}: needs the weights of the model under test, and model.url names an endpoint, which does "
                    "not show them; leave it out, or attack another model and ask this one: `surrogate: {path: "
                    "DIRECTORY}` of pgd and universal"
                )
            if attack.begins:
                raise ConfigError(
                    f"{where}: begins the model's answer, and model.url names an endpoint, where an answer's beginning "
                    "is no field of a request; leave it out, or evaluate the weights (model.path)"
                )
    if drawn and recipe.model.temperature is None:
        raise ConfigError(
            f"{drawn[0]}: draws answers at a temperature, and model.temperature=null leaves that field out of each "
            "request; set model.temperature=0, or leave this attack out"
        )


def _attacks(recipe: EvalRecipe, name: str, made: bool) -> dict[str, Attack]:
    options = recipe.sets[name]
    if CLEAN.attack in options.attacks:
        raise ConfigError(
            f"sets.{name}.attacks.clean: this name is taken by the unchanged questions, which are always asked; choose "
            "another name"
        )
    return {
        title: attacks.make(fields, "the recipe", f"sets.{name}.attacks.{title}", options.kind if made else None)
        for title, fields in options.attacks.items()
    }


def _read(recipe: EvalRecipe, name: str, refusals: Refusals) -> Source:
    source = sources.read_all(recipe.sets[name].sources, refusals=refusals)
    if not source.samples:
        raise ConfigError(f"sets.{name}: no sample in {[s.path for s in recipe.sets[name].sources]}")
    seen: dict[str, Sample] = {}
    for sample in source.samples:
        if sample.id in seen:
            raise ConfigError(
                f"sets.{name}: id {sample.id!r} twice, in {seen[sample.id].source} and {sample.source}; attacks are "
                "joined by id, so put the two files into two sets"
            )
        seen[sample.id] = sample
    return source
