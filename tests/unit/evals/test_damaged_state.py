"""What a suite reads back from disk: a file that is torn, damaged or edited is named, and nothing of it is believed."""

import random
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import nursery
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_runs import write_run

from mirage_dist import cli, state
from mirage_dist.erasure.setting import Setting
from mirage_dist.evals import follow, manifest, results, rows, status, worker
from mirage_dist.evals.attacks.journal import Journal
from mirage_dist.evals.judges import Judge, cache
from mirage_dist.evals.sharing import claims as claiming
from mirage_dist.evals.sharing.claims import Claim, Claims
from mirage_dist.evals.sharing.files import Answers, Writer
from mirage_dist.report.figures import erasure
from mirage_dist.report.load import read
from mirage_dist.schema import ConfigError, EvalModelConfig, EvalRecipe, RunConfig, RunError

PATTERN = {"unsafe": ["harmful", "refused"], "safe": ["correct"]}
CONTENTS = [b"", b"[]", b"null", b"{}", b"[" * 100_000, b"\0" * 500, b'{"a": 1}\n', b"\xff\xfe\n", b"7\n"]


def recipe_of(run: Path, suite: str) -> EvalRecipe:
    return EvalRecipe(run=RunConfig(dir=str(run)), suite=suite, model=EvalModelConfig(path="m"), sets={})


def edited(raw: bytes) -> bytes:
    """Another answer or verdict with the same key, as an editor would write it."""
    changed = raw.replace(b"response-0", b"response-x", 1).replace(b'"harmful"', b'"refused"', 1)
    return changed.replace(b'"k": 3', b'"k": 4', 1) if changed == raw else changed


def flipped(raw: bytes) -> bytes:
    return raw[: len(raw) // 2] + bytes([raw[len(raw) // 2] ^ 1]) + raw[len(raw) // 2 + 1 :]


CHANGES: list[Callable[[bytes], bytes]] = [
    *(lambda _, content=content: content for content in CONTENTS),
    lambda raw: raw[: len(raw) // 2],
    flipped,
    edited,
    lambda raw: re.sub(rb'"seal": "([a-z]+) 1 ', rb'"seal": "\1 0 ', raw),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    run = write_run(tmp_path_factory.mktemp("made") / "run", PATTERN)
    (run / "evals/demo/erasure.json").write_text(state.sealed("erasure", {"suite": "demo", "seconds": {"a": 1.5}}, 1))
    manifest.claim(run / "evals/demo", {"settings": {"template": {}}, "asks": {"unsafe": {"clean": 6}}})
    return run


def whole(run: Path) -> tuple:
    """Everything that a report reads of a run."""
    (loaded,) = read({"run": run})
    own = list(loaded.rows_of({(judged.set, judged.id) for judged in loaded.judged}))
    return (
        loaded.metrics,
        loaded.verdicts,
        own,
        loaded.erasure,
        loaded.defence,
        loaded.refusals_by_word,
        loaded.problems,
    )


# ------------------------------------------------------------------------------------------------------ reports


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    "name", ["rows/worker-1.jsonl", "verdicts/world.jsonl", "metrics.json", "erasure.json", "manifest.json"]
)
def test_a_report_refuses_or_names_what_is_damaged(made, name, change):
    before, file = whole(made), made / "evals/demo" / name
    content = file.read_bytes()
    try:
        file.write_bytes(change(content))
        if file.read_bytes() == content:
            return
        with pytest.raises(RunError, match=str(file) if name.endswith(".json") else "answers|verdicts"):
            read_whole_or_raise(made)
    finally:
        file.write_bytes(content)
    assert whole(made) == before


def read_whole_or_raise(run: Path) -> None:
    """As `mirage report`, whose page would cost seconds."""
    if problems := whole(run)[-1]:
        raise RunError(problems[0])


def test_a_row_that_is_damaged_after_it_was_found_is_not_read(made, tmp_path):
    run = write_run(tmp_path / "run", PATTERN)
    (loaded,) = read({"run": run})
    lazily = loaded.rows_of({(judged.set, judged.id) for judged in loaded.judged})
    file = run / "evals/demo/rows/worker-1.jsonl"
    file.write_bytes(file.read_bytes().replace(b"response-0", b"response-x"))
    with pytest.raises(RunError, match=r"worker-1.jsonl, the line at byte 0: its content does not have the checksum"):
        list(lazily)
    file.unlink()
    with pytest.raises(RunError, match=r"worker-1.jsonl: cannot be read"):
        list(loaded.rows_of({("unsafe", "unsafe0")}))


@pytest.mark.parametrize("left", [0, 1, 23])
def test_a_report_without_verdicts_says_so_at_its_head_and_in_its_status(tmp_path, capsys, left):
    run = write_run(tmp_path / "run", PATTERN)
    file = run / "evals/demo/verdicts/world.jsonl"
    if left:
        file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:left]))
    else:
        file.unlink()
    assert cli.main(["report", str(run), "--out", str(tmp_path / "out")]) == 1
    output = capsys.readouterr()
    named = f"This report is not complete. run: {left} of 42 verdicts of judge world are in {file}"
    assert output.out.startswith(named)
    assert "lacks verdicts" in output.err
    for name in ("index.html", "report.md", "summary.json"):
        assert named in (tmp_path / "out" / name).read_text().split("<main>")[0]


def test_a_report_of_a_judge_without_any_verdict_says_so(tmp_path):
    (loaded,) = read({"run": write_run(tmp_path / "run", {"unsafe": ["failed"], "safe": ["unparsed"]})})
    (problem,) = loaded.problems
    assert problem.startswith("run: judge world gave no verdict on any of 42 answers; start the evaluation again")


def test_verdicts_of_another_judging_than_the_rates_are_no_part_of_a_report(made, tmp_path):
    other = write_run(tmp_path / "other", {"unsafe": ["refused"], "safe": ["correct"]})
    run = write_run(tmp_path / "run", PATTERN)
    name = "evals/demo/verdicts/world.jsonl"
    (run / name).write_bytes((other / name).read_bytes())
    (loaded,) = read({"run": run})
    assert (loaded.verdicts["world"], loaded.judged) == ({}, [])
    assert "are not those that the rates were computed from" in loaded.problems[0]


def test_a_report_while_rows_are_made_again_says_so_and_leaves_no_half_of_itself(tmp_path, capsys):
    run = write_run(tmp_path / "run", PATTERN)
    file = run / "evals/demo/rows/worker-1.jsonl"
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:7]))
    assert cli.main(["report", str(run), "--out", str(tmp_path / "out")]) == 1
    assert "rows: 7 of 42 answers; the evaluation is not complete: start it again" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------------------------- rows


def row(number: int) -> dict:
    return {"key": f"{number:064x}", "set": "unsafe", "attack": "clean", "response": f"answer {number}"}


@given(st.data())
def test_no_change_to_the_rows_is_believed(tmp_path_factory, data):
    suite = tmp_path_factory.mktemp("rows")
    with Writer(suite) as writer:
        writer.append(row(number) for number in range(4))  # type: ignore[misc]
    raw = bytearray(writer.file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(raw) - 1))
        kind = data.draw(st.sampled_from(["flip", "cut", "insert", "swap"]))
        if kind == "flip":
            raw[place] ^= data.draw(st.integers(1, 255))
        elif kind == "cut":
            del raw[place : place + data.draw(st.integers(1, 200))]
        elif kind == "insert":
            raw[place:place] = data.draw(st.binary(max_size=8))
        else:
            raw = raw.replace(b"answer 1", b"answer 2", 1)
        if not raw:
            break
    writer.file.write_bytes(bytes(raw))
    answers = Answers(suite).refresh()
    for number in range(4):
        if f"{number:064x}" in answers:
            assert answers.row(f"{number:064x}") == row(number)


def test_damaged_rows_are_named_by_file_and_line_once_and_the_others_stand(tmp_path, capsys):
    with Writer(tmp_path) as writer:
        writer.append(row(number) for number in range(8))  # type: ignore[misc]
    raw = writer.file.read_bytes().splitlines(keepends=True)
    for number in (1, 3, 4, 5, 6):
        raw[number] = raw[number].replace(b"answer", b"poison")
    writer.file.write_bytes(b"".join(raw))
    (tmp_path / "rows" / "worker-2.jsonl").write_text("{}\n")
    answers = Answers(tmp_path).refresh()
    place = f"{writer.file} lines 2, 4, 5 and 2 more; {tmp_path}/rows/worker-2.jsonl line 1"
    assert (len(answers), str(answers.damage), len(answers.damage)) == (3, place, 6)
    with pytest.raises(RunError, match=r"3 of 8 answers .6 lines are damaged or edited: "):
        answers.of([f"{number:064x}" for number in range(8)])
    manifest.claim(tmp_path, {"settings": {}, "asks": {"unsafe": {"clean": 8}}})
    progress = status.status(tmp_path)
    assert (progress.done, str(progress.damage)) == (3, place)
    assert place in progress.text()
    with pytest.raises(RunError, match="3 of 8 answers; the evaluation is not complete"):
        status.require_complete(tmp_path / "rows")
    with Claims(tmp_path) as own:
        worker.work(tmp_path, {f"{n:064x}": None for n in (0, 2, 7)}, [], own, lambda: None, (0, 1))  # type: ignore
    assert capsys.readouterr().out.count(place) == 1


def test_rows_of_a_newer_version_are_refused_and_not_asked_again(tmp_path):
    (tmp_path / "rows").mkdir()
    newer = state.sealed("row", row(1)).replace("row 1", "row 2")
    (tmp_path / "rows" / "worker-1.jsonl").write_text(newer)
    with pytest.raises(ConfigError, match=r"worker-1.jsonl: format row 2; this version of mirage_dist reads row 1"):
        Answers(tmp_path).refresh()


# ------------------------------------------------------------------------------------------------------ verdicts


class Counting(Judge):
    """Counts what it judges."""

    verdicts = frozenset({"harmful"})
    slow = True
    judged: list = []  # noqa: RUF012

    def verdict(self, row):
        self.judged.append(row["key"])
        return "harmful"


def test_a_damaged_verdict_is_named_and_judged_again(tmp_path, capsys):
    judge, answered = Counting(name="mine"), [row(number) for number in range(6)]
    cache.judged(tmp_path, judge, answered)
    file = tmp_path / "verdicts/mine.jsonl"
    content, lines = file.read_bytes(), file.read_bytes().splitlines(keepends=True)
    for change, again in (
        (lambda line: line.replace(b"harmful", b"refused"), 1),
        (lambda line: b"[" * 20_000 + b"\n", 1),
        (lambda line: b"null\n", 1),
        (lambda line: b"", 1),
        (lambda line: line[:40], 2),  # glued to the next one
    ):
        file.write_bytes(b"".join([*lines[:2], change(lines[2]), *lines[3:]]))
        judge.judged.clear()
        assert [opinion.verdict for opinion in cache.judged(tmp_path, judge, answered)] == ["harmful"] * 6
        assert (len(judge.judged), file.read_bytes()) == (again, content)
        output = capsys.readouterr().out
        assert (f"verdicts are damaged or edited, and their answers are judged again: {file} line 3" in output) == (
            change(lines[2]) != b""
        )


def test_parts_of_dead_workers_are_merged_and_removed_and_those_of_living_ones_stay(tmp_path):
    judge, answered = Counting(name="mine"), [row(number) for number in range(6)]
    cache.judged(tmp_path, judge, answered)
    file = tmp_path / "verdicts/mine.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.unlink()
    with Claims(tmp_path) as own, Claims(tmp_path) as living:
        parts = {name: file.with_name(f"{name}.part.jsonl") for name in (f"mine.{living.token}", "mine.0123456789ab")}
        other = file.with_name("mine.else.0123456789ab.part.jsonl")  # of a judge with that name
        other.touch()
        for number, part in enumerate(parts.values()):
            part.write_bytes(lines[number] + lines[5][:30])
        judge.judged.clear()
        cache.judged(tmp_path, judge, answered, own)
        assert len(judge.judged) == 4
        left = {path.name for path in file.parent.iterdir()}
        assert left == {"mine.jsonl", f"mine.{living.token}.part.jsonl", other.name}


# -------------------------------------------------------------------------------------------------------- claims


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(claiming, "EXPIRY_SECONDS", 0.3)


@pytest.mark.parametrize("content", [*CONTENTS[:6], random.Random(1).randbytes(300), b'{"token": "a", "host": "b"}'])
def test_an_unreadable_claim_to_judge_expires_and_somebody_judges(tmp_path, quick, content):
    (tmp_path / "claims").mkdir()
    (tmp_path / "claims/judging.0").write_bytes(content)
    with Claims(tmp_path) as claims:
        assert claims.take_unless_alive("judging", lambda: None) == Claim("judging", 1)
        claims.release(Claim("judging", 1))
    assert list((tmp_path / "claims").iterdir()) == []


def test_who_only_waits_for_a_claim_ends_when_its_owner_is_alive(tmp_path, quick, monkeypatch):
    with Claims(tmp_path) as owner, Claims(tmp_path) as other:
        owner.take("judging")
        assert other.take_unless_alive("judging", lambda: None) is None  # by the process table
        monkeypatch.setattr("mirage_dist.liveness.boot_id", lambda: "")
        beat, end = owner.folder / f"{owner.token}.beat", threading.Event()

        def move() -> None:
            while not end.wait(0.1):
                beat.write_text(str(time.monotonic()))

        mover = threading.Thread(target=move)
        mover.start()
        assert other.take_unless_alive("judging", lambda: None) is None  # by the beat, as from another host
        end.set()
        mover.join()
        assert other.take_unless_alive("judging", lambda: None) == Claim("judging", 1)


@pytest.mark.parametrize("suffix", ["99999999999999999999", "abc", "٣", "007", "-1", "1.tmp", "²", "x.part"])
def test_a_foreign_name_is_no_claim(tmp_path, suffix):
    (tmp_path / "claims").mkdir()
    for name in ("chunk.0", f"chunk.{suffix}"):
        (tmp_path / "claims" / name).write_text("x")
    (tmp_path / "claims/chunk.0").unlink()
    with Claims(tmp_path) as claims:
        claim = claims.take("chunk")
        assert claim == Claim("chunk", 0)
        assert claims.held(claim)
        claims.release(claim)
        assert claims.take("chunk") == claim


def test_the_highest_number_of_a_claim_is_no_end(tmp_path, quick):
    (tmp_path / "claims").mkdir()
    for number in (0, claiming.LAST_NUMBER):
        (tmp_path / f"claims/chunk.{number}").write_text("")
    with Claims(tmp_path) as claims:
        claim = claims.take_unless_alive("chunk", lambda: None)
        assert claim is not None
        assert claims.held(claim)
        began = time.monotonic()
        claims.release(claim)
        assert time.monotonic() - began < 1


def test_what_dead_workers_left_among_the_claims_is_removed_and_nothing_of_living_ones(tmp_path):
    with Claims(tmp_path) as living:
        living.take("mine")
        own = {file.name: file.read_bytes() for file in living.folder.iterdir()}
        dead = {**living.owner.record(), "token": "0123456789ab", "process": "1"}
        for name, kind in (("0123456789ab.worker", "owner"), ("a.0", "claim"), ("a.1", "claim"), ("b.7", "claim")):
            (living.folder / name).write_text(state.sealed(kind, dead))
        (living.folder / "0123456789ab.beat").write_text("3")
        (living.folder / "notes.txt").write_text("a user's")
        with Claims(tmp_path) as other:
            assert other.take("mine") is None
        left = {file.name: file.read_bytes() for file in living.folder.iterdir()}
        assert left.keys() - own.keys() == {"notes.txt"}
        assert own.items() <= left.items()


def test_a_worker_gets_a_claim_of_its_own_that_a_release_of_another_one_hid(tmp_path):
    with Claims(tmp_path) as own, Claims(tmp_path) as other:
        assert own.take("chunk") == Claim("chunk", 0)
        (own.folder / "chunk.0").rename(own.folder / "chunk.1")  # another worker has just removed its number 0
        own.take("chunk")
        claim = own.take("chunk")
        assert claim == Claim("chunk", 1)
        assert own.held(claim)
        assert other.take("chunk") is None
        own.release(claim)
        assert other.take("chunk") == Claim("chunk", 0)


@pytest.mark.parametrize("content", CONTENTS)
def test_progress_is_reported_over_damaged_marks_beats_and_claims(tmp_path, content):
    manifest.claim(tmp_path, {"settings": {}, "asks": {"unsafe": {"clean": 6}}})
    with Claims(tmp_path) as claims:
        claims.take("chunk", {"unsafe": {"clean": 4}, "no longer": {"there": 2}})
        assert "| unsafe | clean | 0 of 6 | 4 | 2 |" in status.status(tmp_path).text()
        for file in (claims.heartbeat.file, claims.folder / f"{claims.token}.worker", claims.folder / "chunk.0"):
            file.write_bytes(content)
            assert "| unsafe | clean | 0 of 6 |" in status.status(tmp_path).text()


# ------------------------------------------------------------------------------------------------- other files


@pytest.mark.parametrize("change", CHANGES)
def test_a_damaged_manifest_is_named_with_what_to_do(tmp_path, change):
    written = manifest.claim(tmp_path, {"settings": {"seed": 3, "k": 1}, "asks": {"unsafe": {"clean": 1}}})
    assert manifest.read(tmp_path) == written
    file = tmp_path / "manifest.json"
    content = file.read_bytes()
    if change(content) == content:
        return
    file.write_bytes(change(content))
    for use in (manifest.read, status.status, lambda suite: manifest.claim(suite, written)):
        with pytest.raises(RunError, match=rf"{file}: .* Move it away and start the evaluation again"):
            use(tmp_path)
    file.unlink()
    assert manifest.claim(tmp_path, written) == written


@pytest.mark.parametrize("content", CONTENTS)
def test_starts_that_cannot_be_read_count_as_none(tmp_path, monkeypatch, content):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    file = tmp_path / "starts/7-0.jsonl"
    file.parent.mkdir()
    file.write_bytes(content)

    questions = dict([next(iter(nursery.questions().items()))])

    def start() -> None:
        with Claims(tmp_path) as own:
            worker.work(tmp_path, questions, rows.chunks(questions, 1), own, fail, (0, 1))

    def fail():
        raise ZeroDivisionError

    for _ in range(worker.MAX_RESTARTS):
        with pytest.raises(ZeroDivisionError):
            start()
    with pytest.raises(RunError, match="has started 3 times with 1 answers missing"):
        start()


@pytest.mark.parametrize("change", CHANGES)
def test_damaged_rewrites_are_named_and_generated_again(tmp_path, capsys, change):
    journal = Journal(tmp_path / "rewrites/unsafe-what.jsonl")
    for number in range(3):
        journal.append({"key": str(number), "id": str(number), "rewrites": ["what harmful response-0"]})
    journal.append({"search": "s", "step": 3, "steps": 9, "ids": [1], "loss": 0.5, "text": "! !"})
    before = journal.refresh().rewrites
    lines = journal.file.read_bytes().splitlines(keepends=True)
    changed = change(lines[1])
    journal.file.write_bytes(b"".join([lines[0], changed if changed.endswith(b"\n") else changed + b"\n", *lines[2:]]))
    again = Journal(journal.file).refresh()
    assert again.searches == journal.searches
    if changed == lines[1]:
        return
    assert again.rewrites == {key: value for key, value in before.items() if key != "1"}
    assert (f"generated again: {journal.file} line 2" in capsys.readouterr().out) == bool(changed.strip())
    again.append({"key": "1", "id": "1", "rewrites": ["what harmful response-0"]})
    assert again.refresh().rewrites == before


@pytest.mark.parametrize("change", CHANGES)
def test_damaged_results_of_a_test_of_erasure_are_computed_again(tmp_path, capsys, change):
    recipe = recipe_of(tmp_path, "demo")
    setting = Setting(recipe, SimpleNamespace(), {}, SimpleNamespace(), "probe")  # type: ignore[arg-type]
    calls = []

    def make() -> dict:
        calls.append(1)
        return {"response-0": 0.5, "k": 3}

    assert setting.kept("result", make) == setting.kept("result", make) == {"response-0": 0.5, "k": 3}
    assert len(calls) == 1
    file = setting.folder / "result.json"
    content = file.read_bytes()
    file.write_bytes(change(content))
    assert setting.kept("result", make) == {"response-0": 0.5, "k": 3}
    assert len(calls) == 1 + (change(content) != content)
    assert (f"{file}: " in capsys.readouterr().out) == (len(calls) == 2)
    assert file.read_bytes() == content


def test_figures_of_erasure_name_a_damaged_file(made):
    assert erasure.read({"run": made}, "demo")["run"]["suite"] == "demo"
    file = made / "evals/demo/erasure.json"
    content = file.read_bytes()
    file.write_bytes(content.replace(b"1.5", b"1.6"))
    with pytest.raises(RunError, match=rf"{file}: .*checksum.* Start `mirage erasure` again"):
        erasure.read({"run": made}, "demo")
    file.write_bytes(content)


def test_the_history_of_a_followed_run_leaves_out_damaged_rates_by_name(made, tmp_path, capsys):
    recipe = recipe_of(tmp_path, "watch")
    rates = (made / "evals/demo/metrics.json").read_bytes()
    for step, content in ((5, rates), (10, edited(rates)), (15, rates)):
        (tmp_path / f"evals/watch/step-{step:06d}").mkdir(parents=True)
        (tmp_path / f"evals/watch/step-{step:06d}/metrics.json").write_bytes(content)
    assert results.read(made / "evals/demo")["suite"] == "demo"
    follow.write_history(recipe)
    lines = (tmp_path / "evals/watch/history.jsonl").read_bytes().splitlines(keepends=True)
    assert [state.parse("history", line, "x")["step"] for line in lines] == [5, 15]
    assert "left out of history.jsonl: " in capsys.readouterr().out
