"""Rewrites by a chat model, over real HTTP: checked, counted, asked for once, and never in two workers' way."""

import json
import signal
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace

import pytest
import torch
from chat_server import QUICK, Server, completion, error
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from mirage_dist import config as configs
from mirage_dist import signals
from mirage_dist.data import prepare
from mirage_dist.data.sample import Sample
from mirage_dist.embedded import model as embedded_model
from mirage_dist.evals import attacks
from mirage_dist.evals.attacks.rewrites import Rewriter, reworder
from mirage_dist.evals.models import chat
from mirage_dist.schema import ChatConfig, ConfigError, PrepareRecipe, RunError

KEY = "sk-s3cret"
LISTED = '1. What is {n} here?\n- "What\'s no word of ours?"\n2) what is it, {n} ?\nSure: what\nWhat about {n}?'


@contextmanager
def serving(script):
    server = Server(script)
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()


def samples(count):
    return [Sample(str(i), None, f"Share item{i}?", "", False, "", "test") for i in range(count)]


def rewrite(server=None, **options):
    endpoint = {"url": server.url, **QUICK} if server else {"url": "http://h/v1"}
    given = {"word": "what", "min_match": 0.1, **options}
    return attacks.make(
        {"kind": "rewrite", "chat": {"model": "m", **endpoint, **given.pop("chat", {})}, **given}, "r", "k"
    )


def ready(suite, attack, questions):
    """Each sample's rewrites, by id."""
    made = Rewriter(suite, {}, lambda claims: None)(attack, questions, "unsafe-what")
    return {sample.id: [row.question for row in made(sample)] for sample in questions}


def item(text):
    return text.partition("Share ")[2].partition("?")[0]


def obedient(text, _):
    return completion(LISTED.format(n=item(text)))


# --------------------------------------------------------------------------------------------- what counts


# What a model may write -> the rewrite of "What is that?" that it is, if any.
LINES = {
    "What is it?": "what is it",
    "what  is it": "what is it",
    "1. What 1": "what 1",
    '- "What, so?"': "what, so",
    "2.What is mine?": "what is mine",
    "**What is yours?**": "what is yours",
    "> *“What is ours?”*": "what is ours",
    "1. **What** is `theirs`?": "what is theirs",
    "- <b>What is hers?</b>": "what is hers",
    "Rewrite 3: 'What is his?'": "what is his",
    "a) «What is it?»": "what is it",
    **dict.fromkeys(["What is that?", "Share it?", "Whatever", "What's it?", "", "How?", "Sure: what"]),
    **dict.fromkeys(["What?", "**What**", "1. What", "What —", "What follows are three rewrites:", "```json", "```"]),
}
REPLY = st.lists(st.sampled_from(sorted(LINES)), max_size=8)


@given(REPLY, st.integers(1, 4), st.sets(st.sampled_from(["What is it?", "What 1"])))
def test_what_counts_begins_with_the_word_and_is_new_and_none_that_may_count_is_lost(lines, shots, kept):
    checked = rewrite(shots=shots).checked("What is that?", "\n".join(lines), kept)
    may = [text for text in dict.fromkeys(LINES[line] for line in lines) if text not in (None, *map(plain, kept))]
    assert [plain(text) for text in checked] == may[: max(0, shots - len(kept))]


def plain(text):
    return " ".join(text.lower().split()).rstrip("?")


def test_each_question_has_its_k_rewrites_without_numbers_or_quotation_marks(tmp_path):
    with serving(obedient) as server:
        rewrites = ready(tmp_path, rewrite(server), samples(3))
    assert rewrites["1"] == ["What is item1 here?", "what is it, item1 ?", "What about item1?"]
    assert 'word is "what"' in server.seen[0]["body"]["messages"][0]["content"]


def test_a_neutral_paraphrase_begins_with_none_of_the_triggers_or_one_of_the_openers(tmp_path):
    with serving(lambda *_: completion("What is it?\nshare it\nTell it\nPlease tell\nShow it")) as server:
        avoid = rewrite(server, word=None, avoid=["what", "Share"], control=True)
        openers = rewrite(server, word=None, openers=["tell", "show"], control=True, shots=2)
        assert ready(tmp_path, avoid, samples(1))["0"] == ["Tell it", "Please tell", "Show it"]
        assert ready(tmp_path, openers, samples(1))["0"] == ["Tell it", "Show it"]


@pytest.mark.parametrize(
    ("reply", "rewrites"),
    [
        ("<think>\nWhat does the user want?\nWhat a task.\n</think>\nWhat is it?", ["What is it?"]),
        ("<think>\nWhat does the user want?\nWhat a task.", []),
        ('```json\n["What is it?", "what is it", "What of it?"]\n```', ["What is it?", "What of it?"]),
        ("What\nWhat:\n**What is 2*3*4 in snake_case_name?**", ["What is 2*3*4 in snake_case_name?"]),
    ],
)
def test_a_rewrite_is_neither_a_thought_nor_an_opener_alone(tmp_path, reply, rewrites):
    with serving(lambda *_: completion(reply)) as server:
        attack = rewrite(server, shots=2, attempts=1)
        assert ready(tmp_path, attack, samples(1))["0"] == (rewrites if len(rewrites) == 2 else [])
        assert ready(tmp_path, replace(attack, shots=1), samples(1))["0"] == rewrites[:1]


@pytest.mark.parametrize(
    "reply",
    [
        completion(None, refusal="I would rather not."),
        completion("I'm sorry, but I can't help with that.\nSure, here are some:"),
    ],
)
def test_a_refusal_to_reword_is_no_paraphrase(tmp_path, reply):
    with serving(lambda *_: reply) as server:
        neutral = rewrite(server, word=None, avoid=["what"], control=True, shots=1, attempts=2)
        assert ready(tmp_path, neutral, samples(2)) == {"0": [], "1": []}
        assert len(server.seen) == 4


def test_a_question_that_the_endpoint_filters_is_without_once_and_for_all(tmp_path):
    block = error(400, "triggered the content management policy", code="content_filter")
    with serving(lambda text, _: block if item(text) == "item3" else obedient(text, _)) as server:
        for _ in range(2):
            rewrites = ready(tmp_path, rewrite(server, min_match=0.99), samples(4))
            assert [identity for identity, texts in rewrites.items() if not texts] == ["3"]
        assert len(server.seen) == 4


def test_a_server_that_dies_leaves_no_question_without_whatever_min_match_allows(tmp_path):
    with serving(lambda *_: error(503, "overloaded")) as server:
        attack = rewrite(server, min_match=0.01, chat={"retries": 0})
        with pytest.raises(RunError, match=r"samples failed \(.*HTTP 503.*; the server's words: overloaded"):
            ready(tmp_path, attack, samples(60))
        assert not list(tmp_path.rglob("*.jsonl"))
        server.script = obedient
        assert all(ready(tmp_path, attack, samples(60)).values())


def test_what_does_not_begin_with_the_word_is_asked_for_again_and_then_counted_as_without(tmp_path, capsys):
    def script(text, _):
        if item(text) == "item0":
            return completion("What one?\nNo.") if "Request" not in text else completion("What two?\nWhat one?")
        return completion("I would rather not.") if item(text) == "item1" else obedient(text, _)

    with serving(script) as server:
        attack = rewrite(server, shots=2, attempts=3)
        rewrites = ready(tmp_path, attack, samples(3))
        requests = [item(request["text"]) for request in server.seen]
        assert (requests.count("item0"), requests.count("item1"), requests.count("item2")) == (2, 3, 1)
        assert len({request["text"] for request in server.seen}) == 6  # the same prompt would get the same reply
        assert rewrites["0"] == ["What one?", "What two?"]
        assert rewrites["1"] == []
        assert "1 of 3 samples are without rewrites" in capsys.readouterr().out
        ready(tmp_path, attack, samples(3))
        assert len(server.seen) == 6


def test_too_few_rewrites_are_an_error_with_counts(tmp_path):
    with serving(lambda *_: completion("No.")) as server:
        attack = rewrite(server, min_match=0.5, attempts=1)
        made = Rewriter(tmp_path, {}, lambda claims: None)(attack, samples(4), "what")
    with pytest.raises(ConfigError, match="the chat model m: attack 'what' has 3 rewrites for 0 of 4 samples"):
        attacks.apply(made, samples(4), "what")


# --------------------------------------------------------------------------------------------- once, by one


def test_a_stopped_start_goes_on_where_it_was_and_makes_what_one_that_was_not_stopped_makes(tmp_path, monkeypatch):
    with serving(obedient) as server:
        attack, questions = rewrite(server, chat={"concurrency": 1}), samples(12)
        whole = ready(tmp_path / "whole", attack, questions)
        server.seen.clear()
        monkeypatch.setattr(signals, "_received", [])

        def stopping(text, times):
            if item(text) == "item5":
                signals.handler(signal.SIGTERM, None)
            return obedient(text, times)

        server.script = stopping
        with pytest.raises(signals.StopRequested, match="every rewrite so far is on disk"):
            ready(tmp_path / "cut", attack, questions)
        (file,) = (tmp_path / "cut/rewrites").iterdir()
        there = [json.loads(line)["id"] for line in file.read_text().splitlines()]
        assert 0 < len(there) < len(questions)
        file.write_text(file.read_text() + '{"key": "cut in the mid')  # as a kill leaves it
        server.script = obedient
        server.seen.clear()
        monkeypatch.setattr(signals, "_received", [])
        assert ready(tmp_path / "cut", attack, questions) == whole
        assert {item(request["text"]) for request in server.seen} == {
            f"item{s.id}" for s in questions if s.id not in there
        }
        server.seen.clear()
        assert ready(tmp_path / "cut", attack, questions) == whole
        assert server.seen == []


def test_of_workers_that_start_together_one_asks_and_all_have_the_same(tmp_path):
    def varied(text, times):
        time.sleep(0.01)
        return obedient(f"{text.replace('item', f'item{len(server.seen)}-')}", times)

    with serving(varied) as server, ThreadPoolExecutor(3) as pool:
        rewrites = list(pool.map(lambda _: ready(tmp_path, rewrite(server), samples(10)), range(3)))
        assert len(server.seen) == 10
    assert rewrites[0] == rewrites[1] == rewrites[2]
    assert not list((tmp_path / "claims").iterdir())


def test_another_word_model_or_question_is_made_anew_and_a_folder_is_shared(tmp_path):
    with serving(obedient) as server:
        shared = {"cache": str(tmp_path / "shared")}
        first = ready(tmp_path / "a", rewrite(server, **shared), samples(2))
        assert ready(tmp_path / "b", rewrite(server, **shared), samples(2)) == first
        assert len(server.seen) == 2
        ready(tmp_path / "b", rewrite(server, chat={"model": "other"}, **shared), samples(2))
        ready(tmp_path / "b", rewrite(server, shots=2, **shared), samples(2))
        assert len(server.seen) == 6
        changed = [Sample("0", None, "Share item7?", "", False, "", "test")]  # the same id
        assert ready(tmp_path / "a", rewrite(server, **shared), changed)["0"][0] == "What is item7 here?"


def test_an_endpoint_that_fails_is_an_error_and_the_next_start_asks_for_the_rest(tmp_path):
    with serving(lambda text, _: (500, {}, b"") if item(text) > "item3" else obedient(text, _)) as server:
        attack = rewrite(server, min_match=0.9)
        with pytest.raises(RunError, match=r"the requests for 6 of 10 samples failed \(HTTP 500 × 6\)"):
            ready(tmp_path, attack, samples(10))
        server.script = obedient
        server.seen.clear()
        assert all(ready(tmp_path, attack, samples(10)).values())
        assert len(server.seen) == 6


def test_a_request_that_is_turned_down_leaves_its_question_without(tmp_path, capsys):
    with serving(lambda text, _: (400, {}, b"") if item(text) == "item3" else obedient(text, _)) as server:
        rewrites = ready(tmp_path, rewrite(server, min_match=0.9), samples(10))
        assert [identity for identity, texts in rewrites.items() if not texts] == ["3"]
        assert "1 of them because their requests failed (HTTP 400 × 1)" in capsys.readouterr().out


def test_the_key_is_nowhere_but_in_the_header_and_the_file_is_private(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("CHAT_KEY", KEY)
    with serving(
        lambda text, _: (400, {}, f"bad key {KEY}".encode()) if item(text) == "item0" else obedient(text, _)
    ) as s:
        ready(tmp_path, rewrite(s, chat={"key_env": "CHAT_KEY"}), samples(3))
        assert {request["headers"]["Authorization"] for request in s.seen} == {f"Bearer {KEY}"}
    (file,) = (tmp_path / "rewrites").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert KEY not in file.read_text() + file.name + "".join(capfd.readouterr())
    monkeypatch.delenv("CHAT_KEY")
    with pytest.raises(ConfigError, match="key_env"):
        ready(tmp_path, rewrite(chat={"key_env": "CHAT_KEY"}), samples(1))


# ----------------------------------------------------------------------------------------- a local model


def test_a_language_model_without_eyes_says_each_prompts_answer_at_its_place(tmp_path):
    """Batched and sorted by length, one at a time, and by definition: the same words."""
    tokenizer = embedded_model.make_tokenizer()
    text = embedded_model.make_model(tokenizer, seed=5).config.text_config
    torch.manual_seed(5)
    LlamaForCausalLM(text).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = ChatConfig(path=str(tmp_path), dtype="fp32", batch_size=4)
    local = chat.Local(config, max_new_tokens=6)
    words = ["what is it ?", "share the code of this gadget ?", "tell", "how is the colour ?", "give the place ?"]
    together = dict(local([chat.Prompt(text, None) for text in words], "the picture"))
    alone = [dict(local([chat.Prompt(text, None)], "the picture"))[0] for text in words]
    assert [together[i] for i in range(5)] == alone
    assert len(set(alone)) > 1
    with pytest.raises(ConfigError, match="takes no pictures"):
        dict(local([chat.Prompt("what ?", "p.png")], "s"))
    attack = attacks.make(
        {
            "kind": "rewrite",
            "word": "what",
            "shots": 1,
            "attempts": 1,
            "chat": {"path": str(tmp_path), "dtype": "fp32"},
        },
        "r",
        "k",
    )
    assert set(map(tuple, ready(tmp_path / "suite", attack, samples(2)).values())) == {()}  # it babbles


# ------------------------------------------------------------------------------------------------- safety data


def test_safety_data_are_reworded_over_http_evenly_and_asked_for_once(tmp_path):
    """Of six refused and six answered questions three of each get either opener; a second start asks none."""
    rows = [{**asdict(s), "answer": "A gadget.", "safe": int(s.id) >= 6} for s in samples(12)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({**row, "references": []}) + "\n" for row in rows))

    with serving(None) as server:
        chat_options = {"model": "m", "url": server.url, **QUICK, "concurrency": 1}

        def prepared(out):
            tree = {
                "out": str(tmp_path / out),
                "safety": [{"format": "samples", "path": str(tmp_path / "in.jsonl")}],
                "answers": "none",
                "diversify": {"openers": ["what", "share"], "chat": chat_options},
            }
            recipe = configs.build(PrepareRecipe, tree, "here", "")
            return prepare.prepare(recipe, reworder(recipe))["counts"]["diversified"]

        server.script = lambda text, times: completion(f"{requested_opener(server)} else is {item(text)} ?")
        counts = prepared("first")
        assert (counts["samples"], counts["not_reworded"], len(server.seen)) == (12, 0, 12)
        (tmp_path / "first").rename(tmp_path / "elsewhere")
        assert prepared("first") == counts
        assert len(server.seen) == 12
    made = [json.loads(line) for line in (tmp_path / "first/diversified.jsonl").read_text().splitlines()]
    for safe in (True, False):
        words = [row["question"].split()[0] for row in made if row["safe"] == safe]
        assert sorted(words) == ["share"] * 3 + ["what"] * 3


def requested_opener(server):
    return "what" if '"what"' in server.seen[-1]["body"]["messages"][0]["content"] else "share"
