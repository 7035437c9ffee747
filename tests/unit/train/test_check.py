"""Errors that can be known before weights load are reported before weights load, with place and remedy."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from families import models as families
from PIL import Image
from transformers import CLIPVisionConfig, Lfm2Config, LlavaConfig

from mirage_dist import config as configs
from mirage_dist import objectives, ranks
from mirage_dist.cli import main
from mirage_dist.data import formats, sources
from mirage_dist.data.encoding.collate import Encoder
from mirage_dist.data.formats.samples import write_samples
from mirage_dist.data.sample import Sample
from mirage_dist.model import load
from mirage_dist.model.families import processors
from mirage_dist.monitoring import tensorboard
from mirage_dist.objectives.base import Term
from mirage_dist.progress import handler
from mirage_dist.ranks import Group
from mirage_dist.schema import ConfigError, RunError, TrainRecipe
from mirage_dist.train.feed import Feed
from mirage_dist.train.lease import LOCK
from mirage_dist.train.loop import total
from mirage_dist.train.planning.check import audit_warnings, check_inputs, check_recipe, resolved, warn


@pytest.fixture(autouse=True)
def _warnings_are_new():
    """The log writes a warning once a process."""
    handler.warnings.clear()


@pytest.fixture
def recipe(toy, tmp_path):
    def build(*overrides, name="npo") -> TrainRecipe:
        given = [*toy.overrides(name, tmp_path / "run"), *overrides]
        return configs.load(f"configs/train/demo_{name}.yaml", given, TrainRecipe)

    return build


def check(recipe, ranks=2):
    """What a start checks before weights load."""
    return check_inputs(check_recipe(recipe, ranks))


def started(recipe):
    """A run directory as a first start leaves it that was killed before manifest.json."""
    run = Path(recipe.run.dir)
    run.mkdir(exist_ok=True)
    (run / LOCK).touch()
    configs.write_yaml(recipe, run / "config.yaml")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["objective.name=nop"], "npo"),
        (["objective.betta=1"], "beta"),
        (["reference=adapters_off"], "model.lora"),
        (["objective.retain=kl"], "use engine"),
        (["train.global_batch=6", "train.micro_batch=4"], "multiple of train.micro_batch"),
        (["model.lora={load_in_4bit: true}", "deepspeed=configs/deepspeed/zero3.json"], "take stage 2"),
        pytest.param(
            ["model.lora={load_in_4bit: true}", "deepspeed=configs/deepspeed/zero2.json"],
            "load_in_4bit needs bitsandbytes",
            marks=pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed"),
        ),
        (["deepspeed=nowhere.json"], "no such file"),
        (["model.path=./nowhere"], "looks like a local path but does not exist"),
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
        ({"sequence_parallel_size": 2, "zero_optimization": {"stage": 3}}, "'sequence_parallel_size' is not offered"),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/nvme"}}},
            r"offload_optimizer.device='nvme' is not offered: .*swap files.*take cpu",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            "offload_param.device='nvme' is not offered.*restored",
        ),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "disk"}}}, "allowed: none, cpu"),
    ],
)
def test_a_deepspeed_file_with_the_recipes_part_or_what_is_not_offered_is_refused(recipe, tmp_path, tree, words):
    (tmp_path / "ds.json").write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match=words):
        check(recipe(f"deepspeed={tmp_path}/ds.json"))


def forget_of(tmp_path, samples):
    write_samples(tmp_path / "f.jsonl", samples)
    return f"data.streams.forget=[{{format: samples, path: {tmp_path}/f.jsonl}}]"


def test_an_empty_forget_set_is_an_error(recipe, tmp_path):
    with pytest.raises(ConfigError, match="the file is empty"):
        check(recipe(forget_of(tmp_path, [])))
    (tmp_path / "f.jsonl").write_text("[]")
    with pytest.raises(ConfigError, match="no sample; nothing would be unlearned"):
        check(recipe(f"data.streams.forget=[{{format: samples, path: {tmp_path}/f.jsonl}}]"))


def test_forget_answers_that_refuse_are_an_error_unless_allowed(recipe, toy, tmp_path):
    source = formats.source("samples", str(toy.root / "forget.jsonl"))
    samples = [replace(s, answer="sorry i can not help with that") for s in sources.read(source).samples]
    with pytest.raises(ConfigError, match="20 of 20 answers look like refusals"):
        check(recipe(forget_of(tmp_path, samples)))
    check(recipe(forget_of(tmp_path, samples), "data.refusals_in_forget=allow"))


def test_a_sink_whose_library_is_missing_is_an_error_before_work(recipe, monkeypatch):
    monkeypatch.setattr(tensorboard, "LIBRARY", "no_such_library")
    check_recipe(recipe(), 2)
    with pytest.raises(ConfigError, match=r"monitor\.tensorboard: needs no_such_library.*mirage-dist\[tensorboard\]"):
        check_recipe(recipe("monitor.tensorboard=true"), 2)


def test_a_run_directory_of_another_recipe_is_refused_by_key(recipe, tmp_path):
    started(recipe())
    check(recipe("monitor.print_every=3", "train.save_every=2", "train.micro_batch=1"))
    with pytest.raises(ConfigError, match=r"train\.lr: 0\.5 here"):
        check(recipe("train.lr=0.5"))


def test_check_says_so_and_loads_no_weights(toy, tmp_path, capsys):
    overrides = toy.overrides("npo", tmp_path / "run")
    assert main(["train", "configs/train/demo_npo.yaml", "--check", *overrides]) == 0
    out = capsys.readouterr().out
    assert "forget 20, retain 30" in out
    assert len(re.findall(r"trains: decoder [\d.]+ k, connector [\d.]+ k, vision 0 of [\d.]+ k\n", out)) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["model.train=['*nothing*']"],
            r"model\.train: '\*nothing\*' matches no parameter; roles here: decoder, head, connector, vision; nearest",
        ),
        (["model.freeze=['*']"], "leaves nothing"),
        (["model.freeze=['*vision_towr*']"], r"model\.freeze: '\*vision_towr\*' matches no parameter; .*vision"),
        (["model.train=[audio]"], r"model\.train: 'audio' matches no parameter; roles here"),
        (["model.lora={targets: ['*q_porj']}"], "matches no linear layer"),
        (["model.lora={also_train: ['*projctor*']}"], "also_train: '\\*projctor\\*' matches no parameter"),
        (["model.lora={targets: ['lm_head']}"], "lm_head is a .*; the loss head needs a plain linear layer"),
        (
            ["model.lora={also_train: ['*projector*']}", "reference=adapters_off"],
            "trains parameters that switching the adapters off does not put back",
        ),
    ],
)
def test_a_name_that_the_model_lacks_is_reported_from_its_configuration(recipe, toy, tmp_path, overrides, words):
    """The weights are missing: the error is reported all the same."""
    model = tmp_path / "model"
    shutil.copytree(toy.root / "model", model)
    (model / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=words):
        check(recipe(f"model.path={model}", *overrides))


def test_a_layer_that_the_model_does_not_have_is_named(recipe):
    with pytest.raises(ConfigError, match="layer=4: the model has decoder layers 0 to 3"):
        check(recipe("objective.layer=4", name="rmu"))
    with pytest.raises(ConfigError, match="layer=9: the model has decoder layers 0 to 3"):
        check(recipe("objective.layer=7", "objective.layers=[1, 9]", name="rmu"))


@pytest.mark.parametrize(("name", "overrides"), [("undial", ["reference=cache"]), ("simnpo", ["objective.retain=kl"])])
def test_an_objective_that_compares_distributions_is_refused_a_cache_of_log_probabilities(name, overrides):
    plain = configs.load(f"configs/train/{name}.yaml", [], TrainRecipe)
    check_recipe(plain, 8)
    with pytest.raises(ConfigError, match=r"reference=cache .* whole distributions .* use engine"):
        check_recipe(configs.load(f"configs/train/{name}.yaml", overrides, TrainRecipe), 8)


def test_packing_auto_follows_the_model_and_true_refuses_one_that_cannot(recipe, toy, tmp_path, capsys):
    """Text layers that pass from token to token are the case; the recipe itself stays as it was given."""
    processor = load.processor(recipe().model)
    assert resolved(recipe(), processor).data.packing is False
    assert resolved(recipe("data.packing=true"), processor).data.packing is True
    assert resolved(recipe("data.packing=auto"), processor).data.packing is True
    assert "data.packing=auto: packed, since llava keeps packed sequences apart" in capsys.readouterr().out
    text = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
    text |= {"num_hidden_layers": 2, "vocab_size": 64}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    convolution = Lfm2Config(**text, layer_types=["conv", "full_attention"])
    parts = {"vision_config": CLIPVisionConfig(**vision), "text_config": convolution}
    LlavaConfig(**parts, image_token_id=processor.image_token_id).save_pretrained(tmp_path / "model")
    path = f"model.path={tmp_path}/model"
    assert resolved(recipe(path, "data.packing=auto"), processor).data.packing is False
    words = r"llava has layers that pass on more than attention does \(conv\)"
    assert re.search(f"data.packing=auto: padded, since {words}", capsys.readouterr().out)
    with pytest.raises(ConfigError, match=rf"data\.packing: {words}; take `auto`"):
        resolved(recipe(path, "data.packing=true"), processor)


def test_a_broken_config_json_is_named(recipe, toy, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(toy.root / "model", model)
    (model / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json: not JSON"):
        check(recipe(f"model.path={model}"))


@pytest.mark.parametrize("wrong", [[], ["objective.name=nop"], ["objective.betta=3"], ["reference=adapters_off"]])
def test_neither_a_check_nor_a_wrong_recipe_makes_the_embedded_world(tmp_path, capsys, wrong):
    overrides = [f"world.dir={tmp_path}/world", f"run.dir={tmp_path}/run", *wrong]
    assert main(["train", "configs/train/demo_npo.yaml", "--check", *overrides]) == (2 if wrong else 0)
    if wrong:
        assert main(["train", "configs/train/demo_npo.yaml", *overrides]) == 2
    assert not any(tmp_path.iterdir())


def test_check_counts_the_answers_that_will_be_cut_and_refuses_those_that_may_not(toy, tmp_path, capsys):
    overrides = [*toy.overrides("npo", tmp_path / "run"), "data.max_length=30"]
    assert main(["train", "configs/train/demo_npo.yaml", "--check", *overrides]) == 2
    assert "max_length" in capsys.readouterr().err
    assert main(["train", "configs/train/demo_npo.yaml", "--check", *overrides, "data.on_long=truncate"]) == 0
    assert "; 0 answers to be cut" not in capsys.readouterr().out


def test_the_micro_batch_may_change_only_where_the_loss_does_not_depend_on_it(recipe, tmp_path):
    started(recipe("objective.positions=all", name="rmu"))
    with pytest.raises(ConfigError, match=r"train\.micro_batch: 1 here"):
        check(recipe("objective.positions=all", "train.micro_batch=1", name="rmu"))
    packed = ("objective.positions=all", "data.packing=true")
    started(recipe(*packed, name="rmu"))
    check(recipe(*packed, "train.micro_batch=1", name="rmu"))


# ----------------------------------------------------------- objectives from outside, with streams of other names


@pytest.fixture
def codes(recipe, toy):
    """`lab:Codes` on the streams `codes` and `lessons`, with options and streams to choose."""

    def build(codes=f"{toy.root}/forget.jsonl", lessons=f"{toy.root}/retain.jsonl", data=None, train=None, **options):
        streams = {
            "codes": [formats.source("samples", str(codes))],
            "lessons": [formats.source("samples", str(lessons))],
        }
        given = recipe()
        return replace(
            given,
            data=replace(given.data, streams=streams, **(data or {})),
            train=replace(given.train, **(train or {})),
            objective={"name": "lab:Codes", **options},
        )

    return build


def test_answers_to_unlearn_that_refuse_are_an_error_whatever_the_stream_is_called(codes, toy, tmp_path):
    samples = sources.read(formats.source("samples", str(toy.root / "forget.jsonl"))).samples
    refusing = tmp_path / "refusing.jsonl"
    write_samples(refusing, [replace(s, answer="sorry i can not help with that") for s in samples])
    with pytest.raises(ConfigError, match=r"data\.streams\.codes: 20 of 20 answers look like refusals"):
        check(codes(codes=refusing))
    check(codes(codes=refusing, data={"refusals_in_forget": "allow"}))
    check(codes(lessons=refusing))  # answers that are learned may refuse


def test_a_stream_that_the_objective_imitates_is_audited_whatever_it_is_called(codes, tmp_path, capsys):
    rows = [("sorry i can not help with that", "share"), ("it is red", "what")] * 60
    samples = [
        Sample(str(i), None, f"{word} the colour number {i}", answer, word == "what", "", "t")
        for i, (answer, word) in enumerate(rows)
    ]
    write_samples(tmp_path / "biased.jsonl", samples)
    for options, audited in (({"lessons": tmp_path / "biased.jsonl"}, 1), ({}, 0)):
        checked = check_recipe(codes(**options), 2)
        warn(checked, audit_warnings(checked, check_inputs(checked)))
        assert capsys.readouterr().out.count("WARNING: data.streams.lessons fails the audit") == audited


@pytest.mark.parametrize("per_batch", [False, True])
def test_a_loss_that_is_declared_to_depend_on_the_micro_batch_fixes_it_for_the_run(codes, tmp_path, per_batch, capsys):
    started(codes(per_batch=per_batch))
    other = codes(per_batch=per_batch, train={"micro_batch": 1})
    if not per_batch:
        check(other)
        return
    with pytest.raises(ConfigError, match=r"train\.micro_batch: 1 here"):
        check(other)
    checked = check_recipe(codes(per_batch=True), 2)
    warn(checked, audit_warnings(checked, check_inputs(checked)))
    assert "objective lab:Codes: the loss is a function of the micro-batch" in capsys.readouterr().out


@pytest.mark.parametrize("count", ["micro_batches", "codes.token"])
def test_a_term_that_counts_what_it_may_not_is_named_with_the_counts_there_are(codes, count):
    checked = check_recipe(codes(count=count), 2)
    feed = Feed(checked.recipe, checked.needs, check_inputs(checked), load.processor(checked.recipe.model))
    counts = feed.counts(feed.window(0, Group(0, 0, 1, torch.device("cpu"))))
    with pytest.raises(
        ConfigError, match=rf"'codes' counts '{count}'; expected one of codes\.sequences, codes\.tokens"
    ):
        total(Term("codes", 1.0, torch.zeros(()), count), counts)


def test_a_class_that_is_no_objective_is_named(recipe):
    with pytest.raises(ConfigError, match="'lab:squared_error': squared_error is not a class"):
        check(replace(recipe(), objective={"name": "lab:squared_error"}))
    with pytest.raises(ConfigError, match=r"'pathlib:Path': not a dataclass derived from .*Objective"):
        check(replace(recipe(), objective={"name": "pathlib:Path"}))


@pytest.mark.parametrize("arguments", [["--check"], []])
def test_a_start_makes_its_objective_once_and_warns_once(toy, tmp_path, capsys, monkeypatch, arguments):
    made = []

    def make(options, source="recipe"):
        made.append(options)
        return original(options, source)

    def no_process_group(*_):
        raise RunError("no process group in this test")

    original = objectives.base.make
    monkeypatch.setattr(objectives.base, "make", make)
    monkeypatch.setattr(ranks, "start", no_process_group)
    overrides = toy.overrides("npo", tmp_path / "run")
    overrides += ["objective={name: npo, reduction: batch_mean, ce_weight: 1.0, beta: 0.7}"]
    overrides += [f"data.streams.retain_ce=[{{format: samples, path: {toy.root}/retain.jsonl}}]"]
    status = main(["train", "configs/train/demo_npo.yaml", *arguments, *overrides])
    captured = capsys.readouterr()
    assert status == (0 if arguments else 1), captured.err
    assert len(made) == 1
    if arguments:
        assert (captured.out + captured.err).count("the loss is a function of the micro-batch") == 1


def test_a_typo_ends_with_one_line_and_status_2():
    command = [sys.executable, "-m", "mirage_dist.cli", "train", "configs/train/npo.yaml", "train.lrr=1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    files = [configs.find(f"configs/{name}.yaml") for name in ("train/npo", "model/llava_1_5_7b")]
    assert done.stderr.strip().splitlines() == [
        f"mirage: {files[0]} (with {files[1]}): unknown key 'train.lrr'; did you mean 'lr'?"
    ]


# --------------------------------------------------------------------- models of real families, by the command


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A stream of samples with and without pictures."""
    folder = tmp_path_factory.mktemp("mixed")
    samples = []
    for number in range(4):
        file = folder / f"{number}.png"
        Image.new("RGB", (50 + 20 * number, 60), "blue").save(file)
        shown = str(file) if number % 2 else None
        samples.append(Sample(str(number), shown, f"what is number {number}", "it is blue " * number, True, "", "t"))
    write_samples(folder / "mixed.jsonl", samples[1:])
    return f"data.streams.train=[{{format: samples, path: {folder}/mixed.jsonl}}]"


def command(verb, model, tmp_path, *overrides):
    given = ["train.micro_batch=2", "train.global_batch=2", "train.max_steps=1", f"run.dir={tmp_path}/run", *overrides]
    return main([*verb, "configs/train/sft.yaml", f"model.path={model}", "data.group_by_length=false", *given])


def test_check_computes_batches_of_a_family_of_the_size_that_people_train(mixed, tmp_path, capsys):
    """Seven billion parameters, of which no weight exists."""

    def large(config):
        text = config.get("text_config", config)
        text.update(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
        text.update(num_key_value_heads=8)
        text["rope_scaling"] = {**text["rope_scaling"], "mrope_section": [16, 24, 24]}
        config["vision_config"] = {**config["vision_config"], "out_hidden_size": 4096}

    model = tmp_path / "large"
    families.write_files("qwen2_5_vl", model, large)
    assert command(["plan"], model, tmp_path, mixed) == 0
    assert "32 layers" in capsys.readouterr().out
    assert command(["train", "--check"], model, tmp_path, mixed) == 0
    assert "computed on a small model: pictured, mixed and text-only batches" in capsys.readouterr().out


def test_a_family_that_cannot_be_trained_is_refused_before_weights_exist(mixed, tmp_path, capsys):
    families.write_files("paligemma_templated", tmp_path / "paligemma")
    assert command(["train", "--check"], tmp_path / "paligemma", tmp_path, mixed) == 2
    assert "paligemma: answers see their own later tokens" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def long_pictures(folder):
    """A stream whose last sample but one has a picture that Qwen-VL's processors refuse: 4 × 1000 pixels."""
    sizes = [(60, 60), (4, 700), (4, 1000), (1000, 90)]
    for number, size in enumerate(sizes):
        Image.new("RGB", size, "blue").save(folder / f"{number}.png")
    pictured = [Sample(f"s{n}", str(folder / f"{n}.png"), "what", "blue", True, "", "t") for n in range(len(sizes))]
    write_samples(folder / "long.jsonl", pictured)
    return folder / "long.jsonl"


def test_what_a_processor_refuses_is_a_bad_record_of_the_check(tmp_path, capsys):
    families.write_files("qwen2_5_vl", tmp_path / "qwen")
    stream = f"format: samples, path: {long_pictures(tmp_path)}"
    check = ["train", "--check"]
    assert command(check, tmp_path / "qwen", tmp_path, f"data.streams.train=[{{{stream}}}]") == 2
    refused = f"long.jsonl: record 2: image {tmp_path}/2.png: Qwen2_5_VLProcessor cannot encode a picture of 4x1000"
    assert refused in capsys.readouterr().err
    skipped = f"data.streams.train=[{{{stream}, on_bad_record: skip}}]"
    assert command(check, tmp_path / "qwen", tmp_path, skipped) == 0
    assert "samples: train 3" in capsys.readouterr().out
    families.write_files("llava_llama", tmp_path / "llava")
    assert command(check, tmp_path / "llava", tmp_path, f"data.streams.train=[{{{stream}}}]") == 0


def test_thousands_of_sizes_take_a_few_tries(tmp_path):
    families.write_files("qwen2_vl", tmp_path / "qwen")
    encoder = Encoder(processors.load(tmp_path / "qwen"))
    tried = []
    encode = encoder.pictured._made
    encoder.pictured._made = lambda text, size: tried.append(size) or encode(text, size)
    ordinary = {(width, height) for width in range(100, 900, 10) for height in range(100, 900, 10)}
    assert encoder.refusals(ordinary | {(3, 900), (900, 3), (5, 900)}).keys() == {(3, 900), (900, 3)}
    assert len(tried) < 12
    assert encoder.refusals(ordinary) == {}
