"""`mirage export --artifact`: what W&B's own file of an offline run records of an export, and what is refused before
weights are written. The records are read as W&B's protobuf messages; nothing is sent to W&B by a test.
"""

import base64
import hashlib
import json
import subprocess
import sys
import time

import pytest
from trained_runs import made_run

from mirage_dist import disk, runs
from mirage_dist.cli import main
from mirage_dist.monitoring import wandb_files, wandb_run

OFFLINE = "monitor.wandb=offline"


@pytest.fixture(scope="module")
def logged(toy, tmp_path_factory):
    return made_run(toy, tmp_path_factory.mktemp("runs") / "npo", OFFLINE)


def recorded(run) -> list:
    """The artifacts in W&B's files of a run."""
    every = [r for file in wandb_files.offline_files(run / "wandb", "4dtw7a0c") for r in wandb_files.records(file)]
    return [record.artifact for record in every if record.WhichOneof("record_type") == "artifact"]


def test_the_runs_own_wandb_run_records_every_file_by_place_and_checksum(logged, tmp_path, monkeypatch, capsys):
    """From another directory, `wandb sync` still has each file: places are absolute, checksums those of the bytes."""
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(logged), "out", "--artifact", "gadget-npo"]) == 0
    (artifact,) = recorded(logged)
    assert (artifact.name, artifact.type, artifact.run_id) == ("gadget-npo", "model", "4dtw7a0c")
    assert set(artifact.aliases) == {"step-3", "latest"}
    files = {str(f.relative_to(tmp_path / "out")): f for f in (tmp_path / "out").rglob("*") if f.is_file()}
    assert {entry.path for entry in artifact.manifest.contents} == files.keys() >= {"model.safetensors", "README.md"}
    for entry in artifact.manifest.contents:
        assert entry.local_path == str(files[entry.path])
        assert base64.b64decode(entry.digest) == hashlib.md5(files[entry.path].read_bytes()).digest()
    about = json.loads(artifact.metadata)
    assert about["checkpoint_hash"] == disk.sha256(logged / "checkpoints/step-000003/manifest.json")
    assert (about["step"], about["objective"], about["form"]) == (3, "npo", "merged")
    assert about["data"] == {"forget": "f" * 64, "retain": "r" * 64}
    printed = capsys.readouterr().out
    assert f"keep out until `wandb sync {logged}/wandb/offline-run-*` has uploaded it" in printed
    # Once more: the folder is found whole, and equal content is one version to W&B.
    assert main(["export", str(logged), "out", "--artifact", "gadget-npo"]) == 0
    assert {a.digest for a in recorded(logged)} == {artifact.digest}
    assert wandb_files.held(logged / "wandb", "4dtw7a0c").step == 0  # no step of training was made up


@pytest.mark.parametrize(
    ("own", "words", "message"),
    [
        ([OFFLINE], ["--artifact", "gadget npo"], "--artifact gadget npo: expected 1 to 128 letters"),
        ([], ["--artifact", "npo"], "as the first start wrote it, has monitor.wandb: off"),
        ([OFFLINE], ["--artifact", "npo", "--push", "lab/npo"], "--push and --artifact: give one"),
        (
            [OFFLINE, "model.lora={rank: 2, alpha: 4, dropout: 0.0, targets: [decoder]}"],
            ["--artifact", "npo", "--as", "adapter"],
            "--artifact npo: an adapter names its base model",
        ),
        ([OFFLINE], ["--artifact", "npo", "--dry-run"], "--dry-run: belongs to an upload; give --push OWNER/NAME"),
    ],
)
def test_what_cannot_be_recorded_is_refused_before_anything_is_written(toy, tmp_path, capsys, own, words, message):
    run = made_run(toy, tmp_path / "run", *own)
    assert main(["export", str(run), str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert not (run / "wandb").exists()


def test_without_wandb_the_status_is_1_and_the_export_stays_for_the_next_try(toy, tmp_path, monkeypatch, capsys):
    """Online is online: a recording for later would be no upload."""
    run = made_run(toy, tmp_path / "run", "monitor.wandb=online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")
    assert main(["export", str(run), str(tmp_path / "out"), "--artifact", "npo"]) == 1
    printed = capsys.readouterr().err
    assert "--artifact npo: W&B did not take" in printed
    assert "give the same command again" in printed
    assert (tmp_path / "out/model.safetensors").is_file()
    assert recorded(run) == []


def test_a_disk_without_room_for_the_record_is_a_failure(logged, tmp_path):
    """W&B reports nothing where it can write nothing; here no file may have more than 1 KiB."""
    words = ["export", str(logged), str(tmp_path / "out")]
    assert main(words) == 0
    command = [sys.executable, "-m", "mirage_dist.cli", *words, "--artifact", "other"]
    done = subprocess.run(["bash", "-c", 'ulimit -f 1; exec "$@"', "-", *command], capture_output=True, text=True)
    assert done.returncode == 1
    assert "--artifact other: W&B did not take" in done.stderr
    assert "other" not in {artifact.name for artifact in recorded(logged)}


def test_training_that_goes_online_leaves_what_exports_and_evaluations_recorded_to_be_sent(toy, tmp_path):
    """Its own offline steps reach W&B from metrics.jsonl; an artifact, or an evaluation's rates, from nowhere else."""
    run = made_run(toy, tmp_path / "run", OFFLINE)
    monitor = runs.recipe(run).monitor
    for evaluation in (False, True):
        own = wandb_run.options(monitor, str(run), "4dtw7a0c", evaluation)
        sink = wandb_run.WandbRun({**own, "say": lambda **_: None})
        sink.open()
        if evaluation:
            sink.summary({"eval/demo/asr": 0.5})
        else:
            sink.write(1, {wandb_files.OF_TRAINING: 7.0})
        sink.close("finished")
        time.sleep(1.1)  # W&B names a folder by the second
    assert main(["export", str(run), str(tmp_path / "out"), "--artifact", "npo"]) == 0
    wandb_files.mark_sent(run / "wandb", "4dtw7a0c")
    files = wandb_files.offline_files(run / "wandb", "4dtw7a0c")
    assert [file.with_name(f"{file.name}.synced").exists() for file in files] == [True, False, False]
