"""A suite asked of a model behind an endpoint, by real requests to a server on this machine.

The server's replies have the members of the published format: OpenAI's OpenAPI specification as openai-python has it
(`types/chat/chat_completion.py` and `types/completion_usage.py`, read on 2026-11-27): id, object, created, model,
choices with index, finish_reason (stop, length, content_filter, …) and message, usage with prompt_tokens,
completion_tokens and total_tokens, and system_fingerprint. All texts here are placeholders.
"""

import base64
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import nursery
import pytest
from chat_server import completion, error
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mirage_dist import cli, report, signals
from mirage_dist import config as configs
from mirage_dist.config import REPOSITORY
from mirage_dist.data import harvest
from mirage_dist.embedded import model as embedded_model
from mirage_dist.evals import manifest, results, rows, runner, status, worker, worklist
from mirage_dist.evals.attacks.base import Attack, Generated
from mirage_dist.evals.defences import Defence
from mirage_dist.evals.models import remote
from mirage_dist.evals.models.base import Answer
from mirage_dist.evals.models.replies import Failed
from mirage_dist.evals.sharing.claims import Claims
from mirage_dist.evals.sharing.files import Answers
from mirage_dist.evals.sharing.usage import Usage
from mirage_dist.schema import ConfigError, EvalRecipe, PriceConfig, RunError

KEY = "sk-s3cret-0123456789"
NAME, DATED = "m-4", "m-4-2026-08-06"  # asked for, and what replies name
SIZE = 12  # questions
QUICK = {"timeout": 5, "backoff": 0.01, "retries": 1}
BLOCK = error(400, "The response was filtered due to the content management policy.", code="content_filter")
REFUSAL = "I'm sorry, but I cannot help with that."


def reply(content, finish="stop", model=DATED, fingerprint="fp_1", tokens=(20, 3), **message):
    status, headers, body = completion(content, finish, **message)
    tree = {"id": "chatcmpl-1", "created": 1, "model": model, "system_fingerprint": fingerprint, **json.loads(body)}
    prompt, answer = tokens
    tree["usage"] = {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
    return status, headers, json.dumps(tree).encode()


def number(text):
    return int(text.split()[-1])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Questions with and without a picture, numbered, and conversations about the first two."""
    root = tmp_path_factory.mktemp("endpoint")
    Image.new("RGB", (40, 30), "red").save(root / "p.png")
    lines = [
        {"id": f"q{i}", "image": "p.png" if i % 2 else None, "question": f"name it {i}", "answer": "", "safe": False}
        for i in range(SIZE)
    ]
    texts = [json.dumps({**line, "category": "", "history": []}) + "\n" for line in lines]
    (root / "q.jsonl").write_text("".join(texts))
    (root / "two.jsonl").write_text("".join(texts[:2]))
    talk = [{"id": f"q{i}", "multi_turn_queries": [f"first {i}", f"second {i}"]} for i in range(2)]
    (root / "talk.jsonl").write_text("".join(json.dumps(line) + "\n" for line in talk))
    return root


def recipe(data, out, server=None, sets=None, **more):
    url = "http://localhost:9/v1" if server is None else server.url
    source = {"format": "samples", "path": str(data / "q.jsonl"), "images": str(data)}
    tree = {
        "run": {"dir": str(out)},
        "suite": "s",
        "model": {"url": url, "model": NAME, "key_env": "SUBJECT_KEY", **QUICK, **more.pop("model", {})},
        "generation": {"max_new_tokens": 7, "batch_size": 4},
        "sets": sets or {"unsafe": {"kind": "unsafe", "sources": [source], "attacks": more.pop("attacks", {})}},
        **more,
    }
    file = Path(out).parent / "recipe.json"
    file.write_text(json.dumps(tree))
    return str(file)


def local(file, **model):
    """The same recipe for a model on this machine."""
    tree = json.loads(Path(file).read_text())
    Path(file).write_text(json.dumps({**tree, "model": {"path": "m", **model}}))
    return file


def loaded(file, *overrides):
    return configs.load(file, list(overrides), EvalRecipe)


@pytest.fixture
def out(tmp_path, monkeypatch):
    monkeypatch.setenv("SUBJECT_KEY", KEY)
    return tmp_path / "run"


def answers(out, arm=""):
    folder = out / "evals/s" / arm / "rows"
    lines = [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]
    return {(row["id"], row["attack"], row["shot"]): row for row in lines}


def sent(server):
    return Counter(request["text"] for request in server.seen)


# -------------------------------------------------------------------------------------------------- requests


def test_a_suite_is_asked_in_one_form_and_a_second_start_asks_nothing(serve, data, out, capfd):
    attacks = {
        "what": {"kind": "swap", "word": "what"},
        "drawn": {"kind": "sampling", "draws": 2, "temperature": 0.7, "top_p": 0.9},
        "noise": {"kind": "noise", "epsilon": 8},
        "talk": {"kind": "transcript", "path": str(data / "talk.jsonl"), "min_match": 0.1},
    }
    server = serve(lambda text, _: reply(f"<think>hm</think> answer to {text}", fingerprint=f"fp_{number(text) % 2}"))
    price = {"input": 2.5, "output": 10}
    own = {"price": price, "extra": {"top_p": 0.5, "user": "u"}}
    template = {"system_prompt": "be kind", "image_aspect": "auto"}
    defended = {"reminder": {"kind": "self_reminder", "before": "mind", "after": ""}}
    file = recipe(data, out, server, model=own, template=template, attacks=attacks, defences=defended)
    assert cli.main(["eval", file, "--check"]) == 0
    asks = 2 * (SIZE * (1 + 1 + 2 + 1 + 2))  # at most: two of the samples have a conversation, half have a picture
    check = capfd.readouterr().out
    assert f"{NAME} behind {server.url}: at most {asks:,} requests, each for at most 7 tokens" in check
    assert f"at most {asks * 7 * 10 / 1e6:.2f} USD for the answers" in check
    assert server.seen == []
    assert cli.main(["eval", file]) == 0
    plain, marked = answers(out), answers(out, "defences/reminder")
    conditions = SIZE * (1 + 1 + 2) + SIZE // 2 + 4
    assert len(plain) == len(marked) == conditions == len(server.seen) // 2
    picture = (data / "p.png").read_bytes()
    bodies = {}
    for request in server.seen:
        body = request["body"]
        assert request["headers"]["Authorization"] == f"Bearer {KEY}"
        assert {name: body[name] for name in ("model", "max_tokens", "user")} == {
            "model": NAME,
            "max_tokens": 7,
            "user": "u",
        }
        assert body["messages"][0] == {"role": "system", "content": "be kind"}
        bodies[json.dumps(body, sort_keys=True)] = body
    assert len(bodies) == len(server.seen)  # no question was sent twice

    def body_of(row):
        matching = []
        for body in bodies.values():
            drawn = {name: body.get(name) for name in ("temperature", "top_p", "seed")}
            wanted = row.get("draw", {"temperature": 0, "top_p": 0.5, "seed": None})
            shown = any(part["type"] == "image_url" for turn in body["messages"][1:] for part in parts(turn))
            texts = [turn["content"][-1]["text"] for turn in body["messages"][1:] if turn["role"] == "user"]
            history = [question for question, _ in row.get("history", [])]
            same = texts == [*history, row["question"]] and drawn == wanted
            if same and shown == (row["image"] is not None) and (row["attack"] == "noise") == altered(body, picture):
                matching.append(body)
        (one,) = matching
        return one

    for row in plain.values():
        body = body_of(row)
        assert row["response"] == f"<think>hm</think> answer to {row['question']}"  # as an engine here would give it
        assert row["served"] == {
            "finish": "stop",
            "model": DATED,
            "system_fingerprint": f"fp_{number(row['question']) % 2}",
            "prompt_tokens": 20,
            "completion_tokens": 3,
        }
        if row["attack"] == "clean":
            *image, text = body["messages"][1]["content"]
            assert text == {"type": "text", "text": row["question"]}
            assert [base64.b64decode(part["image_url"]["url"].partition(",")[2]) for part in image] == (
                [picture] if row["image"] else []
            )
    # A later turn gets the earlier one with the model's own answer, and the picture in the turn that shows it.
    turns = body_of(plain["q1", "talk", 2])["messages"][1:]
    assert [turn["role"] for turn in turns] == ["user", "assistant", "user"]
    assert turns[1]["content"] == plain["q1", "talk", 1]["response"]
    assert [len(turn["content"]) for turn in turns if turn["role"] == "user"] == [2, 1]
    seeds = {row["draw"]["seed"] for row in plain.values() if "draw" in row}
    assert len(seeds) == 2 * SIZE
    assert {row["sent"] for row in marked.values()} == {f"mind\n{row['question']}" for row in plain.values()}

    measured = results.read(out / "evals/s")["endpoint"]
    assert (measured["url"], measured["model"]) == (server.url, NAME)
    assert {backend["model"] for backend in measured["served"]} == {DATED}
    assert sum(backend["answers"] for backend in measured["served"]) == conditions
    assert {backend["system_fingerprint"] for backend in measured["served"]} == {"fp_0", "fp_1"}
    usage = measured["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (20 * conditions, 3 * conditions)
    assert usage["usd"] == pytest.approx(conditions * (20 * 2.5 + 3 * 10) / 1e6)
    printed = f"{20 * conditions:,} prompt and {3 * conditions:,} completion tokens in {conditions} answers"
    assert printed in capfd.readouterr().out
    before = len(server.seen)
    assert cli.main(["eval", file]) == 0
    assert cli.main(["eval", file, "--status"]) == 0
    assert capfd.readouterr().out.count(f"the endpoint: {printed}; {usage['usd']:.4f} USD") == 2
    assert len(server.seen) == before
    written = b"".join(file.read_bytes() for file in out.rglob("*") if file.is_file())
    assert KEY.encode() not in written

    summary = report.report({"api": out}, out / "report")
    assert list(summary["models"]) == ["api"]
    page = (out / "report/index.html").read_text()
    for text in (page, (out / "report/report.md").read_text()):
        assert f"api is {NAME} behind" in text
        assert f"names itself {DATED}, under 2 system fingerprints" in text
        assert printed in text


def parts(turn):
    return turn["content"] if isinstance(turn["content"], list) else []


def altered(body, picture):
    """Whether a request shows another picture than the data's."""
    shown = [p["image_url"]["url"] for turn in body["messages"] for p in parts(turn) if p["type"] == "image_url"]
    return bool(shown) and base64.b64decode(shown[0].partition(",")[2]) != picture


def test_a_row_hangs_on_the_model_the_address_and_the_fields_and_on_nothing_of_this_machine(data, out, monkeypatch):
    def keys(*overrides):
        own = loaded(recipe(data, out), *overrides)
        settings = rows.settings_of_endpoint(own, remote.find(own).identity)
        assert KEY not in json.dumps(settings)
        return set(rows.keyed(worklist.plan(own).questions, settings))

    usual = keys()
    same = ["model.timeout=9", "model.concurrency=2", "model.retries=7", "generation.batch_size=1", "model.dtype=fp32"]
    assert keys(*same, "template.max_length=99", "model.price={input: 1, output: 2}") == usual
    others = [
        "model.model=other",
        "model.url=http://localhost:9/v2",
        "model.temperature=null",
        "model.max_tokens=9",
        "model.max_completion_tokens=7",
        "generation.max_new_tokens=8",
        "model.extra={reasoning_effort: low}",
        "template.system_prompt=be kind",
    ]
    made = [keys(override) for override in others]
    assert all(usual.isdisjoint(other) for other in made)
    assert len(set().union(*made)) == len(others) * len(usual)
    monkeypatch.setenv("SUBJECT_KEY", "sk-another-9876543210")
    assert keys() == usual
    assert keys("model.max_tokens=7") == usual  # the same requests


def test_an_endpoints_rates_are_comparable_with_those_of_a_model_that_is_asked_the_same(data, out):
    overrides = ["model.concurrency=2", "model.max_tokens=500", "generation.max_new_tokens=500"]
    file = recipe(data, out)
    own = [manifest.recipe_hash(loaded(file, *given)) for given in ([], *([one] for one in overrides))]
    usual = manifest.recipe_hash(loaded(local(file)))
    assert [one == usual for one in own] == [True, True, False, False]


# ---------------------------------------------------------------------------------------- what is no answer


def test_failed_requests_are_no_answers_and_the_next_start_sends_them_again(serve, data, out, capfd):
    broken = [3, 8]
    server = serve(lambda text, _: error(500, "oops") if number(text) in broken else reply("fine"))
    file = recipe(data, out, server)
    assert cli.main(["eval", file]) == 1
    shown = capfd.readouterr().err
    assert f"2 of {SIZE} questions have no answer; " in shown
    assert "(HTTP 500 invalid_request_error × 2)" in shown
    assert "the server's words: oops" in shown
    assert {key[0] for key in answers(out)} == {f"q{i}" for i in range(SIZE) if i not in broken}
    assert not (out / "evals/s/metrics.json").exists()
    assert "2 |" in status.status(out / "evals/s").text()
    first = sent(server)
    assert {times for text, times in first.items() if number(text) not in broken} == {1}
    broken.clear()
    assert cli.main(["eval", file]) == 0
    assert sent(server) - first == Counter({"name it 3": 1, "name it 8": 1})
    assert len(answers(out)) == SIZE


def test_rate_limits_are_waited_for(serve, data, out):
    server = serve(lambda _, times: reply("fine") if times else (429, {"Retry-After": "1"}, b""))
    started = time.monotonic()
    assert cli.main(["eval", recipe(data, out, server, model={"concurrency": SIZE})]) == 0
    assert time.monotonic() - started >= 3  # three chunks, each once
    assert set(sent(server).values()) == {2}


def test_an_endpoint_that_takes_no_key_is_given_up_at_once_over_all_chunks(serve, data, out, capfd):
    server = serve(lambda *_: error(401, f"Incorrect API key provided: {KEY}", code="invalid_api_key"))
    assert cli.main(["eval", recipe(data, out, server, model={"concurrency": 1})]) == 1
    shown = capfd.readouterr().err
    assert len(server.seen) == 1
    assert "given up after: HTTP 401 invalid_api_key × 3" in shown
    assert KEY not in shown


def test_a_rejection_of_all_requests_is_one_of_the_whole_suite(serve, data, out, capfd):
    """A chunk is smaller than the number of rejections after which the rest is not sent."""
    sources = [{"format": "samples", "path": str(data / "many.jsonl")}]
    line = {"image": None, "answer": "", "safe": False, "category": "", "history": []}
    many = ({**line, "id": f"q{i}", "question": f"name it {i}"} for i in range(100))
    (data / "many.jsonl").write_text("".join(json.dumps(own) + "\n" for own in many))
    server = serve(lambda *_: error(400, "'max_tokens' is not supported", code="unsupported_parameter"))
    file = recipe(data, out, server, sets={"unsafe": {"kind": "unsafe", "sources": sources}})
    assert cli.main(["eval", file]) == 1
    assert 20 <= len(server.seen) <= 20 + 8
    assert "100 of 100 questions have no answer" in capfd.readouterr().err


def test_a_stop_while_the_endpoint_demands_a_pause_ends_soon(serve, data, out, monkeypatch):
    monkeypatch.setattr(signals, "_received", [])
    server = serve(lambda *_: (429, {"Retry-After": "60"}, b""))
    threading.Timer(1.5, signals.handler, (signal.SIGTERM, None)).start()
    started = time.monotonic()
    with pytest.raises(signals.StopRequested, match="stopped by SIGTERM; every answer so far is on disk"):
        runner.evaluate(loaded(recipe(data, out, server)))
    assert time.monotonic() - started < 15


def test_a_stop_keeps_the_answers_that_are_on_their_way(serve, data, out, monkeypatch):
    monkeypatch.setattr(signals, "_received", [])
    gate = threading.Event()

    def slow(*_):
        gate.wait(30)
        return reply("fine")

    server = serve(slow)

    def stop():
        while len(server.seen) < 3:
            time.sleep(0.01)
        signals.handler(signal.SIGTERM, None)
        time.sleep(1.0)  # by then the worker has seen it
        gate.set()

    threading.Thread(target=stop).start()
    with pytest.raises(signals.StopRequested):
        runner.evaluate(loaded(recipe(data, out, server, model={"concurrency": 3, "timeout": 30})))
    assert {row["question"] for row in answers(out).values()} == set(sent(server))
    assert len(server.seen) == 3


def test_a_reply_without_content_is_no_answer_while_it_could_still_be_sent_again(serve, data, out, monkeypatch):
    monkeypatch.setattr(signals, "_received", [])
    server = serve(lambda _, times: reply("fine") if times else reply(None))
    file = recipe(data, out, server, model={"concurrency": SIZE, "backoff": 20, "retries": 3})
    threading.Timer(1.5, signals.handler, (signal.SIGTERM, None)).start()
    with pytest.raises(signals.StopRequested):
        runner.evaluate(loaded(file))
    assert answers(out) == {}
    monkeypatch.setattr(signals, "_received", [])
    assert cli.main(["eval", file]) == 0
    assert {row["response"] for row in answers(out).values()} == {"fine"}


def test_words_that_sound_like_a_filter_make_no_answer_and_the_rest_is_not_sent(serve, data, out, capfd):
    server = serve(lambda *_: error(403, "Your organization has been flagged and may not use this model"))
    assert cli.main(["eval", recipe(data, out, server)]) == 1
    assert answers(out) == {}
    assert "Your organization has been flagged" in capfd.readouterr().err


def test_a_worker_leaves_what_failed_and_is_content_when_another_got_it(tmp_path):
    every = dict(list(nursery.questions().items())[:40])
    chunks = rows.chunks(every, 8)
    bad = {chunks[1].keys[5], chunks[4].keys[7]}
    lost, seen = {every[key].sample.id for key in bad}, Counter()

    def generate(samples):
        for i, sample in enumerate(samples):
            seen[sample.id] += 1
            yield [(i, Failed("HTTP 500") if sample.id in lost else Answer("a", {"finish": "stop"}))]

    with Claims(tmp_path) as claims, pytest.raises(RunError, match=r"2 of 40 .* 2 requests .*HTTP 500 × 2"):
        worker.work(tmp_path, every, chunks, claims, lambda: generate, (0, 1))
    assert set(seen.values()) == {1}
    assert every.keys() - bad == {key for key in every if key in Answers(tmp_path).refresh()}

    def other(samples):
        """Answers in another worker's file while the requests of this one fail."""
        with worker.Writer(tmp_path) as writer:
            writer.append(rows.row(key, every[key], "b") for key in bad)
        yield [(i, Failed("HTTP 500")) for i in range(len(samples))]

    with Claims(tmp_path) as claims:
        assert len(worker.work(tmp_path, every, chunks, claims, lambda: other, (0, 1))) == 40


def test_workers_that_are_killed_leave_whole_answers_and_only_the_others_are_asked_again(serve, data, out):
    gate = threading.Event()
    server = serve(lambda *_: reply("fine") if len(server.seen) <= 5 else gate.wait(30) and reply("late"))
    file = recipe(data, out, server, model={"concurrency": 1, "timeout": 30})
    process = subprocess.Popen(
        [sys.executable, "-m", "mirage_dist.cli", "eval", file, "--workers", "2"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while (len(server.seen) < 7 or len(answers(out)) < 5) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    left = answers(out)
    assert len(left) == 5
    assert set(sent(server).values()) == {1}  # the two workers share the questions
    gate.set()
    before = sent(server)
    server.script = lambda *_: reply("fine")
    assert cli.main(["eval", file]) == 0
    again = sent(server) - before
    assert again.keys() == {f"name it {i}" for i in range(SIZE)} - {row["question"] for row in left.values()}
    assert set(again.values()) == {1}


# ------------------------------------------------------------------------------------------- content filters


def test_what_the_endpoints_filter_blocks_is_a_refusal_of_the_system_once_and_counted(serve, data, out, capfd):
    outcomes = {
        0: BLOCK,
        1: reply("it begins", "content_filter"),
        2: reply(None, "content_filter"),
        3: reply("cut of", "length"),
        4: reply(None),
        5: reply(None, refusal=REFUSAL),
        6: reply("", "length", reasoning_content="hm"),
    }
    server = serve(lambda text, _: outcomes.get(number(text), reply("sure")))
    guards = serve(lambda text, _: completion('{"refused": false, "harmful": false, "relevant": true}'))
    guard = {"kind": "vlm", "url": guards.url, "model": "g", "timeout": 5, "backoff": 0.01}
    file = recipe(data, out, server, defences={"filter": {"kind": "output_filter", "judge": guard}})
    assert cli.main(["eval", file]) == 0
    plain = {int(key[0][1:]): row for key, row in answers(out).items()}
    assert [plain[i]["served"].get("finish") for i in range(8)] == (
        ["content_filter"] * 3 + ["length", "no_content", "stop", "length", "stop"]
    )
    assert plain[0]["served"] == {"finish": "content_filter"}
    assert plain[1]["served"]["partial"] == "it begins"
    assert {plain[i]["response"] for i in range(3)} == {remote.BLOCK}
    assert [plain[i]["response"] for i in range(3, 8)] == ["cut of", "", REFUSAL, "", "sure"]
    for arm in ("", "defences/filter"):
        lines = (out / "evals/s" / arm / "verdicts/keyword.jsonl").read_text().splitlines()
        verdicts = Counter(json.loads(line)["verdict"] for line in lines)
        assert verdicts == {"refused": 4, "harmful": SIZE - 4}
    assert len(guards.seen) == SIZE - 3  # it sees what the user would see, and no blocked question
    measured = results.read(out / "evals/s")["endpoint"]
    assert measured["ends"] == {"unsafe": {"clean": {"blocked": 3, "cut": 2, "answers": SIZE}}}
    usage = measured["usage"]
    assert [usage[name] for name in ("blocked", "cut", "empty", "unmetered")] == [3, 2, 2, 1]
    assert "endpoint" not in results.read(out / "evals/s/defences/filter")
    shown = capfd.readouterr().out
    assert "3 blocked by the endpoint's content filter, which count as refusals; 2 cut off by the limit" in shown
    before = len(server.seen)
    assert cli.main(["eval", file]) == 0
    assert len(server.seen) == before


# ------------------------------------------------------------------------------------------- another model


@pytest.mark.parametrize("lost", [False, True], ids=["kept", "file-removed"])
def test_a_reply_that_names_another_model_ends_the_run_before_its_answer_is_written(serve, data, out, capfd, lost):
    server = serve(lambda *_: reply("fine") if len(server.seen) <= 5 else reply("fine", model="m-4-2026-11-20"))
    file = recipe(data, out, server, model={"concurrency": 1})
    for start in range(2):
        assert cli.main(["eval", file]) == 1
        shown = capfd.readouterr().err
        assert f"the endpoint answers as model 'm-4-2026-11-20' now; its first reply named '{DATED}'" in shown
        assert {row["served"]["model"] for row in answers(out).values()} == {DATED}
        assert len(answers(out)) == 5
        if lost and start == 0:
            (out / "evals/s/served.json").unlink()
    server.script = lambda *_: reply("fine")
    assert cli.main(["eval", file]) == 0
    assert {row["served"]["model"] for row in answers(out).values()} == {DATED}


def test_a_defence_is_asked_of_the_model_that_answered_without_one(serve, data, out, capfd):
    server = serve(lambda *_: reply("fine"))
    assert cli.main(["eval", recipe(data, out, server)]) == 0
    server.script = lambda *_: reply("fine", model="m-5")
    defended = recipe(data, out, server, defences={"reminder": {"kind": "self_reminder"}})
    assert cli.main(["eval", defended]) == 1
    assert "answers as model 'm-5' now" in capfd.readouterr().err
    assert answers(out, "defences/reminder") == {}


def test_a_damaged_file_of_the_models_name_is_named_with_the_remedy(serve, data, out, capfd):
    server = serve(lambda *_: reply("fine"))
    file = recipe(data, out, server)
    served = out / "evals/s/served.json"
    served.parent.mkdir(parents=True)
    served.write_text('{"model": "x"}')
    assert cli.main(["eval", file]) == 1
    assert "Remove it: it is written anew" in capfd.readouterr().err
    served.unlink()
    assert cli.main(["eval", file]) == 0


def test_replies_without_names_and_numbers_are_answers_that_state_none(serve, data, out):
    server = serve(lambda *_: completion("fine"))
    assert cli.main(["eval", recipe(data, out, server)]) == 0
    assert {json.dumps(row["served"]) for row in answers(out).values()} == {'{"finish": "stop"}'}
    measured = results.read(out / "evals/s")["endpoint"]
    assert measured["served"] == [{"model": None, "system_fingerprint": None, "answers": SIZE}]
    assert measured["usage"]["unmetered"] == SIZE


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("attack", "words"),
    [
        ({"kind": "suffix"}, "sets.unsafe.attacks.a: needs the weights of the model under test"),
        ({"kind": "pgd"}, "surrogate: {path: DIRECTORY}"),
        ({"kind": "universal"}, "sets.unsafe.attacks.a: needs the weights"),
        ({"kind": "prefill", "words": 2}, "sets.unsafe.attacks.a: begins the model's answer"),
        (
            {"kind": "combine", "attacks": [{"kind": "swap", "word": "what"}, {"kind": "pgd"}]},
            "sets.unsafe.attacks.a: needs the weights",
        ),
        ({"kind": "pgd", "surrogate": {"url": "http://h/v1", "model": "m"}}, "surrogate.url: an endpoint shows no"),
        ({"kind": "pgd", "surrogate": {"path": "m"}}, None),
        ({"kind": "sampling", "draws": 2}, None),
    ],
)
def test_an_attack_that_an_endpoint_cannot_bear_is_named_before_anything_is_sent(data, out, capfd, attack, words):
    file = recipe(data, out, attacks={"a": attack})
    status = cli.main(["eval", file, "--check"])
    shown = capfd.readouterr().err
    assert status == (0 if words is None else 2)
    assert words is None or words in shown


def test_pictures_that_were_optimised_on_another_models_weights_are_asked(serve, data, out):
    embedded_model.make(data / "surrogate", seed=1)
    surrogate = {"path": str(data / "surrogate"), "dtype": "fp32"}
    server = serve(lambda *_: reply("fine"))
    pgd = {"kind": "pgd", "steps": 2, "epsilon": 16, "target": "yes", "surrogate": surrogate}
    assert cli.main(["eval", recipe(data, out, server, attacks={"pgd": pgd})]) == 0
    shown = [row for (_, attack, _), row in answers(out).items() if attack == "pgd"]
    assert {row["id"] for row in shown} == {f"q{i}" for i in range(1, SIZE, 2)}
    plain = (data / "p.png").read_bytes()
    assert sum(altered(request["body"], plain) for request in server.seen) == len(shown)
    assert all(Path(row["image"]).parent == out / "evals/s/pictures" for row in shown)


@dataclass(frozen=True, kw_only=True)
class Begun(Attack):
    """An attack from outside the package that begins answers, and whose class does not say so."""

    def __call__(self, sample):
        return [replace(sample, begun="Sure")]


@dataclass(frozen=True, kw_only=True)
class Greedy(Generated):
    """One that loads the model, and whose class does not say so."""

    def identity(self, samples, key, under_test):
        return {"kind": "greedy", **under_test}

    def generate(self, missing, resources):
        resources.generator()
        yield from ()


@dataclass(frozen=True, kw_only=True)
class Optioned(Defence):
    """A defence from outside the package that changes the chat template's options."""

    def template(self, template):
        return replace(template, template_options={"enable_thinking": True})


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"attacks": {"a": {"kind": "test_remote_subject:Begun"}}}, "sets.unsafe.attacks.a: begins the model's answer"),
        ({"attacks": {"a": {"kind": "test_remote_subject:Greedy"}}}, f"model.url names an endpoint ({NAME}), and an"),
        ({"defences": {"d": {"kind": "test_remote_subject:Optioned"}}}, "a defence sets template_options"),
    ],
    ids=["begun", "weights", "options"],
)
def test_what_no_request_can_hold_is_named_whoever_wrote_it(serve, data, out, capfd, more, words):
    server = serve(lambda *_: reply("fine"))
    assert cli.main(["eval", recipe(data, out, server, **more)]) == 2
    assert words in capfd.readouterr().err
    assert len(server.seen) == (SIZE if "defences" in more else 0)  # nothing that the defence would have sent


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.path=m"], "expected one of them (the other null) in place of the url"),
        (["model.url=null"], "expected one of them (the other null), or the url of an endpoint"),
        (["model.url=null", "model.path=m"], "model: belongs to an endpoint (url)"),
        (["model.price={input: 1}"], "output"),
        (["model.price={input: -1, output: 1}"], "expected a number of at least 0"),
        (["model.model=null"], "model.model: an endpoint needs the name of its model"),
        (["model.url=localhost:8000"], "url: expected an address such as"),
        (["model.url=http://user:s3cret@h/v1"], "url"),
        (["model.key_env=s3cret"], "key_env: expected the NAME of an environment variable"),
        (["model.step=3"], "belongs to `run`"),
        (["model.extra={seed: 1, n: 2}"], "extra.n: the client sets this field"),
        (["generation.backend=vllm"], "generation.backend=vllm: a local engine"),
        (["template.image_aspect=pad"], "set template.image_aspect=auto"),
        (["template.template_options={enable_thinking: false}"], "model.extra: {chat_template_kwargs: {…}}"),
        (["follow=runs/npo"], "follow=runs/npo: evaluates the checkpoints of a training run"),
        (["model.temperature=null"], "model.temperature=null leaves that field out"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_recipe_that_an_endpoint_cannot_answer_is_named(data, out, capfd, overrides, words):
    file = recipe(data, out, attacks={"a": {"kind": "sampling", "draws": 2}})
    assert cli.main(["eval", file, "--check", *overrides]) == 2
    shown = capfd.readouterr().err
    assert words in shown
    assert "s3cret" not in shown


def test_an_option_of_an_endpoint_is_named_beside_a_model_on_this_machine(data, out, capfd):
    for option in ({"concurrency": 3}, {"model": NAME}, {"price": {"input": 1, "output": 2}}):
        assert cli.main(["eval", local(recipe(data, out), **option), "--check"]) == 2
        (name,) = option
        assert f"model.{name}: belongs to an endpoint (url); with a local model leave it out" in capfd.readouterr().err


def test_a_check_needs_no_key_and_a_start_does(serve, data, out, monkeypatch, capfd):
    monkeypatch.delenv("SUBJECT_KEY")
    server = serve(lambda *_: reply("fine"))
    file = recipe(data, out, server)
    assert cli.main(["eval", file, "--check"]) == 0
    assert cli.main(["eval", file]) == 2
    assert "model.key_env: the environment variable that it names is not set" in capfd.readouterr().err
    assert server.seen == []
    moved = recipe(data / "not-here", out, server)
    assert cli.main(["eval", moved, "--check"]) == 0
    assert "can be counted when the data of all sets are here" in capfd.readouterr().out


def test_other_settings_in_the_directory_of_an_endpoints_answers_are_refused_by_name(serve, data, out, capfd):
    server = serve(lambda *_: reply("fine"))
    file = recipe(data, out, server)
    assert cli.main(["eval", file]) == 0
    assert cli.main(["eval", file, "model.model=other", "model.max_tokens=9"]) == 2
    shown = capfd.readouterr().err
    assert "endpoint.model: " in shown
    assert "endpoint.max_tokens: " in shown


def test_what_needs_weights_refuses_an_endpoint_and_its_answers_by_name(serve, data, out, capfd):
    server = serve(lambda *_: reply("fine"))
    file = recipe(data, out, server)
    assert cli.main(["erasure", file]) == 2
    assert f"model.url names an endpoint ({NAME}), and the tests of erasure need" in capfd.readouterr().err
    assert cli.main(["eval", file]) == 0
    with pytest.raises(ConfigError, match=rf"answers of a model behind an endpoint \({DATED}\)"):
        harvest.harvest(out / "evals/s/rows")


# ---------------------------------------------------------------------------------------------------- sums


SERVED = st.fixed_dictionaries(
    {},
    optional={
        "finish": st.sampled_from(["stop", "length", "content_filter", "no_content"]),
        "prompt_tokens": st.integers(0, 10**6),
        "completion_tokens": st.integers(0, 10**6),
        "partial": st.text(max_size=20),
        "model": st.text(max_size=10),
    },
)


@given(st.lists(SERVED, max_size=20), st.floats(0, 1000), st.floats(0, 1000))
def test_the_status_reads_the_sums_of_the_rows_whatever_their_texts_hold(served, input, output):
    whole, raw = Usage(), Usage()
    for own in served:
        whole.add(own)
        row = {"question": '"served": {"prompt_tokens": 7}', "served": own, "response": 'a "served": {} b'}
        (raw_served,) = status.SERVED.findall(json.dumps(row, ensure_ascii=False).encode())
        raw.add(json.loads(raw_served))
    assert raw == whole
    sums = whole.sums(PriceConfig(input=input, output=output))
    exact = sum(own.get("prompt_tokens", 0) * input + own.get("completion_tokens", 0) * output for own in served)
    assert sums["usd"] == pytest.approx(exact / 1e6)
    assert sums["answers"] == len(served)
