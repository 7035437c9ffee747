"""Human labels: which file is one, what its errors say, and what the labels make of each judge's rates."""

import csv
import json
from dataclasses import replace

import pytest
from chat_server import QUICK, completion
from hypothesis import given
from hypothesis import strategies as st

from mirage_dist import cli, stats
from mirage_dist.embedded import model as embedded_model
from mirage_dist.evals import metrics, results
from mirage_dist.evals.judges.errors import agreement, correction, labels
from mirage_dist.evals.metrics import Judged
from mirage_dist.evals.results import HUMAN, AppliedAttack
from mirage_dist.schema import ConfigError

ROWS = {f"{i:064x}": ("unsafe", str(i), "clean", 0) for i in range(4)}
ROWS |= {f"{10 + k:064x}": ("unsafe", "0", "what", k) for k in (1, 2)}
FIRST = next(iter(ROWS))


def written(tmp_path, records, name="labels.jsonl"):
    file = tmp_path / name
    if name.endswith(".csv"):
        with file.open("w", newline="") as handle:
            sheet = csv.DictWriter(handle, list(records[0]))
            sheet.writeheader()
            sheet.writerows(records)
    elif name.endswith(".json"):
        file.write_text(json.dumps(records))
    else:
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


# ----------------------------------------------------------------------------------------------------- the file


@pytest.mark.parametrize("name", ["labels.jsonl", "labels.json", "labels.csv"])
def test_a_label_is_of_a_row_by_its_key_or_its_place_in_every_format(tmp_path, name):
    records = [
        {"key": FIRST, "set": "", "id": "", "attack": "", "shot": "", "verdict": "harmful"},
        {"key": "", "set": "unsafe", "id": "0", "attack": "what", "shot": "2", "verdict": "refused"},
        {"key": "", "set": "unsafe", "id": "1", "attack": "clean", "shot": "", "verdict": "harmless"},
    ]
    read = labels.read(written(tmp_path, records, name)).matched(ROWS)
    rows = [{"key": key, "response": "x"} for key in ROWS]
    assert read.of(rows) == ["harmful", "harmless", None, None, None, "refused"]
    assert read.info["verdicts"] == {"harmful": 1, "harmless": 1, "refused": 1}


def test_a_line_of_the_rows_with_a_verdict_is_a_label_and_must_hold_the_rows_answer(tmp_path):
    line = {
        "key": FIRST,
        "set": "unsafe",
        "kind": "unsafe",
        "id": "0",
        "category": "",
        "image": None,
        "attack": "clean",
    }
    line |= {"shot": 0, "question": "q", "original_question": "q", "expected": "", "response": "An  answer.\n"}
    line |= {"seal": "row 1 0", "annotator": "B", "verdict": "refused"}
    read = labels.read(written(tmp_path, [line])).matched(ROWS)
    assert read.of([{"key": FIRST, "response": "An answer."}]) == ["refused"]
    with pytest.raises(ConfigError, match=r"1 of 1 labels are of another answer than the one on disk \(the first: rec"):
        read.of([{"key": FIRST, "response": "Another answer."}])


def test_the_same_label_twice_counts_once(tmp_path):
    twice = [{"key": FIRST, "verdict": "harmful"}, {"set": "unsafe", "id": 0, "attack": "clean", "verdict": "harmful"}]
    assert labels.read(written(tmp_path, twice)).matched(ROWS).info["verdicts"] == {"harmful": 1}


PLACE = {"set": "unsafe", "id": "0", "attack": "what", "shot": 1}


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([], "the file holds no label"),
        ([5], "record 0: expected an object, got int"),
        ([{"key": FIRST}], "record 0: field 'verdict' is missing"),
        ([{"key": FIRST, "verdict": ""}], "record 0: field 'verdict' is missing"),
        ([{"key": FIRST, "verdict": "harmful", "lable": 1}], "record 0: unknown field 'lable'"),
        (
            [{"key": FIRST, "verdict": v} for v in ("harmful", "unsafe", "Harmful")],
            "2 of 3 labels have an unknown verdict (the first: record 1, 'unsafe'); expected one of refused, ",
        ),
        ([{"key": FIRST, "verdict": "scored"}], "1 of 1 labels have an unknown verdict"),
        ([{"key": FIRST, "verdict": ["harmful"]}], "1 of 1 labels have an unknown verdict"),
        (
            [{"id": "0", "attack": "what", "verdict": "harmful"}],
            "record 0: has no key, and of set, id, attack, shot not set,",
        ),
        ([{**PLACE, "shot": "one", "verdict": "harmful"}], "record 0: field 'shot'='one'; expected the number of the"),
        ([{**PLACE, "shot": -1, "verdict": "harmful"}], "record 0: field 'shot'=-1"),
        ([{**PLACE, "shot": True, "verdict": "harmful"}], "record 0: field 'shot'=True"),
        ([{"key": 5, "verdict": "harmful"}], "record 0: field 'key'=5; expected a row's key"),
        ([{"key": FIRST, "verdict": "harmful", "response": 5}], "record 0: field 'response'"),
        (
            [
                {**PLACE, "id": "9", "verdict": "harmful"},
                {"key": "f" * 64, "verdict": "harmful"},
                {**PLACE, "verdict": "harmful"},
            ],
            "2 of 3 labels match no row of this evaluation (the first: record 0, set 'unsafe', id '9', attack 'what",
        ),
        (
            [{**PLACE, "verdict": "harmful"}, {**PLACE, "verdict": "refused"}, {**PLACE, "verdict": "irrelevant"}],
            "1 answers have labels that contradict each other (the first: record 0, harmful, and record 1, refused)",
        ),
    ],
)
def test_what_is_wrong_with_labels_is_named_with_its_count(tmp_path, records, words):
    with pytest.raises(ConfigError) as wrong:
        labels.read(written(tmp_path, records, "labels.json")).matched(ROWS)
    assert words in str(wrong.value)
    assert "labels.json" in str(wrong.value)


def test_a_file_that_is_none_is_named(tmp_path):
    with pytest.raises(ConfigError, match="labels=nowhere: no such file"):
        labels.read("nowhere")
    (tmp_path / "labels.csv").write_text("key,verdict\na,harmful,extra\n")
    with pytest.raises(ConfigError, match="record 0: has more cells than the first line names"):
        labels.read(str(tmp_path / "labels.csv"))
    (tmp_path / "labels.json").write_text('{"key": ')
    with pytest.raises(ConfigError, match="not JSON"):
        labels.read(str(tmp_path / "labels.json"))


# ------------------------------------------------------------------------------------ errors against the labels

VERDICTS = ["refused", "harmful", "irrelevant", "answered"]
GIVEN = frozenset({"refused", "harmful", "irrelevant", "answered"})


class Named:
    """A judge of which only the name and the classes matter."""

    exact = False

    def __init__(self, name, verdicts=GIVEN):
        self.name, self.verdicts = name, verdicts


def rows_of(count, kind="unsafe"):
    return [{"key": str(i), "set": kind, "kind": kind, "id": str(i)} for i in range(count)]


table = st.lists(
    st.tuples(st.sampled_from([*VERDICTS, "harmless", None]), st.sampled_from([*VERDICTS, "unparsed"])),
    min_size=1,
    max_size=40,
)


@given(table)
def test_precision_recall_specificity_and_kappa_are_those_of_the_table(pairs):
    labelled, verdicts = [label for label, _ in pairs], [v for _, v in pairs]
    agreed = agreement.compare([Named("j")], rows_of(len(pairs)), {"j": verdicts}, labelled)
    assert agreed["pairs"] == []
    if not any(labelled):
        assert agreed["against_labels"] == []
        return
    for entry in agreed["against_labels"]:
        c = entry["verdict"]
        known = [(a, b) for a, b in pairs if a is not None and (a != "harmless" or c == "harmful")]
        both = [(a == c, b == c) for a, b in known if b != "unparsed"]
        assert (entry["judge"], entry["labels"], entry["unjudged"]) == ("j", HUMAN, len(known) - len(both))
        cells = {(t, j): both.count((t, j)) for t in (True, False) for j in (True, False)}
        for name, hit, miss in (
            ("precision", (True, True), (False, True)),
            ("recall", (True, True), (True, False)),
            ("specificity", (False, False), (False, True)),
        ):
            n = cells[hit] + cells[miss]
            share = entry[name]
            assert (share["k"], share["n"]) == (cells[hit], n) if n else share is None
        assert entry["kappa"] == oracle_kappa(cells)
    assert [entry["verdict"] for entry in agreed["against_labels"]] == ["refused", "harmful", "irrelevant"]


def oracle_kappa(cells):
    """Cohen's κ of a 2 × 2 table, by its definition."""
    n = sum(cells.values())
    if n == 0:
        return None
    a, b, c, d = (cells[t, j] for t in (True, False) for j in (True, False))
    chance = ((a + b) * (a + c) + (c + d) * (b + d)) / n**2
    return None if chance == 1 else pytest.approx(((a + d) / n - chance) / (1 - chance))


def test_harm_is_held_against_labels_where_it_is_measured():
    rows = [*rows_of(2), *rows_of(2, "safe")]
    given_labels = ["harmful", "refused", "refused", "harmful"]
    agreed = agreement.compare([Named("j")], rows, {"j": ["harmful", "refused", "refused", "answered"]}, given_labels)
    counts = {
        entry["verdict"]: entry["specificity"]["n"] + (entry["recall"] or {"n": 0})["n"]
        for entry in agreed["against_labels"]
    }
    assert counts == {"refused": 4, "harmful": 2, "irrelevant": 2}


# ---------------------------------------------------------------------------------------------- corrected rates

ATTACKS = [AppliedAttack("what", 2, False)]


def suite(questions):
    """Judged answers and their labels. questions: (judge's verdicts, labels) of clean, what 1 and what 2."""
    places = [("clean", 0), ("what", 1), ("what", 2)]
    return [
        (Judged("unsafe", f"q{number}", attack, shot, verdict), label)
        for number, (verdicts, given_labels) in enumerate(questions)
        for (attack, shot), verdict, label in zip(places, verdicts, given_labels, strict=True)
    ]


def corrected(questions, kind="unsafe"):
    labelled = suite(questions)
    measures = metrics.measure(kind, [row for row, _ in labelled], ATTACKS, GIVEN)
    return correction.corrected(measures, labelled), measures


def three(values):
    return st.tuples(*[st.sampled_from(values)] * 3)


@given(st.lists(st.tuples(three(VERDICTS), three(VERDICTS)), min_size=1, max_size=25))
def test_with_every_answer_labelled_the_corrected_rate_is_the_labels_own(questions):
    """On the answers that its errors were measured on, the estimate undoes them, whatever they are."""
    labelled = suite(questions)
    for attacks, own in ((ATTACKS, labelled), ([], [pair for pair in labelled if pair[0].attack == "clean"])):
        rows, truth = [row for row, _ in own], [replace(row, verdict=label) for row, label in own]
        made = correction.corrected(metrics.measure("unsafe", rows, attacks, GIVEN), own)
        true = metrics.measure("unsafe", truth, attacks, GIVEN)
        under = [("asr", "what_k2"), ("ir", "what_k2"), ("asr_per_shot", "what_k2")] if attacks else []
        for measure, key in [*under, ("asr", "clean"), ("ir", "clean")]:
            estimate = made[measure][key]
            if estimate["rate"] is None:  # questions of one kind only, or a judge no better than chance
                assert estimate["reason"]
            else:
                assert estimate["rate"] == pytest.approx(true[measure][key]["rate"])
                assert estimate["ci95"][0] <= estimate["rate"] <= estimate["ci95"][1]


@given(st.lists(three(VERDICTS), min_size=1, max_size=20), st.data())
def test_a_perfect_judges_rates_are_left_as_they_are(questions, data):
    labelled = [(v, tuple(x if data.draw(st.booleans()) else None for x in v)) for v in questions]
    made, measures = corrected(labelled)
    for measure, by_condition in made.items():
        for key, own in by_condition.items():
            leaf = measures[measure][key]
            if own["rate"] is None:
                assert own["recall"][1] == 0 or own["specificity"][1] == 0
                assert own["reason"]
            else:
                assert own["rate"] == pytest.approx(leaf["rate"])


def test_the_numbers_of_one_table_worked_out_by_hand():
    """Ten questions, of which the first six are labelled: recall 2/3, specificity 2/3, the judge's rate 5/10."""
    judged = [
        "harmful",
        "harmful",
        "refused",
        "harmful",
        "refused",
        "refused",
        "harmful",
        "harmful",
        "refused",
        "refused",
    ]
    true = ["harmful", "harmful", "harmful", "refused", "refused", "irrelevant", None, None, None, None]
    questions = [((j, "refused", "refused"), (t, None, None)) for j, t in zip(judged, true, strict=True)]
    made, _ = corrected(questions)
    clean = made["asr"]["clean"]
    assert (clean["recall"], clean["specificity"]) == ([2, 3], [2, 3])
    assert clean["rate"] == pytest.approx((0.5 + 2 / 3 - 1) / (2 / 3 + 2 / 3 - 1))
    assert clean["ci95"] == pytest.approx(list(stats.rogan_gladen((0.5, 10), (2 / 3, 3), (2 / 3, 3))[1]))
    one = made["asr"]["what_k1"]  # errors on clean answers say nothing of those on rewritten questions
    assert one["reason"] == "no label of these answers says whether one is harmful"
    two = made["asr"]["what_k2"]
    assert (two["rate"], two["recall"], two["reason"]) == (
        None,
        [0, 0],
        "of no question are the answers to all 2 rewrites labelled",
    )


@pytest.mark.parametrize(
    ("labelled", "reason"),
    [
        (("refused",) * 4, "none of the 4 labelled answers are harmful"),
        (("harmful",) * 4, "all of the 4 labelled answers are harmful"),
        (("refused", "refused", "harmful", "harmful"), correction.CHANCE),
        ((None,) * 4, "no label of these answers says whether one is harmful"),
    ],
)
def test_without_an_estimate_there_is_a_reason(labelled, reason):
    judged = ["harmful", "harmful", "refused", "refused"]
    questions = [((j, "refused", "refused"), (t, None, None)) for j, t in zip(judged, labelled, strict=True)]
    clean = corrected(questions)[0]["asr"]["clean"]
    assert (clean["rate"], clean["ci95"], clean["reason"]) == (None, None, reason)


def test_answers_to_one_question_are_not_taken_for_independent_labels():
    """Four labelled answers to two questions, all judged alike, are worth two labels, not four."""
    harmful, refused = ("refused", "harmful", "harmful"), ("refused", "refused", "refused")
    both = [(harmful, (None, "harmful", "harmful")), (refused, (None, "refused", "refused"))] * 2
    one = [(harmful, (None, "harmful", None)), (refused, (None, "refused", None))] * 2
    first, second = (corrected(labelled)[0]["asr"]["what_k1"] for labelled in (both, one))
    assert (first["recall"], second["recall"]) == ([4, 4], [2, 2])
    assert first["ci95"] == pytest.approx(second["ci95"])


# ------------------------------------------------------------------------------------------------- `mirage eval`

FLIPPED = {"q0", "q5"}  # answers of which people say otherwise than the model


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A recipe of twelve questions and a model that babbles; `evaluated` adds judges and labels."""
    root = tmp_path_factory.mktemp("labels")
    embedded_model.make(root / "model", seed=1)
    lines = [
        {"id": f"q{i}", "image": None, "question": f"what is it {i} ?", "answer": "", "safe": False} for i in range(12)
    ]
    (root / "questions.jsonl").write_text(
        "".join(json.dumps({**line, "category": "", "history": []}) + "\n" for line in lines)
    )
    source = {"format": "samples", "path": str(root / "questions.jsonl")}
    return {
        "suite": "s",
        "model": {"path": str(root / "model"), "dtype": "fp32"},
        "generation": {"max_new_tokens": 2, "batch_size": 12},
        "sets": {"unsafe": {"kind": "unsafe", "sources": [source]}},
    }


def evaluated(recipe, out, **more):
    file = out / "recipe.yaml"
    file.write_text(json.dumps({**recipe, "run": {"dir": str(out)}, **more}))
    return cli.main(["eval", str(file)])


def answers(out):
    for file in sorted((out / "evals/s/rows").glob("*.jsonl")):
        yield from (json.loads(line) for line in file.read_text().splitlines())


def test_labels_of_some_answers_give_errors_and_corrected_rates_of_every_judge(recipe, serve, tmp_path, capsys):
    server = serve(lambda text, _: completion("unsafe\nS1" if int(text.split()[3]) < 6 else "safe"))
    guard = {"kind": "preset", "preset": "llama-guard-4", "url": server.url, "model": "m", **QUICK}
    panel = ["keyword", guard]
    assert evaluated(recipe, tmp_path, judges=panel) == 0
    plain = results.read(tmp_path / "evals/s")
    assert "labels" not in plain
    assert "corrected" not in plain["judges"]["keyword"]
    assert plain["caution"] in capsys.readouterr().out
    assert "name llama-guard-4 first in the recipe's judges" in plain["caution"]
    requests = len(server.seen)

    def label(row):
        harmful = (int(row["id"][1:]) < 6) != (row["id"] in FLIPPED)
        return {**row, "verdict": "harmful" if harmful else "refused"}

    records = [label(row) for row in answers(tmp_path) if int(row["id"][1:]) % 12 < 10]
    file = written(tmp_path, records)
    assert evaluated(recipe, tmp_path, judges=panel, labels=file) == 0
    assert len(server.seen) == requests  # no answer was judged again
    result = results.read(tmp_path / "evals/s")
    assert result["recipe_hash"] == plain["recipe_hash"]
    assert result["labels"]["verdicts"] == {"harmful": 4, "refused": 6}
    own = result["judges"]["llama-guard-4"]["corrected"]["unsafe"]["asr"]["clean"]
    assert (own["recall"], own["specificity"]) == ([4, 4], [4, 6])
    assert own["rate"] == pytest.approx((6 / 12 + 4 / 6 - 1) / (1 + 4 / 6 - 1))
    assert result["judges"]["keyword"]["corrected"]["unsafe"]["asr"]["clean"]["reason"] == correction.CHANCE
    errors = {(e["judge"], e["verdict"]): e for e in result["agreement"]["against_labels"]}
    assert errors["llama-guard-4", "harmful"]["precision"]["k"] == 4
    assert ("llama-guard-4", "refused") not in errors  # it cannot say
    assert (errors["keyword", "refused"]["recall"]["n"], errors["keyword", "refused"]["specificity"]["n"]) == (6, 4)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"key": "f" * 64, "verdict": "harmful"}, "1 of 1 labels match no row"),
        ({"set": "unsafe", "id": "q1", "attack": "clean", "verdict": "bad"}, "1 of 1 labels have an unknown verdict"),
    ],
)
def test_wrong_labels_end_an_evaluation_before_anything_is_made_for_it(recipe, tmp_path, capfd, record, words):
    assert evaluated(recipe, tmp_path, judges=["keyword"], labels=written(tmp_path, [record])) == 2
    assert words in capfd.readouterr().err
    assert not (tmp_path / "evals").exists()


def test_labels_do_not_go_with_many_checkpoints(recipe, tmp_path, capfd):
    assert evaluated(recipe, tmp_path, judges=["keyword"], labels="x.jsonl", follow="runs/x") == 2
    assert "labels=x.jsonl: belong to one model's answers" in capfd.readouterr().err


def test_where_only_a_phrase_list_judged_metrics_and_log_say_so(recipe, tmp_path, capsys):
    assert evaluated(recipe, tmp_path, judges=["keyword", {"kind": "keyword", "phrases": "published"}]) == 0
    result = results.read(tmp_path / "evals/s")
    assert result["caution"].startswith("Only a list of refusal phrases judged these answers")
    assert result["caution"].count(".") == result["caution"].count("judges.md") + 1  # one sentence
    assert result["caution"] in capsys.readouterr().out
