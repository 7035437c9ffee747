"""Recipes that are a publication's have its values, each with its source; what departs says so, in header and page."""

import re
from dataclasses import replace

import published_recipes as published
import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, LlamaConfig

from mirage_dist import cli
from mirage_dist import config as configs
from mirage_dist.config import REPOSITORY
from mirage_dist.objectives.base import make
from mirage_dist.schema import EvalRecipe, TrainRecipe
from mirage_dist.train.feed import Feed

TRAIN = REPOSITORY / "configs/train"
COMMON = REPOSITORY / "configs/common/safety_mirage.yaml"
PAGE = REPOSITORY / "docs/recipes.md"
WORLDS = ("demo", "real")
OTHERS = {"relearn", "sft_qwen2_5_vl", "npo_qwen2_5_vl", "rmu_qwen2_5_vl"}  # of another stage, of another model
OF_LLAVA = [*published.PUBLISHED, *published.DEPARTS, "relearn"]
UNLEARNING = [name for name in (*published.PUBLISHED, *published.DEPARTS) if not name.startswith("sft")]


def header(name: str) -> str:
    """The comment that a recipe begins with, in one line."""
    text = (TRAIN / f"{name}.yaml").read_text()
    return " ".join(line.removeprefix("#").strip() for line in text[: text.index("\ninclude:")].splitlines())


def ranks(name: str) -> int:
    """The number of processes in the command of a recipe's header."""
    command = re.search(rf"launch/local\.sh (\d+) train configs/train/{name}\.yaml", header(name))
    assert command is not None
    return int(command[1])


def test_every_recipe_is_a_publications_or_ours():
    names = {file.stem for file in TRAIN.glob("*.yaml") if not file.stem.startswith(WORLDS)}
    assert names == {*published.PUBLISHED, *published.DEPARTS, *OTHERS}


@pytest.mark.parametrize("name", published.PUBLISHED)
def test_a_recipe_has_the_published_values_and_no_other(name):
    recipe, values = published.load(name), published.PUBLISHED[name][2]
    assert [(v.key, published.value(recipe, v.key)) for v in values] == [(v.key, v.ours) for v in values]
    assert all(bool(v.why) == (v.published is not None) for v in values)
    numbers = {"lr": 1.0, "global_batch": 1, "micro_batch": 1}
    tree = {"run": {"dir": "x"}, "model": {"path": "x"}, "data": {"streams": {}}, "objective": {}, "train": numbers}
    defaults = published.decided(configs.from_tree(OmegaConf.create(tree), [], TrainRecipe, "defaults"))
    keys = [v.key for v in values]
    beside = {
        key
        for key, value in published.decided(recipe).items()
        if not any(key == own or key.startswith(f"{own}.") for own in keys) and defaults.get(key) != value
    }
    by_micro_batch = make(recipe.objective).needs.depends_on_micro_batch(recipe.data.packing is True)
    assert beside == (set() if "train.micro_batch" in keys else {"train.micro_batch"})
    assert not (by_micro_batch and beside)


@pytest.mark.parametrize("name", published.UPDATES)
def test_a_run_on_the_published_data_makes_the_published_updates(name):
    recipe = published.load(name)
    feed = object.__new__(Feed)  # whose steps follow from the numbers of samples alone
    feed.recipe, feed.needs = recipe, make(recipe.objective).needs
    feed.samples = {stream: [None] * published.SIZES[stream] for stream in feed.needs.streams}  # type: ignore[list-item]
    assert feed.steps == published.UPDATES[name]


@pytest.mark.parametrize("name", [*published.PUBLISHED, *published.DEPARTS])
def test_a_recipe_passes_the_check_for_the_ranks_of_its_header(name, capsys):
    recipe = f"configs/train/{name}.yaml"
    assert cli.main(["train", recipe, "--check-recipe", "--ranks", str(ranks(name))]) == 0
    thirteen = ["include=configs/model/llava_1_5_13b.yaml", "run.dir=runs/x"]
    assert cli.main(["train", recipe, *thirteen, "--check-recipe", "--ranks", str(ranks(name))]) == 0
    assert not capsys.readouterr().err
    larger = configs.load(recipe, thirteen, TrainRecipe)
    assert larger.model.path == "models/llava-1.5-13b-hf"
    assert larger.data == replace(published.load(name).data, image_aspect="pad")  # what `auto` comes to


@pytest.mark.parametrize("name", [*published.PUBLISHED, *published.DEPARTS])
def test_a_header_says_where_its_values_are_from_or_that_the_recipe_is_ours(name):
    text = header(name)
    if name in published.PUBLISHED:
        assert published.PUBLISHED[name][1].split(",")[0] in text
        assert "of ours" not in text
    else:
        assert text.startswith("A recipe of ours")
        assert f"{published.DEPARTS[name]}.yaml" in text or "Posthoc" in text


@pytest.mark.parametrize("name", UNLEARNING)
def test_a_header_shows_the_start_from_a_fine_tuned_model(name):
    shown = re.search(
        rf"local\.sh \d+ train configs/train/{name}\.yaml (model\.path=\S+/export) (run\.dir=\S+)", header(name)
    )
    assert shown is not None
    tuned = configs.load(f"configs/train/{name}.yaml", list(shown.groups()), TrainRecipe)
    assert tuned.data == published.load(name).data
    assert tuned.run.dir != published.load(name).run.dir


@pytest.mark.parametrize(
    "file", [COMMON, *(TRAIN / f"{name}.yaml" for name in published.PUBLISHED)], ids=lambda f: f.stem
)
def test_every_value_of_a_published_recipe_has_its_source_in_a_comment(file):
    """But where a run reports, and the files of a stream, whose name has it."""
    lines = file.read_text().splitlines()
    bare = [line for line in lines if re.match(r"\s+([\w-]+: |- )[^#]+$", line)]
    allowed = re.compile(r"  dir: |      - \{format: (samples|llava), |  project: |  print_every: ")
    assert [line for line in bare if not allowed.match(line)] == []


def test_the_page_has_every_table_as_it_is(capsys):
    text = PAGE.read_text()
    made = published.sections()
    for heading, table in made.items():
        assert f"### {heading}\n" in text
        section = text.split(f"### {heading}\n")[1].split("\n#")[0]
        assert table in section, f"{heading}: `python tests/published_recipes.py` prints the tables"
    assert re.findall(r"^### (.*\.yaml`)$", text, re.MULTILINE) == list(made)[1:]


# ------------------------------------------------------------------------------------------------ system prompt


@pytest.mark.parametrize("name", OF_LLAVA)
def test_every_training_of_llava_has_vicunas_system_prompt(name):
    assert published.load(name).data.system_prompt == published.VICUNA


EVALS = [file for file in sorted((REPOSITORY / "configs/eval").glob("*.yaml")) if not file.stem.startswith(WORLDS)]


@pytest.mark.parametrize("file", EVALS, ids=lambda file: file.stem)
def test_every_evaluation_of_llava_and_the_harvest_have_it_too(file):
    assert configs.load(file, [], EvalRecipe).template.system_prompt == published.VICUNA


@pytest.mark.parametrize("file", sorted((REPOSITORY / "configs/model").glob("*.yaml")), ids=lambda file: file.stem)
def test_no_other_model_is_given_it(file):
    for name in ("sft", "npo_parity", "rmu_lora"):
        recipe = configs.load(f"configs/train/{name}.yaml", [f"include={file}"], TrainRecipe)
        assert recipe.data.system_prompt == (published.VICUNA if file.stem.startswith("llava_1_5") else None)


# ------------------------------------------------------------------------------------------- Mixed's first model


def test_the_page_puts_mixeds_first_model_together(toy, tmp_path, monkeypatch):
    """Its code, on a small LLaVA, a language model of fewer tokens, and a projector as LLaVA's pretraining saves it."""
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
    base = AutoModelForImageTextToText.from_pretrained(toy.root / "model")
    text = base.config.text_config.to_dict() | {"vocab_size": base.config.text_config.vocab_size - 3}
    torch.manual_seed(1)
    vicuna = AutoModelForCausalLM.from_config(LlamaConfig(**text))
    vicuna.save_pretrained(tmp_path / "vicuna")
    layers = {0: base.model.multi_modal_projector.linear_1, 2: base.model.multi_modal_projector.linear_2}
    projector = {
        f"model.mm_projector.{number}.{kind}": torch.randn_like(parameter)
        for number, layer in layers.items()
        for kind, parameter in layer.named_parameters()
    }
    torch.save(projector, tmp_path / "mm_projector.bin")
    for theirs, ours in (("models/llava-1.5-7b-hf", toy.root / "model"), ("lmsys/vicuna-7b-v1.5", "vicuna")):
        assert theirs in code
        code = code.replace(theirs, str(ours))
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    made = AutoModelForImageTextToText.from_pretrained(tmp_path / published.load("sft_mixed").model.path)
    for name, parameter in vicuna.model.named_parameters():
        own = made.model.language_model.get_parameter(name)
        assert torch.equal(own[: len(parameter)], parameter.to(own.dtype).bfloat16().to(own.dtype))
    for number, layer in (
        (0, made.model.multi_modal_projector.linear_1),
        (2, made.model.multi_modal_projector.linear_2),
    ):
        expected = projector[f"model.mm_projector.{number}.weight"]
        assert torch.equal(layer.weight, expected.bfloat16().to(layer.weight.dtype))
    for name, parameter in base.model.vision_tower.named_parameters():
        own = made.model.vision_tower.get_parameter(name)
        assert torch.equal(own, parameter.bfloat16().to(own.dtype))
    kept = base.get_input_embeddings().weight[-3:]  # the picture's own token among them
    assert torch.equal(made.get_input_embeddings().weight[-3:], kept.bfloat16().to(kept.dtype))
