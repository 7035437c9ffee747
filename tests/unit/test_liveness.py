"""Who a process is, whether it lives, and what is known of one that the process table does not show."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from mirage_dist import liveness
from mirage_dist.config import REPOSITORY
from mirage_dist.liveness import Heartbeat, Observer, Owner

UNSHARE = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc"]


def in_another_namespace(code: str, *arguments: str) -> subprocess.Popen:
    """A Python process that has other process numbers, as in a container with this host's name."""
    command = [*UNSHARE, sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def namespaces_can_be_made() -> bool:
    return (
        shutil.which("unshare") is not None and subprocess.run([*UNSHARE, "true"], capture_output=True).returncode == 0
    )


def test_an_owner_comes_back_from_disk_as_it_was_written():
    owner = Owner.current()
    record = json.loads(json.dumps({**owner.record(), "rows": {"unsafe": 3}}))
    assert Owner.from_record(record) == owner
    assert owner.alive() is True
    assert Owner.current().token != owner.token


@pytest.mark.parametrize("missing", [field.name for field in dataclasses.fields(Owner)])
def test_a_record_that_lacks_a_field_is_nobody_who_lives_here(missing):
    record = Owner.current().record()
    del record[missing]
    if missing not in ("token", "job", "cluster", "restart", "since"):
        assert not Owner.from_record(record).alive()


def test_a_dead_process_a_zombie_and_another_one_of_the_same_number_are_dead():
    process = subprocess.Popen(["sleep", "60"])
    owner = dataclasses.replace(Owner.current(), pid=process.pid, process=liveness.process_start(process.pid))
    assert owner.alive() is True
    assert dataclasses.replace(owner, process="1").alive() is False
    process.kill()
    while liveness.process_start(process.pid) is not None:  # not waited for: a zombie
        time.sleep(0.01)
    assert owner.alive() is False
    process.wait()
    assert owner.alive() is False


@pytest.mark.parametrize("place", ["host", "boot", "namespace"])
def test_the_process_table_says_nothing_about_another_place(monkeypatch, place):
    owner = Owner.current()
    assert dataclasses.replace(owner, **{place: "another"}).alive() is None
    monkeypatch.setattr(liveness, "boot_id" if place == "boot" else "pid_namespace", lambda: "")
    assert dataclasses.replace(owner, boot="", namespace="").alive() is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root may signal every process")
def test_a_process_that_proc_hides_from_us_is_not_taken_for_dead(monkeypatch):
    monkeypatch.setattr(liveness, "process_start", lambda _: None)
    assert dataclasses.replace(Owner.current(), pid=1).alive() is None


@pytest.mark.skipif(not namespaces_can_be_made(), reason="this machine lets users make no namespaces")
def test_a_container_with_the_same_host_name_is_another_place():
    code = "from mirage_dist.liveness import *; import json; print(json.dumps(Owner.current().record())); input()"
    process = in_another_namespace(code)
    assert process.stdout is not None
    owner = Owner.from_record(json.loads(process.stdout.readline()))
    here = Owner.current()
    assert (owner.host, owner.boot) == (here.host, here.boot)
    assert owner.pid != process.pid
    assert owner.alive() is None
    process.communicate("\n")


def test_a_process_table_of_other_processes_than_this_containers_says_nothing(monkeypatch):
    """As where /proc is the host's: this process's number is there somebody else's."""
    owner, readlink = Owner.current(), os.readlink
    monkeypatch.setattr(os, "readlink", lambda path: "99999999" if path == "/proc/self" else readlink(path))
    assert liveness.pid_namespace() == ""
    assert owner.alive() is None
    assert Owner.current().alive() is None


def test_a_job_of_the_same_number_on_another_cluster_is_another_job(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "a")
    owner = Owner.current()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert owner.superseded()
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "b")
    assert not owner.superseded()


def test_only_a_later_start_of_the_same_job_supersedes(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    owner = Owner.current()
    for job, restart, expected in (("77", "1", False), ("77", "2", True), ("78", "2", False)):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
        assert owner.superseded() is expected
    monkeypatch.delenv("SLURM_JOB_ID")
    assert not owner.superseded()
    assert not dataclasses.replace(owner, job=None).superseded()


def test_a_heart_beats_until_it_is_stopped_whatever_the_disk_does(tmp_path, monkeypatch):
    monkeypatch.setattr(liveness, "BEAT_SECONDS", 0.01)
    file = tmp_path / "missing" / "beat"
    heartbeat = Heartbeat(file, lambda count: f"beat {count}").start()
    time.sleep(0.1)  # beats fail
    file.parent.mkdir()
    while not file.exists() or int(file.read_text().removeprefix("beat ") or 0) < 10:
        time.sleep(0.01)
    heartbeat.stop()
    last = file.read_text()
    time.sleep(0.05)
    assert file.read_text() == last
    heartbeat.stop()
    Heartbeat(file).stop()


def test_an_observer_times_stillness_from_its_own_first_look(tmp_path, monkeypatch):
    now, file = [100.0], tmp_path / "beat"
    monkeypatch.setattr(liveness.time, "monotonic", lambda: now[0])
    observer = Observer()

    def look(seconds: float) -> float:
        now[0] += seconds
        return observer.still_for(file)

    assert [look(0), look(5)] == [0.0, 5.0]  # no file, and still none
    file.write_text("1")
    assert [look(1), look(4)] == [0.0, 4.0]
    os.utime(file, (0, 0))  # whatever a clock says
    assert look(1) == 5.0
    file.write_text("2")
    assert look(1) == 0.0
    file.write_bytes(b"\xff")
    assert look(1) == 0.0


@pytest.mark.parametrize("text", [None, "", "{", "[1]", '"text"', '{"token": "a"'])
def test_what_is_no_whole_object_is_nothing(tmp_path, text):
    if text is not None:
        (tmp_path / "file").write_text(text)
    assert liveness.read(tmp_path / "file") is None


def test_a_process_gets_sigterm_when_one_of_its_parents_has_been_killed(monkeypatch):
    """Also one that did not start it itself, or had ended before it looked; one of another container is none."""
    parents = [subprocess.Popen(["sleep", "60"]) for _ in range(2)]
    here = f"{liveness.boot_id()}/{liveness.pid_namespace()}"
    listed = [f"other/{liveness.pid_namespace()}/1", *(f"{here}/{pid}" for pid in (parents[0].pid, parents[1].pid))]
    monkeypatch.setenv(liveness.PARENTS, " ".join(listed))
    code = "import time; from mirage_dist import liveness; liveness.end_with_parents(); print('up', flush=True)"
    command = [sys.executable, "-c", f"{code}; time.sleep(60)"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **liveness.child_environment()}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"up\n"
        time.sleep(2 * liveness.PARENTS_SECONDS)
        assert child.poll() is None
        parents[1].kill()  # and nobody waits for it: a zombie is no parent
        assert child.wait(30) == -signal.SIGTERM
    for parent in parents:
        parent.kill()
        parent.wait()
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as child:
        assert child.wait(30) == -signal.SIGTERM
