"""Retention keeps what the recipe asks for; a commit that was cut off is settled; damage takes nobody's place."""

import json
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mirage_dist import disk, state
from mirage_dist.model import export
from mirage_dist.ranks import Group
from mirage_dist.schema import ConfigError, RunError, TrainConfig
from mirage_dist.train.checkpoints.commit import Saver, committed, damage, kept, newest, read_manifest, step_of

ALONE = Group(0, 0, 1, torch.device("cpu"))


def config(**options) -> TrainConfig:
    return TrainConfig(lr=1.0, global_batch=1, micro_batch=1, **options)


def metrics(steps, values):
    return {step: {"loss": value} for step, value in zip(steps, values, strict=True)}


def test_by_hand():
    there = metrics(range(10, 80, 10), [5.0, 1.0, 4.0, 3.0, 1.0, 2.0, 6.0])
    assert kept(there, config(keep_last=None)) == set(there)
    assert kept(there, config(keep_last=2)) == {60, 70}
    assert kept(there, config(keep_last=1, keep_every=30)) == {30, 60, 70}
    assert kept(there, config(keep_last=1, keep_best="loss")) == {50, 70}  # of equal ones the newest
    assert kept({}, config()) == set()
    assert kept({10: {}, 20: {}}, config(keep_last=1, keep_best="loss")) == {20}  # no step had a finite loss


@given(
    st.dictionaries(st.integers(1, 500), st.floats(-1e6, 1e6), max_size=30),
    st.integers(1, 5),
    st.none() | st.integers(1, 40),
    st.booleans(),
)
def test_retention_keeps_what_the_recipe_says_and_nothing_else(losses, last, every, best):
    train = config(keep_last=last, keep_every=every, keep_best="loss" if best else None)
    keep = kept(metrics(losses, losses.values()), train)
    assert keep <= set(losses)
    assert set(sorted(losses)[-last:]) <= keep
    assert {s for s in losses if every and s % every == 0} <= keep
    others = keep - set(sorted(losses)[-last:]) - {s for s in losses if every and s % every == 0}
    assert len(others) <= best
    if best and losses:
        assert min(losses.values()) == min(losses[s] for s in keep)
    # Retention goes on from what it left: taking away twice is taking away once.
    assert kept({s: {"loss": losses[s]} for s in keep}, train) == keep


@pytest.fixture
def folder(tmp_path):
    """Committed steps 2, 4, 6 and 8, a workspace, and `latest` as it was before the last one's commit was cut off."""
    for step in (2, 4, 6, 8):
        made = tmp_path / f"checkpoints/step-{step:06d}"
        made.mkdir(parents=True)
        content = {"step": step, "files": {}, "metrics": {"loss": float(step)}}
        (made / "manifest.json").write_text(state.sealed("checkpoint", content, indent=1))
    (tmp_path / "checkpoints/latest").write_text("step-000006")
    (tmp_path / "work-1.tmp").mkdir()
    return tmp_path / "checkpoints"


def saver(folder: Path, **options) -> Saver:
    return Saver(folder, folder.parent / "work-1.tmp", config(**options), ALONE)


def steps(folder: Path) -> list[int]:
    return [step_of(c) for c in committed(folder)]


def test_a_commit_that_was_cut_off_is_settled(folder):
    saver(folder, keep_last=2).settle(8)
    assert (folder / "latest").read_text() == "step-000008"
    assert steps(folder) == [6, 8]


def test_a_resume_from_an_older_checkpoint_points_to_it_and_leaves_the_damaged_one(folder):
    saver(folder, keep_last=2).settle(6)
    assert (folder / "latest").read_text() == "step-000006"
    assert steps(folder) == [4, 6, 8]


def test_a_checkpoint_without_a_readable_manifest_ends_no_save_and_takes_no_place(folder):
    (folder / "step-000006/manifest.json").write_text("{")
    saver(folder, keep_last=2).settle(8)
    assert steps(folder) == [4, 6, 8]


def test_a_metric_that_comes_after_the_commit_decides_what_is_kept(folder):
    own = saver(folder, keep_last=1, keep_best="held")
    for step, value in ((2, 0.5), (4, 0.25), (6, 0.75)):
        Saver(folder, own.workspace, config(keep_last=None), ALONE).amend(step, {"held": value})
    own.settle(8)
    assert steps(folder) == [4, 8]
    assert read_manifest(folder / "step-000004") == {"step": 4, "files": {}, "metrics": {"loss": 4.0, "held": 0.25}}
    own.amend(8, {"held": 0.125})
    assert steps(folder) == [8]


def test_what_cannot_be_removed_is_reported(folder, monkeypatch, capsys):
    def refused(*_):
        raise PermissionError("not yours")

    monkeypatch.setattr(disk.os, "rename", refused)
    saver(folder, keep_last=3).settle(8)
    assert "step-000002: retention cannot remove it (not yours)" in capsys.readouterr().out


def test_a_manifest_with_any_byte_changed_is_damaged_or_says_the_same(folder):
    manifest = folder / "step-000004/manifest.json"
    content, original = manifest.read_bytes(), read_manifest(manifest.parent)
    assert damage(manifest.parent) is None
    for place in range(len(content)):
        for change in (1, 2, 32, 255):
            manifest.write_bytes(content[:place] + bytes([content[place] ^ change]) + content[place + 1 :])
            with suppress(ConfigError):  # of the version of a format that does not exist yet
                assert damage(manifest.parent) is not None or read_manifest(manifest.parent) == original


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", "[" * 10_000, json.dumps({"files": {}}), "\x00" * 40])
def test_a_manifest_that_is_none_is_damage(folder, text):
    (folder / "step-000004/manifest.json").write_text(text)
    assert "no readable manifest" in str(damage(folder / "step-000004"))


def foreign(folder: Path) -> list[str]:
    """What a user put among the checkpoints."""
    (folder / "step-000002.bak1").mkdir()
    (folder / "step-old2").mkdir()
    (folder / "step-000002 (copy)").mkdir()
    (folder / "step-99999999999999999999").mkdir()
    (folder / "step-000003").write_text("a file")
    (folder / "step-000005").symlink_to("nowhere")
    (folder / "notes.txt").write_text("mine")
    return sorted({entry.name for entry in folder.iterdir()} - {"latest", *(c.name for c in committed(folder))})


def test_what_is_no_checkpoint_is_named_once_and_stays(folder, capsys):
    others = foreign(folder)
    assert len(others) == 7
    saver(folder, keep_last=1).settle(8)
    assert newest(folder, ALONE) == folder / "step-000008"
    assert export.chosen(folder, None) == folder / "step-000008"
    assert steps(folder) == [8]
    assert capsys.readouterr().out.count("passed over: " + ", ".join(others)) == 1
    assert [name for name in others if not (folder / name).is_symlink() and not (folder / name).exists()] == []


def test_a_model_is_that_of_the_newest_checkpoint_or_of_a_step_that_is_named(folder):
    """A training goes on from an older one; an older model in place of the newest would not be noticed."""
    (folder / "step-000012").mkdir()  # a user's
    assert export.chosen(folder, None) == folder / "step-000008"
    (folder / "step-000008/manifest.json").write_text("")
    assert newest(folder, ALONE) == folder / "step-000006"
    with pytest.raises(ConfigError, match=r"step-000008 is damaged: .*name the newest whole one: step 6 \(.*--step 6"):
        export.chosen(folder, None)
    with pytest.raises(ConfigError, match=r"step-000008 is damaged: .*; nothing was exported"):
        export.chosen(folder, 8)
    assert export.chosen(folder, 6) == folder / "step-000006"


def test_a_copy_under_another_steps_name_is_damaged(folder):
    (folder / "step-000004").rename(folder / "step-000009")
    assert "is the manifest of step 4" in str(damage(folder / "step-000009"))
    assert newest(folder, ALONE) == folder / "step-000008"


@pytest.mark.parametrize("kind", ["file", "link", "folder"])
def test_what_lies_where_a_checkpoint_will_be_written_stops_the_start_and_stays(folder, kind):
    place = folder / "step-000010"
    if kind == "file":
        place.write_text("mine")
    elif kind == "link":
        place.symlink_to("nowhere")
    else:
        place.mkdir()
        (place / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match=r"step-000010: is in the place of a checkpoint .* move it away"):
        saver(folder).settle(8)
    assert place.is_symlink() or place.exists()
    saver(folder).settle(10)  # it is in the way of no later step


def test_what_a_user_put_into_a_checkpoint_keeps_it(folder, capsys):
    (folder / "step-000002/notes.txt").write_text("mine")
    saver(folder, keep_last=1).settle(8)
    assert steps(folder) == [2, 8]
    assert "step-000002: retention leaves it, because of what others put there: notes.txt" in capsys.readouterr().out
