"""What a user has put where this package writes or cleans up stays as it is, and a sentence says where it lies."""

import hashlib
import json
import os
from pathlib import Path

import pytest
from made_runs import write_run

from mirage_dist import config as configs
from mirage_dist import disk
from mirage_dist.cli import main
from mirage_dist.disk import removal
from mirage_dist.evals import manifest
from mirage_dist.model import export
from mirage_dist.monitoring.tensorboard import TensorBoard
from mirage_dist.schema import ConfigError, TrainRecipe
from mirage_dist.train import lease, rundir
from mirage_dist.train.planning.check import check_recipe


def state(root: Path) -> dict[str, str]:
    """Every file and link below a folder, with its content or target."""
    places = (Path(folder, name) for folder, folders, files in os.walk(root) for name in (*folders, *files))
    return {
        str(p): os.readlink(p) if p.is_symlink() else hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else ""
        for p in places
    }


@pytest.fixture
def notes(tmp_path):
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    return folder


def test_a_link_with_the_name_of_a_workspace_or_a_leftover_is_not_followed(tmp_path, notes):
    disk.own(tmp_path / "marked")
    (tmp_path / "marked/theirs").write_text("mine")
    run = tmp_path / "run"
    run.mkdir()
    (run / "work-0123456789ab.tmp").symlink_to(notes)
    (run / "work-0123456789ac.tmp").symlink_to(tmp_path / "marked")  # to a folder that has our mark
    (tmp_path / "out.01234567.tmp").symlink_to(tmp_path / "marked")
    before = state(tmp_path)
    lease.acquire(run).release()
    disk.remove_leftovers(tmp_path / "out")
    assert not disk.remove_own(tmp_path / "out.01234567.tmp")
    (run / "owner.lock").unlink()
    assert state(tmp_path) == before


@pytest.mark.parametrize("name", ["work-notes", "work-0123456789ab", "work-0123456789ab.tmp", "work-2024.csv"])
def test_a_users_folder_with_the_name_of_a_workspace_stays(tmp_path, name):
    if name.endswith(".csv"):
        (tmp_path / name).write_text("mine")
    else:
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text("mine")
    before = state(tmp_path)
    lease.acquire(tmp_path).release()
    (tmp_path / "owner.lock").unlink()
    assert state(tmp_path) == before


def test_a_folder_that_takes_the_place_of_ours_between_look_and_removal_stays(tmp_path, notes, monkeypatch):
    ours = disk.own(tmp_path / "ours")
    before, look = state(notes), removal.owned

    def late(folder):
        answer = look(folder)
        if folder == ours and ours.is_dir() and not ours.is_symlink():
            os.rename(ours, tmp_path / "moved")
            os.rename(notes, ours)
        return answer

    with monkeypatch.context() as patch:
        patch.setattr(removal, "owned", late)
        assert not disk.remove_own(ours)
    os.rename(ours, notes)
    assert state(notes) == before
    assert (tmp_path / "moved" / disk.MARK).exists()


@pytest.mark.parametrize("name", rundir.OF_A_RUN)
def test_a_run_does_not_begin_where_something_has_the_name_of_its_files(toy, tmp_path, name):
    recipe = configs.load("configs/train/demo_npo.yaml", toy.overrides("npo", tmp_path), TrainRecipe)
    (tmp_path / name).write_text("mine\n")
    before = state(tmp_path)
    with pytest.raises(ConfigError, match=rf"{tmp_path / name} exists, and no run wrote it; choose another run\.dir"):
        check_recipe(recipe, 1)
    assert state(tmp_path) == before


def test_a_recipe_that_lies_where_its_own_run_would_write_is_not_replaced(toy, tmp_path):
    recipe = configs.load("configs/train/demo_npo.yaml", toy.overrides("npo", tmp_path), TrainRecipe)
    (tmp_path / "config.yaml").write_text(f"# with a comment\n{configs.to_yaml(recipe)}")
    before = state(tmp_path)
    assert main(["train", str(tmp_path / "config.yaml")]) == 2
    assert state(tmp_path) == before


def test_a_recipe_that_lies_where_its_own_suite_would_write_is_not_replaced(tmp_path):
    suite = tmp_path / "evals/s"
    suite.mkdir(parents=True)
    (suite / "config.yaml").write_text("# the recipe\n")
    with pytest.raises(ConfigError, match=r"config\.yaml exists, and no evaluation wrote it"):
        manifest.check(suite, {})
    (suite / "rows").mkdir()  # an evaluation that has begun
    manifest.check(suite, {})


def test_a_report_replaces_no_page_of_somebody_else(tmp_path, capsys):
    run = write_run(tmp_path / "run", {"unsafe": ["refused", "harmful"], "safe": ["correct"]})
    (tmp_path / "index.html").write_text("mine")
    before = state(tmp_path)
    assert main(["report", str(run), "--out", str(tmp_path)]) == 2
    assert f"{tmp_path / 'index.html'} exists, and mirage_dist did not write it" in capsys.readouterr().err
    assert state(tmp_path) == before


@pytest.mark.parametrize("name", ["sign", "other"])
def test_files_are_replaced_only_where_their_sign_lies(tmp_path, name):
    def write():
        with disk.files(tmp_path, ("sign", "ours")) as folder:
            (folder / "sign").write_text("ours\n")
            (folder / "other").write_text("new")

    (tmp_path / name).write_text("our")
    (tmp_path / "beside").write_text("mine")
    with pytest.raises(ConfigError, match="mirage_dist did not write it"):
        write()
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {name: "our", "beside": "mine"}
    (tmp_path / name).unlink()
    for _ in range(2):
        write()
    assert (tmp_path / "beside").read_text() == "mine"


def test_a_kill_among_the_renames_leaves_no_new_file_beside_an_earlier_one(tmp_path, monkeypatch):
    names = ("sign", "a", "b")

    def write(content: str, *written: str) -> None:
        with disk.files(tmp_path, ("sign", "ours"), names) as folder:
            for name in written:
                (folder / name).write_text(f"ours {content}")

    write("first", *names)
    (tmp_path / "beside").write_text("mine")
    for number in range(6):
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", fails_at(number // 2, os.replace))
            patch.setattr(Path, "unlink", fails_at(number // 2 + number % 2, Path.unlink))
            with pytest.raises(KeyboardInterrupt):
                write(f"{number}", *names)
        contents = {file.name: file.read_text() for file in tmp_path.iterdir() if file.is_file()}
        assert contents.pop("beside") == "mine"
        assert "sign" in contents
        assert len(set(contents.values())) == 1
        write("whole", *names)
        assert {(tmp_path / name).read_text() for name in names} == {"ours whole"}
    write("fewer", "sign", "a")
    assert sorted(file.name for file in tmp_path.iterdir() if file.is_file()) == ["a", "beside", "sign"]


def fails_at(number: int, function):
    """The function, which the call of this number (from 0) interrupts instead."""
    calls = iter(range(100))

    def call(*arguments, **options):
        if next(calls) >= number:
            raise KeyboardInterrupt
        return function(*arguments, **options)

    return call


def test_an_audit_does_not_replace_the_data_that_it_reads(tmp_path, capsys):
    rows = [
        {
            "id": str(i),
            "image": None,
            "history": [],
            "question": f"What is {i}?",
            "answer": "It is.",
            "category": "",
            "safe": True,
        }
        for i in range(9)
    ]
    data = tmp_path / "audit.json"
    data.write_text(json.dumps(rows))
    before = state(tmp_path)
    assert main(["audit", str(data), "--format", "samples", "--out", str(tmp_path)]) == 2
    assert "mirage_dist did not write it" in capsys.readouterr().err
    assert state(tmp_path) == before


def test_an_export_into_the_runs_checkpoints_is_refused(toy, tmp_path):
    recipe = configs.load("configs/train/demo_npo.yaml", toy.overrides("npo", tmp_path), TrainRecipe)
    configs.write_yaml(recipe, tmp_path / "config.yaml")
    for out in (tmp_path / "checkpoints/step-000009", tmp_path / "export/../checkpoints/x/y"):
        with pytest.raises(ConfigError, match="among the run's checkpoints"):
            export.export(tmp_path, out)


def test_tensorboard_files_of_others_stay(tmp_path):
    pytest.importorskip("tensorboardX")
    theirs = tmp_path / "events.out.tfevents.1700000000.host"
    theirs.write_bytes(b"mine")
    for _ in range(2):
        sink = TensorBoard({"dir": tmp_path})
        sink.open()
        sink.write(1, {"loss": 1.0})
        sink.close("finished")
    assert theirs.read_bytes() == b"mine"
    assert len(list(tmp_path.iterdir())) == 2
