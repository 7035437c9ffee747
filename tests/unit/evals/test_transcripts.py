"""Conversations from a file: each turn is a row that saw the model's own earlier answers, wherever a start begins.

The forms of the records, read on 2026-11-27: CoSafe's files (github ErxinYu/CoSafe-Dataset, EMNLP 2024), a line a
conversation, a list of {role, content} of user and assistant in turn, the user first and last; SafeMTData's Attack_600
(hub SafeMTData/SafeMTData) has the columns id, query_id, category, actor_name, relationship, plain_query and
multi_turn_queries, a list of texts; MHJ's harmbench_behaviors.csv (hub ScaleAI/mhj, gated) has message_0 to
message_100, each JSON with role and body, as readers of it take them. All texts here are placeholders.
"""

import csv
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from toy import Toy

from mirage_dist import config as configs
from mirage_dist import report, state
from mirage_dist.data import formats, sources
from mirage_dist.data.sample import Sample
from mirage_dist.evals import attacks, metrics, results, runner, worklist
from mirage_dist.evals.attacks.rewrites import Rewriter
from mirage_dist.evals.attacks.turns import records
from mirage_dist.evals.attacks.turns.records import Exchange
from mirage_dist.evals.metrics import Judged
from mirage_dist.evals.models.hf import HuggingFace
from mirage_dist.evals.results import AppliedAttack, Condition
from mirage_dist.schema import ConfigError, EvalRecipe


def sample(identity="a", **more):
    return Sample(identity, None, "plain ?", "", False, "", "test", **more)


def talk(*texts):
    """Messages of user and assistant in turn; None for an answer that the model gives."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts) if text is not None]


def written(path: Path, *rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path, key="id"):
    return {identity: turns for _, identity, turns in records.read(path, key)}


# -------------------------------------------------------------------------------------------------- records


def test_the_published_forms_give_the_same_turns(tmp_path):
    texts = ["q one ?", "q two ?", "q three ?"]
    queries = {"id": 7, "query_id": 70, "plain_query": "plain ?", "category": "c", "multi_turn_queries": texts}
    messages = [{"role": "user", "body": text} for text in texts]
    with (tmp_path / "mhj.csv").open("w", newline="") as file:
        sheet = csv.writer(file)
        sheet.writerow(["Source", "question_id", *(f"message_{i}" for i in range(5))])
        sheet.writerow(["s", "7", *map(json.dumps, messages), "", ""])
    numbered = [{"role": "user", "content": text, "turn": n} for n, text in enumerate(texts, start=1)]
    files = [
        (written(tmp_path / "a.jsonl", queries), "id"),
        (written(tmp_path / "b.jsonl", {"id": "7", "messages": [{"role": "user", "content": t} for t in texts]}), "id"),
        (written(tmp_path / "c.jsonl", {"id": "7", "messages": numbered}), "id"),
        (tmp_path / "mhj.csv", "question_id"),
    ]
    for file, key in files:
        assert read(file, key) == {"7": [Exchange(text, None) for text in texts]}, file
    cosafe = {"id": "7", "messages": talk("q one ?", "a one", "q two ?", "a two", "q three ?")}
    turns = [Exchange("q one ?", "a one"), Exchange("q two ?", "a two"), Exchange("q three ?", None)]
    assert read(written(tmp_path / "d.jsonl", cosafe)) == {"7": turns}
    for numbers in ([0, 1, 2, 3, 4], [1, 2, 3, 4, 5], [0, 0, 1, 1, 2], [1, 1, 2, 2, 3]):  # of messages, or of turns
        own = [{**message, "turn": n} for n, message in zip(numbers, cosafe["messages"], strict=True)]
        assert read(written(tmp_path / "e.jsonl", {"id": "7", "messages": own})) == {"7": turns}


U, A = {"role": "user", "content": "q ?"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"messages": [U]}, "field 'id' is missing"),
        ({"id": "a"}, "holds no conversation; expected the field 'messages', 'message_0'"),
        ({"id": "a", "messages": []}, "holds no conversation"),
        ({"id": "a", "messages": "q"}, "field 'messages': expected a list, got str"),
        ({"id": "a", "messages": ["q"]}, r"field 'messages\[0\]': expected an object with role and content"),
        ({"id": "a", "messages": [U, {"role": "tool", "content": "x"}]}, r"'messages\[1\]': unknown role 'tool'"),
        ({"id": "a", "messages": [{"role": "system", "content": "x"}, U]}, "unknown role 'system'.*system_prompt"),
        ({"id": "a", "messages": [A, U]}, r"'messages\[0\]': out of order: an answer before the first question"),
        ({"id": "a", "messages": [U, A, A, U]}, r"'messages\[2\]': out of order: a second answer in a row"),
        ({"id": "a", "messages": [U, A]}, r"'messages\[1\]': the last message is an answer"),
        ({"id": "a", "messages": [U, {"role": "user", "content": " "}]}, r"'messages\[1\]': expected text"),
        ({"id": "a", "messages": [U, {"role": "user"}]}, r"'messages\[1\]': expected text, got None"),
        (
            {"id": "a", "messages": [{**U, "turn": 1}, {**U, "turn": 3}]},
            r"\[1\]\.turn': out of order, or one is missing",
        ),
        (
            {"id": "a", "messages": [{**U, "turn": 2}, {**U, "turn": 1}]},
            r"\[0\]\.turn': .*got 2, expected 0 or 1",
        ),
        (
            {"id": "a", "message_0": json.dumps(U), "message_2": json.dumps(U)},
            "'message_1' is missing, and",
        ),
        ({"id": "a", "message_0": "{"}, "field 'message_0': no JSON"),
        ({"id": "a", "multi_turn_queries": ["q ?", 3]}, r"'multi_turn_queries\[1\]': expected text, got 3"),
        ({"id": "a", "multi_turn_queries": "q ?"}, "'multi_turn_queries': expected a list"),
    ],
)
def test_a_bad_conversation_is_named_by_file_record_and_field_before_weights_load(tmp_path, record, words):
    good = {"id": "b", "messages": [U]}
    file = written(tmp_path / "talks.jsonl", good, record)
    attack = attacks.make({"kind": "transcript", "path": str(file)}, "r", "k")
    with pytest.raises(ConfigError, match=rf"talks\.jsonl: record 1: .*{words}"):
        attacks.apply(attack, [sample()], "talk")


def test_a_second_conversation_of_one_id_and_one_that_is_missing_are_errors(tmp_path):
    twice = written(tmp_path / "twice.jsonl", {"id": "a", "messages": [U]}, {"id": "a", "messages": [U]})
    with pytest.raises(ConfigError, match=r"twice\.jsonl: record 1: field 'id': 'a' a second time"):
        attacks.apply(attacks.make({"kind": "transcript", "path": str(twice)}, "r", "k"), [sample()], "talk")
    other = written(tmp_path / "other.jsonl", {"id": "z", "messages": [U]})
    with pytest.raises(ConfigError, match=r"for 0 of 1 samples; min_match requires 100%.*not in the set: 1 ids"):
        attacks.apply(attacks.make({"kind": "transcript", "path": str(other)}, "r", "k"), [sample()], "talk")


TURNS = st.lists(st.tuples(st.text("abc", min_size=1), st.none() | st.text("xyz", min_size=1)), min_size=1, max_size=6)


@settings(max_examples=40)
@given(TURNS)
def test_each_answered_turn_is_a_row_with_the_turns_before_it(tmp_path_factory, turns):
    turns[-1] = turns[-1][0], None
    file = tmp_path_factory.mktemp("talk") / "t.jsonl"
    written(file, {"id": "a", "messages": talk(*[text for turn in turns for text in turn])})
    before = (("h ?", "h"),)
    attack = attacks.make({"kind": "transcript", "path": str(file)}, "r", "k")
    rows = attack(sample(history=before))
    answered = [i for i, (_, answer) in enumerate(turns) if answer is None]
    assert [row.question for row in rows] == [turns[i][0] for i in answered]
    assert attack.shots == len(rows)
    for number, (i, row) in enumerate(zip(answered, rows, strict=True), start=1):
        assert row.history == (*before, *((q, a or "") for q, a in turns[:i]))
        assert (row.turn.number, row.turn.turns) == (number, len(rows))
        assert row.turn.own == tuple(1 + j for j in answered[: number - 1])
        assert row.turn.last == (row is rows[-1])


# -------------------------------------------------------------------------------------------------- combinations


def combined(path, *parts):
    options = {"kind": "combine", "attacks": [{"kind": "transcript", "path": str(path)}, *parts]}
    return attacks.make(options, "recipe", "attacks.x", "unsafe")


def test_a_rewrite_changes_the_last_turn_only(tmp_path):
    file = written(tmp_path / "t.jsonl", {"id": "a", "messages": talk("tell one ?", None, "tell two ?")})
    rows = combined(file, {"kind": "swap", "word": "what"})(sample())
    assert [row.question for row in rows] == ["tell one ?", "what two ?"]
    assert rows[1].history == (("tell one ?", ""),)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"kind": "sampling", "draws": 2}, r"attacks\.x\.attacks\[1\]: needs the answers to earlier turns"),
        ({"kind": "suffix"}, r"attacks\[1\]: needs the answers to earlier turns"),
        (
            {"kind": "combine", "attacks": [{"kind": "swap", "word": "what"}, {"kind": "suffix"}]},
            r"attacks\[1\]: needs the answers to earlier turns",
        ),
        ({"kind": "prefix", "prefixes": ["a", "b"]}, r"attacks\[1\]: K = 2; the last turn of a conversation has one"),
    ],
)
def test_what_cannot_follow_a_conversation_is_refused(tmp_path, part, words):
    with pytest.raises(ConfigError, match=words):
        combined(tmp_path / "t.jsonl", part)
    swapped = [{"kind": "swap", "word": "what"}, {"kind": "transcript", "path": "t.jsonl"}]
    with pytest.raises(ConfigError, match=r"attacks\[1\]: takes its questions from a file.*put it first"):
        attacks.make({"kind": "combine", "attacks": swapped}, "recipe", "attacks.x")


# -------------------------------------------------------------------------------------------------- rates

TALKS = st.lists(st.lists(st.sampled_from(["harmful", "refused"]), min_size=1, max_size=4), min_size=1, max_size=12)


@given(TALKS)
def test_k_counts_the_first_k_answers_of_each_conversation_or_all_that_it_has(table):
    rows = [
        Judged("unsafe", str(i), "talk", shot, verdict, turns=len(answers))
        for i, answers in enumerate(table)
        for shot, verdict in enumerate(answers, start=1)
    ]
    attack = AppliedAttack("talk", 4, False)
    measured = metrics.measure("unsafe", rows, [attack], frozenset({"harmful", "refused", "irrelevant"}))
    for k in range(1, 5):
        leaf = measured["asr"][str(Condition("talk", k))]
        assert (leaf["k"], leaf["n"]) == (sum("harmful" in answers[:k] for answers in table), len(table))
    assert measured["asr_per_shot"]["talk_k4"]["n"] == sum(map(len, table))


# -------------------------------------------------------------------------------------------------- a whole suite


def recipe(root: Path, run: Path, model: Path, *overrides: str) -> EvalRecipe:
    set_ = {
        "kind": "unsafe",
        "sources": [{"format": "samples", "path": str(root / "asked.jsonl")}],
        "attacks": {"talk": {"kind": "transcript", "path": str(root / "talks.jsonl"), "min_match": 0.5}},
    }
    tree = {
        "suite": "s",
        "run": {"dir": str(run)},
        "model": {"path": str(model), "dtype": "fp32"},
        "sets": {"unsafe": set_},
        "generation": {"max_new_tokens": 5, "batch_size": 2},
    }
    return configs.from_tree(OmegaConf.create(tree), list(overrides), EvalRecipe, "a test")


@pytest.fixture(scope="module")
def finished(toy: Toy, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("talks")
    lines = (toy.root / "forget.jsonl").read_text().splitlines(keepends=True)[:4]
    (root / "asked.jsonl").write_text("".join(lines))
    first, second, third, _ = (json.loads(line)["id"] for line in lines)
    written(
        root / "talks.jsonl",
        {"id": first, "messages": talk("what is it ?", None, "tell the colour ?", None, "tell the code ?")},
        {"id": second, "messages": talk("tell it ?", "a fixed answer", "what is the place ?", None, "what code ?")},
        {"id": third, "messages": talk("what is it ?", "sure", "tell the code ?")},
    )
    runner.evaluate(recipe(root, root / "run", toy.root / "model"))
    return root


def answers(run: Path) -> dict[tuple, dict]:
    lines = [line for file in (run / "evals/s/rows").iterdir() for line in file.read_bytes().splitlines(keepends=True)]
    parsed = [state.parse("row", line, "") for line in lines]
    return {(row["id"], row["attack"], row["shot"]): row for row in parsed}


def test_a_turn_saw_the_models_own_answers_and_those_of_the_file(toy, finished):
    rows, options = answers(finished / "run"), recipe(finished, finished / "run", toy.root / "model")
    first, second, third, fourth = (q.sample.id for q in worklist.plan(options).questions if q.attack == "clean")
    assert {(i, shot) for i, attack, shot in rows if attack == "talk"} == {
        *((first, n) for n in (1, 2, 3)), *((second, n) for n in (1, 2)), (third, 1)
    }  # fmt: skip
    own = [rows[first, "talk", n]["response"] for n in (1, 2)]
    assert rows[first, "talk", 3]["history"] == [["what is it ?", own[0]], ["tell the colour ?", own[1]]]
    place = ["what is the place ?", rows[second, "talk", 1]["response"]]
    assert rows[second, "talk", 2]["history"] == [["tell it ?", "a fixed answer"], place]
    assert rows[third, "talk", 1]["history"] == [["what is it ?", "sure"]]
    assert (rows[third, "talk", 1]["turns"], rows[first, "talk", 1]["turns"]) == (1, 3)
    generator = HuggingFace(options.model, options.template, options.generation)
    by_id = {s.id: s for s in sources.read(formats.source("samples", str(finished / "asked.jsonl"))).samples}
    for (i, attack, _), row in rows.items():
        if attack == "talk":
            history = tuple((q, a) for q, a in row["history"])
            question = Sample(i, by_id[i].image, row["question"], "", False, "", "", history)
            assert generator.answer([question]) == [row["response"]]
    assert rows[fourth, "clean", 0]
    counted = results.read(finished / "run/evals/s")["judges"]["keyword"]["entry"]["asr"]
    assert set(counted) == {"clean", "talk_k1", "talk_k2", "talk_k3"}
    assert all(counted[f"talk_k{k}"]["n"] == 3 for k in (1, 2, 3))


def gathered(run: Path, kept: int | None = None) -> list[bytes]:
    """The lines of all workers' files in their order, of which the first `kept` stay, in one file."""
    files = sorted((run / "evals/s/rows").iterdir())
    lines = [line for file in files for line in file.read_bytes().splitlines(keepends=True)]
    files[0].write_bytes(b"".join(lines[:kept]))
    for file in files[1:]:
        file.unlink()
    return lines


@pytest.mark.parametrize("kept", [0, 5, 8, 9])
def test_a_conversation_goes_on_from_any_turn(toy, finished, tmp_path, kept, monkeypatch):
    """4 clean and 3 first answers are the first round, 2 and 1 the next ones."""
    shutil.copytree(finished / "run", tmp_path / "run")
    lines = gathered(tmp_path / "run", kept)
    assert len(lines) == 10
    (tmp_path / "run/evals/s/metrics.json").unlink()
    loads, init = [], HuggingFace.__init__
    monkeypatch.setattr(HuggingFace, "__init__", lambda *arguments: (loads.append(1), init(*arguments))[1])
    runner.evaluate(recipe(finished, tmp_path / "run", toy.root / "model", "generation.batch_size=3"))
    assert answers(tmp_path / "run") == answers(finished / "run")
    assert results.read(tmp_path / "run/evals/s") == results.read(finished / "run/evals/s")
    assert len(loads) == 1


def test_a_turn_that_followed_another_answer_is_asked_again(toy, finished, tmp_path):
    shutil.copytree(finished / "run", tmp_path / "run")
    rows = [state.parse("row", line, "") for line in gathered(tmp_path / "run")]
    (file,) = (tmp_path / "run/evals/s/rows").iterdir()
    i = next(n for n, row in enumerate(rows) if row["attack"] == "talk" and row["turns"] == 3 and row["shot"] == 1)
    rows[i] = {**{k: v for k, v in rows[i].items() if k != "seal"}, "response": "another answer"}
    file.write_text("".join(state.sealed("row", {k: v for k, v in r.items() if k != "seal"}) for r in rows))
    (tmp_path / "run/evals/s/metrics.json").unlink()
    runner.evaluate(recipe(finished, tmp_path / "run", toy.root / "model"))
    now = [state.parse("row", line, "") for line in gathered(tmp_path / "run")]
    assert len(now) == 12
    assert now[-1]["history"][0][1] == "another answer"


def test_the_report_of_conversations_counts_as_metrics_do(finished, tmp_path):
    summary = report.report({"m": finished / "run"}, tmp_path / "out")
    assert summary["models"]["m"]["asr"]["talk_k3"]["n"] == 3
    assert not summary["problems"]


def test_labels_of_later_turns_are_matched_once_the_turns_are_answered(toy, finished, tmp_path):
    shutil.copytree(finished / "run", tmp_path / "run")
    place = {"set": "unsafe", "attack": "talk", "verdict": "refused"}
    (identity,) = {row["id"] for row in answers(finished / "run").values() if row["shot"] == 3}
    labels = written(tmp_path / "labels.jsonl", *({**place, "id": identity, "shot": n} for n in (1, 2, 3)))
    measured = runner.evaluate(recipe(finished, tmp_path / "run", toy.root / "model", f"labels={labels}"))
    assert measured["labels"]["verdicts"] == {"refused": 3}
    stranger = written(tmp_path / "labels.jsonl", {**place, "id": identity, "shot": 4})
    with pytest.raises(ConfigError, match="1 of 1 labels match no row"):
        runner.evaluate(recipe(finished, tmp_path / "run", toy.root / "model", f"labels={stranger}"))


def test_rounds_of_one_start_are_no_restarts_of_a_slurm_job(toy, tmp_path, monkeypatch):
    """Five rounds, each with one answer missing at its start."""
    line = (toy.root / "forget.jsonl").read_text().splitlines(keepends=True)[0]
    (tmp_path / "asked.jsonl").write_text(line)
    turns = ["what is it ?"] * 5
    written(tmp_path / "talks.jsonl", {"id": json.loads(line)["id"], "multi_turn_queries": turns})
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    runner.evaluate(recipe(tmp_path, tmp_path / "run", toy.root / "model", "generation.max_new_tokens=1"))
    assert len(answers(tmp_path / "run")) == 6


def test_a_last_turn_may_be_a_picture(tmp_path):
    file = written(tmp_path / "t.jsonl", {"id": "a", "messages": talk("tell one ?", None, "tell two ?")})
    attack = combined(file, {"kind": "typographic", "layout": "plain"})
    rows = Rewriter(tmp_path / "suite", {}, lambda claims: None)(attack, [sample()], "x")(sample())
    assert [row.image is None for row in rows] == [True, False]
    assert (rows[1].shown, rows[1].history) == (1, (("tell one ?", ""),))
