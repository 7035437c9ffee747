"""A run that goes on is the run that began: its data are compared stream by stream at every start."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image, ImageOps

from mirage_dist import config as configs
from mirage_dist.cli import main
from mirage_dist.data import formats, sources
from mirage_dist.data.formats.samples import write_samples
from mirage_dist.objectives.base import make
from mirage_dist.schema import ConfigError, TrainRecipe
from mirage_dist.train import rundir
from mirage_dist.train.lease import acquire
from mirage_dist.train.planning.check import check_inputs, check_recipe

CHANGES = {
    "an answer": (lambda s: [replace(s[0], answer="other"), *s[1:]], "stream forget still has 20 samples"),
    "another picture": (lambda s: [replace(s[0], image=s[1].image), *s[1:]], "stream forget still has 20 samples"),
    "no picture": (lambda s: [replace(s[0], image=None), *s[1:]], "stream forget still has 20 samples"),
    "the order": (lambda s: s[::-1], "stream forget still has 20 samples"),
    "one less": (lambda s: s[:-1], "stream forget had 20 samples and now has 19"),
    "one twice": (lambda s: [*s, replace(s[0], id="again")], "stream forget had 20 samples and now has 21"),
}


@pytest.fixture
def begin(toy, tmp_path):
    recipe = configs.load("configs/train/demo_npo.yaml", toy.overrides("npo", tmp_path / "run"), TrainRecipe)

    def start(change=lambda samples: samples, base_hash="0" * 64):
        streams = check_inputs(check_recipe(recipe, 1))
        sources.check_pictures(streams)
        forget = replace(streams["forget"], samples=change(streams["forget"].samples))
        lease = acquire(Path(recipe.run.dir))
        try:
            needs = make(recipe.objective).needs
            rundir.open_run(recipe, needs, {**streams, "forget": forget}, False, base_hash, lease)
        finally:
            lease.release()

    start()
    return start


@pytest.mark.parametrize("change", CHANGES)
def test_a_start_on_changed_data_names_the_stream(begin, change):
    function, words = CHANGES[change]
    with pytest.raises(ConfigError, match=words) as error:
        begin(function)
    assert "retain" not in str(error.value)


def test_the_same_data_from_another_file_go_on(begin):
    begin(lambda samples: [replace(s, source="/elsewhere/forget.jsonl") for s in samples])


def test_a_picture_that_was_replaced_in_its_place_is_noticed(begin, toy):
    picture = Path(sources.read(formats.source("samples", str(toy.root / "forget.jsonl"))).samples[0].image)
    kept = picture.read_bytes()
    with Image.open(picture) as image:
        ImageOps.mirror(image.convert("RGB")).save(picture)
    try:
        with pytest.raises(ConfigError, match="stream forget still has 20 samples"):
            begin()
    finally:
        picture.write_bytes(kept)
    begin()


def test_other_weights_are_refused_too(begin):
    with pytest.raises(ConfigError, match="weights"):
        begin(base_hash="1" * 64)


def test_a_manifest_of_an_older_version_names_every_stream(begin, tmp_path):
    file = tmp_path / "run/manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["data"]
    file.write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match="stream forget exists only now; stream retain exists only now"):
        begin()


def test_check_reports_changed_data_before_a_start(begin, toy, tmp_path, capsys):
    data = tmp_path / "retain.jsonl"
    write_samples(data, check_retain(toy)[1:])
    words = toy.overrides("npo", tmp_path / "run")
    assert main(["train", "configs/train/demo_npo.yaml", "--check", *words]) == 0
    kept = (toy.root / "retain.jsonl").read_bytes()
    (toy.root / "retain.jsonl").write_bytes(data.read_bytes())
    try:
        assert main(["train", "configs/train/demo_npo.yaml", "--check", *words]) == 2
    finally:
        (toy.root / "retain.jsonl").write_bytes(kept)
    assert "stream retain had 30 samples and now has 29" in capsys.readouterr().err


def check_retain(toy):
    source = formats.source("samples", str(toy.root / "retain.jsonl"))
    return sources.read(source).samples
