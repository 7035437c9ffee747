"""A judge over HTTP, against a real server that times out, breaks, limits, filters, hangs up and talks rubbish."""

import base64
import json
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from itertools import pairwise

import pytest
from chat_server import completion, error, rows
from PIL import Image

from mirage_dist import signals
from mirage_dist.evals import judges
from mirage_dist.evals.judges import cache
from mirage_dist.evals.models import endpoint
from mirage_dist.evals.models.endpoint import Endpoint, Request
from mirage_dist.evals.models.replies import Failed
from mirage_dist.schema import ChatConfig, ConfigError

KEY = "sk-s3cret"
GOOD = json.dumps({"refused": True, "harmful": False, "relevant": True})


def ask(config, texts=("q",), image=None):
    outcomes = Endpoint(config, max_new_tokens=64, json_mode=True).ask_all(
        [Request("be strict", t, image) for t in texts]
    )
    return {i: (None, reply.reason) if isinstance(reply, Failed) else (reply, "") for i, reply in outcomes}


def test_what_is_sent_is_the_chat_format_with_the_picture_and_the_key(serve, monkeypatch, tmp_path):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    Image.new("RGB", (3, 2), "red").save(tmp_path / "p.jpg", "PNG")  # the media type is that of the bytes
    server = serve(lambda *_: completion("hello"))
    assert ask(server.config(key_env="JUDGE_KEY"), ["what?"], str(tmp_path / "p.jpg")) == {0: ("hello", "")}
    (request,) = server.seen
    assert request["path"] == "/v1/chat/completions"
    assert request["headers"]["Authorization"] == f"Bearer {KEY}"
    body = request["body"]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0, 64)
    assert body["response_format"] == {"type": "json_object"}
    assert body["messages"][0] == {"role": "system", "content": "be strict"}
    picture, text = body["messages"][1]["content"]
    kind, _, data = picture["image_url"]["url"].partition(",")
    assert (kind, base64.b64decode(data)) == ("data:image/png;base64", (tmp_path / "p.jpg").read_bytes())
    assert text == {"type": "text", "text": "what?"}


def test_without_a_key_none_is_sent_and_json_is_not_forced(serve):
    server = serve(lambda *_: completion("x"))
    list(Endpoint(server.config(), 64, json_mode=False).ask_all([Request("s", "t", None)]))
    assert "Authorization" not in server.seen[0]["headers"]
    assert "response_format" not in server.seen[0]["body"]


@pytest.mark.parametrize(
    "broken",
    [
        (429, {}, b""),
        (500, {}, b"oops"),
        (503, {}, b""),
        (200, {}, b"rubbish"),
        (200, {}, b"\xff\xfe"),
        (200, {}, b"[]"),
        (200, {}, b'{"choices": []}'),
        (200, {}, b'{"choices": [{"message": {"content": null}}]}'),
        (200, {}, b"[" * 100_000),
    ],
    ids=lambda answer: f"{answer[0]}-{answer[2][:12]!r}",
)
def test_what_may_pass_is_tried_again_and_then_failed(serve, broken):
    server = serve(lambda text, times: completion("fine") if text == "heals" and times == 2 else broken)
    outcomes = ask(server.config(), ["heals", "stays broken"])
    assert outcomes[0] == ("fine", "")
    assert outcomes[1][0] is None
    assert outcomes[1][1] in (f"HTTP {broken[0]}", "not a chat completion", "no content")
    assert sum(request["text"] == "stays broken" for request in server.seen) == 3


def test_a_server_that_says_nothing_or_drips_times_out(serve):
    def drip():
        for _ in range(100):
            yield b" "
            time.sleep(0.05)

    server = serve(lambda text, _: None if text == "mute" else (200, {}, drip()))
    started = time.monotonic()
    assert ask(server.config(timeout=0.3, retries=1), ["mute", "drip"]) == {
        0: (None, "timed out"),
        1: (None, "timed out"),
    }
    assert len(server.seen) == 4
    assert time.monotonic() - started < 4


def test_nobody_there_is_a_failure_too(serve):
    server = serve(lambda *_: completion("x"))
    server.shutdown()
    server.server_close()
    assert ask(server.config(retries=1)) == {0: (None, "connection failed")}


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_honoured(serve, form):
    wait = "1" if form == "seconds" else None

    def script(_, times):
        return (
            completion("ok") if times else (429, {"Retry-After": wait or formatdate(time.time() + 2, usegmt=True)}, b"")
        )

    server = serve(script)
    assert ask(server.config()) == {0: ("ok", "")}
    assert server.seen[1]["time"] - server.seen[0]["time"] >= 0.9  # dates are in whole seconds


def test_waits_double(serve):
    server = serve(lambda *_: (500, {}, b""))
    ask(server.config(backoff=0.1, retries=3))
    times = [request["time"] for request in server.seen]
    waits = [b - a for a, b in pairwise(times)]
    assert [0.75 * 0.1 * 2**i <= wait for i, wait in enumerate(waits)] == [True] * 3


def test_a_bad_request_is_not_repeated_and_the_rest_goes_on(serve):
    server = serve(lambda text, _: (400, {}, b"") if text == "bad" else completion("ok"))
    assert ask(server.config(), ["bad", "good"]) == {0: (None, "HTTP 400"), 1: ("ok", "")}
    assert len(server.seen) == 2


def test_a_refused_key_ends_it_at_once(serve):
    server = serve(lambda *_: (401, {}, b""))
    outcomes = ask(server.config(concurrency=1), [str(i) for i in range(50)])
    assert len(server.seen) == 1
    assert {text for text, _ in outcomes.values()} == {None}
    assert sorted({reason for _, reason in outcomes.values()}) == ["HTTP 401", "given up after: HTTP 401"]


def test_a_dead_endpoint_is_given_up_and_a_live_one_is_retried(serve):
    alive = []
    server = serve(lambda *_: completion("ok") if alive else (500, {}, b""))
    client = Endpoint(server.config(concurrency=2, retries=0), 64, True)
    requests = [Request("s", str(i), None) for i in range(200)]
    assert all(isinstance(reply, Failed) for _, reply in client.ask_all(requests))
    assert endpoint.GIVE_UP <= len(server.seen) <= endpoint.GIVE_UP + 70  # some were under way
    alive.append(True)
    assert {reply for _, reply in client.ask_all(requests)} == {"ok"}


BLOCK = error(400, "The prompt triggered the content management policy.", code="content_filter")


@pytest.mark.parametrize("block", [BLOCK, (403, *BLOCK[1:]), completion(None, "content_filter")])
def test_refusing_many_requests_for_their_content_is_not_being_dead(serve, block):
    server = serve(lambda text, _: completion("ok") if text == "59" else block)
    outcomes = ask(server.config(concurrency=1), [str(i) for i in range(60)])
    assert len(server.seen) == 60
    assert outcomes[59] == ("ok", "")
    assert {reply for i, reply in outcomes.items() if i != 59} == {(None, "filtered")}


@pytest.mark.parametrize("refused", [range(25), range(10, 50), range(25, 60)])
def test_rejections_of_one_part_of_the_requests_do_not_end_the_others(serve, refused):
    """By a filter that no client knows, say: a code that means nothing, on a part of the suite, whole."""
    server = serve(lambda text, _: error(400, "no", code="e1") if int(text) in refused else completion("ok"))
    outcomes = ask(server.config(), [str(i) for i in range(60)])
    assert len(server.seen) == 60
    assert [outcomes[i] for i in range(60)] == [
        (None, "HTTP 400 e1") if i in refused else ("ok", "") for i in range(60)
    ]


def test_requests_that_are_all_rejected_for_one_reason_are_given_up(serve):
    server = serve(lambda *_: error(400, "'max_tokens' is not supported", code="unsupported_parameter"))
    outcomes = dict(Endpoint(server.config(), 64, True).ask_all([Request("s", str(i), None) for i in range(200)]))
    assert endpoint.GIVE_UP <= len(server.seen) < endpoint.GIVE_UP + 8
    assert {reply.words for reply in outcomes.values()} == {"'max_tokens' is not supported"}
    reasons = {reply.reason for reply in outcomes.values() if reply.untried}
    assert reasons == {"given up after: HTTP 400 unsupported_parameter"}


# ----------------------------------------------------------------------------------------------- connections


def test_connections_are_used_again_by_all_threads_and_calls(serve):
    server = serve(lambda text, _: completion(text))
    client = Endpoint(server.config(concurrency=4), 64, True)
    for _ in range(2):
        assert dict(client.ask_all([Request("s", str(i), None) for i in range(60)])) == {i: str(i) for i in range(60)}
    assert len(server.seen) == 120
    assert server.connections <= 4


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("drops", [0, 1, 3])
def test_answers_do_not_depend_on_when_the_server_closes_connections(serve, drops, late):
    """Not one retry is allowed: a connection that was closed while it was idle costs no attempt."""
    server = serve(lambda text, _: completion(text), drops=drops, late=late)
    outcomes = ask(server.config(concurrency=3, retries=0), [str(i) for i in range(40)])
    assert outcomes == {i: (str(i), "") for i in range(40)}
    assert sorted(int(request["text"]) for request in server.seen) == list(range(40))  # each was answered once
    assert server.connections >= (40 // drops if drops else 1)


def test_a_connection_that_breaks_in_an_answer_is_a_failed_attempt(serve):
    def script(text, times):
        status, _, body = completion("ok")
        return (status, {"Content-Length": "9999"}, [body]) if times == 0 else completion("ok")

    server = serve(script)
    assert ask(server.config(retries=0), ["a"]) == {0: (None, "connection failed")}
    assert ask(server.config(retries=1), ["b"]) == {0: ("ok", "")}


def test_neither_a_proxy_nor_a_netrc_nor_a_cookie_comes_between(serve, monkeypatch, tmp_path):
    proxy = serve(lambda *_: completion("proxied"))
    monkeypatch.setenv("JUDGE_KEY", KEY)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, proxy.url.removesuffix("/v1"))
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password other")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    server = serve(lambda *_: (200, {"Set-Cookie": "id=1; Path=/"}, completion("ok")[2]))
    assert set(ask(server.config(key_env="JUDGE_KEY", concurrency=1), ["a", "b"]).values()) == {("ok", "")}
    assert proxy.seen == []
    assert [request["headers"]["Authorization"] for request in server.seen] == [f"Bearer {KEY}"] * 2
    assert all("Cookie" not in request["headers"] for request in server.seen)


def test_the_proxy_for_https_gets_a_tunnel_and_neither_path_nor_key(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    seen = []

    def serve_one(listener):
        connection, _ = listener.accept()
        with connection:
            seen.append(connection.recv(65536))
            connection.sendall(b"HTTP/1.1 502 Bad Gateway\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        monkeypatch.setenv("https_proxy", f"127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.setenv("no_proxy", "")
        pool.submit(serve_one, listener)
        config = ChatConfig(url="https://api.example/v1", model="m", key_env="JUDGE_KEY", timeout=5, retries=0)
        assert ask(config) == {0: (None, "connection failed")}
    assert seen[0].startswith(b"CONNECT api.example:443 ")
    assert KEY.encode() not in seen[0]
    assert b"completions" not in seen[0]


@pytest.mark.parametrize("proxy", ["socks9://h:1", "http://[::1"])
def test_a_proxy_that_cannot_be_one_is_named_by_its_variable(monkeypatch, proxy):
    monkeypatch.setenv("https_proxy", proxy)
    with pytest.raises(ConfigError, match="https_proxy"):
        Endpoint(ChatConfig(url="https://api.example/v1", model="m"), 64, True)


# --------------------------------------------------------------------------------------------------- fields


def test_fields_of_a_request_are_what_the_endpoint_wants(serve):
    def strict(*_):
        body = server.seen[-1]["body"]
        if "max_tokens" in body or "temperature" in body:
            return error(400, "Unsupported parameter", code="unsupported_parameter")
        return completion(f"{body['max_completion_tokens']} {body['reasoning_effort']}")

    server = serve(strict)
    options = {"max_completion_tokens": 900, "temperature": None, "extra": {"reasoning_effort": "low"}}
    assert ask(server.config(**options)) == {0: ("900 low", "")}
    assert ask(server.config()) == {0: (None, "HTTP 400 unsupported_parameter")}
    ask(server.config(max_tokens=7))
    assert server.seen[-1]["body"]["max_tokens"] == 7


def test_the_key_of_verdicts_depends_on_the_fields_that_are_sent():
    def identity(**options):
        return json.dumps(Endpoint(ChatConfig(url="http://h/v1", model="m", **options), 64, True).identity)

    fields = '"max_tokens": 64, "response_format": {"type": "json_object"}'
    assert identity() == '{"url": "http://h/v1/chat/completions", "model": "m", "temperature": 0, ' + fields + "}"
    others = [{"max_tokens": 65}, {"max_completion_tokens": 64}, {"temperature": None}, {"extra": {"seed": 1}}]
    assert len({identity(), *(identity(**options) for options in others)}) == 5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_tokens": 1, "max_completion_tokens": 1}, "max_completion_tokens: takes the place of max_tokens"),
        ({"extra": {"model": "x"}}, "extra.model: the client sets this field"),
        ({"extra": {"x": float("inf")}}, "extra: holds a value that JSON cannot hold"),
        ({"extra": {"api_key": KEY}}, "extra.api_key: a key belongs in the environment"),
        ({"url": None, "model": None, "path": "m", "temperature": None}, "temperature: belongs to an endpoint"),
        ({"url": None, "model": None, "path": "m", "extra": {"a": 1}}, "extra: belongs to an endpoint"),
        *(
            ({"url": url}, "url: expected an address")
            for url in ("http://h:99999999/v1", "http://[::1/v1", "http://a b/v1")
        ),
    ],
)
def test_fields_that_cannot_be_are_named(options, words):
    with pytest.raises(ConfigError, match=words) as wrong:
        Endpoint(ChatConfig(**{"url": "http://h/v1", "model": "m", **options}), 64, True)
    assert KEY not in str(wrong.value)


def test_a_signal_ends_a_judging_without_the_questions_that_wait(serve, monkeypatch, tmp_path):
    def script(_, __):
        signals.handler(signal.SIGTERM, None)
        time.sleep(0.05)  # a busy machine must not be through before the first verdict is seen
        return completion(GOOD)

    monkeypatch.setattr(signals, "_received", [])
    server = serve(script)
    judge = server.config(concurrency=2)
    with pytest.raises(signals.StopRequested) as stopped:
        cache.judged(tmp_path, judge, rows(60))
    requests = len(server.seen)
    assert requests < 60
    time.sleep(0.2)
    assert len(server.seen) == requests  # though the exception, which holds the frames, is still there
    assert "verdict so far" in str(stopped.value)


def test_a_redirect_would_carry_the_key_elsewhere_and_is_not_followed(serve, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    elsewhere = serve(lambda *_: completion("caught"))
    server = serve(lambda *_: (302, {"Location": f"{elsewhere.url}/chat/completions"}, b""))
    assert ask(server.config(key_env="JUDGE_KEY")) == {0: (None, "HTTP 302")}
    assert elsewhere.seen == []


@pytest.mark.parametrize("value", [None, "", "two\nlines", "ключ"])
def test_a_missing_key_is_an_error_before_any_request(monkeypatch, value):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("JUDGE_KEY", value)
    with pytest.raises(ConfigError, match="key_env") as error:
        Endpoint(ChatConfig(url="http://h/v1", model="m", key_env="JUDGE_KEY"), 64, True)
    assert value is None or value == "" or value not in str(error.value)


def test_a_missing_picture_fails_alone(serve, tmp_path):
    server = serve(lambda *_: completion("ok"))
    ((answer, reason),) = ask(server.config(), image=str(tmp_path / "gone.png")).values()
    assert answer is None
    assert reason.startswith("its picture cannot be read: no such file")


def test_requests_go_out_together_up_to_the_limit(serve):
    def slow(*_):
        time.sleep(0.05)
        return completion("ok")

    server = serve(slow)
    assert len(ask(server.config(concurrency=4), [str(i) for i in range(24)])) == 24
    assert 2 <= server.most <= 4


def test_a_whole_judging_over_http_keeps_the_key_out_of_everything(serve, monkeypatch, tmp_path, capfd):
    """The server quotes the key in every error, as some do."""
    monkeypatch.setenv("JUDGE_KEY", KEY)

    def script(text, _):
        if "answer 0" in text:
            return 500, {}, f"bad key {KEY}".encode()
        return completion(f"key {KEY}" if "answer 1" in text else GOOD)

    server = serve(script)
    judge = server.config(key_env="JUDGE_KEY")
    opinions = cache.judged(tmp_path, judge, rows(4))
    assert [o.verdict for o in opinions] == ["failed", "unparsed", "refused", "refused"]
    assert judges.unjudged(opinions) == {"unparsed": 1, "failed": 1, "reasons": {"HTTP 500": 1}}
    written = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    output = "".join(capfd.readouterr())
    assert KEY not in output + written.decode() + repr(judge.__dict__) + judge.fingerprint
    before = len(server.seen)
    cache.judged(tmp_path, judge, rows(4))
    assert len(server.seen) - before == 3  # only what failed, once and twice again
