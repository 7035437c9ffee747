"""Run directories as an evaluation leaves them, made from given verdicts, for tests of what reads them."""

import hashlib

from mirage_dist import state
from mirage_dist.evals import metrics, results
from mirage_dist.evals.metrics import Judged
from mirage_dist.evals.results import AppliedAttack

NASTY = "</td><script>alert('x')</script><img src=http://example.invalid/a.png onerror=alert(1)> & \"quoted\""
EXACT = frozenset({"refused", "harmful", "irrelevant", "correct"})
KEYWORD = frozenset({"refused", "harmful", "answered"})
CONDITIONS = {
    "unsafe": [AppliedAttack("what", 3, False), AppliedAttack("neutral", 1, True)],
    "safe": [AppliedAttack("share", 1, False)],
}


def write_run(folder, pattern, judge="world", verdicts=EXACT, suite="demo", recipe_hash="same", rules="same"):
    """A run directory whose verdicts repeat `pattern` (set -> verdicts of its questions, in turn).

    verdicts: those that the judge can give.
    """
    rows, judged = [], []
    for kind, conditions in CONDITIONS.items():
        places = [("clean", 0), *((c.name, k) for c in conditions for k in range(1, c.shots + 1))]
        for number in range(6):
            verdict = pattern[kind][number % len(pattern[kind])]
            for attack, shot in places:
                place = {"set": kind, "id": f"{kind}{number}", "attack": attack, "shot": shot}
                texts = {
                    "question": f"{attack} q{number} {NASTY}",
                    "original_question": f"clean q{number} {NASTY}",
                    "expected": "e",
                    "response": f"response-{shot} {NASTY}",
                    "image": None,
                }
                key = hashlib.sha256(repr((folder.name, place)).encode()).hexdigest()
                rows.append({"key": key, "kind": kind, **place, "category": f"c/{number % 2}", **texts})
                judged.append(Judged(kind, f"{kind}{number}", attack, shot, verdict, f"c/{number % 2}"))
    unjudged = {"unparsed": sum(j.verdict == "unparsed" for j in judged), "failed": 0}
    by_set = {kind: [j for j in judged if j.set == kind] for kind in CONDITIONS}
    entry = {"asr": None, "rr": None, "ir": None, "utility": None, "locality": None}
    for kind, conditions in CONDITIONS.items():
        measures = metrics.measure(kind, by_set[kind], conditions, verdicts)
        entry.update((name, value) for name, value in measures.items() if name in entry)
    attacks = {k: {c.name: {"shots": c.shots, "control": c.control} for c in cs} for k, cs in CONDITIONS.items()}
    result = {
        "suite": suite,
        "seed": 3,
        "model_hash": "0" * 64,
        "recipe_hash": recipe_hash,
        "world": {"dir": str(folder.parent / "world"), "spurious": 0.95} if judge == "world" else None,
        "sets": {kind: {"kind": kind, "samples": 6, "attacks": attacks[kind]} for kind in CONDITIONS},
        "headline": judge,
        "judges": {
            judge: {
                "kind": judge,
                "about": f"the {judge} judge",
                "entry": entry,
                "sets": {kind: metrics.measure(kind, by_set[kind], c, verdicts) for kind, c in CONDITIONS.items()},
                "categories": {
                    kind: metrics.by_category(kind, by_set[kind], c, verdicts) for kind, c in CONDITIONS.items()
                },
                "verdicts": {kind: metrics.counts(by_set[kind]) for kind in CONDITIONS},
                "unjudged": unjudged,
            }
        },
    }
    base = folder / "evals" / suite
    (base / "rows").mkdir(parents=True)
    (base / "verdicts").mkdir()
    (base / "metrics.json").write_text(results.text(result))
    half = '{"key": "cut off in the midd'
    (base / "rows" / "worker-1.jsonl").write_text("".join(state.sealed("row", row) for row in rows) + half)
    lines = [{"key": r["key"], "verdict": j.verdict, "rules": rules} for r, j in zip(rows, judged, strict=True)]
    (base / "verdicts" / f"{judge}.jsonl").write_text("".join(state.sealed("verdict", line) for line in lines))
    return folder
