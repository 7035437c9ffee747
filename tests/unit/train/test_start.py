"""A later start reads no data and yet trains on exactly what the first one checked; no change passes unnoticed."""

import json
import os
import shutil
import sys
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from conftest import Engine, run_of
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from mirage_dist import config as configs
from mirage_dist.cli import main
from mirage_dist.data import sources
from mirage_dist.data.pictures import Checked, Inspection, open_picture
from mirage_dist.data.sample import Sample, digest_of, stream_digest
from mirage_dist.model import load
from mirage_dist.objectives.base import make
from mirage_dist.ranks import Group
from mirage_dist.schema import ConfigError, RunError, TrainRecipe
from mirage_dist.train import rundir
from mirage_dist.train.caches import identity, samples
from mirage_dist.train.caches import vision as vision_cache
from mirage_dist.train.feed import Feed
from mirage_dist.train.lease import acquire
from mirage_dist.train.measures import validation
from mirage_dist.train.planning import start
from mirage_dist.train.planning.check import check_recipe
from mirage_dist.train.planning.streams import read_streams

ALONE = Group(0, 0, 1, torch.device("cpu"))
OPENED: list[str] = []  # the paths of every file that Python opens
sys.addaudithook(lambda event, given: OPENED.append(str(given[0])) if event == "open" else None)


@pytest.fixture
def data(toy, tmp_path):
    """A copy of the toy's data, to be changed."""
    for name in ("forget", "retain"):
        lines = [json.loads(line) for line in (toy.root / f"{name}.jsonl").read_text().splitlines()]
        for record in lines:
            picture = tmp_path / Path(record["image"]).name
            shutil.copyfile(record["image"], picture)
            record["image"] = str(picture)
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in lines))
    shutil.copytree(toy.root / "model", tmp_path / "model")
    return tmp_path


@pytest.fixture
def begin(toy, data):
    """One start: what `mirage train` does before the model loads."""

    def run(*own, name="npo"):
        overrides = [o.replace(str(toy.root), str(data)) for o in toy.overrides(name, data / "run")]
        given = [*overrides, "train.global_batch=8", "train.micro_batch=4", *own]
        recipe = configs.load(f"configs/train/demo_{name}.yaml", given, TrainRecipe)
        return started(recipe)

    return run


@contextmanager
def started(recipe):
    checked = check_recipe(recipe, 1)
    with start.prepared(checked, ALONE) as prepared:
        lease = acquire(Path(recipe.run.dir))
        try:
            table = prepared.table
            rundir.open_run(recipe, checked.needs, table.records(), table.summary, False, "0" * 64, lease)
            prepared.publish(lease)
            yield prepared
        finally:
            lease.release()


def windows(feed):
    return [feed.window(step, ALONE) for step in range(4)]


def equal(one, other):
    assert one.samples == other.samples
    assert one.counts == other.counts
    for name, tensor in one.batch.inputs.items():
        assert torch.equal(tensor, other.batch.inputs[name])
    assert torch.equal(one.batch.labels_BS, other.batch.labels_BS)


@pytest.mark.parametrize(
    "own",
    [
        (),
        ("data.group_by_length=true", "data.group_by_modality=true"),
        ("data.group_by_length=true", "data.balance=openers"),
    ],
)
def test_batches_are_those_of_the_data_themselves_at_the_first_start_and_at_later_ones(begin, own):
    with begin(*own) as first:
        recipe = first.feed.recipe
        feed = Feed(recipe, first.feed.needs, read_streams(recipe, first.feed.needs), first.feed.encoder.processor)
        feed.check_lengths(ALONE)
        expected, made = windows(feed), windows(first.feed)
    with begin(*own) as second:
        again = windows(second.feed)
    assert (first.new, second.new) == (True, False)
    for mine, others, later in zip(expected, made, again, strict=True):
        for one, other, last in zip(mine, others, later, strict=True):
            equal(one, other)
            equal(one, last)
    for name, kept in feed.samples.items():
        assert list(second.feed.samples[name]) == list(kept)
        assert second.feed.lengths[name].tolist() == [feed.encoder.length(sample) for sample in kept]


def test_each_start_warns_of_answers_that_the_tokenizer_cannot_write(toy, begin, data, caplog):
    """An answer in another language: the toy's tokenizer of whole words would make it <unk>, and train that."""
    with begin() as first:
        assert not [text for text in first.table.checks["warnings"] if "<unk>" in text]
    lines = [json.loads(line) for line in (data / "retain.jsonl").read_text().splitlines()]
    lines[3]["answer"], lines[5]["answer"] = "sure , das weiß ich", "Das weiß ich nicht"
    (data / "retain.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    for new in (True, False):
        with begin("run.dir=" + str(data / "other")) as later:
            assert later.new is new
            (warning,) = [text for text in later.table.checks["warnings"] if "<unk>" in text]
    expected = (
        f"data.streams.retain: the tokenizer has no token for a part of 2 of {len(lines)} answers and writes <unk>"
    )
    assert warning.startswith(expected)
    assert f"sample {lines[5]['id']!r}" in warning  # the most of it
    overrides = [o.replace(str(toy.root), str(data)) for o in toy.overrides("npo", data / "third")]
    assert main(["train", "--check", "configs/train/demo_npo.yaml", *overrides]) == 0
    assert warning in caplog.text


def test_damaged_openers_are_counted_again(begin, caplog):
    with begin("data.balance=openers") as first:
        expected, file = windows(first.feed), first.feed.recipe.run.dir
    (file,) = Path(file).glob("samples/*/openers.json")
    file.write_text(file.read_text().replace("[0, ", "[1, ", 1))
    with begin("data.balance=openers") as second:
        assert second.new
        again = windows(second.feed)
    assert "openers.json" in caplog.text
    for one, other in zip(expected, again, strict=True):
        for mine, later in zip(one, other, strict=True):
            equal(mine, later)


def test_what_the_run_records_is_what_reading_the_data_gives(begin, data):
    with begin() as first:
        recipe, needs = first.feed.recipe, first.feed.needs
        streams = read_streams(recipe, needs)
        sources.check_pictures(streams)
        assert first.table.records() == rundir.describe_streams(streams)
        whole = Feed(recipe, needs, streams, first.feed.encoder.processor)
        names = needs.streams
        assert first.feed.stream_digests(names, ALONE) == whole.stream_digests(names, ALONE)
        assert first.feed.picture_digests(names, ALONE) == whole.picture_digests(names, ALONE)


def test_a_later_start_opens_no_data_file_and_no_picture(begin, data):
    with begin():
        pass
    OPENED.clear()
    with begin() as second:
        assert not [path for path in OPENED if path.endswith((".jsonl", ".png")) and "/run/" not in path]
        windows(second.feed)  # and the steps open the pictures of their samples
        assert any(path.endswith(".png") for path in OPENED)


def test_held_out_pictures_are_computed_once_too_and_the_held_out_loss_takes_their_features(begin, data):
    held = f"data.streams.validation=[{{format: samples, path: {data}/forget.jsonl, limit: 9}}]"
    with begin(held, "data.cache_vision=true", "data.workers=0", name="sft") as prepared:
        feed = prepared.feed
        policy = load.policy(feed.recipe.model, "fp32", {})
        run = run_of(feed.recipe, make(feed.recipe.objective), feed, Engine(policy))
        run.lease.workspace.mkdir(parents=True, exist_ok=True)

        def measured():
            held_out = validation.of(feed, prepared.table, ALONE)
            with held_out:
                held_out.begin(0, True)
                return held_out.measure(run.engine, feed.steps)

        live = measured()
        feed.encoder.recall(vision_cache.fill(run))
        for name, parameter in policy.named_parameters():
            if "vision_tower" in name:
                parameter.data.fill_(torch.nan)
        assert measured() == {"loss": pytest.approx(live["loss"], rel=1e-6), "tokens": live["tokens"]}


def touched(file):
    os.utime(file, ns=(1, 1))


CHANGES = {
    "data": lambda data: touched(data / "forget.jsonl"),
    "processor": lambda data: touched(data / "model/tokenizer_config.json"),
    "template": lambda data: touched(next((data / "model").glob("*chat_template*"))),
    "replaced by an equal file": lambda data: (
        shutil.copyfile(data / "retain.jsonl", data / "new") and os.replace(data / "new", data / "retain.jsonl")
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_may_have_changed_is_read_again_and_goes_on_where_it_has_not(begin, data, change):
    with begin() as first:
        pass
    CHANGES[change](data)
    with begin() as second:
        assert second.new
        assert second.table.records() == first.table.records()
    assert [f.name for f in (data / "run/samples").iterdir()] == [second.table.folder.name]  # the stale one is removed
    with begin() as third:
        assert not third.new


@pytest.mark.parametrize("name", ["FORMAT", "__version__"])
def test_another_version_checks_again(begin, monkeypatch, name):
    with begin():
        pass
    monkeypatch.setattr(identity, name, "other")
    with begin() as second:
        assert second.new


@pytest.mark.parametrize(
    "own", ["data.system_prompt=Be brief.", "data.max_length=60", "data.streams.retain[0].limit=20"]
)
def test_other_options_have_another_key(begin, data, own):
    with begin() as first:
        pass
    shutil.rmtree(data / "run")
    with begin(own) as second:
        assert second.table.folder.name != first.table.folder.name


def test_options_of_the_step_have_the_same_key(begin):
    with begin():
        pass
    with begin("data.workers=0") as second:
        assert not second.new


def test_data_that_changed_end_the_start(begin, data):
    with begin():
        pass
    lines = (data / "forget.jsonl").read_text().splitlines()
    (data / "forget.jsonl").write_text("\n".join(lines[::-1]) + "\n")
    with pytest.raises(ConfigError, match="stream forget still has 20 samples"), begin():
        pass


def test_data_that_change_while_they_are_checked_end_the_start(begin, data, monkeypatch):
    write = samples.write

    def late(*given):
        write(*given)
        touched(data / "retain.jsonl")

    monkeypatch.setattr(samples, "write", late)
    with pytest.raises(ConfigError, match=r"retain\.jsonl: changed while the data were checked"), begin():
        pass
    assert not (data / "run").exists()


def mirrored(picture):
    with Image.open(picture) as image:
        ImageOps.mirror(image.convert("RGB")).save(picture)


def test_a_picture_that_changed_later_ends_the_run_where_it_is_opened(begin, data):
    with begin():
        pass
    for picture in data.glob("*.png"):
        mirrored(picture)
    with begin() as second:
        assert not second.new
        with pytest.raises(ConfigError, match=rf"{data}/.*\.png: has changed since .* put the file back"):
            second.feed.window(0, ALONE)
        with pytest.raises(ConfigError, match="has changed since"):  # also from a worker, as one line
            list(second.feed.windows(range(2), ALONE))
    with pytest.raises(ConfigError, match="the data changed since this run began: stream"), begin("data.verify=true"):
        pass


def test_verify_checks_everything_again_where_nothing_changed(begin):
    with begin() as first:
        pass
    OPENED.clear()
    with begin("data.verify=true") as second:
        assert second.new
        assert second.table.records() == first.table.records()
        assert any(path.endswith(".png") for path in OPENED)


def cut(file):
    file.write_bytes(file.read_bytes()[:-100])


def flipped(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "a table cut off": (lambda folder: cut(folder / "stream-000.arrow")),
    "a table lost": (lambda folder: (folder / "pictures.arrow").unlink()),
    "lengths changed": (lambda folder: flipped(folder / "lengths-001.npy")),
    "checks edited": (lambda folder: flipped(folder / "checks.json")),
    "checks lost": (lambda folder: (folder / "checks.json").unlink()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_table_is_made_again(begin, damage):
    with begin() as first:
        expected = windows(first.feed)
    folder = Path(first.feed.recipe.run.dir) / "samples" / first.table.folder.name
    DAMAGES[damage](folder)
    with begin() as second:
        assert second.new
        equal(windows(second.feed)[0][0], expected[0][0])
    with begin() as third:
        assert not third.new


def test_a_text_that_was_changed_on_disk_is_never_trained_on(begin):
    with begin() as first:
        answer = first.feed.samples["forget"][3].answer
    file = Path(first.feed.recipe.run.dir) / "samples" / first.table.folder.name / "stream-000.arrow"
    file.write_bytes(file.read_bytes().replace(answer.encode(), answer.swapcase().encode()))
    with begin() as second:
        assert not second.new  # nothing is hashed at the start
        with pytest.raises(RunError, match=r"stream-000\.arrow: row \d+ is not what the checks have written"):
            list(second.feed.samples["forget"])
    with begin("data.verify=true") as third:
        assert third.feed.samples["forget"][3].answer == answer


def test_a_start_that_was_killed_while_it_wrote_leaves_what_the_next_one_removes(begin, data, monkeypatch):
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(samples, "finish", lambda *given: os._exit(9))
        with begin():
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    left = list(data.glob("run.*.tmp"))
    assert len(left) == 1
    assert not (data / "run").exists()
    with begin() as first:
        assert first.new
        assert not list(data.glob("run.*.tmp"))
    with begin("data.verify=true"):  # in the run directory, now that it is there
        assert not list(data.glob("run.*.tmp"))
    assert {f.name for f in (data / "run").iterdir()} >= {"samples"}
    assert not list((data / "run").glob("*.tmp"))


def test_an_error_in_the_data_leaves_nothing_of_the_run(begin, data):
    with (data / "forget.jsonl").open("a") as file:
        file.write("{}\n")
    with pytest.raises(ConfigError, match="record 20"), begin():
        pass
    assert not list(data.glob("run*"))


def test_only_the_owner_may_read_the_answers(begin):
    with begin() as first:
        pass
    folder = Path(first.feed.recipe.run.dir) / "samples" / first.table.folder.name
    assert folder.stat().st_mode & 0o077 == 0
    assert all(file.stat().st_mode & 0o077 == 0 for file in folder.iterdir())


@pytest.mark.parametrize("verb", [["train", "--check"], ["plan"]])
def test_a_check_and_a_plan_write_nothing(toy, data, verb):
    overrides = [o.replace(str(toy.root), str(data)) for o in toy.overrides("npo", data / "run")]
    before = {file: file.stat().st_mtime_ns for file in data.rglob("*")}
    assert main([verb[0], "configs/train/demo_npo.yaml", *verb[1:], *overrides]) == 0
    assert {file: file.stat().st_mtime_ns for file in data.rglob("*")} == before


# ------------------------------------------------------------------------------------------------------- the table

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
PATHS = TEXT.filter(lambda path: path and "\0" not in path) | st.just("d\udcff/a.png")
SAMPLES = st.builds(
    Sample,
    id=TEXT,
    image=st.none() | PATHS,
    question=TEXT,
    answer=TEXT,
    safe=st.booleans(),
    category=TEXT,
    source=PATHS,
    history=st.lists(st.tuples(TEXT, TEXT), max_size=3).map(tuple),
    references=st.lists(TEXT, max_size=3).map(tuple),
    begun=TEXT,
    shown=st.integers(0, 3),
)


@settings(max_examples=25, deadline=None)
@given(st.lists(SAMPLES, min_size=1, max_size=4), st.sampled_from([1, 3, 1024]))
def test_a_sample_comes_back_from_a_table_as_it_was(tmp_path_factory, kept, rows):
    folder = tmp_path_factory.mktemp("table")
    inspected = {s.image: Inspection(None, f"{n:064x}", (n, 7)) for n, s in enumerate(kept) if s.image is not None}
    summary = {"streams": {}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "ROWS", rows)
        many = kept * 2 + kept[:1]
        samples.write(folder, {"a": many, "b": kept}, inspected, {"a": {}, "b": {}}, ["text"], summary)
        table = samples.opened(folder, whole=False)
        assert list(table.rows["a"]) == many
        assert list(table.rows["b"]) == kept
        for start, stop in ((0, len(many)), (1, 3), (2, 2), (len(many) - 1, len(many))):
            for text, own in zip(table.rows["a"].texts(start, stop), many[start:stop], strict=True):
                assert text == replace(own, image=None, category="", source="", references=(), begun="", shown=0)
        assert table.rows["a"][-1] == many[-1]
        assert table.rows["a"][1:3] == many[1:3]
        assert table.rows["a"].pictured().tolist() == [s.image is not None for s in many]
        assert table.summary() == summary
        assert {f.name for f in fields(Sample)} == set(vars(table.rows["b"][0]))
        for mine, own in zip(table.rows["b"], kept, strict=True):
            if own.image is not None:
                assert (mine.image.sha256, mine.image.size) == (inspected[own.image].sha256, inspected[own.image].size)
        hashed = [replace(s, image=None if s.image is None else inspected[s.image].sha256) for s in kept]
        assert table.records()["b"] == {"samples": len(kept), "sha256": stream_digest(hashed)}
        assert [digest_of(s, h.image) for s, h in zip(kept, hashed, strict=True)] == [h.digest() for h in hashed]


def test_a_checked_picture_opens_as_itself_or_not_at_all(tmp_path):
    import pickle

    Image.new("RGB", (5, 3), "red").save(tmp_path / "a.png")
    path = str(tmp_path / "a.png")
    (sha256, size) = (one := sources.inspect({path: 100})[path]).sha256, one.size
    checked = Checked(path, sha256, size)
    assert checked == path
    assert open_picture(checked).size == size == (5, 3)
    assert vars(pickle.loads(pickle.dumps(checked))) == vars(checked)
    Image.new("RGB", (5, 3), "blue").save(tmp_path / "a.png")
    with pytest.raises(ConfigError, match=r"a\.png: has changed since the run's data were checked"):
        open_picture(checked)
    assert open_picture(path).getpixel((0, 0)) == (0, 0, 255)
