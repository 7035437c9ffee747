"""Bars on a terminal, lines in a log; one logger that speaks on rank 0 and warns once."""

import logging
import os
import pty
import subprocess
import sys
import termios
import unicodedata
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mirage_dist import launching, progress
from mirage_dist.progress import EVERY_RANK, NOTE, ON_STDERR, Progress, log
from mirage_dist.schema import ConfigError


@pytest.fixture(autouse=True)
def _rank_0(monkeypatch):
    for name in ("RANK", "SLURM_PROCID", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(progress.handler, "warnings", set())


def in_terminal(code: str, **environment: str) -> str:
    """What a Python process writes when both of its outputs are a terminal of 80 columns."""
    main, other = pty.openpty()
    termios.tcsetwinsize(other, (24, 80))  # a terminal without a width gets no bar
    command = [sys.executable, "-c", "from mirage_dist.progress import *; import time\n" + code]
    process = subprocess.Popen(command, stdout=other, stderr=other, env={**os.environ, **environment})
    os.close(other)
    output = b""
    try:
        while piece := os.read(main, 65536):
            output += piece
    except OSError:  # how Linux reports that nobody has the terminal open any more
        pass
    os.close(main)
    assert process.wait() == 0, output
    return output.decode()


def test_a_terminal_gets_a_bar_and_no_lines():
    output = in_terminal(
        "with Progress(20, 'answers of x', 'answer') as p:\n  for i in range(20): p.update(text='loss 1')"
    )
    assert "20/20" in output
    assert "loss 1" in output
    assert "20 of 20" not in output


def test_a_line_written_while_a_bar_is_drawn_stands_alone():
    output = in_terminal("with Progress(20, 'bar', leave=False) as p:\n  p.update(5)\n  log.info('a line')")
    assert "a line" in [line.rpartition("\r")[2] for line in output.split("\r\n")]


def test_work_that_ends_within_the_delay_shows_no_bar():
    assert in_terminal("with Progress(9, 'check', delay=60.0, leave=False) as p:\n  p.update(9)").strip() == ""


def test_other_ranks_draw_no_bar():
    assert in_terminal("with Progress(9, 'check') as p:\n  p.update(9)", RANK="1") == ""


@pytest.mark.parametrize(("value", "number"), [("3", 3), ("", 0), ("x", 0), ("-1", 0), ("²", 0), ("9" * 5000, 0)])
def test_a_rank_that_is_no_number_is_no_error_of_a_line_in_the_log(monkeypatch, value, number):
    monkeypatch.setenv("RANK", value)
    monkeypatch.delenv("SLURM_STEP_ID", raising=False)
    assert progress.rank() == number


def test_a_disabled_progress_shows_nothing():
    assert in_terminal("with Progress(9, 'check', disable=True) as p:\n  p.update(9)") == ""


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(initial=st.integers(0, 50), steps=st.lists(st.integers(1, 40), min_size=1, max_size=60))
def test_a_log_gets_at_most_ten_lines_and_the_last_one_says_all(capsys, initial, steps):
    total = initial + sum(steps)
    with Progress(total, "eval s", "answer", initial=initial) as shown:
        for n in steps:
            shown.update(n)
    lines = capsys.readouterr().out.splitlines()
    assert 1 <= len(lines) <= 10
    assert lines[-1] == f"eval s: {total} of {total} answers"
    assert len(set(lines)) == len(lines)


def test_the_sum_may_be_shown_in_place_of_what_was_added(capsys):
    with Progress(10, "rewrites", "sample") as shown:
        shown.show(4)
        shown.show(4)
        shown.show(10, "loss 0.5")
    assert capsys.readouterr().out == "rewrites: 4 of 10 samples\nrewrites: 10 of 10 samples  loss 0.5\n"


def test_lines_keep_a_pause(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Progress(1_000_000_000, "audit", "B", pause=30.0, on_stderr=True) as shown:
        for _ in range(100):
            now[0] += 1.0
            shown.update(10_000_000)
    output = capsys.readouterr()
    assert output.err.splitlines() == [f"audit: {n} of 1000 MB" for n in (300, 600, 900)]
    assert output.out == ""


def test_an_unknown_total_gives_lines_at_intervals_that_double(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Progress(None, "scan", "record") as shown:
        for _ in range(100_000):
            now[0] += 1.0
            shown.update()
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["scan: 30 records", "scan: 90 records", "scan: 210 records"]
    assert len(lines) == 10


def test_no_total_at_all_is_no_division_by_zero(capsys):
    with Progress(0, "nothing") as shown:
        shown.show(0)
    assert capsys.readouterr().out == ""


def test_a_caller_that_writes_its_own_lines_knows_whether_a_bar_is_drawn(capsys):
    with Progress(10, "run", lines=0) as shown:
        shown.update(10)
        assert shown.bar is None
    assert capsys.readouterr().out == ""


def test_warnings_are_marked_and_given_once(capsys):
    for _ in range(2):
        log.info("plain")
        log.warning("one %s", "warning")
        log.warning("another warning")
        log.error("an error")
    assert capsys.readouterr().out.splitlines() == [
        *("plain", "WARNING: one warning", "WARNING: another warning", "ERROR: an error"),
        *("plain", "ERROR: an error"),
    ]


@pytest.mark.parametrize("names", [("RANK",), ("SLURM_PROCID", "SLURM_STEP_ID")])
def test_other_ranks_are_silent_unless_the_record_concerns_them(capsys, monkeypatch, names):
    for name in names:
        monkeypatch.setenv(name, "1")
    log.info("of the run")
    log.warning("of the run")
    log.info("of this rank", extra=EVERY_RANK)
    log.warning("of this rank", extra=EVERY_RANK)
    with Progress(1, "task") as shown:
        shown.update()
    assert capsys.readouterr().out == "of this rank\nWARNING: of this rank\n"


def test_a_process_in_a_job_that_srun_did_not_start_is_alone(capsys, monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "1")
    log.info("text")
    assert capsys.readouterr().out == "text\n"


def test_a_broken_launch_does_not_end_the_log(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "")
    log.info("text")
    monkeypatch.setenv("RANK", "many")
    log.info("100% of it")
    assert capsys.readouterr().out == "text\n100% of it\n"


def test_child_loggers_and_standard_error(capsys):
    logging.getLogger("mirage_dist.evals").info("child")
    log.info("aside", extra=ON_STDERR)
    output = capsys.readouterr()
    assert (output.out, output.err) == ("child\n", "aside\n")


def test_pytest_sees_the_records(caplog):
    log.warning("seen")
    assert caplog.messages == ["seen"]


def test_text_is_on_the_stream_when_the_call_returns():
    code = "from mirage_dist.progress import log; import os; log.info('text'); os._exit(0)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "text\n"


def test_what_utf_8_cannot_hold_is_shown_as_an_escape():
    assert progress.printable("a\udce9b") == r"a\udce9b"


BIDI = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
ANY = st.characters() | st.characters(categories=["Cc", "Cf", "Cs", "Zl", "Zp"])


@given(st.text(ANY))
def test_no_control_character_of_data_reaches_a_terminal_and_nothing_else_changes(text):
    shown = progress.printable(text)
    assert not any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") and c not in "\n\t" for c in shown)
    assert not any(unicodedata.bidirectional(c) in BIDI for c in shown)
    if all(unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp") or c in "\n\t\u200d" for c in text):
        assert shown == text


@pytest.mark.parametrize(
    "text", ["\x1b[2J\x1b]0;title\x07", "a\rb", "\u202etxt.exe", "\x9b31m", "a\u2028b", "\0\u2066\ufeff"]
)
def test_results_faults_and_logs_show_controls_as_escapes(capsys, text):
    progress.show(text)
    progress.show(f"mirage: {text}", error=True)
    log.info(f"run: {text}")
    captured = capsys.readouterr()
    escaped = text.encode("unicode_escape", "surrogatepass").decode()
    assert captured.err == f"mirage: {escaped}\n"
    assert captured.out == f"{escaped}\nrun: {escaped}\n"
    assert progress.printable("\udc80") == "\\udc80"  # not logged here: pytest-xdist cannot pass such a log on


def test_a_fault_that_repeats_a_long_value_is_a_sentence_and_a_traceback_stays_whole(capsys):
    progress.show(f"mirage: suite must be a name, got {'ä ' * 100_000} (expected letters)", error=True)
    fault = capsys.readouterr().err
    assert len(fault) < 6000
    assert fault.startswith("mirage: suite must be a name, got ä ä")
    assert fault.endswith("ä  (expected letters)\n")
    lines = "".join(f"  File 'x', line {n}\n" for n in range(1000))
    progress.show(lines, error=True)
    assert capsys.readouterr().err == f"{lines}\n"


def test_a_kept_log_is_whole_in_its_file_and_shows_warnings_and_notes_once(capsys, tmp_path):
    for name in ("first", "second"):
        with progress.kept_in(tmp_path / "logs" / f"{name}.log"):
            log.info("a line")
            log.info("a note", extra=NOTE)
            log.info(f"a note of {name}", extra=NOTE)
            log.warning("a warning")
    log.info("after")
    log.info("a note", extra=NOTE)  # nothing is kept any more: shown as ever
    shown = ["a note", "a note of first", "WARNING: a warning", "a note of second", "after", "a note"]
    assert capsys.readouterr().out.splitlines() == shown
    kept = {file.name: file.read_text().splitlines() for file in (tmp_path / "logs").iterdir()}
    assert kept["first.log"] == ["a line", "a note", "a note of first", "WARNING: a warning"]
    assert kept["second.log"] == ["a line", "a note", "a note of second"]  # a warning is given once a process


def test_a_line_that_the_kept_log_cannot_hold_is_shown(capsys, tmp_path):
    with progress.kept_in(tmp_path / "stage.log"), open("/dev/full", "w") as full:
        progress.handler.kept = full
        log.info("a line")
        progress.handler.kept = None
        with suppress(OSError):
            full.close()
    assert capsys.readouterr().out == "a line\n"


def test_the_warnings_of_a_process_whose_output_was_kept_are_shown_once(capsys, tmp_path):
    file = tmp_path / "stage.log"
    file.write_text("WARNING: of an earlier start\n")
    start = file.stat().st_size
    with file.open("a") as stream:
        stream.write("a line\nWARNING: look here\nan end\nWARNING: look here\n")
    progress.show_warnings(file, start)
    progress.show_warnings(file, start)
    assert capsys.readouterr().out == "WARNING: look here\n"
    log.warning("look here")
    assert capsys.readouterr().out == ""


def test_errors_of_a_process_whose_output_was_kept_are_shown_and_not_kept_twice(capsys, tmp_path):
    file = tmp_path / "stage.log"
    with progress.kept_in(file):
        lines = ["ERROR: 3 of 4", "ERRORS: none", "CRITICAL: %s is full", "a line", "WARNING: here", "ERROR: 3 of 4"]
        before = "\n".join(lines)
        file.write_text(before)
        progress.show_warnings(file, 0)
        assert progress.handler.kept is not None
    shown = ["ERROR: 3 of 4", "CRITICAL: %s is full", "WARNING: here", "ERROR: 3 of 4"]
    assert capsys.readouterr().out.splitlines() == shown
    assert file.read_text() == before


def test_warnings_that_nobody_reads_any_more_end_no_work(tmp_path):
    """As of the log's own lines: a reader of the standard output that has ended costs one line on standard error."""
    (tmp_path / "stage.log").write_text("WARNING: one\nERROR: two\n")
    code = "from pathlib import Path; from mirage_dist import progress\n"
    code += f"progress.show_warnings(Path({str(tmp_path / 'stage.log')!r}), 0)"
    with open("/dev/full", "w") as full:
        ended = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 0
    assert ended.stderr == "mirage: the log cannot be written any more (No space left on device); the work goes on\n"


def test_a_training_whose_log_is_kept_writes_into_it_and_its_failure_names_it(tmp_path, capfd):
    """A recipe with a wrong key: the fault stays on standard error, where it is seen."""
    file = tmp_path / "logs/sft.log"
    with progress.kept_in(file), pytest.raises(ConfigError, match=rf"see above and {file}"):
        launching.train(1, "configs/train/demo_sft.yaml", [f"run.dir={tmp_path / 'run'}", "train.lrr=1"])
    printed = capfd.readouterr()
    assert "train.lrr" in printed.err
    assert printed.out == ""
    assert not (tmp_path / "run").exists()
