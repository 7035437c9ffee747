"""Ranks that die, stand still or disagree end their run by name, and a second job on a run directory is refused."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import DEADLINE, launch, steps_done, until
from faults.processes import ranks_of, send

from mirage_dist.config import REPOSITORY
from mirage_dist.ranks import free_port

pytestmark = pytest.mark.usefixtures("plain_environment")


@pytest.fixture(scope="module")
def struck(toy):
    """One long run: a second job wants its directory, then rank 1 is killed; started again, rank 1 stands still;
    and once more, rank 0 does. name -> (exit status, output, seconds from the blow to the end).
    """
    folder, outcomes = toy.root / "faults/struck", {}
    arguments = ["train", "configs/train/demo_npo.yaml", *toy.overrides("npo", folder), "train.max_steps=2000"]
    arguments += ["train.global_batch=8", "train.save_every=1", "train.keep_last=2", "train.hang_seconds=6"]
    for name, rank, blow in (
        ("killed", 1, signal.SIGKILL),
        ("stopped", 1, signal.SIGSTOP),
        ("first", 0, signal.SIGSTOP),
    ):
        run = launch(2, *arguments, "train.micro_batch=4", start=True)
        there = steps_done(folder)
        # The first steps behind a resume may be made again: wait until the file grows beyond what was there.
        until(lambda there=there: steps_done(folder) > there + 2, run)
        ranks = ranks_of(run.pid)
        if name == "killed":
            outcomes["second job"] = (ranks[0], launch(1, *arguments, "train.micro_batch=8", check=False), run.poll())
        send(ranks[rank], blow)
        begin = time.monotonic()
        outcomes[name] = (run.wait(DEADLINE), run.stdout.read(), time.monotonic() - begin)
        run.stdout.close()
    return outcomes


def test_a_second_job_on_a_run_directory_is_refused_with_the_owners_name(struck):
    owner, second, first = struck["second job"]
    assert second.returncode == 1
    assert f"belongs to a job on {socket.gethostname()}, process {owner}, since " in second.stderr
    assert "Wait for it or cancel it" in second.stderr
    assert first is None  # the owner goes on


def test_a_rank_that_dies_ends_the_run_by_name(struck):
    status, output, seconds = struck["killed"]
    assert status == 128 + signal.SIGKILL
    assert re.search(r"rank 1 ended with status 137 \(SIGKILL, .*\); stopping the others", output)
    assert "another rank ended or does not answer" in output
    assert seconds < 60


@pytest.mark.parametrize(
    ("name", "cause"), [("killed", "rank 1 ended"), ("stopped", "mirage: rank 1"), ("first", "mirage: rank 0")]
)
def test_the_cause_comes_first_once_and_in_few_lines(struck, name, cause):
    lines = struck[name][1].splitlines()
    end = [line for line in lines if not line.startswith("struck: ")]  # without the run's own lines
    assert cause in end[0], end
    assert sum(cause in line for line in end) == 1
    assert len(end) <= 5, end
    assert "Traceback" not in "".join(end)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("stopped", r"rank 1 on \S+, last at '.*', is dead or stopped: it has not answered for 6 s"),
        ("first", r"rank 0 .*is dead or stopped"),
    ],
)
def test_a_rank_that_stands_still_ends_the_run_by_name_within_the_limit(struck, name, words):
    status, output, seconds = struck[name]
    assert status == 1
    assert "resumed from" in output
    assert re.search(rf"mirage: {words}.*the run ends \(train\.hang_seconds=6\)", output), output
    assert seconds < 60


def sleeping(launcher: int) -> list[int]:
    """A launcher's children that have become `sleep`."""
    children = map(int, Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split())
    return [n for n in children if _command(n) == "sleep\n"]


def _command(process: int) -> str:
    """The name of what a process runs; empty where it has ended, also while its file is read."""
    try:
        return Path(f"/proc/{process}/comm").read_text()
    except OSError:
        return ""


def test_ranks_that_die_at_the_same_time_do_not_hold_their_launcher(tmp_path):
    """It is bash that may reap both at once, so the ranks can be anything; often, because it does not always."""
    rank = tmp_path / "rank"
    rank.write_text("#!/usr/bin/env bash\nif [[ $1 == -c ]]; then echo 1; else exec sleep 60; fi\n")
    rank.chmod(0o755)
    environment = {**os.environ, "MIRAGE_PYTHON": str(rank)}
    command = [str(REPOSITORY / "launch/local.sh"), "2", "train", "none"]
    for _ in range(12):
        run = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        until(lambda run=run: len(sleeping(run.pid)) == 2, run)
        for number in sleeping(run.pid):
            send(number, signal.SIGKILL)
        try:
            assert run.wait(30) == 128 + signal.SIGKILL
        finally:
            run.kill()
        assert "ended with status 137" in run.communicate()[1]


def _two(script: Path) -> list[subprocess.Popen]:
    """The script as two ranks."""
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, str(script)]
    return [
        subprocess.Popen(command, env={**shared, "RANK": r, "LOCAL_RANK": r}, stderr=subprocess.PIPE, text=True)
        for r in "01"
    ]


def test_ranks_at_different_points_are_named_and_one_that_fails_says_why_before_the_others_notice(tmp_path):
    script, log = tmp_path / "unequal.py", tmp_path / "log"
    script.write_text(
        "import os\n"
        f"os.dup2(os.open({str(log)!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 2)\n"
        "from mirage_dist import ranks\n"
        "w = ranks.start()\n"
        "try: ranks.gather(w, [1.0, 2.0], 'save' if w.rank else 'step 3')\n"
        "except RuntimeError as e: os.write(2, f'{w.rank}, {ranks.peer_lost(e)}: {e}\\n'.encode())\n"
        "if w.rank: raise ValueError('the cause')\n"
        "try: ranks.barrier(w, 'step 4')\n"
        "except RuntimeError as e: os.write(2, f'lost: {ranks.peer_lost(e)}\\n'.encode())\n"
    )
    statuses = []
    for rank in _two(script):
        rank.communicate(timeout=120)
        statuses.append(rank.returncode)
    assert statuses == [0, 1]
    text = log.read_text()
    for rank in "01":
        fault = "ranks are not at the same point (rank 0: step 3 with 2 values; rank 1: save with 2 values)"
        assert f"{rank}, None: {fault}\n" in text
    assert re.search(r"lost: .*(closed|reset) by peer", text)
    assert text.index("ValueError: the cause") < text.index("lost: ")


def test_a_rank_that_is_never_heard_of_is_missed(tmp_path):
    """It was stopped, or died, before its watchdog's first word."""
    script = tmp_path / "mute.py"
    script.write_text(
        "import time\n"
        "from mirage_dist import ranks\n"
        "from mirage_dist.train.watchdog import Watchdog\n"
        "w = ranks.start()\n"
        "time.sleep(3600) if w.rank else Watchdog(w, 2.0).start()\n"
        "ranks.barrier(w, 'step 1')\n"
    )
    ranks = _two(script)
    try:
        output = ranks[0].communicate(timeout=120)[1]
        assert ranks[0].returncode == 1
        assert "rank 1 on an unknown host, last at 'the start', is dead or stopped" in output
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def test_a_hang_leaves_the_stack_of_every_thread_of_every_rank_and_no_secret(tmp_path):
    """Also of the rank that hangs, whose watchdog still answers."""
    script = tmp_path / "hanging.py"
    script.write_text(
        "import os, time\n"
        "from pathlib import Path\n"
        "from mirage_dist import ranks\n"
        "from mirage_dist.train.watchdog import Watchdog\n"
        "def stuck(secret):\n"
        "    time.sleep(3600)\n"
        "w = ranks.start()\n"
        "ranks.barrier(w, 'step 1')\n"
        f"Watchdog(w, 3.0, Path({str(tmp_path)!r}) / 'hang').start()\n"
        "ranks.barrier(w, 'step 2')\n"
        "if w.rank: stuck('hunter2')\n"
        "ranks.barrier(w, 'step 3')\n"
    )
    ranks = _two(script)
    try:
        output = ranks[0].communicate(timeout=120)[1]
        assert ranks[0].returncode == 1
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    assert re.search(rf"mirage: rank 1 on {socket.gethostname()}, last at 'step 2', hangs", output)
    assert "; the stacks of 2 of 2 ranks are in" in output
    assert f"ranks are in {tmp_path}/hang; the run ends (train.hang_seconds=3)" in output
    for number, where, line in ((0, "'step 3' (call 3)", "in meet"), (1, "'step 2' (call 2)", "in stuck")):
        text = (tmp_path / f"hang/rank-{number:05d}.txt").read_text()
        assert f"rank {number} on {socket.gethostname()}, last at {where}" in text
        assert line in text
        assert "in _exchange" in text  # of every thread
        recorded = (tmp_path / f"hang/rank-{number:05d}.json").read_text()
        assert any("gather" in entry["profiling_name"] for entry in json.loads(recorded)["entries"])
        assert "hunter2" not in text + recorded
