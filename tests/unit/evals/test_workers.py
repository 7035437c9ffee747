"""Workers that share a suite: claims, deaths, the merge, and the reports on them."""

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nursery
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirage_dist import liveness, state
from mirage_dist.evals import manifest, rows, status, worklist
from mirage_dist.evals.sharing import claims as claiming
from mirage_dist.evals.sharing import files
from mirage_dist.evals.sharing.claims import Claims
from mirage_dist.evals.sharing.files import Answers, Writer
from mirage_dist.schema import ConfigError


def nurse(suite: Path, *words: int) -> subprocess.CompletedProcess:
    command = [sys.executable, nursery.__file__, str(suite), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def all_answered_once(suite: Path) -> Answers:
    questions, answers = nursery.questions(), Answers(suite).refresh()
    assert [row["response"] for row in answers.of(questions)] == [
        nursery.answer(question.sample) for question in questions.values()
    ]
    assert [row["key"] for row in answers.of(questions)] == list(questions)
    assert (len(answers), answers.repeated) == (len(questions), 0)
    return answers


# --------------------------------------------------------------------------------------------------- deaths


def test_of_workers_killed_a_hundred_times_every_row_is_there_once(tmp_path):
    done = nurse(tmp_path, 3, 100, 5)
    assert (done.returncode, done.stdout) == (0, "100\n"), done.stderr
    assert all_answered_once(tmp_path).cut > 0  # some died within a line
    # What is left of the dead is in nobody's way.
    assert nurse(tmp_path, 1, 0, 0).returncode == 0


def test_a_full_disk_ends_a_worker_in_words_and_the_next_start_does_the_rest(tmp_path):
    done = nurse(tmp_path, 2, 0, 0, 3000)
    assert done.returncode == 1
    assert "cannot be written ([Errno 27] File too large); whole answers are kept" in done.stderr
    there = Answers(tmp_path).refresh()
    assert there.cut in (1, 2)  # two, but where the space ends just behind a line
    assert 0 < len(there) < nursery.QUESTIONS
    assert nurse(tmp_path, 3, 0, 0).returncode == 0
    all_answered_once(tmp_path)


def test_a_line_that_grows_while_it_is_read_is_read_whole(tmp_path):
    """Its beginning is at the end of the file at one moment, and its rest there at the next."""
    lines = "".join(state.sealed("row", {"key": f"{i:064x}", "text": "x" * 40}) for i in range(3000)).encode()

    def grow() -> None:
        with (tmp_path / "rows/worker-1.jsonl").open("ab", buffering=0) as file:
            for start in range(0, len(lines), 7):
                file.write(lines[start : start + 7])

    (tmp_path / "rows").mkdir()
    writer, answers = threading.Thread(target=grow), Answers(tmp_path)
    writer.start()
    while writer.is_alive():
        answers.refresh()
    assert (len(answers.refresh()), len(answers.damage), answers.cut, answers.repeated) == (3000, 0, 0, 0)


# --------------------------------------------------------------------------------------------------- claims


@pytest.fixture
def elsewhere(monkeypatch):
    """No process table tells of the others, as on another host; beats are quick."""
    monkeypatch.setattr(liveness, "boot_id", lambda: "")
    monkeypatch.setattr(liveness, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(claiming, "EXPIRY_SECONDS", 0.4)


def taken(claims: Claims, name: str):
    while (claim := claims.take(name)) is None:
        time.sleep(0.02)
    return claim


def test_a_claim_is_kept_by_a_beat_that_moves_and_lost_by_one_that_stands_still(tmp_path, elsewhere):
    with Claims(tmp_path) as first, Claims(tmp_path) as second, Claims(tmp_path) as third:
        old = first.take("chunk")
        end = time.monotonic() + 1.0
        while time.monotonic() < end:
            assert second.take("chunk") is None
            time.sleep(0.02)
        first.heartbeat.stop()
        began = time.monotonic()
        new = taken(second, "chunk")
        assert time.monotonic() - began > 0.3
        assert second.held(new)
        # The late one finds itself followed, and takes nothing away when it lets go.
        assert not first.held(old)
        first.release(old)
        assert third.take("chunk") is None
        second.release(new)
        assert third.take("chunk") == claiming.Claim("chunk", 0)


@pytest.mark.parametrize("content", ["", '{"token": "ab', "\0" * 9, "null", "{}", "[" * 9999, '{"seal": "claim 1 0"}'])
def test_a_claim_that_a_power_failure_emptied_expires(tmp_path, elsewhere, content):
    (tmp_path / "claims").mkdir()
    (tmp_path / "claims" / "chunk.0").write_text(content)
    with Claims(tmp_path) as claims:
        began = time.monotonic()
        assert taken(claims, "chunk") == claiming.Claim("chunk", 1)
        assert time.monotonic() - began > 0.3


def test_of_many_that_find_a_worker_dead_one_follows_it(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    with Claims(tmp_path) as owner:
        record = {**owner.owner.record(), "token": "dead", "pid": dead.pid, "process": "1"}
    for name in map(str, range(20)):
        (tmp_path / "claims" / f"{name}.0").write_text(state.sealed("claim", record))
        many = [Claims(tmp_path) for _ in range(8)]
        with ThreadPoolExecutor(8) as threads:
            taken_by = list(threads.map(lambda claims, name=name: claims.take(name), many))
        assert sorted(str(claim) for claim in taken_by if claim) == [str(claiming.Claim(name, 1))]


def test_of_two_runners_with_other_settings_that_start_at_once_one_is_refused(tmp_path):
    def start(suite: Path, tokens: int) -> str:
        try:
            return str(manifest.claim(suite, {"settings": {"tokens": tokens}})["settings"]["tokens"])
        except ConfigError as error:
            return str(error)

    for number in range(20):
        with ThreadPoolExecutor(2) as threads:
            answers = sorted(threads.map(lambda n, suite=tmp_path / str(number): start(suite, n), (5, 6)), key=len)
        assert answers[0] in ("5", "6")
        assert "holds answers of another evaluation: tokens:" in answers[1]


# ---------------------------------------------------------------------------------------------------- merge

line_of = st.tuples(st.integers(0, 5), st.sampled_from(["yes", "no", 'a "quoted" }\n', "\u2028é"]))
worker_of = st.tuples(st.lists(line_of, max_size=6), st.integers(0, 120))  # its rows, bytes cut off at the end


def raw(row) -> bytes:
    key = f"{row[0]:064x}"
    fields = {"key": key, "set": "unsafe", "id": '"set": "x", "attack": "y"', "attack": "clean", "response": row[1]}
    return state.sealed("row", fields).encode()


@given(st.lists(worker_of, max_size=4), st.data())
def test_the_merge_is_of_whole_lines_and_does_not_depend_on_when_they_were_read(tmp_path_factory, workers, data):
    suite = tmp_path_factory.mktemp("merge")
    (suite / "rows").mkdir()
    first: dict[str, dict] = {}
    whole, cut = [], 0
    contents = []
    for lines, gone in workers:
        content = b"".join(map(raw, lines))
        content = content[: max(0, len(content) - gone)]
        contents.append(content)
        whole += [state.parse("row", line, "") for line in content.split(b"\n")[:-1]]
        cut += not content.endswith(b"\n") and content != b""
    for row in whole:
        first.setdefault(row["key"], row)
    growing = Answers(suite)
    places = [0] * len(contents)
    while any(place < len(content) for place, content in zip(places, contents, strict=True)):
        i = data.draw(st.sampled_from([i for i, c in enumerate(contents) if places[i] < len(c)]))
        end = data.draw(st.integers(places[i] + 1, len(contents[i])))
        with (suite / "rows" / f"worker-{i}.jsonl").open("ab") as file:
            file.write(contents[i][places[i] : end])
        places[i] = end
        growing.refresh()
    for answers in (growing, Answers(suite).refresh()):
        assert {row["key"]: row for row in answers.of(list(first))} == first
        assert (len(answers), answers.repeated, answers.cut) == (len(first), len(whole) - len(first), cut)
        assert answers.differing == {row["key"] for row in whole if row != first[row["key"]]}
    files.write(suite / "manifest.json", state.sealed("suite", {"asks": {"unsafe": {"clean": 6}}}))
    progress = status.status(suite)
    assert (progress.done, progress.repeated, progress.cut) == (len(first), len(whole) - len(first), cut)


def test_a_damaged_line_is_no_row(tmp_path):
    with Writer(tmp_path) as writer:
        writer.append([state.parse("row", raw((i, "yes")), "") for i in range(3)])
    content = bytearray(writer.file.read_bytes())
    content[len(raw((0, "yes"))) + 90] = 0  # a page that never reached the disk
    writer.file.write_bytes(content)
    answers = Answers(tmp_path).refresh()
    assert (len(answers), answers.damage.lines, answers.cut) == (2, {writer.file: [2]}, 0)
    assert f"{1:064x}" not in answers


# --------------------------------------------------------------------------------------------------- status


def test_progress_is_reported_by_set_and_attack_and_without_torch(tmp_path):
    with pytest.raises(ConfigError, match="not started yet"):
        status.status(tmp_path)
    (tmp_path / "rewrites").mkdir()
    (tmp_path / "rewrites" / "unsafe-what-0a1b.jsonl").write_text('{"key": "1"}\n{"key": "2"}\n{"ke')
    with pytest.raises(ConfigError, match=r"rewrites are being made first \(unsafe-what-0a1b: 2 lines\)"):
        status.status(tmp_path)
    questions = nursery.questions()
    files.write(tmp_path / "manifest.json", state.sealed("suite", {"asks": worklist.by_attack(questions.values())}))
    keys = list(questions)
    with Claims(tmp_path) as claims, Writer(tmp_path) as writer:
        claims.take("chunk", {"unsafe": {"clean": 8}})
        writer.append(rows.row(key, questions[key], "x") for key in keys[:300])
        text = status.status(tmp_path).text()
        assert "| unsafe | clean | 300 of 900 | 8 | 592 |" in text
        assert "300 of 900 answers (33.3%); 1 workers at work" in text
        dead = {**claims.owner.record(), "process": "1"}
        (tmp_path / "claims/chunk.0").write_text(state.sealed("claim", {**dead, "rows": {"unsafe": {"clean": 8}}}))
        assert "| unsafe | clean | 300 of 900 | 0 | 600 |" in status.status(tmp_path).text()
    code = "import sys; from mirage_dist.evals import status; print('torch' in sys.modules or 'PIL' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_model_outputs_are_readable_by_their_owner_only(tmp_path):
    before = os.umask(0)
    try:
        with Writer(tmp_path) as writer:
            writer.append([{"key": "x"}])
        files.write(tmp_path / "metrics.json", "{}")
    finally:
        os.umask(before)
    for file in (writer.file, tmp_path / "metrics.json"):
        assert file.stat().st_mode & 0o777 == 0o600
