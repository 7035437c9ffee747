"""The flat reference cache: merged of whole parts, read as needed, the same bits whatever was stopped or damaged."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Engine, run_of
from hypothesis import given
from hypothesis import strategies as st
from opens import Opens
from safetensors.numpy import load_file

from mirage_dist import config as configs
from mirage_dist import disk, signals
from mirage_dist.model import load
from mirage_dist.model.reference import LogProbs
from mirage_dist.objectives.base import make
from mirage_dist.schema import RunError, TrainRecipe
from mirage_dist.train.caches import flat
from mirage_dist.train.caches import reference as reference_cache
from mirage_dist.train.feed import Feed, read_streams


class Counted(Engine):
    """Counts its forwards."""

    calls = 0

    def forward(self, *arguments):
        self.calls += 1
        return super().forward(*arguments)


@pytest.fixture(scope="module")
def parts(toy):
    """Feed and policy of a run whose cache takes five parts of a batch."""
    overrides = [*toy.overrides("npo", toy.root / "cached"), "train.micro_batch=4"]
    recipe = configs.load("configs/train/demo_npo.yaml", overrides, TrainRecipe)
    objective = make(recipe.objective)
    feed = Feed(recipe, objective.needs, read_streams(recipe, objective.needs), load.processor(recipe.model))
    return recipe, objective, feed, load.policy(recipe.model, "fp32", {})


@pytest.fixture
def run(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(reference_cache, "BATCHES_A_PART", 1)
    recipe, objective, feed, policy = parts
    run = run_of(recipe, objective, feed, Counted(policy))
    lease = type(run.lease)(tmp_path, run.lease.owner)
    lease.workspace.mkdir(parents=True)
    return type(run)(recipe, run.group, objective, feed, run.engine, {}, run.manifest, lease)


def filled(run) -> tuple[int, list[list[float]]]:
    """How many forwards the cache takes, and every sample's log-probabilities."""
    run.engine.calls = 0
    cache = reference_cache.fill(run)
    samples = [("forget", index) for index in range(len(run.feed.samples["forget"]))]
    rows = [cache.rows([sample], torch.device("cpu")).tolist() for sample in samples]
    assert cache.rows(samples[::-1], torch.device("cpu")).tolist() == [value for row in rows[::-1] for value in row]
    return run.engine.calls, rows


def files(run) -> list[str]:
    return sorted(file.name for file in run.root.glob("reference/*/*"))


@pytest.fixture(scope="module")
def computed(parts):
    """What the policy gives, batch by batch."""
    recipe, objective, feed, policy = parts
    whole, engine = LogProbs(), Engine(policy)
    for rows in feed.every_sample(("forget",), run_of(recipe, objective, feed, engine).group):
        reference_cache.add(whole, engine, feed.collate(rows), "forget")
    return [whole.table["forget", index].tolist() for index in range(len(feed.samples["forget"]))]


def test_parts_become_one_file_and_values_are_those_of_the_policy(run, computed):
    assert filled(run) == (5, computed)
    assert files(run) == [reference_cache.WHOLE]
    assert filled(run) == (0, computed)
    content = load_file(*run.root.glob("reference/*/*"))  # an ordinary safetensors file
    assert content["forget/values"].tolist() == [value for row in computed for value in row]
    assert np.diff(content["forget/starts"]).tolist() == [len(row) for row in computed]


class Killed(BaseException):
    pass


def test_a_merge_that_is_killed_is_made_again_from_the_same_parts(run, computed, monkeypatch):
    replace, remove, removed = os.replace, disk.remove, []

    def killed_at_the_rename(source, target):
        if Path(target).name == reference_cache.WHOLE:
            raise Killed
        replace(source, target)

    def killed_at_the_third_part(*given):
        removed.append(remove(*given))
        if len(removed) == 3:
            raise Killed

    for place, name, killed, left in (
        (flat, "write", lambda *_: killed_at_the_rename("", reference_cache.WHOLE), 5),
        (os, "replace", killed_at_the_rename, 5),
        (disk, "remove", killed_at_the_third_part, 3),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, killed)
            with pytest.raises(Killed):
                reference_cache.fill(run)
        assert len(files(run)) == left
    assert reference_cache.WHOLE in files(run)
    assert filled(run) == (0, computed)
    assert files(run) == [reference_cache.WHOLE]


def test_a_stop_keeps_the_parts_and_one_that_is_damaged_meanwhile_is_computed_again_alone(run, computed, monkeypatch):
    save = LogProbs.save

    def stopped(self, handle):
        save(self, handle)
        if run.engine.calls == 2:
            signals.handler(10, None)

    with monkeypatch.context() as patch:
        patch.setattr(LogProbs, "save", stopped)
        with pytest.raises(signals.StopRequested):
            filled(run)
    signals.clear()
    assert len(files(run)) == 2
    with monkeypatch.context() as patch:  # the others too, but no merge
        patch.setattr(reference_cache, "_merge", lambda *_: [][0])
        with pytest.raises(IndexError):
            filled(run)
    assert run.engine.calls == 3
    parts = sorted(run.root.glob("reference/*/*"))
    assert len(parts) == 5
    parts[1].write_bytes(parts[1].read_bytes()[:-900])
    shutil.copy(parts[0], parts[3])
    # The damaged one, alone; then all, since one lies under another's name.
    assert filled(run) == (6, computed)


@pytest.mark.parametrize("damage", ["cut", "empty", "header", "a byte", "of another number of samples"])
def test_a_damaged_file_is_computed_again_and_named(run, computed, capsys, damage):
    filled(run)
    (file,) = run.root.glob("reference/*/*")
    raw = file.read_bytes()
    if damage == "of another number of samples":
        arrays = {title: array[:-1] for title, array in load_file(file).items()}
        flat.write(file, arrays, "log-probabilities", run.lease.workspace)
    else:
        place = 20 if damage == "header" else len(raw) - 5
        changed = raw[:place] + bytes([raw[place] ^ 8]) + raw[place + 1 :]
        file.write_bytes({"cut": raw[:-7], "empty": b""}.get(damage, changed))
    assert filled(run) == (5, computed)
    if damage != "of another number of samples":
        assert f"{file}: damaged (" in capsys.readouterr().out


def test_parts_of_another_number_of_ranks_and_of_the_first_versions_are_merged(run, computed, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(reference_cache, "_remove_parts", lambda *_: None)
        filled(run)
    folder = next(run.root.glob("reference/*"))
    for number, part in enumerate(sorted(folder.glob("*.npz"))[:4]):  # as of two ranks and two parts
        part.rename(folder / f"rank-{number // 2:05d}-of-00002-width-9-part-{number % 2:03d}-of-003.npz")
    last = next(folder.glob("ranks-*"))
    shutil.copy(last, folder / "rank-00000-of-00002-width-9-part-002-of-003.npz")
    last.rename(folder / "rank-00001-of-00002-width-9-part-002-of-003.npz")
    (folder / "mine.npz").write_text("mine")
    (folder / reference_cache.WHOLE).unlink()
    assert filled(run) == (0, computed)
    assert files(run) == [reference_cache.WHOLE, "mine.npz"]


def test_files_that_are_damaged_again_and_again_end_the_run(run, monkeypatch):
    write = flat.write
    monkeypatch.setattr(flat, "write", lambda file, *more: (write(file, *more), os.truncate(file, 100)))
    monkeypatch.setattr(reference_cache, "_remove_parts", lambda *_: None)
    with pytest.raises(RunError, match=r"what was computed is damaged again; .* check this disk"):
        reference_cache.fill(run)


ARRAY = st.tuples(st.sampled_from(["I64", "I32", "F32", "U8"]), st.integers(0, 40), st.integers(1, 3))


@given(st.lists(ARRAY, max_size=4), st.data())
def test_a_flat_file_gives_what_was_written_or_is_damaged(tmp_path_factory, arrays, data):
    folder, block = tmp_path_factory.mktemp("flat"), flat.BLOCK
    flat.BLOCK = 16
    try:
        made = {
            f"stream {n}/x": np.arange(rows * width).reshape(rows, width).astype(flat.DTYPES[dtype])
            for n, (dtype, rows, width) in enumerate(arrays)
        }
        flat.write(folder / "file", made, "täxt", folder)
        raw = (folder / "file").read_bytes()
        place = data.draw(st.one_of(st.none(), st.integers(0, len(raw) - 1)), label="changed byte")
        if place is not None:
            changed = raw[:place] + bytes([raw[place] ^ data.draw(st.integers(1, 255))]) + raw[place + 1 :]
            (folder / "file").write_bytes(changed)
        try:
            file = flat.Flat(folder / "file")
        except ValueError:
            assert place is not None
            return
        if any(file.damage(part, 3) for part in range(3)):
            assert place is not None
        for title, array in made.items():
            if title not in file.titles:  # a title was changed: whoever asks for it finds the file damaged
                assert place is not None
                continue
            for _ in range(3):
                start = data.draw(st.integers(0, len(array)))
                stop = data.draw(st.integers(start, len(array)))
                try:
                    rows = flat.Flat(folder / "file").read(title, start, stop)
                except RunError:
                    assert place is not None
                    continue
                if place is None or file.shape(title) == array.shape:
                    assert rows.tobytes() == array[start:stop].tobytes()
    finally:
        flat.BLOCK = block


def test_a_rank_reads_what_it_needs_and_opens_the_file_once(tmp_path):
    rows = 200_000
    arrays = {"forget/starts": np.arange(rows), "forget/values": np.ones(rows, np.float32)}
    flat.write(tmp_path / "file", arrays, "", tmp_path)
    with Opens(tmp_path) as opens:
        file = flat.Flat(tmp_path / "file")
        assert file.damage(3, 8) is None
        assert file.read("forget/starts", 5, 7).tolist() == [5, 6]
    assert opens.count == 1
