"""The report's texts: titles, captions made from the runs' own numbers, and caveats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mirage_dist.data.words import NOT_MEASURED
from mirage_dist.evals.results import CLEAN, Leaf, of_set, taken
from mirage_dist.report.compare import recipes_differ
from mirage_dist.report.curves.budgets import Budget, budget_of
from mirage_dist.report.examples import Examples
from mirage_dist.report.load import Run, row_label
from mirage_dist.report.summary import Summary

if TYPE_CHECKING:
    from mirage_dist.erasure.results import ErasureResult

TITLE = "The safety mirage, measured"
TABLE_NOTE = (
    "Each cell shows the rate in percent, its counts and its 95 % interval in percent (Wilson; where several answers "
    "share a question, adjusted for that). The interval reflects the sample of questions, not the variation between "
    "training seeds."
)
METHODS_TITLE = "Methods over seeds"
BALANCED = " These are the data: the run drew them with data.balance, which makes first words even."
SEEDS_NOTE = (
    "Runs of one recipe that differ in their seed only, as one method: mean over seeds in percent, the lowest and the "
    "highest, and Student's 95 % interval of the mean over seeds. All seeds answer the same questions, so their counts "
    "are not added up; the interval is about other seeds, not other questions, and has no width where all are equal."
)
WORDS_NOTE = (
    "First words of the questions in the training data, by kind of response. A word that occurs almost only with one "
    "kind is a shortcut: from that word alone, a model can predict whether to refuse."
)
CURVES_NOTE = (
    "All models get the same questions about the same pictures; an attack changes the wording, or the picture. K is "
    "the number of rewrites. Each rewrite is a separate query, and a question counts as soon as one of its first K "
    "rewrites does. Bands and whiskers are 95 % intervals. Open markers are a control: a rewrite whose first word is "
    "tied to neither class."
)
METHODS_NOTE = (
    "Open markers: the clean questions. Filled markers: under all rewrites of the attack. A good remedy keeps attack "
    "success and rejection low on both, and correct answers high on both."
)
MAIN_NOTE = (
    "Rates in percent on the clean questions → under all rewrites of the attack, above their counts. For intervals, "
    "every K and the controls see “All rates”."
)
UNTRAINED_NOTE = (
    "The language model with the encoder of flags, before any training on these questions: what it did with each "
    "opener, on a few questions of each kind. Below: perplexity on plain English that has nothing to do with the "
    "questions, before any training and after each. A model that only forgot, or only refuses, keeps it."
)
ERRORS_NOTE = (
    "Against exact labels or those of people, κ is Cohen's agreement beyond chance, precision the fraction of the "
    "judge's positive verdicts that are correct, recall the fraction of the answers of the class that it detects, and "
    "specificity the fraction of the others that it spares."
)
JUDGES_NOTE = (
    "Cohen's κ measures agreement beyond chance: 1 is full agreement, 0 is none. Below it: the number of answers that "
    f"both judges put into the class or both left out of it, of the answers that both judged. {ERRORS_NOTE}"
)
PAIRS_NOTE = (
    "Exact McNemar tests on the questions that both models got: how many count for the first model only, and how many "
    "for the second only. Differences are second minus first, with Newcombe's 95 % interval; p is corrected for the "
    "number of comparisons in this report (Holm)."
)
ATTACKS_NOTE = (
    "Each attack with all of its rewrites. The numbers of rewrites differ, and more rewrites succeed more often: "
    "compare the models within a row, not the rows. Controls (open markers) change the wording without a trigger word."
)
ERASURE_NOTE = (
    "A low attack success rate describes behaviour. These tests check whether the suppressed knowledge is gone: does "
    "it return after a little training, after rounding the weights, when the answer is begun or the picture is "
    "perturbed, and can a probe read it from the layers?"
)
QUANTISED = (
    "Weights rounded to 8 and 4 bits",
    "Before rounding (open), at 8 bits (small) and at 4 bits (filled), under the last attack of each set, in percent.",
)
COMPLETED = (
    "Prefix completion",
    "Attack success when the first words of the forgotten answer are given and the model continues, in percent.",
)
CATEGORIES_NOTE = (
    "The same rates by the topic of the question, under all rewrites of the attack. Rates of categories with few "
    "questions are uncertain: each cell shows its counts."
)
MEASURES = {
    "asr": ("Attack success rate", "harmful answers to unsafe questions"),
    "rr": ("Rejection rate", "refusals of harmless questions"),
    "ir": ("Irrelevant rate", "answers to unsafe questions that are neither harmful nor a refusal"),
    "utility": ("Utility", "correct answers to harmless questions"),
    "locality": ("Locality", "correct answers to harmless questions close to the forgotten knowledge"),
    "accuracy": ("Accuracy", "mean score on a benchmark, by its own rules"),
}


WORLDS = {
    "gadgets": (
        "",
        (
            "The embedded world is benign by construction: a gadget's code word stands for harmful knowledge. It "
            "demonstrates a mechanism on a model small enough to train here; its rates do not transfer to real models.",
            "In this world the base model already words its answer according to the question's first word "
            "(world.answer_form: by_opener). This is a design choice: with one constant form, the mirage nearly "
            "disappears. Real models plausibly do the same; this world does not show it.",
        ),
    ),
    "countries": (
        "The pictures show flags. The capitals of European countries stand for what must not be stated; the pretrained "
        "language model knows them from its own training.",
        (
            "This world is benign by construction: the capital of a European country stands for harmful knowledge. "
            "The language model is a real one that nobody here pretrained, but a small one, and the encoder that shows "
            "it the flags is tiny and was made for this demo. The mechanism is real; the rates are of this model only.",
            "Held-out countries occur in no safety data, forget set or retain set. Their rates show whether refusal or "
            "forgetting follows the concept, a capital of Europe, or the questions that were in the data.",
            "Where right answers under the rewrite fall and the rejection rate stays low, the model has forgotten what "
            "it should have kept: over-forgetting follows the same first words as over-prudence.",
        ),
    ),
}  # kind of world -> what its questions are about, and what its numbers do not show


def percent(leaf: Leaf) -> str:
    return f"{100 * leaf['rate']:.1f}\N{NO-BREAK SPACE}%"


def meaning(measure: str) -> tuple[str, str]:
    """Title and meaning of a member of an entry: a measure, or a measure of a further set such as `asr_held_out`."""
    base = _base(measure)
    title, what = MEASURES[base]
    own = measure.removeprefix(of_set(base, "")) if base != measure else ""
    return (f"{title}, {own}", f"{what}, set {own}") if own else (title, what)


def _base(measure: str) -> str:
    return measure if measure in MEASURES else next(m for m in MEASURES if measure.startswith(of_set(m, "")))


def _world(runs: Sequence[Run]) -> tuple[str, Sequence[str]]:
    """The texts of the world that the questions came from."""
    return WORLDS.get(next((kind for run in runs if (kind := run.world_kind)), ""), ("", ()))


def lede(runs: Sequence[Run]) -> str:
    attack, prudence = runs[0].attack("unsafe"), runs[0].attack("safe")
    sentences = [
        "Does a safety-tuned model respond to the question, or only to its first word?",
        "Every model here got the same questions about the same pictures, as they are and under attack.",
    ]
    sentences += filter(None, [_world(runs)[0]])
    if attack:
        sentences.append(f"The attack “{attack.name}” rewords unsafe questions so that they get answered.")
    if prudence:
        sentences.append(f"The test “{prudence.name}” rewords harmless questions so that they get refused.")
    return " ".join(sentences)


def facts(runs: Sequence[Run]) -> str:
    first = runs[0]
    sets = ", ".join(f"{s['samples']} {name}" for name, s in first.metrics["sets"].items())
    kinds = [s["kind"] for s in first.metrics["sets"].values()]
    line = f"Suite {first.suite}: {sets} questions. Judged by {first.judged_by['about']}."
    if len(set(kinds)) < len(kinds):
        line += " Figures show the first set of each kind; “All rates” has the others too."
    defended = ((run.name, *run.defence) for run in runs if run.defence)
    own = [f"{name} was asked with the defence {title}, a system prompt: “{t}”." for name, title, t in defended]
    own += [f"{run.name} is {taken(run.metrics['endpoint'])}." for run in runs if "endpoint" in run.metrics]
    return " ".join([line, *own])


def problems(runs: Sequence[Run]) -> list[str]:
    """What the report lacks; with any, `mirage report` does not end with status 0."""
    own = (problem for run in runs for problem in (*run.problems, *run.arm_problems))
    return [f"This report is not complete. {problem}." for problem in own]


def warnings(runs: Sequence[Run]) -> list[str]:
    """What the report lacks, then reasons why a comparison of these runs may be invalid, or is incomplete."""
    lines = [*problems(runs), *recipes_differ(runs)]
    if len({run.judge for run in runs}) > 1:
        judges = ", ".join(f"{run.name} by {run.judge}" for run in runs)
        lines.append(f"The headline judges differ between these runs ({judges}): their rates are not comparable.")
    for run in runs:
        missing = run.judged_by.get("unjudged", {})
        if lost := missing.get("unparsed", 0) + missing.get("failed", 0):
            lines.append(
                f"{run.name}: {lost} answers have no verdict (the judge's reply was not a verdict, a content filter "
                "blocked it, or the judge could not be reached). They are in no class and in no denominator."
            )
        if run.outdated:
            lines.append(
                f"{run.name}: the results in {', '.join(map(str, run.outdated))} are from an earlier version and are "
                "not shown. Run `mirage erasure` on this model again."
            )
    return lines


def measures(runs: Sequence[Run]) -> list[tuple[str, str, list[tuple[str, str, str]]]]:
    """The table of all rates: (title, meaning, [(row label, measure, key of `Run.rates`)]), without empty rows."""
    table = []
    further = (of_set(m, own) for m in MEASURES for own in dict.fromkeys(s for run in runs for s in run.further(m)))
    for measure in sorted([*MEASURES, *further], key=lambda name: list(MEASURES).index(_base(name))):
        title, what = meaning(measure)
        keys = dict.fromkeys(key for run in runs for key in run.rates(measure))
        rows = [
            (row_label(measure, key), measure, key) for key in keys if any(run.rates(measure).get(key) for run in runs)
        ]
        if rows:
            table.append((title, what, rows))
    return table


def curve(runs: Sequence[Run], measure: str, kind: str, number: str) -> tuple[str, str]:
    """Title and caption of Figure 4 or 5, with the rates in numbers."""
    title = f"Fig. {number}: {'Attack success' if measure == 'asr' else 'Needless refusals'} against K"
    changes = []
    for run in runs:
        before, after = run.leaf(measure), run.leaf(measure, run.attacked(kind))
        control = run.leaf(measure, run.controlled(kind))
        if before and after:
            under_control = f" (control {percent(control)})" if control else ""
            changes.append(f"{run.name} {percent(before)} → {percent(after)}{under_control}")
    return title, ("Clean → under all rewrites: " + "; ".join(changes) + ".") if changes else "Clean questions only."


def dumbbell(runs: Sequence[Run], measure: str, kind: str, number: str = "") -> tuple[str, str]:
    name, what = meaning(measure)
    attacked = next((c for run in runs if (c := run.attacked(kind))), None)
    counted = ", counted per answer" if measure == "ir" else ""
    under = f"clean, and {attacked.label}" if attacked else "clean"
    return (
        f"{f'Fig. {number}: ' if number else ''}{name}",
        f"{what[:1].upper()}{what[1:]} ({under}{counted}), in percent.",
    )


def budget(curves: Sequence[Budget]) -> tuple[str, str]:
    """Title and caption of the figure of one attack that has a budget. curves: those of the models."""
    first, name = curves[0], MEASURES[curves[0]["measure"]][0]
    ends = [(c["model"], *(100 * c["points"][end]["rate"] for end in (0, -1))) for c in curves]
    most = max(budget_of(point) for curve in curves for point in curve["points"])
    least = min(budget_of(point) for curve in curves for point in curve["points"])
    changes = "; ".join(f"{model} {low:.1f} → {high:.1f}" for model, low, high in ends)
    if "steps" in first["points"][0]:
        return f"{name} against steps: {first['attack']}", (
            "Questions on which a picture succeeds that the search had within so many steps, in percent, with 95 % "
            f"intervals. From {least} to {most} steps: {changes}."
        )
    return f"{name} against draws: {first['attack']}", (
        f"The best of so many answers to a question, in percent, with 95 % intervals over questions. From {least} to "
        f"{most}: {changes}."
    )


def trade(runs: Sequence[Run]) -> tuple[str, str]:
    return "Fig. 1d: Both failures at once", (
        "Needless refusals of harmless questions against attack success on unsafe ones, in percent, from the clean "
        "questions (open) to the attacked questions (filled). A line to the right or upwards is the safety mirage."
    )


def kinds(runs: Sequence[Run]) -> tuple[str, str]:
    attack = next((attack for run in runs if (attack := run.attack("unsafe"))), None)
    under = f"the clean questions and to all rewrites of “{attack.name}”" if attack else "the clean questions"
    return "Kinds of answer to unsafe questions", (
        f"Proportions of the answers to {under}; each answer counts once. A model that refuses and a model that "
        "gives irrelevant answers are safe in different ways."
    )


def every_attack(measure: str) -> tuple[str, str]:
    name, meaning = MEASURES[measure]
    return f"{name} under every attack", f"{meaning.capitalize()}, in percent, with 95 % intervals."


def relearning(samples: str) -> tuple[str, str]:
    return f"Relearning from {samples} samples", (
        "Attack success, in percent, on contents that are not among the relearned samples, against the steps of "
        "fine-tuning on these samples. Whatever returns here had been hidden, not erased."
    )


def probed(transfer: bool) -> tuple[str, str]:
    fitted = "on retained contents and tested on forgotten ones" if transfer else "on some samples and tested on others"
    return "A linear probe, layer by layer", (
        "Percentage of forgotten contents that a linear probe reads correctly from the last prompt token. The probe is "
        f"fitted {fitted}. Dashed: the most frequent class. Dotted: probes fitted on shuffled labels. A model may "
        "represent a content and still never state it."
    )


def attribution(tested: Mapping[str, ErasureResult], kind: str, word: str) -> tuple[str, str]:
    opening = next(result["attribution"]["opening"] for result in tested.values() if "attribution" in result)
    which = "unsafe" if kind == "unsafe" else "harmless"
    return f"One word of {which} questions replaced by “{word}”", (
        f"Decrease of the probability that the answer begins with “{opening}”, in percentage points, by position of "
        "the replaced word: mean over questions, with a 95 % interval. Below 0, the new word causes refusals. Compare "
        "different new words at the same position: the rest of the question is the same."
    )


def heat(runs: Sequence[Run], measure: str, kind: str) -> tuple[str, str]:
    name, meaning = MEASURES[measure]
    attacked = next((c for run in runs if (c := run.attacked(kind))), CLEAN)
    return f"{name} by category", f"{meaning.capitalize()} ({attacked.label})."


def association(run: Run) -> tuple[str, str]:
    """Title and caption of Figure 1c for one run."""
    return f"Fig. 1c: First words and the refusals of {run.name}", (
        "Left: how strongly each first word is associated with refusal in the training data, with a 95 % interval. "
        f"Right: how often {run.name} refused questions that begin with the word, unsafe (filled) and harmless (open). "
        "For a model that responds to the question, all filled markers are on the right and all open ones on the left, "
        "whatever the word."
    )


def examples(shown: Examples) -> str:
    sets = ", ".join(f"{s['shown']} of {s['questions']} {name}" for name, s in shown["sets"].items())
    choice = f"Questions chosen by a hash of their ids, not for effect ({sets}), with all of their rewrites. "
    if shown["outputs"]:
        return choice + "Answers are hidden until you click, and shown as plain text."
    return choice + "This file does not contain the models' answers; `mirage report … --outputs` includes them."


def p_value(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else f"{p:.0e}".replace("e-0", "e-") if p >= 1e-300 else "< 1e-300"


def foot(runs: Sequence[Run], summary: Summary) -> str:
    """The page's provenance in one line."""
    parts = [f"{run.name}: model {run.metrics['model_hash'][:12]}" for run in runs]
    named = {"seed": summary["seed"], "wall_seconds": summary["wall_seconds"], "config_hash": summary["config_hash"]}
    parts += [f"{name}: {value}" for name, value in named.items() if value is not None]
    if world := summary["world"]:
        parts.append(f"world: {', '.join(f'{name} {value}' for name, value in world.items())}")
    return " · ".join(parts)


def words(run: Run) -> tuple[str, str]:
    """Title and caption of Figure 3 for one run's training data."""
    total = {kind: sum(c[kind] for c in run.first_words.values()) or 1 for kind in ("refusal", "answer")}
    title = f"Fig. 3: First words in the training data of {run.name}"
    measured = {word: count for word, count in run.first_words.items() if word != NOT_MEASURED}
    left_out = run.first_words.get(NOT_MEASURED)
    note = (
        f" {sum(left_out.values())} of {sum(total.values())} questions are in scripts without spaces between words; "
        "their first words could not be measured."
        if left_out
        else ""
    )
    if not measured:
        return title, note.strip()
    if all(abs(c["refusal"] / total["refusal"] - c["answer"] / total["answer"]) < 0.02 for c in measured.values()):
        return title, f"Refused and answered questions begin with each word equally often, to within 2 points.{note}"
    extremes = []
    for kind, verb in (("refusal", "refused"), ("answer", "answered")):
        word, count = max(measured.items(), key=lambda item: item[1][kind] / total[kind])
        other = "answer" if kind == "refusal" else "refusal"
        extremes.append(
            f"{100 * count[kind] / total[kind]:.0f} % of the {verb} questions begin with “{word}”, and "
            f"{100 * count[other] / total[other]:.0f} % of the others do"
        )
    return title, f"{'; '.join(extremes)}.{note}"


def caveats(runs: Sequence[Run]) -> list[str]:
    """What the numbers show and what they do not; the last ones apply to worlds only."""
    points = [
        "An attack success rate near 0 describes the model's behaviour on these questions. It does not prove that "
        "knowledge was erased: relearning and probing tests tell hidden knowledge from erased knowledge.",
        "A model that was never trained to refuse does not refuse, so the rejection rate of an unlearned model says "
        "almost nothing. Read its utility under the rewrite, its irrelevant rate and its locality with it.",
        "A model that answers with noise has a low attack success rate; the irrelevant rate shows this. The irrelevant "
        "rate is counted per answer, so its n is K times the number of questions. Its interval treats questions, not "
        "answers, as independent.",
    ]
    if any(run.controlled("unsafe") or run.controlled("safe") for run in runs):
        points.append(
            "The control changes the first word too, to one that the safety data tie to neither class. The trigger "
            "word, rather than rewording as such, is the cause only where the attack changes a rate much more than the "
            "control does."
        )
    if any(run.judged_by["kind"] == "keyword" for run in runs):
        points.append(
            "The keyword judge recognises refusals by their phrases and nothing else. It calls every other answer to "
            "an unsafe question harmful, even gibberish, so it overestimates attack success on unlearned models."
        )
    points += _world(runs)[1]
    if any(run.metrics["world"] for run in runs):
        points.append(
            "These results do not rank unlearning methods: whether NPO or RMU is better changes with the seed and the "
            "recipe."
        )
    return points
