"""A signal before training begins ends the process in order and soon, wherever it is; later it is only recorded."""

import os
import signal
import subprocess
import sys
import time

import pytest

from mirage_dist import signals
from mirage_dist.schema import ConfigError
from mirage_dist.signals import StopRequested

START = """
import hashlib, os, sys
from mirage_dist import signals
signals.GRACE = 0.3
signals.install()
def busy(seconds=60):
    os.write(1, b"ready\\n")
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**6 * seconds)  # one call into a library, inside which no handler runs
"""


def stopped(code: str, number: int = signal.SIGTERM) -> tuple[int, str, float]:
    """(exit status, output, seconds from the signal to the end) of a process that is signalled when it is ready."""
    process = subprocess.Popen([sys.executable, "-c", START + code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line == b"ready\n", line
    process.send_signal(number)
    sent = time.monotonic()
    output = process.communicate(timeout=60)[0].decode()
    return process.returncode, output, time.monotonic() - sent


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_start_that_is_inside_a_library_ends_soon_and_gives_back_what_it_holds(number):
    code = "with signals.start_up(), signals.before_end(lambda: os.write(1, b'given back\\n')): busy()"
    status, output, seconds = stopped(code, number)
    assert status == signals.STOPPED, output
    assert output.endswith(f"given back\nmirage: {signals.NOTHING_LOST}\n")
    assert seconds < 10


def test_work_that_commits_and_a_run_that_trains_are_not_cut_short():
    code = "with signals.start_up(), signals.at_stop_points(): busy(1)\nbusy(1); print(signals.received())"
    status, output, _ = stopped(code)
    assert status == 0, output
    assert "SIGTERM" in output.splitlines()


@pytest.mark.parametrize("block", ["signals.start_up()", "signals.at_stop_points()"])
def test_a_stop_whose_output_nobody_reads_any_more_is_in_order(block):
    """As of a run whose calling process was killed: the pipe that it read is broken."""
    code = f"with {block}: busy(1)\nos._exit(signals.STOPPED if signals.received() == 'SIGTERM' else 1)"
    process = subprocess.Popen([sys.executable, "-c", START + code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.stdout.close()
    process.terminate()
    assert process.wait(60) == signals.STOPPED


def test_a_forked_process_that_is_signalled_stops_alone():
    code = """
import signal, time
with signals.start_up():
    if not (child := os.fork()):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        time.sleep(10)
        os._exit(0)
    time.sleep(0.5)
    os.kill(child, signal.SIGUSR1)
    time.sleep(0.5)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert signals.received() is None
    busy()
"""
    status, output, _ = stopped(code)
    assert status == signals.STOPPED, output
    assert output.endswith(f"mirage: {signals.NOTHING_LOST}\n")


@pytest.fixture
def request_stop(monkeypatch):
    monkeypatch.setattr(signals, "_received", [])
    return lambda: signals.handler(signal.SIGTERM, None)


def test_an_error_after_the_request_is_a_stop_unless_the_recipe_is_wrong(request_stop):
    with pytest.raises(ZeroDivisionError), signals.start_up():
        raise ZeroDivisionError

    def fail(error: Exception) -> None:
        with signals.start_up():
            request_stop()
            raise error

    with pytest.raises(ConfigError):
        fail(ConfigError("data.max_length=0"))
    signals.clear()
    with pytest.raises(StopRequested):
        fail(ConnectionError("Connection reset by peer"))
    with pytest.raises(StopRequested), signals.start_up():
        os._exit(3)  # not reached: the request came before
