"""A run that goes on is the run that began: its data are compared stream by stream at every start."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image, ImageOps

from mirage_dist import config as configs
from mirage_dist import report, runs, state
from mirage_dist.cli import main
from mirage_dist.data import formats, sources
from mirage_dist.data.formats.samples import write_samples
from mirage_dist.evals.models import subject
from mirage_dist.model import export
from mirage_dist.objectives.base import make
from mirage_dist.schema import ConfigError, EvalModelConfig, TrainRecipe
from mirage_dist.train import rundir
from mirage_dist.train.lease import acquire
from mirage_dist.train.planning.check import check_inputs, check_recipe
from mirage_dist.train.planning.streams import describe

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
            given = {**streams, "forget": forget}
            data = rundir.describe_streams(given)
            rundir.open_run(recipe, needs, data, lambda: describe(given), False, base_hash, lease)
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


def test_a_manifest_of_an_older_version_is_named(begin, tmp_path):
    file = tmp_path / "run/manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["seal"]
    file.write_text(json.dumps(manifest))
    with pytest.raises(state.Damaged, match=r"manifest.json: .*an older version wrote it. Restore .* or move it away"):
        begin()
    file.unlink()
    begin()  # as the message promises
    assert file.is_file()


def test_a_run_that_an_earlier_version_began_goes_on(begin, toy, tmp_path):
    """Its config.yaml lacks the keys that came since, and its manifest has the hash without them."""
    root, words = tmp_path / "run", toy.overrides("npo", tmp_path / "run")
    whole, manifest = runs.recipe(root), json.loads((root / "manifest.json").read_text())
    tree = configs.to_dict(whole)
    for section, new in (("data", "group_by_modality"), ("train", "warmup_from_zero"), ("train", "schedule_steps")):
        del tree[section][new]
    (root / "config.yaml").write_text(json.dumps(tree))
    manifest["config_hash"] = configs.config_hash(tree, manifest["may_change"])
    manifest.pop("seal")
    (root / "manifest.json").write_text(state.sealed("run", manifest, indent=1))
    assert runs.recipe(root) == whole
    begin()
    for key in ("train.warmup_from_zero=true", "train.lr=1e-7"):
        other = configs.load("configs/train/demo_npo.yaml", [*words, key], TrainRecipe)
        with pytest.raises(ConfigError, match=rf"run of another recipe \({key.partition('=')[0]}: "):
            rundir.check_directory(other, make(other.objective).needs)
    tree["train"]["lr"] = 1e-7
    (root / "config.yaml").write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match=r"config.yaml: was changed after this run began"):
        begin()


def changed(raw: bytes) -> dict[str, bytes]:
    """What may have become of a state file."""
    half = len(raw) // 2
    return {
        "flipped": raw[:half] + bytes([raw[half] ^ 1]) + raw[half + 1 :],
        "another seal": raw[:-6] + bytes([raw[-6] ^ 1]) + raw[-5:],
        "cut": raw[:half],
        "empty": b"",
        "list": b"[]",
        "null": b"null",
        "object": b"{}",
        "deep": b"[" * 10_000,
        "zeros": bytes(len(raw)),
    }


def test_a_damaged_state_file_of_a_run_is_named(begin, toy, tmp_path, capsys):
    root, words = tmp_path / "run", toy.overrides("npo", tmp_path / "run")
    readers = {
        "manifest.json": lambda: begin(),
        "config.yaml": lambda: runs.recipe(root),
        "data.json": lambda: runs.data(root),
    }
    for name, read in readers.items():
        file = root / name
        raw = file.read_bytes()
        before = read()
        for damage, content in changed(raw).items():
            file.write_bytes(content)
            if name == "config.yaml" and damage == "flipped":  # in a key that may change, such as monitor's
                content = raw.replace(b"seed: 21", b"seed: 22")
                file.write_bytes(content)
            if name == "config.yaml" and damage == "another seal":
                continue
            with pytest.raises((ConfigError, state.Damaged), match=f"{name}: "):
                read()
            if name == "manifest.json" and damage == "cut":
                assert main(["train", "configs/train/demo_npo.yaml", "--check", *words]) == 1
                assert f"{file}: holds no whole object" in capsys.readouterr().err
        file.write_bytes(raw)
        assert read() == before


def test_a_recipe_that_was_edited_after_the_start_is_named_and_free_keys_are_free(begin, tmp_path):
    file = tmp_path / "run/config.yaml"
    recipe = file.read_text()
    file.write_text(recipe.replace("print_every: 100", "print_every: 7"))
    assert runs.recipe(tmp_path / "run").monitor.print_every == 7
    file.write_text(recipe.replace("seed: 21", "seed: 22"))
    for read in (
        lambda: runs.recipe(tmp_path / "run"),
        lambda: export.export(tmp_path / "run", tmp_path / "out"),
        lambda: report.named([tmp_path / "run"]),
        lambda: subject.find(EvalModelConfig(run=str(tmp_path / "run")), tmp_path / "run"),
    ):
        with pytest.raises(ConfigError, match=r"config.yaml: was changed after this run began.* restore the file"):
            read()
    file.unlink()
    begin()
    assert file.read_text() == recipe


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
