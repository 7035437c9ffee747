"""What counts as an answer in a chat endpoint's reply, as a filter's block, as an error; what of it may be shown."""

import json
from string import ascii_letters, digits

import pytest
from chat_server import completion, error
from hypothesis import given
from hypothesis import strategies as st

from mirage_dist.evals.models import reasoning, replies
from mirage_dist.evals.models.replies import Declined, Failed, NoAnswer

KEY = "sk-proj-A1b2C3d4"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("plain\n", "plain\n"),
        ("<think>\nhm\n</think>\n\nyes", "yes"),
        ("<THINKING>hm</THINKING>yes", "yes"),
        ("<reasoning>hm</reasoning> yes ", "yes"),
        ("<seed:think>hm</seed:think>yes", "yes"),
        ("[THINK]hm[/THINK]yes", "yes"),
        ("◁think▷hm◁/think▷yes", "yes"),
        ("<|begin_of_thought|>hm<|end_of_thought|>yes", "yes"),
        ("<think></think>yes", "yes"),
        ("hm, the template opened it</think>yes", "yes"),
        ("<think>the <think> tag</think>yes", "yes"),
        ("<think>a<think>b</think>c</think>yes", "yes"),
        ("<think>a</think> <think>b</think>yes\n<think>c</think>no", "yes\nno"),
        ("<think>no end", ""),
        ("yes\n<think>no end", "yes"),
        ("<think>a</think>\n<think>no end", ""),
        ("What is the <think> tag for?", "What is the <think> tag for?"),
        ("<think>hm</think><answer>yes</answer>", "yes"),
        ("<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>yes<|return|>", "yes"),
        ("<|channel|>analysis<|message|>no end", ""),
        ("analysisWe need a verdict.assistantfinalyes", "yes"),
        ("analysisWe need", ""),
        ("analysis of the picture", "analysis of the picture"),
    ],
)
def test_an_answer_is_without_the_reasoning_before_it(text, answer):
    assert reasoning.answer(text) == answer


NAMES = st.sampled_from(["think", "thinking", "reasoning", "reflection"])


@given(st.text(ascii_letters + " \n<>", max_size=30), NAMES, st.text(ascii_letters + " .?", max_size=20))
def test_whatever_is_thought_the_answer_after_it_is_the_same(thought, name, answer):
    assert reasoning.answer(f"<{name}>{thought}</{name}>{answer}") == answer.strip()
    assert reasoning.answer(f"<{name}>{thought}") == "" or "</" in thought


def read(content, finish="stop", **message):
    return replies.completion(completion(content, finish, **message)[2]).answer


def test_half_a_surrogate_pair_in_an_answer_becomes_a_question_mark():
    body = b'{"choices": [{"message": {"content": "cut \\ud83d"}, "finish_reason": "length"}]}'
    assert replies.completion(body).answer == "cut ?"
    body = b'{"choices": [{"message": {"content": null, "refusal": "No \\udc00"}}]}'
    assert replies.completion(body).answer == Declined("No ?")


def test_a_completion_repeats_no_key_and_keeps_words_that_servers_without_keys_take_for_one():
    key = "sk-s3cret-0123456789"
    tree = {"model": f"m {key}\n", "system_fingerprint": key, "choices": [{"message": {"content": f"{key} EMPTY"}}]}
    body = json.dumps(tree).encode()
    masked = replies.completion(body, key)
    assert (masked.content, masked.model, masked.fingerprint) == ("*** EMPTY", "m ***", "***")
    assert replies.completion(body, "EMPTY").content == f"{key} EMPTY"


@pytest.mark.parametrize("usage", [None, [], {"prompt_tokens": -1, "completion_tokens": True}, {"prompt_tokens": "7"}])
def test_numbers_of_tokens_that_cannot_be_are_none(usage):
    body = json.dumps({"usage": usage, "model": 7, "choices": [{"message": {"content": "a"}}]}).encode()
    assert replies.completion(body) == replies.Reply("a")


@pytest.mark.parametrize(
    ("message", "answer"),
    [
        ({"content": [{"type": "text", "text": "yes"}, {"type": "text", "text": ", sir"}]}, "yes, sir"),
        ({"content": [{"type": "thinking", "thinking": [{"text": "no"}]}, {"type": "text", "text": "yes"}]}, "yes"),
        ({"content": [{"type": "reasoning", "text": "no"}, {"type": "output_text", "text": "yes"}]}, "yes"),
        ({"content": ["yes"]}, "yes"),
        ({"content": " ", "refusal": "I cannot."}, Declined("I cannot.")),
        ({"content": "yes", "reasoning_content": "no", "reasoning": "no"}, "yes"),
        ({"content": None, "reasoning_content": "no", "finish": "length"}, ""),
        ({"content": None, "reasoning_content": "hm"}, ""),
        ({"content": "<think>no", "finish": "length"}, ""),
        ({"content": "", "finish": "length"}, ""),
        ({"content": None, "refusal": "I cannot."}, Declined("I cannot.")),
        ({"content": "", "refusal": "I cannot."}, Declined("I cannot.")),
        ({"content": [{"type": "refusal", "refusal": "I cannot."}]}, Declined("I cannot.")),
        ({"content": "yes", "refusal": None}, "yes"),
    ],
)
def test_texts_parts_and_refusals_are_read(message, answer):
    got = read(**message)
    assert (got, type(got)) == (answer, type(answer))


@pytest.mark.parametrize("finish", ["content_filter", "SAFETY", "content_filter: PROHIBITED_CONTENT", "RECITATION"])
@pytest.mark.parametrize("content", [None, "", "half a verdi"])
def test_a_filters_block_is_final(finish, content):
    with pytest.raises(NoAnswer) as stopped:
        read(content, finish)
    assert (stopped.value.failure, stopped.value.again, stopped.value.alive) == (
        Failed("filtered", final=True),
        False,
        True,
    )


def refused(status, body, key="", request=""):
    return replies.error(status, body if isinstance(body, bytes) else json.dumps(body).encode(), None, key, request)


AZURE = {
    "error": {
        "message": "The response was filtered due to the prompt triggering Azure OpenAI's content management policy.",
        "type": None,
        "code": "content_filter",
        "status": 400,
        "innererror": {"code": "ResponsibleAIPolicyViolation"},
    }
}


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, AZURE),
        (403, AZURE),
        (400, {"error": {"code": None, "innererror": {"code": "ResponsibleAIPolicyViolation"}, "message": "no"}}),
        (400, {"error": {"code": "data_inspection_failed", "message": "Input data may contain bad words."}}),
        (400, {"error": {"code": "invalid_prompt", "message": "flagged as potentially violating our usage policy"}}),
        (403, {"error": {"code": 403, "message": "Input was flagged", "metadata": {"reasons": ["violence"]}}}),
        (400, [{"error": {"code": 400, "status": "SAFETY", "message": "blocked"}}]),
        (400, {"error": {"code": "invalid_request_error", "message": "Content Exists Risk"}}),
        (200, {"error": {"code": "content_filter", "message": "no"}}),
    ],
)
def test_a_filter_is_recognised_by_its_code(status, body):
    """Codes of Azure, Alibaba, OpenAI's reasoning models, OpenRouter, Google and DeepSeek."""
    error = refused(status, body)
    assert (error.failure.reason, error.failure.final, error.again, error.hopeless) == ("filtered", True, False, False)
    assert not error.failure.guessed


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (200, {"error": {"code": 403, "message": "Your input was flagged by moderation"}}),
        (403, {"error": {"message": "Your organization has been flagged and may not use this model"}}),
        (403, {"error": {"message": "Your API key is blocked by our usage policy limits: monthly budget exceeded"}}),
        (400, {"error": {"message": "The guardrail identifier does not exist"}}),
        (403, {"error": {"message": "Moderation service unavailable"}}),
        (400, {"error": {"code": "unsupported_safety_parameter", "message": "m"}}),
    ],
)
def test_a_filter_that_only_the_words_speak_of_is_a_guess(status, body):
    """It is a verdict of nothing for a judge, and no answer of a model under test."""
    failure = refused(status, body).failure
    assert (failure.reason, failure.final, failure.guessed) == ("filtered", True, True)


def test_a_request_that_an_error_repeats_is_not_searched_for_filters():
    question = "what does a moderation guardrail of the content policy do"
    own = refused(400, {"error": {"message": f"cannot parse: {question}"}}, request=question)
    assert own.failure.reason == "HTTP 400"
    own = refused(422, {"detail": [{"loc": ["body", "seed"], "msg": "Field required", "input": {"system": question}}]})
    assert str(own.failure) == 'HTTP 422: ["body", "seed"]: Field required'


@pytest.mark.parametrize(("content", "filtered"), [(None, True), ("", True), ("no, thanks", False)])
def test_a_refusal_as_the_end_of_no_text_is_a_block(content, filtered):
    if filtered:
        with pytest.raises(NoAnswer) as stopped:
            read(content, "refusal")
        assert stopped.value.failure == Failed("filtered", final=True)
    else:
        assert read(content, "refusal") == content


@pytest.mark.parametrize(
    ("status", "body", "words", "again", "hopeless"),
    [
        (400, {"error": {"code": "unsupported_parameter", "message": "m"}}, "HTTP 400 unsupported_parameter: m", 0, 0),
        (
            400,
            {"object": "error", "type": "BadRequestError", "code": 400, "message": "m"},
            "HTTP 400 BadRequestError: m",
            0,
            0,
        ),
        (
            404,
            {"error": {"code": "model_not_found", "message": "no model"}},
            "HTTP 404 model_not_found: no model",
            0,
            1,
        ),
        (403, {"error": "forbidden"}, "HTTP 403: forbidden", 0, 1),
        (422, {"detail": [{"loc": ["body"], "msg": "extra"}]}, 'HTTP 422: ["body"]: extra', 0, 0),
        (500, b"<html><h1>Oops</h1>\x1b[31m</html>", "HTTP 500: Oops [31m", 1, 0),
        (429, {"error": {"code": "insufficient_quota", "message": "m"}}, "HTTP 429 insufficient_quota: m", 1, 0),
        (200, {"error": {"code": 502, "message": "upstream"}}, "HTTP 502: upstream", 1, 0),
        (503, b"", "HTTP 503", 1, 0),
        (400, b"[" * 100_000, "HTTP 400: " + "[" * 300 + " …", 0, 0),
    ],
)
def test_an_error_has_its_status_code_and_words(status, body, words, again, hopeless):
    error = refused(status, body)
    assert (str(error.failure), error.again, error.hopeless) == (words, bool(again), bool(hopeless))


@given(st.text(max_size=200), st.text(ascii_letters + digits + "-_", min_size=4, max_size=40), st.text(max_size=200))
def test_no_message_shows_the_key_whole_or_in_pieces_or_more_than_a_line(before, key, after):
    piece = key[:-1] if len(key) > 6 else key
    line = replies.shown(f"{before}{key} {piece}{after}", key, "")
    size = min(6, len(key))
    cleaned = line.replace("***", " ").replace(" …", "")
    assert not any(key[i : i + size].lower() in cleaned.lower() for i in range(len(key) - size + 1))
    assert line.isprintable()
    assert len(line) <= 302


def test_a_message_shows_neither_what_looks_like_a_key_nor_the_request():
    answer = 'She said "mix the two" and left the kitchen for good.'
    for quoted in (answer, json.dumps(answer)):
        line = replies.shown(
            f"Incorrect key hf_ABCDEFgh123 for: {quoted}; see docs", KEY, f"Question: q\nAnswer: {answer}"
        )
        assert line.startswith("Incorrect key *** fo")
        assert line.endswith("see docs")
        assert "kitchen" not in line
        assert "mix" not in line


def test_a_code_that_holds_the_key_is_no_reason():
    _, _, body = error(400, "m", code=KEY)
    assert refused(400, body, KEY).failure.reason == "HTTP 400 invalid_request_error"
