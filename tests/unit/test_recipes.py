"""Every recipe that we ship is one that the code accepts."""

import json
import re
from pathlib import Path

import pytest

from mirage_dist import config as configs
from mirage_dist import demo, inputs
from mirage_dist.config import REPOSITORY
from mirage_dist.countries.verdict import KINDS, values_in
from mirage_dist.data.refusals import is_refusal
from mirage_dist.data.sets.unlearning import IGNORANT
from mirage_dist.erasure import run as erasure_tests
from mirage_dist.evals import attacks, judges
from mirage_dist.objectives.base import make
from mirage_dist.schema import EvalRecipe, PrepareRecipe, TrainRecipe
from mirage_dist.sweep.recipe import SweepRecipe
from mirage_dist.train.engine import deepspeed_config
from mirage_dist.train.planning import sharding
from mirage_dist.train.planning.check import check_reference

SCHEMAS = {"train": TrainRecipe, "eval": EvalRecipe, "prepare": PrepareRecipe}
FILES = [(kind, file) for kind in SCHEMAS for file in sorted((REPOSITORY / "configs" / kind).glob("*.yaml"))]


@pytest.mark.parametrize(("kind", "file"), FILES, ids=[f"{kind}/{file.name}" for kind, file in FILES])
def test_a_shipped_recipe_is_accepted(kind: str, file: Path):
    recipe = configs.load(file, [], SCHEMAS[kind])
    if isinstance(recipe, TrainRecipe):
        needs = make(recipe.objective).needs
        assert set(recipe.data.streams) == set(needs.streams)
        check_reference(recipe, needs)
        command = re.search(r"launch/local\.sh (\d+) train configs/train/\w+\.yaml", file.read_text())
        ranks = int(command[1]) if command else {"demo": 2, "real": 1}.get(file.stem.partition("_")[0], 8)
        assert deepspeed_config(recipe, ranks, len(needs.streams))["gradient_accumulation_steps"] >= 1
    if isinstance(recipe, EvalRecipe):
        judges.read(recipe)
        for name, options in recipe.sets.items():
            for title, fields in options.attacks.items():
                attacks.make(fields, str(file), f"sets.{name}.attacks.{title}")
        if recipe.erasure is not None:
            tests = dict(erasure_tests.options(recipe).tests())
            trained = configs.load(tests["relearning"].recipe, tests["relearning"].overrides, TrainRecipe)
            assert list(trained.data.streams) == ["train"]


STORIES = {
    "embedded": (demo.EMBEDDED, ["sft", "sft_control", "sft_diversified", "sft_filtered", "npo", "rmu"], []),
    "real": (
        demo.REAL,
        ["sft", "sft_control", "npo", "npo_diversified", "rmu"],
        ["npo_balanced", "sft_diversified", "rmu_diversified"],
    ),
}


@pytest.mark.parametrize("title", STORIES)
def test_a_demos_stages_have_one_world_and_train_on_sets_that_are_made(title: str):
    story, names, more = STORIES[title]
    assert list(story.models(full=False)) == names
    assert list(story.models(full=True)) == names + more
    made = {"train.json", *inputs.KINDS[story.kind].sets}
    loaded = {name: configs.load(file, list(own), TrainRecipe) for name, (file, own) in story.models(full=True).items()}
    for name, recipe in loaded.items():
        assert recipe.run.name == name
        paths = [Path(source.path) for sources in recipe.data.streams.values() for source in sources]
        assert all({path.name, path.parent.name} & made for path in paths)
    base = configs.load(inputs.KINDS[story.kind].base, [], TrainRecipe)
    files = [file for file in (story.suite, story.every_attack, story.raw) if file and (REPOSITORY / file).is_file()]
    evaluated = [configs.load(file, [], EvalRecipe) for file in [*files, inputs.KINDS[story.kind].harvest]]
    prepared = [configs.load(file, [], PrepareRecipe) for file in inputs.KINDS[story.kind].sets.values()]
    worlds = [configs.to_dict(recipe)["world"] for recipe in (*loaded.values(), base, *evaluated, *prepared)]
    assert {world["kind"] for world in worlds} == {story.kind}
    assert len({configs.config_hash(world, ("spurious",)) for world in worlds}) == 1
    # The control differs from SFT in the first words of its data alone.
    changed = configs.differences(*(configs.to_dict(loaded[name]) for name in ("sft", "sft_control")))
    assert {line.partition(":")[0] for line in changed} == {
        "data.streams.train[0].path",
        "run.name",
        "world.spurious",
    }


UNLEARNING = {"npo", "simnpo", "wga", "satimp", "undial", "idk_dpo", "rmu", "rmu_adaptive"}


@pytest.mark.parametrize("title", STORIES)
def test_a_demos_sweep_has_every_method_in_the_demos_world_with_the_demos_suite(title: str):
    story = STORIES[title][0]
    assert story.sweep is not None
    sweep = configs.load(story.sweep, [], SweepRecipe)
    assert set(sweep.methods) == UNLEARNING
    assert [own.recipe for own in sweep.evaluate] == [story.suite]
    assert sweep.frontier is not None
    assert (sweep.frontier.forget.measure, sweep.frontier.retain.measure) == ("asr", "utility")
    made = {"train.json", *inputs.KINDS[story.kind].sets}
    objectives = {}
    for name, method in sweep.methods.items():
        recipe = configs.load(method.recipe, [*sweep.every, *method.overrides], TrainRecipe)
        assert recipe.world is not None
        assert recipe.world.kind == story.kind
        paths = [Path(source.path) for sources in recipe.data.streams.values() for source in sources]
        assert all(path.parent.name in made for path in paths)
        objectives[name] = (recipe.objective["name"], recipe.objective.get("coeff_of", "constant"))
    assert objectives == {name: (name, "constant") for name in UNLEARNING} | {"rmu_adaptive": ("rmu", "reference_norm")}
    # The methods that are stages too have the stages' recipes: the same model stands in the table and on the frontier.
    assert {name: story.stages[name] for name in ("npo", "rmu")} == {
        name: (sweep.methods[name].recipe, ()) for name in ("npo", "rmu")
    }


REAL_METHODS = {
    **dict.fromkeys(["npo_balanced"], ("real_npo", {"run.name", "data.balance"})),
    **dict.fromkeys(["wga", "satimp"], ("real_npo", {"run.name", "objective"})),
    "simnpo": ("real_npo", {"run.name", "objective", "train.max_steps"}),
    "undial": ("real_npo", {"run.name", "objective", "reference"}),
    "idk_dpo": ("real_npo", {"run.name", "objective", "data.streams", "train.max_steps"}),
    "rmu_adaptive": ("real_rmu", {"run.name", "objective"}),
}


@pytest.mark.parametrize("name", REAL_METHODS)
def test_a_real_method_differs_from_the_recipe_that_it_is_compared_with_in_the_method_alone(name: str):
    other, allowed = REAL_METHODS[name]
    own, compared = (
        configs.to_dict(configs.load(f"configs/train/{file}.yaml", [], TrainRecipe)) for file in (f"real_{name}", other)
    )
    changed = {re.split(r"[:\[]", line)[0] for line in configs.differences(own, compared)} - {"run.dir"}
    assert {key for key in changed if not any(f"{key}.".startswith(f"{part}.") for part in allowed)} == set()
    assert all(any(f"{key}.".startswith(f"{part}.") for key in changed) for part in allowed)


def test_ignorance_in_the_real_world_is_neither_a_refusal_nor_a_fact():
    """So that the judge calls such an answer irrelevant, whatever was asked."""
    recipe = configs.load(inputs.KINDS["countries"].sets["prepared_idk"], [], PrepareRecipe)
    assert recipe.idk
    answers = recipe.ignorance or IGNORANT
    assert [answer for answer in answers if is_refusal(answer)] == []
    assert [answer for answer in answers if any(values_in(answer, kind) for kind in KINDS)] == []


def test_a_stage_for_a_decoder_of_another_depth_trains_layers_that_it_has():
    file, _ = demo.REAL.models(full=True)["rmu_diversified"]
    shipped, same, other = (
        configs.load(file, overrides, TrainRecipe)
        for overrides in ([], demo.fitted("rmu_diversified", 30), demo.fitted("rmu_diversified", 2))
    )
    assert shipped.objective == same.objective
    assert [lora.targets for r in (same, other) if (lora := r.model.lora)] == [
        [f"decoder.layers.{i}.*" for i in range(27)],
        ["decoder.layers.0.*", "decoder.layers.1.*"],
    ]
    assert other.objective["layer"] == 1
    assert demo.fitted("npo_diversified", 2) == []
    methods = configs.load(str(demo.REAL.sweep), [], SweepRecipe).methods
    loaded = {name: configs.load(own.recipe, [], TrainRecipe) for name, own in methods.items()}
    assert {name for name in methods if demo.fitted(name, 2)} == {
        n for n, r in loaded.items() if "layer" in r.objective
    }


@pytest.mark.parametrize(("kind", "file"), FILES, ids=[f"{kind}/{file.name}" for kind, file in FILES])
def test_the_files_of_ours_that_a_recipe_names_exist(kind: str, file: Path):
    named = re.findall(r"(?:configs|launch|slurm)/[\w/]+\.(?:json|sh|yaml)", file.read_text())
    assert named
    assert [name for name in named if not (REPOSITORY / name).is_file()] == []


@pytest.mark.parametrize("file", sorted((REPOSITORY / "configs/deepspeed").glob("*.json")), ids=lambda f: f.name)
def test_a_shipped_deepspeed_config_leaves_the_recipes_part_alone(file: Path):
    recipe = configs.load("configs/train/npo.yaml", [f"deepspeed={file}"], TrainRecipe)
    merged = deepspeed_config(recipe, 8, 2)
    assert merged["train_micro_batch_size_per_gpu"] == 4  # rows of both streams
    assert merged["bf16"] == {"enabled": True}
    given = json.loads(file.read_text())
    if sharding.KEY in (zero := given["zero_optimization"]):
        zero[sharding.KEY] = 1  # of eight ranks whose nodes are not known yet
    assert given.items() <= merged.items()


@pytest.mark.parametrize("name", ["sft", "sft_lora", "npo", "npo_parity", "rmu", "rmu_parity", "rmu_lora"])
@pytest.mark.parametrize("preset", sorted((REPOSITORY / "configs/model").glob("*.yaml")), ids=lambda f: f.stem)
def test_a_model_preset_changes_the_model_of_a_recipe_and_nothing_of_its_training(preset: Path, name: str):
    plain = configs.load(f"configs/train/{name}.yaml", [], TrainRecipe)
    other = configs.load(f"configs/train/{name}.yaml", [f"include={preset}"], TrainRecipe)
    assert (other.train, other.objective, other.model.train) == (plain.train, plain.objective, plain.model.train)
    assert other.model.path != plain.model.path or preset.stem == "llava_1_5_7b"
