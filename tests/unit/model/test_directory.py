"""What decides a model is in its hash, and a directory that holds no whole model is refused before weights load."""

import json
import shutil

import pytest

from mirage_dist import config as configs
from mirage_dist.model import directory, load
from mirage_dist.schema import ConfigError, TrainRecipe
from mirage_dist.train.planning.check import check_inputs, check_recipe


@pytest.fixture
def model(toy, tmp_path):
    return shutil.copytree(toy.root / "model", tmp_path / "model")


def test_every_file_that_decides_the_model_changes_its_hash(model):
    hashes = {directory.model_hash(model)}
    names = [f.name for f in directory.files(model)]
    assert {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"} <= set(names)
    for number, name in enumerate(names):
        state = directory.state(model)
        with (model / name).open("ab") as file:
            file.write(b" ")
        assert directory.state(model) != state
        hashes.add(load.base_hash(str(model)))
        assert len(hashes) == number + 2, name


def test_files_that_decide_nothing_leave_the_hash_alone(model):
    before = directory.model_hash(model)
    for name in ("README.md", "LICENSE.txt", "pytorch_model.bin", "notes"):
        (model / name).write_text("other")
    assert directory.model_hash(model) == before


def as_adapter(model):
    (model / "model.safetensors").rename(model / "adapter_model.safetensors")
    (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "somewhere"}))


def test_an_adapter_without_its_base_model_is_refused(model, toy, tmp_path):
    as_adapter(model)
    overrides = [*toy.overrides("npo", tmp_path / "run"), f"model.path={model}"]
    recipe = configs.load("configs/train/demo_npo.yaml", overrides, TrainRecipe)
    for check in (lambda: check_inputs(check_recipe(recipe, 1)), lambda: directory.check(str(model))):
        with pytest.raises(ConfigError, match=r"peft adapter without its base model; merge it first: .*merge_and_un"):
            check()
    with pytest.raises(ConfigError, match=r"no \*\.safetensors"):
        directory.model_hash(model)  # an adapter's weights are not a model's


def test_what_is_no_model_is_named(model, tmp_path):
    (model / "model.safetensors").rename(model / "model.bin")
    assert directory.check(str(model), weights=False) == model
    with pytest.raises(ConfigError, match=r"model: no \*\.safetensors here \(weights in other formats are never"):
        directory.check(str(model))
    (model / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"no readable config\.json in .*model;"):
        directory.check(str(model), weights=False)
    with pytest.raises(ConfigError, match=r"nobody/nothing: no such directory .* no hub model .* hf download"):
        directory.check("nobody/nothing")


def test_a_mistyped_directory_is_named_with_the_one_beside_it(model, monkeypatch):
    monkeypatch.chdir(model.parent)
    other = model.parent / "models" / "llava-1.5-7b"
    other.mkdir(parents=True)
    for given in ("models/llava-1.5-7", str(model.parent / "models/llava-1.5-7bb"), "./models/lava-1.5-7b"):
        with pytest.raises(ConfigError, match=r"does not exist .* did you mean '.*models/llava-1.5-7b'\? "):
            directory.check(given)
    with pytest.raises(ConfigError, match=r"modles/x: no such directory .*, and no hub model"):
        directory.check("modles/x")
