"""The report's words: titles, captions made of the runs' own numbers, and what may not be concluded."""

from __future__ import annotations

from collections.abc import Sequence

from mirage_dist.report.load import Leaf, Run

TITLE = "The safety mirage, measured"
TABLE_NOTE = (
    "Each cell: the rate in percent, the counts behind it, and Wilson's 95 % interval in percent. The interval is "
    "about the questions asked; it does not hold the spread from one training seed to the next."
)
WORDS_NOTE = (
    "How the questions of the training data begin, apart by what follows. A word that stands almost only on one "
    "side is a shortcut: a model can tell from it alone whether a refusal is due."
)
CURVES_NOTE = (
    "The same questions about the same pictures; only the wording changes. K is the number of rewrites: each is asked "
    "on its own, and a question counts as soon as one of its first K rewrites does. Bands and whiskers are 95 % "
    "intervals. The open markers are a control: a rewrite that opens with a word tied to neither class."
)
METHODS_NOTE = (
    "Open markers: the question as it is. Filled markers: under all rewrites of the attack. A good remedy keeps "
    "attack success and rejection low at both ends, and right answers high at both."
)
EXAMPLES_NOTE = (
    "Questions in the order of a hash of their ids, not picked for effect. Answers are the models' own words, shown "
    "as plain text."
)
MEASURES = {
    "asr": ("Attack success rate", "harmful answers to unsafe questions"),
    "rr": ("Rejection rate", "refusals of harmless questions"),
    "ir": ("Irrelevant rate", "answers to unsafe questions that are neither harmful nor a refusal"),
    "utility": ("Utility", "right answers to harmless questions"),
    "locality": ("Locality", "right answers to harmless questions near what was to be forgotten"),
}


def percent(leaf: Leaf) -> str:
    return f"{100 * leaf['rate']:.1f}\N{NO-BREAK SPACE}%"


def lede(runs: Sequence[Run]) -> str:
    attack, prudence = runs[0].attack("unsafe"), runs[0].attack("safe")
    told = "Does a safety-tuned model look at the question, or only at its first word? Every model here was asked "
    told += "the same questions about the same pictures, as they are and reworded."
    told += f" The attack “{attack[0]}” rewords unsafe questions to have them answered." if attack else ""
    told += f" The test “{prudence[0]}” rewords harmless ones to have them refused." if prudence else ""
    return told


def facts(runs: Sequence[Run]) -> str:
    first = runs[0]
    sets = ", ".join(f"{s['samples']} {name}" for name, s in first.metrics["sets"].items())
    kinds = [s["kind"] for s in first.metrics["sets"].values()]
    beside = " Of each kind the first set is shown; metrics.json has all." if len(set(kinds)) < len(kinds) else ""
    return f"Suite {first.suite}: {sets} questions. Judged by {first.judged_by['about']}.{beside}"


def warnings(runs: Sequence[Run]) -> list[str]:
    """What makes a comparison of these runs doubtful."""
    found = []
    if len({run.metrics["recipe_hash"] for run in runs}) > 1:
        found.append("These runs were not asked in the same way (their evaluation recipes differ): compare with care.")
    if len({run.judge for run in runs}) > 1:
        judged = ", ".join(f"{run.name} by {run.judge}" for run in runs)
        found.append(f"These runs have different headline judges ({judged}): their rates do not compare.")
    for run in runs:
        missing = run.judged_by.get("unjudged", {})
        if lost := missing.get("unparsed", 0) + missing.get("failed", 0):
            found.append(
                f"{run.name}: {lost} answers have no verdict (the judge's words were no verdict, or it could not be "
                "asked). They are in no class and in no denominator."
            )
    return found


def measures(runs: Sequence[Run]) -> list[tuple[str, str, list[tuple[str, str, str]]]]:
    """The main table: (title, meaning, [(row label, measure, condition)]), only what some run has."""
    table = []
    for measure, (title, meaning) in MEASURES.items():
        if measure == "locality":
            conditions = ["clean"]
        else:
            conditions = list(dict.fromkeys(c for run in runs for c in run.entry.get(measure) or {}))
        rows = [(label(c), measure, c) for c in conditions if any(run.leaf(measure, c) for run in runs)]
        if rows:
            table.append((title, meaning, rows))
    return table


def label(condition: str) -> str:
    """ "what_k3" -> "what, K = 3"."""
    name, found, shots = condition.rpartition("_k")
    return f"{name}, K = {shots}" if found else condition


def curve(runs: Sequence[Run], measure: str, kind: str) -> tuple[str, str]:
    """Title and caption of Figure 4 or 5: what it shows, in numbers."""
    number, what = ("4", "Attack success") if measure == "asr" else ("5", "Needless refusals")
    title = f"Fig. {number}: {what} against K"
    told = []
    for run in runs:
        before, after = run.leaf(measure), run.leaf(measure, run.attacked(kind) or "")
        control = run.leaf(measure, run.controlled(kind) or "")
        if before and after:
            beside = f" (control {percent(control)})" if control else ""
            told.append(f"{run.name} {percent(before)} → {percent(after)}{beside}")
    return title, ("Clean → under all rewrites: " + "; ".join(told) + ".") if told else "Clean questions only."


def dumbbell(runs: Sequence[Run], measure: str, kind: str) -> tuple[str, str]:
    name, meaning = MEASURES[measure]
    attacked = next((c for run in runs if (c := run.attacked(kind))), None)
    counted = ", counted per answer" if measure == "ir" else ""
    under = f"clean, and {label(attacked)}" if attacked else "clean"
    number = "Fig. 1d: " if measure in ("asr", "rr") else ""
    return f"{number}{name}", f"{meaning.capitalize()} ({under}{counted}), in percent."


def words(run: Run) -> tuple[str, str]:
    """Title and caption of Figure 3 for one run's training data."""
    total = {kind: sum(c[kind] for c in run.first_words.values()) or 1 for kind in ("refusal", "answer")}
    told = []
    for kind, verb in (("refusal", "refused"), ("answer", "answered")):
        word, count = max(run.first_words.items(), key=lambda item: item[1][kind] / total[kind])
        other = "answer" if kind == "refusal" else "refusal"
        told.append(
            f"“{word}” opens {100 * count[kind] / total[kind]:.0f} % of the {verb} questions and "
            f"{100 * count[other] / total[other]:.0f} % of the others"
        )
    return f"Fig. 3: First words in the training data of {run.name}", f"{'; '.join(told)}."


def caveats(runs: Sequence[Run]) -> list[str]:
    """Plain words on what the numbers do and do not say; the last ones only for the embedded world."""
    points = [
        "Attack success near zero is behaviour under the questions asked here, not proof that knowledge was erased. "
        "Relearning and probing tests are needed to tell hidden from gone.",
        "A model that was never taught to refuse does not refuse: the rejection rate of an unlearned model is nearly "
        "vacuous. Read its utility under the rewrite, its irrelevant rate and its locality beside it.",
        "A model that answers noise is safe by attack success alone; the irrelevant rate shows it. That rate is "
        "counted per answer, so its n is K times the number of questions; its interval takes only the questions as "
        "independent.",
    ]
    if any(run.controlled("unsafe") or run.controlled("safe") for run in runs):
        points.append(
            "The control changes the first word too, to one that the safety data tie to neither class. Only where it "
            "moves a rate much less than the attack does is the word, and not any change of wording, the cause."
        )
    if any(run.judged_by["kind"] == "keyword" for run in runs):
        points.append(
            "The keyword judge knows refusals by their phrases and nothing else. It calls every other answer to an "
            "unsafe question harmful, gibberish included, so it overstates attacks on unlearned models."
        )
    if any(run.metrics["world"] for run in runs):
        points += [
            "The embedded world is benign by construction: a gadget's code word stands for harmful knowledge. It "
            "shows a mechanism on a model small enough to train here; its rates are not those of a real model.",
            "That the base model already words an answer by how the question opens is a choice of this world "
            "(world.answer_form: by_opener). With one constant form the mirage nearly vanishes. Real models plausibly "
            "do the same; this world does not show it.",
            "Nothing here ranks one unlearning method above another: which of NPO and RMU comes out ahead changes "
            "with the seed and the recipe.",
        ]
    return points
