"""Recipes: every mistake is named with its place and its remedy; a resolved recipe reads back equal."""

import copy
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from mirage_dist import config as configs
from mirage_dist.schema import ConfigError, EvalRecipe, TrainRecipe, secrets

RECIPE = {
    "run": {"dir": "runs/x"},
    "model": {"path": "m"},
    "data": {"streams": {"forget": {"format": "vlguard", "path": "train.json"}}},
    "objective": {"name": "graddiff"},
    "train": {"lr": 1e-5, "global_batch": 8, "micro_batch": 2},
}


def build(*overrides):
    return configs.from_tree(OmegaConf.create(copy.deepcopy(RECIPE)), overrides, TrainRecipe, "recipe.yaml")


def test_overrides_keep_their_types():
    recipe = build("train.lr=5e-7", "train.max_steps=20", "run.name=null", "model.lora.rank=8")
    assert recipe.train.lr == 5e-7
    assert recipe.train.max_steps == 20
    assert recipe.run.name is None
    assert recipe.model.lora is not None
    assert recipe.model.lora.rank == 8


def test_one_source_stands_for_a_list_of_one():
    assert [s.path for s in build().data.streams["forget"]] == ["train.json"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.train=[decoder.layers.[01].mlp.weight]", ["model.train", "quote names with"]),
        ("model.train=[decoder", ["model.train=[decoder", "is not YAML"]),
        ("train.lrr=1", ["train.lrr", "'lr'"]),
        ("trian.lr=1", ["trian", "'train'"]),
        ("train.dtype=fp16", ["train.dtype", "fp32, bf16"]),
        ("train.lr=fast", ["train.lr", "a number"]),
        ("train.max_steps=1.5", ["train.max_steps", "a whole number"]),
        ("data.streams.forget.format=coco", ["data.streams.forget[0].format", "vlguard"]),
        ("data.streams.forget.response=rejected", ["data.streams.forget[0].response", "format=spa_vl"]),
        ("data.streams.forget={format: llava, path: x, split: unsafes}", ["forget[0].split", "format=vlguard"]),
        ("monitor.wandb=maybe", ["monitor.wandb", "offline"]),
        ("world.dri=w", ["world.dri", "'dir'"]),
        ("train.lr", ["key=value"]),
    ],
)
def test_a_wrong_key_or_value_is_named_with_what_is_allowed(override, words):
    with pytest.raises(ConfigError) as error:
        build(override)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        *(
            ("train", f"{name}={v}", "above 0")
            for name in ("global_batch", "micro_batch", "max_steps")
            for v in (0, -3)
        ),
        *(("train", f"{name}=0", "above 0") for name in ("save_every", "keep_last", "keep_every", "max_restarts")),
        *(("train", f"{name}={v}", "above 0") for name in ("lr", "epochs", "hang_seconds") for v in (0, -1, ".inf")),
        *(("train", f"{name}=-1", "at least 0") for name in ("weight_decay", "clip")),
        *(("train", f"{name}={v}", "from 0 to 1") for name in ("warmup", "decay", "min_lr") for v in (-0.1, 3)),
        ("data", "max_length=0", "above 0"),
        ("monitor", "print_every=0", "above 0"),
        ("model", "lora={rank: 0}", "above 0"),
        ("model", "lora={dropout: 1.0}", "below 1"),
        ("world", "eval_samples=0", "above 0"),
    ],
)
def test_a_number_out_of_its_range_is_named_with_the_range(key, value, allowed):
    with pytest.raises(ConfigError) as error:
        build("world.dir=w", f"{key}.{value}")
    name = value.partition("=")[0].partition("={")[0]
    assert f"{key}." in str(error.value)
    assert name in str(error.value)
    assert allowed in str(error.value)


def test_a_missing_key_is_named():
    tree = OmegaConf.create(copy.deepcopy(RECIPE))
    del tree.train.lr
    with pytest.raises(ConfigError, match=r"train\.lr is missing"):
        configs.from_tree(tree, [], TrainRecipe, "recipe.yaml")


def test_written_recipe_reads_back_equal(tmp_path):
    recipe = build("train.lr=5e-7", "monitor.wandb=off", "world.dir=w", "world.spurious=0.5")
    configs.write_yaml(recipe, tmp_path / "config.yaml")
    assert configs.load(tmp_path / "config.yaml", [], TrainRecipe) == recipe


def test_hash_follows_values_and_nothing_else():
    assert configs.config_hash(build()) == configs.config_hash(build("train.epochs=1.0"))
    assert configs.config_hash(build()) != configs.config_hash(build("train.lr=1"))
    ignored = ["run.dir", "monitor"]
    assert configs.config_hash(build("run.dir=y"), ignored) == configs.config_hash(build(), ignored)


def test_a_default_that_is_said_is_the_default():
    explicit, plain = build("data.streams.forget.split=all"), build()
    assert explicit == plain
    assert explicit.data.streams["forget"][0].split == "all"
    # Recipes that were written out before these keys were of one format only have them for every format.
    other = build("data.streams.forget={format: llava, path: x, split: all, response: chosen, annotations: null}")
    assert other == build("data.streams.forget={format: llava, path: x}")


def test_differences_name_dotted_keys():
    mine, other = configs.to_dict(build()), configs.to_dict(build("train.lr=1"))
    assert configs.differences(mine, other) == ["train.lr: 1e-05 here, 1.0 there"]


def test_a_typo_is_reported_without_loading_torch():
    code = "import sys, mirage_dist.config; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_differences_are_found_within_lists_and_an_absent_key_is_null():
    mine = {"sources": [{"path": "a", "limit": None}, {"path": "b", "limit": 3}]}
    there = {"sources": [{"path": "a"}, {"path": "b"}]}
    assert configs.differences(mine, there) == ["sources[1].limit: 3 here, None there"]
    assert configs.differences({"x": [1]}, {"x": [1, 2]}) == ["x: [1] here, [1, 2] there"]


NPO = {"name": "npo", "beta": 0.3, "retain": "kl"}


def options(*overrides):
    return configs.from_tree(
        OmegaConf.create({**RECIPE, "objective": dict(NPO)}), overrides, TrainRecipe, "r"
    ).objective


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["objective.name=graddiff"], {"name": "graddiff"}),
        (["objective={name: rmu, layer: 3}"], {"name": "rmu", "layer": 3}),
        (["objective={name: npo}"], {"name": "npo"}),
        (["objective.retain_weight=2", "objective.name=graddiff"], {"name": "graddiff", "retain_weight": 2}),
        (["objective.name=graddiff", "objective.retain_weight=2"], {"name": "graddiff", "retain_weight": 2}),
        (["objective.name=npo"], NPO),
        (["objective={beta: 0.5}"], {**NPO, "beta": 0.5}),
        (["objective.beta=0.5"], {**NPO, "beta": 0.5}),
    ],
)
def test_choosing_another_class_replaces_its_options_as_a_whole(overrides, expected):
    assert options(*overrides) == expected


def test_a_choice_within_a_mapping_of_choices_replaces_its_own_options_only():
    attacks = {"what": {"kind": "swap", "words": ["what"]}, "other": {"kind": "file", "path": "x"}}
    sets = {"unsafe": {"kind": "unsafe", "sources": [], "attacks": attacks}}
    tree = {"run": {"dir": "r"}, "suite": "s", "model": {"path": "m"}, "sets": sets}
    recipe = configs.from_tree(
        OmegaConf.create(tree), ["sets.unsafe.attacks.what.kind=prefix"], EvalRecipe, "recipe.yaml"
    )
    assert recipe.sets["unsafe"].attacks == {"what": {"kind": "prefix"}, "other": {"kind": "file", "path": "x"}}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("train.export=true",), "allowed: merged, adapter, both, off"),
        (("train.export=adapter",), r"no adapter without model\.lora"),
        (("train.export=both", "model.lora={also_train: [connector]}"), "does not hold what model.lora.also_train"),
    ],
)
def test_a_form_of_export_that_would_lose_what_was_trained_is_refused(overrides, words):
    with pytest.raises(ConfigError, match=words):
        build(*overrides)
    assert build("train.export=false").train.export == "off"


def test_a_recipe_wins_over_what_it_includes_and_the_command_line_over_both(tmp_path):
    (tmp_path / "base.yaml").write_text("model: {path: base, attention: sdpa}\ndata: {max_length: 7, workers: 9}\n")
    (tmp_path / "other.yaml").write_text(f"include: {tmp_path}/base.yaml\nmodel: {{path: other}}\n")
    own = "include: [INCLUDED]\ndata: {max_length: 8, streams: {}}\nrun: {dir: r}\nobjective: {name: sft}\n"
    own += "train: {lr: 1.0, global_batch: 1, micro_batch: 1}\n"
    (tmp_path / "own.yaml").write_text(own.replace("INCLUDED", f"{tmp_path}/other.yaml"))
    recipe = configs.load(tmp_path / "own.yaml", [], TrainRecipe)
    assert (recipe.model.path, recipe.model.attention) == ("other", "sdpa")
    assert (recipe.data.max_length, recipe.data.workers) == (8, 9)
    (tmp_path / "late.yaml").write_text("model: {path: late}\ndata: {max_length: 5}\n")
    recipe = configs.load(tmp_path / "own.yaml", [f"include={tmp_path}/late.yaml", "data.max_length=6"], TrainRecipe)
    assert (recipe.model.path, recipe.model.attention, recipe.data.max_length) == ("late", "sdpa", 6)
    configs.write_yaml(recipe, tmp_path / "resolved.yaml")
    assert configs.load(tmp_path / "resolved.yaml", [], TrainRecipe) == recipe
    assert "include" not in (tmp_path / "resolved.yaml").read_text()


@pytest.mark.parametrize(
    ("included", "words"),
    [
        ("model: {pth: x}", r"own\.yaml \(with .*included\.yaml\): unknown key 'model\.pth'"),
        ("include: OWN", r"included\.yaml: include: .*own\.yaml includes this file in turn"),
        ("include: nowhere.yaml", r"nowhere\.yaml: no such file"),
        ("include: ${x}", r"\$\{x\}: no such file"),
        ("include: ['${x:1}']", r"\$\{x:1\}: no such file"),
        ("include: ${", r"included\.yaml: not readable as YAML: no viable alternative.*'\$\{'$"),
        ("include: 3", r"included\.yaml: include=3; expected a file or a list of files"),
        ("- a", r"included\.yaml: expected a mapping"),
        ("a: [", r"included\.yaml: not readable as YAML"),
    ],
)
def test_a_fault_of_an_included_file_names_the_file(tmp_path, included, words):
    (tmp_path / "own.yaml").write_text(f"include: {tmp_path}/included.yaml\nmodel: {{path: x}}\n")
    (tmp_path / "included.yaml").write_text(included.replace("OWN", f"{tmp_path}/own.yaml"))
    with pytest.raises(ConfigError, match=words):
        configs.load(tmp_path / "own.yaml", [], TrainRecipe)


def suite(*overrides):
    attacks = {"pair": {"kind": "combine", "attacks": [{"kind": "swap", "word": "what"}, {"kind": "prefix"}]}}
    source = {"format": "vlguard", "path": "p.json", "images": "i", "split": "unsafes"}
    sets = {"unsafe": {"kind": "unsafe", "sources": [source], "attacks": attacks}}
    judges = ["keyword", {"kind": "keyword", "phrases": "published", "name": "theirs"}]
    tree = {"run": {"dir": "r"}, "suite": "s", "model": {"path": "m"}, "sets": sets, "judges": judges}
    return configs.from_tree(OmegaConf.create(tree), overrides, EvalRecipe, "recipe.yaml")


def test_another_judge_has_none_of_the_former_ones_options():
    assert suite("judges[1].kind=benchmark").judges == ["keyword", {"kind": "benchmark"}]
    assert suite("judges.1.kind=vlm", "judges.1.url=u").judges[1] == {"kind": "vlm", "url": "u"}
    assert suite("judges[0].kind=vlm", "judges[0].path=p").judges[0] == {"kind": "vlm", "path": "p"}
    assert suite("judges[0].phrases=published").judges[0] == {"kind": "keyword", "phrases": "published"}
    assert suite("judges[1].kind=keyword").judges[1] == {"kind": "keyword", "phrases": "published", "name": "theirs"}


def test_another_part_of_a_combined_attack_has_none_of_the_former_ones_options():
    attack = suite("sets.unsafe.attacks.pair.attacks[0].kind=prefix").sets["unsafe"].attacks["pair"]
    assert attack == {"kind": "combine", "attacks": [{"kind": "prefix"}, {"kind": "prefix"}]}


def test_another_format_keeps_what_every_format_has_and_none_of_the_former_ones_options():
    source = suite("sets.unsafe.sources[0].format=llava").sets["unsafe"].sources[0]
    assert (source.format, source.path, source.images) == ("llava", "p.json", "i")
    streams = build("data.streams.forget={format: vlguard, path: x, split: unsafes}").data.streams["forget"]
    assert streams[0].split == "unsafes"
    with pytest.raises(ConfigError, match="split='unsafes'; belongs to format=vlguard"):
        suite("sets.unsafe.sources[0].format=llava", "sets.unsafe.sources[0].split=unsafes")


def test_another_optimizer_has_none_of_the_former_ones_options():
    train = {**RECIPE["train"], "optimizer": {"name": "adamw", "betas": [0.8, 0.9]}}
    tree = OmegaConf.create({**RECIPE, "train": train})
    recipe = configs.from_tree(tree, ["train.optimizer.name=muon"], TrainRecipe, "r")
    assert recipe.train.optimizer == {"name": "muon"}


def test_a_recipe_that_names_another_class_takes_none_of_the_included_ones_options(tmp_path):
    npo = "objective: {name: npo, beta: '${seed}', retain: kl}\nseed: 1\nmodel: {path: m}\n"
    (tmp_path / "npo.yaml").write_text(npo)
    own = "run: {dir: r}\ndata: {streams: {}}\ntrain: {lr: 1.0, global_batch: 1, micro_batch: 1}\n"
    own = f"include: {tmp_path}/npo.yaml\n{own}"
    for objective, expected in (
        ("{name: rmu, layer: 3}", {"name": "rmu", "layer": 3}),
        ("{beta: 0.5}", {"name": "npo", "beta": 0.5, "retain": "kl"}),
        ("{name: npo, retain: ce}", {"name": "npo", "beta": 1, "retain": "ce"}),
    ):
        (tmp_path / "own.yaml").write_text(f"{own}objective: {objective}\n")
        assert configs.load(tmp_path / "own.yaml", [], TrainRecipe).objective == expected
    (tmp_path / "sft.yaml").write_text("objective: {name: sft}\n")
    recipe = configs.load(tmp_path / "own.yaml", [f"include={tmp_path}/sft.yaml", "seed=2"], TrainRecipe)
    assert recipe.objective == {"name": "sft"}


TEXTS = (
    "runs/it's",
    'runs/"sft"',
    "runs/a b = c",
    "runs/$x ${run.name} \\${y}",
    "runs/é 日本 \U0001f600\u2028",
    "[a, b]: {c} #d",
    "null",
    "1e3",
    "a\\",
)


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_given_as_an_override_or_read_back_from_config_yaml_is_the_same_text(tmp_path, text):
    recipe = build(configs.override("run.dir", text))
    assert recipe.run.dir == text
    assert configs.value(recipe, "run.dir") == text
    configs.write_yaml(recipe, tmp_path / "config.yaml")
    assert configs.load(tmp_path / "config.yaml", [], TrainRecipe) == recipe


def test_containers_given_as_an_override_are_the_same_containers():
    recipe = build(configs.override("data.template_options", {"a": ["x: y", 1, True, None], "b": "${c}"}))
    assert recipe.data.template_options == {"a": ["x: y", 1, True, None], "b": "${c}"}


PIECES = ("$", "{", "}", "\\", "x", ":", " ", "run.dir", "${x}", "é", "'", '"', "\n")


@given(st.text() | st.lists(st.sampled_from(PIECES)).map("".join))
def test_every_text_survives_an_override_and_config_yaml(drawn):
    recipe = build(configs.override("data.system_prompt", drawn))
    assert recipe.data.system_prompt == drawn
    again = configs.from_tree(OmegaConf.create(configs.to_yaml(recipe)), [], TrainRecipe, "config.yaml")
    assert again == recipe


def test_a_value_is_named_by_its_key_and_an_unknown_key_by_the_nearest():
    recipe = build()
    assert configs.value(recipe, "data.streams.forget[0].path") == recipe.data.streams["forget"][0].path
    with pytest.raises(ConfigError, match=r"unknown key 'run\.dri'; did you mean 'dir'"):
        configs.value(recipe, "run.dri")


def test_the_class_of_a_recipe_shows_in_its_keys(tmp_path):
    assert isinstance(configs.load_any("configs/eval/vlguard.yaml", ["run.dir=r"]), EvalRecipe)
    assert isinstance(configs.load_any("configs/train/npo_qwen2_5_vl.yaml", []), TrainRecipe)
    with pytest.raises(ConfigError, match="expected a recipe of training, evaluation or preparation"):
        configs.load_any("configs/model/qwen3_vl_8b.yaml", [])


def build_eval(*overrides: str) -> EvalRecipe:
    return configs.load("configs/eval/vlguard.yaml", ["run.dir=runs/x", *overrides], EvalRecipe)


@pytest.mark.parametrize(
    ("key", "override"),
    [
        ("suite", "suite={}"),
        ("run.name", "run.name={}"),
        ("a key of sets", "sets={{{}: {{kind: safe, sources: []}}}}"),
        ("a key of sets.a.attacks", "sets={{a: {{kind: safe, sources: [], attacks: {{{}: {{kind: swap}}}}}}}}"),
    ],
)
@pytest.mark.parametrize("name", ["'../x'", "a/b", "'.hidden'", "'a b'", "''", "'\\e[31mred'", "naïve", "x" * 81, "a."])
def test_what_becomes_part_of_a_path_is_a_name(key, override, name):
    with pytest.raises(ConfigError, match=re.escape(f": {key}=") + ".*; expected a name: 1 to 80 of A-Z, a-z, 0-9"):
        build_eval(override.format(name))


@pytest.mark.parametrize("value", ["'a\\0b'", "''", "x" * 256, "/".join(["x" * 200] * 20)])
@pytest.mark.parametrize("key", ["run.dir", "model.path"])
def test_a_path_that_no_file_system_takes_is_refused_before_anything_is_made(key, value):
    with pytest.raises(ConfigError, match=f": {key}=.*; expected a path"):
        build_eval(f'{key}="{value[1:-1]}"' if value.startswith("'") else f"{key}={value}")


@pytest.mark.parametrize("resolver", ["oc.env:HOME", "oc.decode:1", "oc.create:1", "file:/etc/passwd"])
def test_a_recipe_reads_nothing_from_outside_itself(resolver):
    with pytest.raises(ConfigError, match=r"template.system_prompt: .*What is secret stays in the environment"):
        build_eval(f"template.system_prompt=${{{resolver}}}")


@pytest.mark.parametrize(
    "value", ["sk-proj-" + "a1" * 12, "hf_" + "a1" * 12, "https://user:password@host/v1", "Bearer " + "a1" * 12]
)
@pytest.mark.parametrize("key", ["template.system_prompt", "judges", "run.dir"])
def test_what_looks_like_a_key_is_refused_without_being_shown(key, value):
    with pytest.raises(ConfigError, match=f"{key}.* holds what looks like a key or a password.*key_env") as refused:
        build_eval(
            f"{key}=[{{kind: vlm, url: 'http://h/v1', model: '{value}'}}]" if key == "judges" else f"{key}='{value}'"
        )
    assert value not in str(refused.value)


def test_command_lines_are_recorded_without_the_keys_in_them():
    words = [
        "mirage",
        "model.api_key=topsecret1",
        "x=hf_" + "a1" * 12,
        "url=https://u:topsecret2@host/v1",
        "train.lr=1e-4",
    ]
    assert [secrets.masked(word) for word in words] == [
        *("mirage", "model.api_key=***", "x=***", "url=https://***@host/v1", "train.lr=1e-4")
    ]
