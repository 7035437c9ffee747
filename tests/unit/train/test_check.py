"""What can be wrong before weights load is said before weights load, with its place and its remedy."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
from transformers import CLIPVisionConfig, Lfm2Config, LlavaConfig, Qwen2_5_VLConfig

from mirage_dist import config as configs
from mirage_dist.cli import main
from mirage_dist.data import sources
from mirage_dist.schema import ConfigError, SourceConfig, TrainRecipe
from mirage_dist.train.planning.check import check_inputs, check_recipe


@pytest.fixture
def recipe(toy, tmp_path):
    def build(*overrides, name="npo") -> TrainRecipe:
        told = [*toy.overrides(name, tmp_path / "run"), *overrides]
        return configs.load(f"configs/train/demo_{name}.yaml", told, TrainRecipe)

    return build


def check(recipe, ranks=2):
    """What a start checks before weights load."""
    return check_inputs(check_recipe(recipe, ranks))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["objective.name=nop"], "npo"),
        (["objective.betta=1"], "beta"),
        (["reference=adapters_off"], "model.lora"),
        (["objective.retain=kl"], "use engine"),
        (["train.global_batch=6", "train.micro_batch=4"], "multiple of train.micro_batch"),
        (["deepspeed=nowhere.json"], "no such file"),
        (["model.path=./nowhere"], "config.json"),
        (["data.streams.train=[{format: samples, path: x.jsonl}]"], "needs"),
        (["data.streams.forget=[{format: samples, path: nowhere.jsonl}]"], "cannot be read"),
    ],
)
def test_a_wrong_recipe_is_named(recipe, overrides, words):
    with pytest.raises(ConfigError, match=words):
        check(recipe(*overrides))


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"train_batch_size": 8, "zero_optimization": {"stage": 3}}, "train.global_batch"),
        ({"zero_optimization": {"stage": 1}}, "allowed: 2, 3"),
        ({"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}, "train.dtype"),
        ([1], "JSON object"),
    ],
)
def test_a_deepspeed_file_that_says_what_the_recipe_says_is_refused(recipe, tmp_path, tree, words):
    (tmp_path / "ds.json").write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match=words):
        check(recipe(f"deepspeed={tmp_path}/ds.json"))


def forget_of(tmp_path, samples):
    sources.write_samples(tmp_path / "f.jsonl", samples)
    return f"data.streams.forget=[{{format: samples, path: {tmp_path}/f.jsonl}}]"


def test_an_empty_forget_set_is_an_error(recipe, tmp_path):
    with pytest.raises(ConfigError, match="the file is empty"):
        check(recipe(forget_of(tmp_path, [])))
    (tmp_path / "f.jsonl").write_text("[]")
    with pytest.raises(ConfigError, match="no sample; nothing would be unlearned"):
        check(recipe(f"data.streams.forget=[{{format: samples, path: {tmp_path}/f.jsonl}}]"))


def test_forget_answers_that_refuse_are_an_error_unless_allowed(recipe, toy, tmp_path):
    source = SourceConfig("samples", str(toy.root / "forget.jsonl"))
    samples = [replace(s, answer="sorry i can not help with that") for s in sources.read(source).samples]
    with pytest.raises(ConfigError, match="20 of 20 answers look like refusals"):
        check(recipe(forget_of(tmp_path, samples)))
    check(recipe(forget_of(tmp_path, samples), "data.refusals_in_forget=allow"))


def test_a_run_directory_of_another_recipe_is_refused_by_key(recipe, tmp_path):
    (tmp_path / "run").mkdir()
    configs.write_yaml(recipe(), tmp_path / "run/config.yaml")
    check(recipe("monitor.print_every=3", "train.save_every=2", "train.micro_batch=1"))
    with pytest.raises(ConfigError, match=r"train\.lr: 0\.5 here"):
        check(recipe("train.lr=0.5"))


def test_check_says_so_and_loads_no_weights(toy, tmp_path, capsys):
    told = toy.overrides("npo", tmp_path / "run")
    assert main(["train", "configs/train/demo_npo.yaml", "--check", *told]) == 0
    assert "forget 20, retain 30" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.train=['*nothing*']"], r"model\.train: pattern '\*nothing\*' matches no parameter"),
        (["model.freeze=['*']"], "leaves nothing"),
        (["model.lora={targets: ['*q_porj']}"], "matches no linear layer"),
        (["model.lora={also_train: ['*projctor*']}"], "also_train: '\\*projctor\\*' matches no parameter"),
        (["model.lora={targets: ['lm_head']}"], "lm_head is a .*; the loss head needs a plain linear layer"),
        (
            ["model.lora={also_train: ['*projector*']}", "reference=adapters_off"],
            "trains parameters that switching the adapters off does not put back",
        ),
    ],
)
def test_a_name_that_the_model_does_not_have_is_told_from_its_configuration(recipe, toy, tmp_path, overrides, words):
    """The weights are out of reach: what is wrong is told all the same."""
    model = tmp_path / "model"
    shutil.copytree(toy.root / "model", model)
    (model / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=words):
        check(recipe(f"model.path={model}", *overrides))


def test_a_layer_that_the_model_does_not_have_is_named(recipe):
    with pytest.raises(ConfigError, match="layer=4: the model has decoder layers 0 to 3"):
        check(recipe("objective.layer=4", name="rmu"))


def test_a_model_that_does_not_keep_packed_sequences_apart_is_refused_by_its_configuration(recipe, tmp_path):
    """Positions of a picture's grid are one case; text layers that pass from token to token are another."""
    check(recipe("data.packing=true"))
    text = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
    text |= {"num_hidden_layers": 2, "vocab_size": 64}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    convolution = Lfm2Config(**text, layer_types=["conv", "full_attention"])
    for config, words in (
        (Qwen2_5_VLConfig(text_config=text), "qwen2_5_vl is not known to keep packed sequences apart .*grid"),
        (LlavaConfig(vision_config=CLIPVisionConfig(**vision), text_config=convolution), "not every layer of lfm2"),
    ):
        config.save_pretrained(tmp_path / config.model_type)
        told = f"model.path={tmp_path / config.model_type}"
        check(recipe(told))
        with pytest.raises(ConfigError, match=rf"data\.packing: {words}"):
            check(recipe(told, "data.packing=true"))


def test_a_broken_config_json_is_named(recipe, toy, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(toy.root / "model", model)
    (model / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json: not JSON"):
        check(recipe(f"model.path={model}"))


@pytest.mark.parametrize("wrong", [[], ["objective.name=nop"], ["objective.betta=3"], ["reference=adapters_off"]])
def test_neither_a_check_nor_a_wrong_recipe_makes_the_embedded_world(tmp_path, capsys, wrong):
    told = [f"world.dir={tmp_path}/world", f"run.dir={tmp_path}/run", *wrong]
    assert main(["train", "configs/train/demo_npo.yaml", "--check", *told]) == (2 if wrong else 0)
    if wrong:
        assert main(["train", "configs/train/demo_npo.yaml", *told]) == 2
    assert not any(tmp_path.iterdir())


def test_check_counts_the_answers_that_will_be_cut_and_refuses_those_that_may_not(toy, tmp_path, capsys):
    told = [*toy.overrides("npo", tmp_path / "run"), "data.max_length=30"]
    assert main(["train", "configs/train/demo_npo.yaml", "--check", *told]) == 2
    assert "max_length" in capsys.readouterr().err
    assert main(["train", "configs/train/demo_npo.yaml", "--check", *told, "data.on_long=truncate"]) == 0
    assert "; 0 answers to be cut" not in capsys.readouterr().out


def test_the_micro_batch_may_change_only_where_the_loss_does_not_depend_on_it(recipe, tmp_path):
    (tmp_path / "run").mkdir()
    configs.write_yaml(recipe("objective.positions=all", name="rmu"), tmp_path / "run/config.yaml")
    with pytest.raises(ConfigError, match=r"train\.micro_batch: 1 here"):
        check(recipe("objective.positions=all", "train.micro_batch=1", name="rmu"))
    packed = ("objective.positions=all", "data.packing=true")
    configs.write_yaml(recipe(*packed, name="rmu"), tmp_path / "run/config.yaml")
    check(recipe(*packed, "train.micro_batch=1", name="rmu"))


def test_a_typo_ends_with_one_line_and_status_2():
    command = [sys.executable, "-m", "mirage_dist.cli", "train", "configs/train/npo.yaml", "train.lrr=1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        f"mirage: {configs.find('configs/train/npo.yaml')}: unknown key 'train.lrr'; did you mean 'lr'?"
    ]
