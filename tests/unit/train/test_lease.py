"""One job owns a run directory; one that another took over from can write nothing any more."""

import errno
import json
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest

from mirage_dist import disk, liveness, state
from mirage_dist.liveness import Owner, process_start
from mirage_dist.schema import RunError
from mirage_dist.train import lease as leases
from mirage_dist.train import rundir
from mirage_dist.train.lease import Fenced, acquire

# As in a container that has this host's name and process numbers of its own.
UNSHARE = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Beats come every 50 ms, and this is no Slurm job."""
    monkeypatch.setattr(liveness, "BEAT_SECONDS", 0.05)
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


FORGED = "f0f0f0f0f0f0"


def forge(root, **changes):
    """An owner.json and a workspace as another process left them."""
    owner = {**Owner.current().record(), "token": FORGED, **changes}
    (root / "owner.json").write_text(state.sealed("owner", owner))
    return disk.own(root / f"work-{FORGED}.tmp", Owner.from_record(owner))


@contextmanager
def beating(workspace):
    """The heartbeat of an owner elsewhere."""
    stop = threading.Event()

    def beat():
        count = 0
        while not stop.wait(0.02):
            count += 1
            (workspace / "beat").write_text(str(count))

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def names(root):
    return sorted(f.name for f in root.iterdir())


def test_what_is_released_leaves_nothing_behind(tmp_path):
    lease = acquire(tmp_path / "run")
    lease.publish("data.json", "{}")
    lease.release()
    assert names(tmp_path / "run") == ["data.json", "owner.lock"]
    acquire(tmp_path / "run").release()


def test_a_living_owner_on_this_host_is_named(tmp_path):
    lease = acquire(tmp_path)
    with pytest.raises(
        RunError, match=rf"belongs to a job on {socket.gethostname()}, process {os.getpid()}, .* running"
    ):
        acquire(tmp_path)
    lease.check()
    lease.release()


def test_a_slurm_job_is_named(tmp_path):
    forge(tmp_path, job="77", restart=2)
    with pytest.raises(RunError, match=r"belongs to Slurm job 77 \(restart 2\) on"):
        acquire(tmp_path)


def test_the_number_of_a_dead_owner_may_be_used_again_by_another_process(tmp_path):
    forge(tmp_path, process="1")  # a process of this number, started at another time
    acquire(tmp_path).release()
    other = subprocess.Popen(["sleep", "60"])
    forge(tmp_path, pid=other.pid, process=process_start(other.pid))
    with pytest.raises(RunError, match=f"process {other.pid},"):
        acquire(tmp_path)
    other.kill()  # and not waited for: a zombie is dead
    while process_start(other.pid) is not None:
        time.sleep(0.01)
    acquire(tmp_path).release()
    other.wait()


def test_a_host_that_has_started_anew_runs_nothing_of_before(tmp_path):
    forge(tmp_path, boot="before")  # alive by its number, but of another boot: only a beat could tell
    acquire(tmp_path).release()


def test_where_no_process_table_can_be_read_the_beat_tells(tmp_path, monkeypatch):
    monkeypatch.setattr(liveness, "boot_id", lambda: "")
    monkeypatch.setattr(liveness, "process_start", lambda _: None)
    forge(tmp_path)  # dead: nobody beats in its workspace
    lease = acquire(tmp_path)
    with pytest.raises(RunError, match="which is running"):
        acquire(tmp_path)
    lease.release()


def test_an_owner_on_another_host_whose_beat_moves_is_named_and_keeps_its_workspace(tmp_path):
    workspace = forge(tmp_path, host="node7", pid=4242)
    with beating(workspace), pytest.raises(RunError, match="belongs to a job on node7, process 4242"):
        acquire(tmp_path)
    assert names(tmp_path) == ["owner.json", "owner.lock", f"work-{FORGED}.tmp"]


DAMAGE = {
    "absent": None,
    "empty": b"",
    "an empty object": b"{}",
    "a list": b"[]",
    "nothing": b"null",
    "deep": b"[" * 10_000,
    "no text": b"\xff\x00",
    "another kind": state.sealed("start", {"token": FORGED}).encode(),
    "by an older version": json.dumps({"token": FORGED, "host": "node7"}).encode(),
}


@pytest.mark.parametrize(
    ("damage", "mark"),
    [*((damage, "whole") for damage in DAMAGE)]
    + [("empty", mark) for mark in ("", "[]", '{"pid": "x", "host": 7, "token": ["a"]}', "[" * 10_000)],
)
def test_a_damaged_owner_file_neither_hides_a_live_owner_nor_locks_the_run(tmp_path, damage, mark):
    workspace = forge(tmp_path, **({} if mark == "whole" else {"host": "node7"}))
    if mark != "whole":
        (workspace / disk.MARK).write_text(mark)
    if (content := DAMAGE[damage]) is None:
        (tmp_path / "owner.json").unlink()
    else:
        (tmp_path / "owner.json").write_bytes(content)
    owner = f"process {os.getpid()}," if mark == "whole" else f"only the token {FORGED} is known"
    with beating(workspace), pytest.raises(RunError, match=owner):
        acquire(tmp_path)
    assert workspace.is_dir()
    (workspace / disk.MARK).write_text("{}")  # not the mark of a process that lives, and no beat any more
    acquire(tmp_path).release()
    assert names(tmp_path) == ["owner.lock"]


def test_a_damaged_owner_file_is_named(tmp_path, capsys):
    (tmp_path / "owner.json").write_text("{")
    acquire(tmp_path).release()
    assert f"{tmp_path}/owner.json: holds no whole object" in capsys.readouterr().out


@pytest.mark.skipif(
    subprocess.run([*UNSHARE, "true"], capture_output=True).returncode != 0, reason="users can make no namespaces here"
)
def test_two_containers_with_one_host_name_are_not_taken_for_one_another(tmp_path):
    """The owner's process number means another process here, or none; only its heartbeat shows that it lives."""
    code = (
        "import sys; from pathlib import Path; from mirage_dist import liveness; liveness.BEAT_SECONDS = 0.02\n"
        "from mirage_dist.train.lease import acquire\n"
        "lease = acquire(Path(sys.argv[1])); print(lease.owner.pid, flush=True); input()"
    )
    command = [*UNSHARE, "--kill-child", sys.executable, "-c", code, str(tmp_path)]
    container = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert container.stdout is not None
    number = int(container.stdout.readline())
    assert number != container.pid
    with pytest.raises(RunError, match=f"belongs to a job on {socket.gethostname()}, process {number},"):
        acquire(tmp_path)
    container.kill()
    container.communicate()
    acquire(tmp_path).release()


@pytest.mark.parametrize("beat", [None, "", "41"])
def test_an_owner_on_another_host_whose_beat_stands_still_is_taken_over_from(tmp_path, beat):
    workspace = forge(tmp_path, host="node7")
    if beat is not None:
        (workspace / "beat").write_text(beat)
    begin = time.monotonic()
    lease = acquire(tmp_path)
    assert time.monotonic() - begin >= leases.BEATS_MISSED * liveness.BEAT_SECONDS
    assert not workspace.exists()
    lease.release()


def test_clocks_decide_nothing(tmp_path):
    """An owner from the future, by its own word and by every file's time, is alive or not by its process alone."""
    future = time.time() + 10 * 365 * 86400
    for alive in (True, False):
        workspace = forge(tmp_path, since="2036-01-01 00:00:00 +0000", **({} if alive else {"process": "1"}))
        (workspace / "beat").write_text("7")
        for file in (tmp_path / "owner.json", workspace / "beat", workspace, tmp_path):
            os.utime(file, (future, future))
        if alive:
            with pytest.raises(RunError, match="since 2036-01-01"):
                acquire(tmp_path)
        else:
            acquire(tmp_path).release()


def test_a_requeued_job_takes_over_from_what_is_left_of_its_last_start(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    orphan = acquire(tmp_path)
    with pytest.raises(RunError, match=r"Slurm job 77 \(restart 0\)"):
        acquire(tmp_path)  # the same start once more
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    successor = acquire(tmp_path)
    before = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file() and f.name != "beat"}
    with pytest.raises(Fenced, match=r"was taken over by Slurm job 77 \(restart 1\)"):
        orphan.check()
    with pytest.raises(Fenced), orphan.write_failures():
        orphan.publish("manifest.json", "{}")
    orphan.release()
    assert {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file() and f.name != "beat"} == before
    successor.check()
    successor.release()


def test_another_job_with_a_higher_restart_count_is_not_the_successor(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    orphan = acquire(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "78")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "5")
    with pytest.raises(RunError, match="belongs to Slurm job 77"):
        acquire(tmp_path)
    orphan.release()


def test_stale_workspaces_go_even_half_removed_ones(tmp_path):
    for name, inner in (
        ("work-0123456789ab.tmp", "step-4.tmp"),
        ("work-ba9876543210.tmp.01234567.gone", "step-2.gone"),
    ):
        (disk.own(tmp_path / name) / inner).mkdir()
        (tmp_path / name / inner / "rank-00000-of-00001.safetensors").write_bytes(b"half")
    acquire(tmp_path).release()
    assert names(tmp_path) == ["owner.lock"]


def test_what_a_user_put_into_the_run_directory_stays(tmp_path):
    """By names that ours resemble, and by exactly such a name."""
    theirs = ["work-notes/plan.md", "work-2024.csv", "work-0123456789ab.tmp/mine.txt", "work-01.tmp/mine.txt"]
    for name in theirs:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    acquire(tmp_path).release()
    assert [name for name in theirs if not (tmp_path / name).is_file()] == []


def test_a_predecessor_that_cannot_be_fenced_stops_the_start(tmp_path):
    (forge(tmp_path, pid=0, process=None) / disk.MARK).unlink()
    (tmp_path / f"work-{FORGED}.tmp/file").write_text("")
    with pytest.raises(RunError, match=r"work-f0f0f0f0f0f0\.tmp: the workspace of .*holds no .mirage_dist; remove it"):
        acquire(tmp_path)


def test_of_many_that_start_at_once_one_wins(tmp_path):
    script = (
        "import sys, time; from pathlib import Path; from mirage_dist.schema import RunError\n"
        "from mirage_dist.train.lease import acquire\n"
        "try: acquire(Path(sys.argv[1]))\n"
        "except RunError as error: sys.exit(f'{error}')\n"
        "print('owner', flush=True); time.sleep(60)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    jobs = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    try:
        deadline = time.monotonic() + 60
        while sum(job.poll() is not None for job in jobs) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        (winner,) = [job for job in jobs if job.poll() is None]
        for job in jobs:
            if job is not winner:
                assert f"process {winner.pid}," in job.communicate()[1]
    finally:
        for job in jobs:
            job.kill()
            job.communicate()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_takes_nothing_more_is_told(tmp_path, number):
    lease = acquire(tmp_path)
    with pytest.raises(RunError, match=r"cannot be written .* every checkpoint in it is whole"), lease.write_failures():
        raise OSError(number, os.strerror(number))
    with pytest.raises(FileNotFoundError), lease.write_failures():  # somebody else's file
        (tmp_path / "nowhere").read_text()
    lease.release()


def test_a_directory_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="the run directory cannot be written"):
        acquire(tmp_path / "file/run")


def start(lease, root):
    """One start of Slurm job 77 that makes nothing."""
    rundir.count_start(lease, 3)
    return [json.loads(line) for line in (root / "starts.jsonl").read_text().splitlines()]


def test_a_job_that_starts_over_without_getting_on_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    lease = acquire(tmp_path)
    for number in range(3):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(number))
        assert len(start(lease, tmp_path)) == number + 1
    with pytest.raises(RunError, match=r"Slurm job 77 has started 3 times from step 0 without .* submit it again"):
        start(lease, tmp_path)
    # A part of the reference cache is a step forward, and so is a checkpoint, and a new submission.
    part = tmp_path / "reference/key/rank-00000-of-00001-width-4-part-000-of-002.npz"
    part.parent.mkdir(parents=True)
    part.touch()
    assert len(start(lease, tmp_path)) == 4
    for number in range(3):
        (tmp_path / f"checkpoints/step-{number + 1:06d}").mkdir(parents=True)
        start(lease, tmp_path)
    for _ in range(2):
        start(lease, tmp_path)
    with pytest.raises(RunError, match="from step 3"):
        start(lease, tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "78")
    assert start(lease, tmp_path)[-1]["job"] == "78"
    lease.release()


@pytest.mark.parametrize("damage", ["", "[]", "[" * 10_000, '{"job": "77"}\n', "\udcff", "cut", "flipped"])
def test_damaged_starts_are_named_and_counted_anew(tmp_path, monkeypatch, capsys, damage):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    lease, file = acquire(tmp_path), tmp_path / "starts.jsonl"
    for _ in range(2):
        start(lease, tmp_path)
    whole = file.read_text()
    damaged = {"cut": whole[:-20], "flipped": whole.replace('"step": 0', '"step": 9', 1)}.get(damage, damage)
    file.write_bytes(os.fsencode(damaged))
    assert len(start(lease, tmp_path)) == 1
    assert (f"{file}: line" in capsys.readouterr().out) == (damaged != "")
    assert len(start(lease, tmp_path)) == 2
    lease.release()


def test_starts_by_hand_are_not_counted(tmp_path):
    lease = acquire(tmp_path)
    for _ in range(6):
        start(lease, tmp_path)
    lease.release()


def test_a_start_that_stopped_on_request_does_not_count(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    lease = acquire(tmp_path)
    for number in range(5):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(number))
        assert ("asked to stop 3 times before training began" in caplog.text) == (number > 3)
        start(lease, tmp_path)
        rundir.forget_start(lease)
    assert "sbatch --time" in caplog.text
    for number in range(5, 8):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(number))
        start(lease, tmp_path)
    with pytest.raises(RunError, match="has started 3 times from step 0"):
        start(lease, tmp_path)
    # What is no start of this job is left alone.
    monkeypatch.setenv("SLURM_JOB_ID", "78")
    before = (tmp_path / "starts.jsonl").read_text()
    rundir.forget_start(lease)
    assert (tmp_path / "starts.jsonl").read_text() == before
    lease.release()
