"""Whole judgings and whole evaluations by a judge over HTTP: what is final, what is sent again, how they end."""

import json
import shutil
from collections import Counter

import pytest
from chat_server import QUICK, completion, error, rows

from mirage_dist import cli
from mirage_dist.embedded import model as embedded_model
from mirage_dist.evals import judges
from mirage_dist.evals.judges import cache
from mirage_dist.schema import RunError

KEY = "sk-s3cret"
GOOD = json.dumps({"refused": True, "harmful": False, "relevant": True})
BLOCK = error(400, "The prompt triggered the content management policy.", code="content_filter")


def number(text):
    return int(text.rpartition("answer ")[2].strip('"'))


def verdicts(opinions):
    return Counter(opinion.verdict for opinion in opinions)


@pytest.mark.parametrize(
    "block", [BLOCK, completion(None, "content_filter"), completion(None)], ids=["400", "200", "?"]
)
def test_of_sixty_rows_of_which_25_are_filtered_35_are_judged_once_and_for_all(serve, tmp_path, block):
    server = serve(lambda text, _: block if number(text) < 25 else completion(GOOD))
    first = cache.judged(tmp_path, server.config(), rows(60))
    assert [opinion.verdict for opinion in first] == ["failed"] * 25 + ["refused"] * 35
    reason = "no content" if block == completion(None) else "filtered"
    assert judges.unjudged(first) == {"unparsed": 0, "failed": 25, "reasons": {reason: 25}}
    judges.require_verdicts(server.config(), first)
    sent = len(server.seen)
    assert cache.judged(tmp_path, server.config(), rows(60)) == first
    assert len(server.seen) == sent


@pytest.mark.parametrize("way", ["5xx", "refused connections", "silence"])
def test_a_dead_server_ends_the_judging_early_and_its_rows_are_sent_again(serve, tmp_path, way):
    server = serve(lambda *_: None if way == "silence" else error(503, "overloaded"))
    if way == "refused connections":
        server.shutdown()
        server.server_close()
    judge = server.config(retries=0, timeout=0.2)
    opinions = cache.judged(tmp_path, judge, rows(100))
    assert verdicts(opinions) == {"failed": 100}
    with pytest.raises(RunError, match=r"judge vlm: \d+ of 100 answers were not sent to it, given up after: ") as dead:
        judges.require_verdicts(judge, opinions)
    words = {"5xx": "HTTP 503 invalid_request_error: overloaded", "silence": "timed out"}.get(way, "Connection refused")
    assert words in str(dead.value)
    # The same judge, when its server works again: the address is a part of its rules.
    if way != "refused connections":
        server.script = lambda *_: completion(GOOD)
        assert verdicts(cache.judged(tmp_path, server.config(), rows(100))) == {"refused": 100}


def test_a_judge_that_only_reasons_or_declines_is_unparsed_and_not_sent_again(serve, tmp_path):
    replies = [
        completion("<think>hm", "length"),
        completion(None, refusal="I cannot."),
        completion(f"<think>{GOOD}</think>```json\n{GOOD}\n```"),
    ]
    server = serve(lambda text, _: replies[number(text)])
    for _ in range(2):
        opinions = cache.judged(tmp_path, server.config(), rows(3))
        assert [opinion.verdict for opinion in opinions] == ["unparsed", "unparsed", "refused"]
        assert [o.detail.get("shape", "")[:20] for o in opinions] == ["nothing after the re", "a refusal to judge", ""]
    assert len(server.seen) == 3


# ----------------------------------------------------------------------------------------------- `mirage eval`


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """A recipe of 60 questions of text and a model that babbles; the answers are the same in each test."""
    root = tmp_path_factory.mktemp("http")
    embedded_model.make(root / "model", seed=1)
    lines = [
        {"id": f"q{i}", "image": None, "question": f"what is it {i} ?", "answer": "", "safe": False} for i in range(60)
    ]
    (root / "run").mkdir()
    (root / "questions.jsonl").write_text(
        "".join(json.dumps({**line, "category": "", "history": []}) + "\n" for line in lines)
    )
    assert evaluated(root, root / "run", "keyword") == 0
    (root / "run/evals/s/metrics.json").unlink()
    return root


def evaluated(suite, out, *judge_options):
    recipe = {
        "run": {"dir": str(out)},
        "suite": "s",
        "model": {"path": str(suite / "model"), "dtype": "fp32"},
        "generation": {"max_new_tokens": 2, "batch_size": 60},
        "sets": {
            "unsafe": {"kind": "unsafe", "sources": [{"format": "samples", "path": str(suite / "questions.jsonl")}]}
        },
        "judges": list(judge_options),
    }
    (out / "recipe.yaml").write_text(json.dumps(recipe))
    return cli.main(["eval", str(out / "recipe.yaml")])


def vlm(server, **more):
    return {"kind": "vlm", "url": server.url, "model": "m", "key_env": "JUDGE_KEY", **QUICK, **more}


PARAMETER = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."


@pytest.mark.parametrize(
    ("answer", "status", "words"),
    [
        (completion(f"```json\n{GOOD}\n```"), 0, ""),
        (
            error(400, f"{PARAMETER} {KEY}", code="unsupported_parameter"),
            1,
            f"unsupported_parameter: {PARAMETER} ***",
        ),
        (
            error(401, f"Incorrect API key provided: {KEY[:7]}***", code="invalid_api_key"),
            1,
            "HTTP 401 invalid_api_key",
        ),
        (error(503, "overloaded"), 1, "given up after: HTTP 503"),
        (completion("It refuses."), 1, '"xx xxxxxxx." (11 characters)'),
        (completion(f"<think>{GOOD}", "length"), 1, "a larger max_tokens"),
        (BLOCK, 1, "none of 60 answers has a verdict (0 are unparsed and 60 failed (filtered × 60))"),
    ],
    ids=["fenced", "parameter", "key", "dead", "prose", "thoughts", "filter"],
)
def test_the_status_of_an_evaluation_and_its_last_words(
    suite, serve, tmp_path, monkeypatch, capfd, answer, status, words
):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    server = serve(lambda *_: answer)
    shutil.copytree(suite / "run", tmp_path, dirs_exist_ok=True)  # every question is answered; only the judge is new
    assert evaluated(suite, tmp_path, "keyword", vlm(server, retries=0)) == status
    output = capfd.readouterr()
    assert words in output.err
    assert (tmp_path / "evals/s/metrics.json").is_file() == (status == 0)
    assert (tmp_path / "evals/s/verdicts/keyword.jsonl").is_file()
    written = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()).decode()
    assert KEY not in output.out + output.err + written
    assert PARAMETER not in written
    assert "Traceback" not in output.err
    if words.startswith("unsupported"):
        assert len(server.seen) < 30  # of 60: it ended early
