"""What goes wrong in a run: numbers that are none, full disks, damage, other jobs, what it depends on."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import forkserver
import pytest
from conftest import DEADLINE, launch, metrics, steps_done, until
from faults import events, memory, trees
from faults.check import differences
from faults.processes import ranks_of, send
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from mirage_dist import config, disk, state
from mirage_dist.config import REPOSITORY
from mirage_dist.evals import follow, runner, status, tracking
from mirage_dist.evals.sharing import files
from mirage_dist.model import export
from mirage_dist.monitoring import wandb_files
from mirage_dist.ranks import free_port
from mirage_dist.schema import ConfigError, EvalRecipe, TrainRecipe

SHORT = ("train.max_steps=6", "train.global_batch=8", "train.save_every=1", "train.keep_last=null")
pytestmark = pytest.mark.usefixtures("plain_environment")
TWO, ONE = "train.micro_batch=4", "train.micro_batch=8"


def command(toy, folder: Path, *own: str) -> tuple[str, ...]:
    return ("train", "configs/train/demo_npo.yaml", *toy.overrides("npo", folder), *SHORT, *own)


@pytest.fixture(scope="module")
def whole(toy):
    """A finished run on two ranks with a checkpoint at each of its six steps."""
    folder = toy.root / "faults/whole"
    launch(2, *command(toy, folder, TWO, "run.name=npo"))
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of it without the last checkpoint and the export."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    for gone in ("checkpoints/step-000006", "export"):
        shutil.rmtree(folder / gone)
    return folder


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below, when it was written and what it holds."""
    files = (f for f in folder.rglob("*") if f.is_file())
    return {str(f.relative_to(folder)): (f.stat().st_mtime_ns, f.read_bytes()) for f in files}


# ------------------------------------------------------------------------------------------------ evaluation


def suite_of(toy, folder: Path, **own: object) -> EvalRecipe:
    sets = {"unsafe": {"kind": "unsafe", "sources": [{"format": "samples", "path": f"{toy.root}/forget.jsonl"}]}}
    tree = {"suite": "s", "run": {"dir": str(folder)}, "sets": sets, "generation": {"max_new_tokens": 6}, **own}
    return config.from_tree(OmegaConf.create(tree), [], EvalRecipe, "a test")


def test_a_checkpoint_answers_as_its_export_does_and_leaves_none_behind(whole, toy, tmp_path):
    export.export(whole, tmp_path / "export", 4)

    def answers(name: str, **model: object) -> dict[str, str]:
        runner.evaluate(suite_of(toy, tmp_path / name, model={"dtype": "fp32", **model}))
        suite = tmp_path / name / "evals/s"
        assert sorted(f.name for f in suite.iterdir()) == sorted(
            ("claims", "config.yaml", "manifest.json", "metrics.json", "rows", "verdicts")
        )
        (file,) = (suite / "rows").iterdir()
        return {row["id"]: row["response"] for row in map(json.loads, file.read_text().splitlines())}

    exported = answers("a", path=str(tmp_path / "export"))
    assert len(set(exported.values())) > 1
    assert answers("b", run=str(whole), step=4) == exported
    with pytest.raises(ConfigError, match=r"model_hash"):
        answers("b", run=str(whole))
    with pytest.raises(ConfigError, match=r"no checkpoint step-000099 \(there: step-000001"):
        answers("c", run=str(whole), step=99)
    with pytest.raises(ConfigError, match=r"model\.path='x', run='y'; expected one of them"):
        answers("c", path="x", run="y")


def test_each_checkpoint_of_a_run_is_evaluated_as_it_comes(whole, copy, toy, monkeypatch):
    """The run is not over at first: its last checkpoint and its export come while it is followed."""
    recipe = config.load(copy / "config.yaml", [], TrainRecipe)
    offline = replace(recipe, run=replace(recipe.run, dir=str(copy)), monitor=replace(recipe.monitor, wandb="offline"))
    config.write_yaml(offline, copy / "config.yaml")
    for gone in (1, 2, 3):
        shutil.rmtree(copy / f"checkpoints/step-{gone:06d}")

    def history() -> list[dict]:
        file = copy / "evals/s/history.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def arrive() -> None:
        while [step["step"] for step in history()] != [4, 5]:
            time.sleep(0.01)
        for name in ("checkpoints/step-000006", "export"):
            shutil.copytree(whole / name, copy / "arriving")
            (copy / "arriving").rename(copy / name)

    monkeypatch.setattr(follow, "POLL_SECONDS", 0.05)
    late = threading.Thread(target=arrive, daemon=True)
    late.start()
    followed = suite_of(toy, copy, model={"path": "unused", "dtype": "fp32"}, follow=str(copy))
    follow.follow(followed)
    assert status.report(followed).count("20 of 20 answers (100.0%); 0 workers") == 3
    assert [step["step"] for step in history()] == [4, 5, 6]
    alone = runner.evaluate(
        suite_of(toy, copy.parent / "alone", model={"path": str(whole / "export"), "dtype": "fp32"})
    )
    assert alone is not None
    assert history()[-1]["entry"] == alone["judges"]["keyword"]["entry"]
    (records,) = copy.glob("wandb/offline-run-*/*.wandb")
    identity = json.loads((copy / "manifest.json").read_text())["wandb_id"]
    assert identity in records.name
    assert all(name in records.read_bytes() for name in (b"eval/asr/clean", b"eval/step"))
    assert not any(name in records.read_bytes() for name in (b"eval/outputs", b"response"))
    assert not list(copy.glob("wandb/offline-run-*/files/media/**/*.json"))


def test_model_outputs_go_to_wandb_only_by_option_and_no_more_than_its_number(whole, copy, toy, capsys):
    shutil.copytree(whole / "export", copy / "export")
    for gone in (1, 2, 3):
        shutil.rmtree(copy / f"checkpoints/step-{gone:06d}")
    followed = suite_of(toy, copy, model={"path": "unused", "dtype": "fp32"}, follow=str(copy), wandb_outputs=7)
    with pytest.raises(ConfigError, match=r"wandb_outputs=7: .*does not log to W&B"):
        follow.follow(followed)
    recipe = config.load(copy / "config.yaml", [], TrainRecipe)
    config.write_yaml(replace(recipe, monitor=replace(recipe.monitor, wandb="offline")), copy / "config.yaml")
    follow.follow(followed)
    assert "eval s: step 5: 7 of 20 answers go to W&B" in capsys.readouterr().out
    tables = sorted(copy.glob("wandb/offline-run-*/files/media/**/*.table.json"), key=lambda file: file.stat().st_mtime)
    places = []
    for step, file in zip((4, 5), tables, strict=True):
        table = json.loads(file.read_text())
        assert table["columns"] == ["set", "attack", "shot", "id", "category", "question", "response", "verdict"]
        answers = files.Answers(copy / f"evals/s/step-{step:06d}").refresh()
        judged = files.whole_objects("verdict", answers.folder.parent / "verdicts/keyword.jsonl")
        verdicts = {line["key"]: line["verdict"] for line in judged}
        outputs = {row["id"]: (row["response"], verdicts[row["key"]]) for row in answers.of(verdicts)}
        assert {row[3]: (row[6], row[7]) for row in table["data"]}.items() <= outputs.items()
        assert len(table["data"]) == 7
        places.append([row[:4] for row in table["data"]])
    assert places[0] == places[1]
    for file in copy.glob("wandb/offline-run-*/**/*"):
        if file.is_file() and file.stat().st_mode & 0o077:  # others may read it
            content = file.read_bytes()
            assert not any(answer.encode() in content for answer, _ in outputs.values() if answer), file
    # An evaluation that follows nothing adds its rates to the summary of the same W&B run.
    before = wandb_files.offline_files(copy / "wandb", json.loads((copy / "manifest.json").read_text())["wandb_id"])
    alone = suite_of(toy, copy, suite="alone", model={"run": str(copy), "step": 5, "dtype": "fp32"})
    result = tracking.evaluate(alone)
    (file,) = {*wandb_files.offline_files(copy / "wandb", before[0].stem[4:])} - {*before}
    updates = [item for record in wandb_files.records(file) for item in record.summary.update]
    summary = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in updates}
    leaf = result["judges"]["keyword"]["entry"]["asr"]["clean"]
    assert [summary[f"eval/alone/asr/clean{end}"] for end in ("", "_n", "_low", "_high")] == pytest.approx(
        [leaf["rate"], leaf["n"], *leaf["ci95"]]
    )
    with pytest.raises(ConfigError, match=r"wandb_outputs: belongs to `follow`"):
        suite_of(toy, copy, model={"path": "x"}, wandb_outputs=7)


# ------------------------------------------------------------------------------------------ damage on disk


def test_damaged_checkpoints_are_logged_each_with_its_fault_and_the_newest_whole_one_used(whole, copy, toy):
    (copy / "checkpoints/step-000006").mkdir()  # without a manifest it is no checkpoint
    five, four, three = (copy / f"checkpoints/step-{step:06d}" for step in (5, 4, 3))
    shard = five / "rank-00001-of-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    os.truncate(four / "rank-00000-of-00002.safetensors", 1000)
    (three / "rank-00000-of-00002.safetensors").unlink()
    two = copy / "checkpoints/step-000002/manifest.json"
    two.write_text(two.read_text().replace('"step": 2', '"step": 3'))
    # What a dead start left, and a clock that was years ahead when it did.
    stale = disk.own(copy / "work-0123456789ab.tmp") / "step-000006.tmp"
    stale.mkdir()
    (stale / "manifest.json").write_text("{}")
    (copy / "checkpoints/latest").write_text("step-000006")
    future = time.time() + 10 * 365 * 86400
    for file in copy.rglob("*"):
        os.utime(file, (future, future))
    output = launch(2, *command(toy, copy, TWO, "run.name=npo")).stdout
    for step, fault in (
        (6, "no readable manifest"),
        (5, r"rank-00001-of-00002\.safetensors does not have the SHA-256 of the manifest"),
        (4, r"rank-00000-of-00002\.safetensors has 1000 bytes, the manifest says \d+"),
        (3, r"rank-00000-of-00002\.safetensors is missing"),
        (2, "no readable manifest .*checksum"),
    ):
        assert re.search(rf"step-00000{step} is passed over: {fault}", output), output
    assert re.search(r"resumed from .*step-000001 at step 1", output)
    assert differences(copy, whole) == []


# ----------------------------------------------------------------------- disks that take nothing (more)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, of 24 MiB; None where this user may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        yield None
        return
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_while_saving_leaves_what_was_committed(whole, copy, toy, small_disk):
    arguments = command(toy, copy, TWO, "run.name=npo")
    if small_disk is None:
        # No file may grow beyond 256 KiB: logs still can be written, shards can not.
        limited = f"ulimit -f 256; trap '' XFSZ; exec {REPOSITORY}/launch/local.sh 2 \"$@\""
        environment = {**os.environ, "MIRAGE_PYTHON": sys.executable, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(["bash", "-c", limited, "x", *arguments], env=environment, capture_output=True, text=True)
    else:
        shutil.rmtree(copy / "checkpoints/step-000001")
        copy = Path(shutil.move(copy, small_disk / "run"))
        arguments = command(toy, copy, TWO, "run.name=npo")
        space = shutil.disk_usage(small_disk).free
        (small_disk / "others").write_bytes(bytes(space - 2**20))
        done = launch(2, *arguments, check=False)
        (small_disk / "others").unlink()
    before = contents(copy / "checkpoints/step-000005")
    assert done.returncode == 1
    assert re.search(r"step-000006\.tmp: cannot be written .* every checkpoint before it is whole", done.stderr)
    assert contents(whole / "checkpoints/step-000005").keys() == before.keys()
    assert (copy / "checkpoints/latest").read_text() == "step-000005"
    assert not (copy / "checkpoints/step-000006").exists()
    launch(2, *arguments)
    # The first step's checkpoint had to make room on the small disk.
    shutil.copytree(whole / "checkpoints/step-000001", copy / "checkpoints/step-000001", dirs_exist_ok=True)
    assert differences(copy, whole) == []


def test_a_run_directory_that_cannot_be_written_is_named(toy, copy, small_disk):
    arguments = command(toy, copy, ONE, "run.name=npo")
    if small_disk is None:
        copy.chmod(0o500)
    else:
        copy = Path(shutil.move(copy, small_disk / "run"))
        arguments = command(toy, copy, ONE, "run.name=npo")
        subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    before = contents(copy)
    done = launch(1, *arguments, check=False)
    assert done.returncode == 1
    assert re.search(rf"mirage: {copy}: the run directory cannot be written: .*(Read-only|denied)", done.stderr)
    assert contents(copy) == before
    copy.chmod(0o700) if small_disk is None else None


# ------------------------------------------------------------------------------------------- other jobs


@pytest.mark.parametrize("moment", ["reference", "steps"])
def test_an_orphan_of_a_requeued_job_that_comes_back_writes_nothing(toy, tmp_path, monkeypatch, moment):
    """Stopped in the reference cache or between two steps; its successor has finished when it goes on."""
    folder = tmp_path / "run"
    arguments = command(toy, folder, TWO)
    seen = {"reference": lambda: (folder / "reference").is_dir(), "steps": lambda: steps_done(folder) >= 2}
    monkeypatch.setenv("SLURM_JOB_ID", "4242")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    orphan = launch(2, *arguments, start=True)
    until(seen[moment], orphan)
    ranks = ranks_of(orphan.pid).values()
    for number in ranks:
        send(number, signal.SIGSTOP)
    try:
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        launch(2, *arguments)
        assert [m["step"] for m in metrics(folder)] == [1, 2, 3, 4, 5, 6]
        before = contents(folder)
    finally:
        for number in ranks:
            send(number, signal.SIGCONT)
    out, _ = orphan.communicate(timeout=DEADLINE)
    assert orphan.returncode == 1
    assert re.search(r"was taken over by|another job has taken this run directory over", out), out
    assert contents(folder) == before


def test_an_export_does_not_bring_a_removed_workspace_back(whole, tmp_path):
    with pytest.raises(FileNotFoundError):
        export.export(whole, tmp_path / "export", workspace=tmp_path / "work-gone.tmp")
    assert list(tmp_path.iterdir()) == []


def test_a_job_that_slurm_restarts_in_vain_is_stopped(toy, copy, monkeypatch):
    caches = {"reference_parts": 0, "reference_caches": len(list(copy.glob("reference/*/*.safetensors")))}
    for number in range(3):
        with (copy / "starts.jsonl").open("a") as file:
            start = {"job": "4242", "restart": str(number), "step": 5, **caches, "vision_parts": 0}
            file.write(state.sealed("start", {**start, "stopped": False}))
    monkeypatch.setenv("SLURM_JOB_ID", "4242")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    done = launch(1, *command(toy, copy, ONE, "run.name=npo"), check=False)
    assert done.returncode == 1
    assert "Slurm job 4242 has started 3 times from step 5 without a new checkpoint" in done.stderr
    assert "submit it again" in done.stderr


# -------------------------------------------------------------------------------- what a run depends on


def test_without_wandb_a_run_goes_on_says_so_and_is_recorded(toy, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "10")
    folder = tmp_path / "run"
    done = launch(1, *command(toy, folder, ONE, "monitor.wandb=online", "train.max_steps=2", "train.export=false"))
    assert re.search(
        r"W&B cannot be reached \(.*connection refused\); .* to be sent later with `wandb sync`", done.stdout
    )
    assert [m["step"] for m in metrics(folder)] == [1, 2]
    (record,) = folder.glob("wandb/offline-run-*/*.wandb")
    assert b"terms/forget" in record.read_bytes()


@pytest.mark.parametrize(
    ("change", "words"),
    [(["train.lr=0.5"], r"train\.lr: 0\.5 here"), (["seed=5"], r"seed: 5 here")],
)
def test_a_run_of_another_recipe_is_not_continued(copy, toy, change, words):
    done = launch(1, *command(toy, copy, ONE, "run.name=npo"), *change, check=False)
    assert done.returncode == 2
    assert re.search(words, done.stderr)


@pytest.mark.parametrize("stage", ["zero3", "zero2"])
def test_steps_without_a_finite_gradient_are_skipped_and_too_many_stop_the_run(toy, tmp_path, stage):
    arguments = [*command(toy, tmp_path / "run", TWO), "train.nonfinite_patience=3", "train.warmup=0"]
    # The first step moves so far that nothing after it is a number.
    arguments += ["train.lr=1e6", "train.weight_decay=1e6", "train.clip=0", f"deepspeed=configs/deepspeed/{stage}.json"]
    done = launch(2, *arguments, check=False)
    assert done.returncode == 1
    assert "not finite in 3 steps in a row" in done.stderr
    records = metrics(tmp_path / "run")
    assert [m["skipped"] for m in records] == [False, True, True]
    assert records[-1]["grad_norm"] is None


# --------------------------------------------------------------------------------------------- the harness


def test_the_harness_finds_what_is_wrong(whole, tmp_path):
    """It would be worth nothing if it passed these."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    assert differences(folder, whole) == []
    shard = folder / "checkpoints/step-000006/rank-00001-of-00002.safetensors"
    tensors = load_file(shard)
    name = next(n for n in tensors if n.startswith("param/"))
    tensors[name][0] += 1e-7
    save_file(tensors, shard)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([*lines, lines[-1]]))
    shutil.rmtree(folder / "checkpoints/step-000003")
    (folder / "checkpoints/latest").write_text("step-000005")
    (folder / "work-1.tmp").mkdir()
    (folder / "data.json").write_text("")
    listed = "\n".join(differences(folder, whole))
    for words in (
        "metrics.jsonl has steps [1, 2, 3, 4, 5, 6, 6]",
        "checkpoints ['step-000001', 'step-000002', 'step-000004'",
        "latest names step-000005, wanted step-000006",
        "step-000006/rank-00001-of-00002.safetensors is not that of the never-stopped run",
        "data.json is missing or empty",
        "work-1.tmp was left behind",
    ):
        assert words in listed


def test_the_harness_sees_every_event_and_every_difference(tmp_path):
    whole, other = tmp_path / "whole", tmp_path / "other"
    for folder in (whole, other):
        (folder / "rows").mkdir(parents=True)
        (folder / "manifest.json").write_text(json.dumps({"seed": 1, "date": folder.name}))
    (whole / "rows/worker-1764142000000000000-0123abcd.jsonl").write_text("a\nb\n")
    (other / "rows/worker-1764142000000000001-0123abce.jsonl").write_text("b\n")
    with events.Watch(other) as watch:
        (other / "rows/worker-1764142000000000002-0123abcf.jsonl").write_text("a\n")  # two starts, the same answers
        (other / "out.0123abcd.tmp/files").mkdir(parents=True)
        watch.look(1.0)
        (other / "out.0123abcd.tmp/files").rename(other / "out")
        while watch.look(0.1):
            pass
    assert {"create rows/worker-#-#.jsonl", "create out.#.tmp", "create out.#.tmp/files", "rename to out"} <= set(
        watch.counts
    )
    mine, wanted = trees.read(other), trees.read(whole)
    assert trees.unequal(mine, wanted) == trees.missing(mine, wanted) == []
    assert trees.more(mine, wanted) == {"out.#.tmp": 1, "out": 1}
    (other / "manifest.json").write_text('{"seed": 2}')
    (whole / "report").mkdir()
    assert trees.unequal(trees.read(other), wanted) == ["manifest.json"]
    assert trees.missing(mine, trees.read(whole)) == ["report"]


def test_killed_runs_end_as_if_they_had_not_been(tmp_path):
    out = tmp_path / "faults.json"
    harness = [sys.executable, "-m", "tests.faults", "--verbs", "train", "--kills", "3", "--seed", "3", "--out"]
    environment = {**os.environ, "MIRAGE_PYTHON": forkserver.python()}
    done = subprocess.run([*harness, str(out)], cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads(out.read_text())
    assert counts["kills"] == sum(counts["verbs"]["train"]["phases"].values()) >= 3
    wrong = ("lost", "differing", "litter", "orphans", "foreign_changed")
    assert {name: counts[name] for name in wrong} == dict.fromkeys(wrong, 0)


# ------------------------------------------------------------------------------------------- memory, descriptors


def test_memory_and_descriptors_do_not_grow_with_checkpoints(toy, tmp_path):
    """A checkpoint of this model has 2.8 MB: one that is kept, or half of it, would be seen at once."""
    samples = memory.training(toy, tmp_path / "run", forkserver.python(), steps=60, every=5)
    late = samples[len(samples) // 3 :]
    assert len(late) > 20
    assert 5 * memory.growth(samples, lambda sample: sample.bytes) < 500_000
    quarter = len(samples) // 4  # the least in each: a sample may come while a file is open
    second, last = samples[quarter : 2 * quarter], samples[3 * quarter :]
    assert min(sample.descriptors for sample in last) <= min(sample.descriptors for sample in second)


def test_memory_and_descriptors_do_not_grow_with_answers(tmp_path):
    """A row's key stays in memory, not its 4000 characters; allocations are counted, not pages."""
    tracemalloc.start()
    try:
        samples = memory.rows(tmp_path, 2000, lambda: tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert memory.growth(samples[:-1], lambda sample: sample.bytes) < 1000
    assert samples[-1].bytes - samples[0].bytes < 1000 * 2000
    assert max(sample.descriptors for sample in samples) <= samples[0].descriptors
