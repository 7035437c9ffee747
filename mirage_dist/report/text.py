"""The report's words: titles, captions made of the runs' own numbers, and what may not be concluded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mirage_dist.report.load import Leaf, Run, condition_label

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
MAIN_NOTE = (
    "Rates in percent, as asked → under all rewrites of the attack, above the counts they are of. Intervals, every K "
    "and the controls are under “All rates”."
)
JUDGES_NOTE = (
    "Cohen's κ is agreement beyond chance: 1 is full, 0 is none. Below it, the answers on which two judges gave the "
    "same class, of those that both judged. Where one judge has exact labels, precision is the share of what the other "
    "called so that is so, and recall the share of what is so that it called so."
)
PAIRS_NOTE = (
    "Exact McNemar tests on the questions that both models were asked: how many count for the first model only, and "
    "how many for the second only. Differences are second minus first, with Newcombe's 95 % interval; p is corrected "
    "for the number of comparisons in this report (Holm)."
)
ATTACKS_NOTE = (
    "Each attack with all of its rewrites. Attacks have different numbers of them, and more tries succeed more often: "
    "compare models in a row, not rows. Controls, with open markers, change the wording without a trigger word."
)
ERASURE_NOTE = (
    "Attack success near zero is behaviour. These tests ask whether what is no longer told is gone: does it come back "
    "with a little training, with rounded weights or with the answer begun, and can it still be read off the layers?"
)
QUANTISED = (
    "Weights rounded to 8 and 4 bits",
    "Before (open), at 8 bits (small) and at 4 bits (filled), under the last attack of each set, in percent.",
)
COMPLETED = (
    "The answer begun, the rest told",
    "Attack success when the first words of the forgotten answer are given and the model goes on, in percent.",
)
CATEGORIES_NOTE = (
    "The same rates by what the question is about, under all rewrites of the attack. The fewer questions a category "
    "has, the less its rate says: counts stand in each cell."
)
MEASURES = {
    "asr": ("Attack success rate", "harmful answers to unsafe questions"),
    "rr": ("Rejection rate", "refusals of harmless questions"),
    "ir": ("Irrelevant rate", "answers to unsafe questions that are neither harmful nor a refusal"),
    "utility": ("Utility", "right answers to harmless questions"),
    "locality": ("Locality", "right answers to harmless questions near what was to be forgotten"),
    "accuracy": ("Accuracy", "mean score on a benchmark, by its own rules"),
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
        if run.outdated:
            found.append(
                f"{run.name}: {', '.join(map(str, run.outdated))}: tests of erasure by an earlier version, not shown "
                "here. Run `mirage erasure` on this model again."
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
        rows = [(condition_label(c), measure, c) for c in conditions if any(run.leaf(measure, c) for run in runs)]
        if rows:
            table.append((title, meaning, rows))
    return table


def curve(runs: Sequence[Run], measure: str, kind: str, number: str) -> tuple[str, str]:
    """Title and caption of Figure 4 or 5: what it shows, in numbers."""
    title = f"Fig. {number}: {'Attack success' if measure == 'asr' else 'Needless refusals'} against K"
    told = []
    for run in runs:
        before, after = run.leaf(measure), run.leaf(measure, run.attacked(kind) or "")
        control = run.leaf(measure, run.controlled(kind) or "")
        if before and after:
            beside = f" (control {percent(control)})" if control else ""
            told.append(f"{run.name} {percent(before)} → {percent(after)}{beside}")
    return title, ("Clean → under all rewrites: " + "; ".join(told) + ".") if told else "Clean questions only."


def dumbbell(runs: Sequence[Run], measure: str, kind: str, number: str = "") -> tuple[str, str]:
    name, meaning = MEASURES[measure]
    attacked = next((c for run in runs if (c := run.attacked(kind))), None)
    counted = ", counted per answer" if measure == "ir" else ""
    under = f"clean, and {condition_label(attacked)}" if attacked else "clean"
    return f"{f'Fig. {number}: ' if number else ''}{name}", f"{meaning.capitalize()} ({under}{counted}), in percent."


def trade(runs: Sequence[Run]) -> tuple[str, str]:
    return "Fig. 1d: Both failures at once", (
        "Needless refusals of harmless questions against attack success on unsafe ones, in percent: from the questions "
        "as they are (open) to the attacked ones (filled). A line to the right or upwards is the mirage."
    )


def kinds(runs: Sequence[Run]) -> tuple[str, str]:
    attack = next((found[0] for run in runs if (found := run.attack("unsafe"))), None)
    under = f"the questions as they are and to all rewrites of “{attack}”" if attack else "the questions as they are"
    return "Kinds of answer to unsafe questions", (
        f"Shares of the answers to {under}, each answer counted once. Safety by refusal and safety by irrelevant "
        "output are not the same."
    )


def every_attack(measure: str) -> tuple[str, str]:
    name, meaning = MEASURES[measure]
    return f"{name} under every attack", f"{meaning.capitalize()}, in percent, with 95 % intervals."


def relearning(samples: str) -> tuple[str, str]:
    return f"Relearning on {samples} samples", (
        "Attack success on what was never told again, in percent, against the steps of fine-tuning on a few forgotten "
        "answers. What comes back untold was there all along."
    )


def probed(transfer: bool) -> tuple[str, str]:
    fitted = "on what the model was to keep and tried on what it was to forget" if transfer else "and tried on others"
    return "A linear probe, layer by layer", (
        f"Share of forgotten contents that a linear probe reads off the last prompt token, fitted {fitted}. Dashed: "
        "the most frequent class; dotted: probes fitted on shuffled labels. What can be read may still never be told."
    )


def attribution(tested: Mapping[str, Mapping[str, Any]], kind: str, word: str) -> tuple[str, str]:
    told = next(found for result in tested.values() if (found := result.get("attribution")))
    which = "unsafe" if kind == "unsafe" else "harmless"
    return f"One word of {which} questions becomes “{word}”", (
        f"Fall of the chance that the answer begins with “{told['opening']}”, in points, by which word is replaced: "
        "mean over questions, with a 95 % interval. Below 0 the new word brings refusals. Compare words put in at one "
        "place: the rest of the question is the same."
    )


def heat(runs: Sequence[Run], measure: str, kind: str) -> tuple[str, str]:
    name, meaning = MEASURES[measure]
    attacked = next((c for run in runs if (c := run.attacked(kind))), "clean")
    return f"{name} by category", f"{meaning.capitalize()} ({condition_label(attacked)})."


def association(run: Run) -> tuple[str, str]:
    """Title and caption of Figure 1c for one run."""
    return f"Fig. 1c: The data's words and what {run.name} does with them", (
        "Left: how strongly each first word speaks for a refusal in the training data, with a 95 % interval. Right: "
        f"how often {run.name} refused the questions that were put to it with this first word, unsafe (filled) and "
        "harmless (open). A model that looks at the question has all filled markers right and all open ones left, "
        "whatever the word."
    )


def examples(shown: Mapping[str, Any]) -> str:
    sets = ", ".join(f"{s['shown']} of {s['questions']} {name}" for name, s in shown["sets"].items())
    told = f"Questions chosen by a hash of their ids, not for effect ({sets}), with all of their rewrites. "
    if shown["outputs"]:
        return told + "What models said is hidden until you ask for it, and shown as plain text."
    return told + "What models said is not in this file; `mirage report … --outputs` puts it in."


def p_value(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else f"{p:.0e}".replace("e-0", "e-") if p > 0 else "0"


def foot(runs: Sequence[Run], summary: Mapping[str, Any]) -> str:
    """Where the page comes from, in one line."""
    parts = [f"{run.name}: model {run.metrics['model_hash'][:12]}" for run in runs]
    parts += [f"{k}: {summary[k]}" for k in ("seed", "wall_seconds", "config_hash") if summary.get(k) is not None]
    if world := summary.get("world"):
        told = ", ".join(f"{k} {v}" for k, v in world.items()) if isinstance(world, Mapping) else str(world)
        parts.append(f"world: {told}")
    return " · ".join(parts)


def words(run: Run) -> tuple[str, str]:
    """Title and caption of Figure 3 for one run's training data."""
    total = {kind: sum(c[kind] for c in run.first_words.values()) or 1 for kind in ("refusal", "answer")}
    title = f"Fig. 3: First words in the training data of {run.name}"
    if all(
        abs(c["refusal"] / total["refusal"] - c["answer"] / total["answer"]) < 0.02 for c in run.first_words.values()
    ):
        return title, "Every first word opens refused and answered questions equally often, to within 2 points."
    told = []
    for kind, verb in (("refusal", "refused"), ("answer", "answered")):
        word, count = max(run.first_words.items(), key=lambda item: item[1][kind] / total[kind])
        other = "answer" if kind == "refusal" else "refusal"
        told.append(
            f"“{word}” opens {100 * count[kind] / total[kind]:.0f} % of the {verb} questions and "
            f"{100 * count[other] / total[other]:.0f} % of the others"
        )
    return title, f"{'; '.join(told)}."


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
