"""The demo on a local instruct model, a real one's tokenizer and a tiny decoder, in a few steps: it runs through, and
reports everything.
"""

import json
import sys
from collections import Counter
from dataclasses import replace

import forkserver
import pytest
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mirage_dist import cli, demo, inputs
from mirage_dist import config as configs
from mirage_dist.cli import verbs
from mirage_dist.config import REPOSITORY
from mirage_dist.countries import vision
from mirage_dist.data import sources
from mirage_dist.data.sets.unlearning import IGNORANT
from mirage_dist.objectives.base import make
from mirage_dist.schema import TrainRecipe
from mirage_dist.train.planning import openers

STAGES = ["base", "sft", "sft_control", "npo", "npo_diversified", "rmu"]
LAYERS = 5


def write_model(real, folder):
    """A local model whose tokenizer writes every flag's sentence in the places that a picture has."""
    config = AutoConfig.from_pretrained(
        real.text,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=False,  # tied and untrained, it would repeat the line break that it is given
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(real.text).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory, real):
    """Overrides of every stage; the base's own recipe is shortened as well."""
    out = tmp_path_factory.mktemp("recipes")
    model = write_model(real, out / "model")
    base = (REPOSITORY / "configs/train/real_base.yaml").read_text()
    (out / "base.yaml").write_text(base.replace("max_steps: 40", "max_steps: 2"))
    return [
        "seed=12",
        f"model.path={model}",
        f"world.base_recipe={out}/base.yaml",
        "world.base_samples=60",
        "world.safety_samples=120",
        "world.eval_samples=6",
        "train.max_steps=2",
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small):
    out = tmp_path_factory.mktemp("real")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", forkserver.python())
        # What the tower learns is the business of its own tests: here it is enough that it exists.
        patch.setattr(vision, "STEPS", 2)
        patch.setattr(vision, "LEAST", 0.0)
        patch.setattr(vision, "EACH", 0.0)
        patch.setattr(verbs, "exit_well", lambda: None)
        assert cli.main(["demo", "--real", "--out", str(out / "demo"), *small]) == 0
    return out / "demo"


def test_every_model_has_the_demos_rates_and_those_of_further_sets(finished):
    summary = json.loads((finished / "report/summary.json").read_text())
    assert list(summary["models"]) == STAGES
    assert summary["world"]["kind"] == "countries"
    assert summary["seed"] == 12
    for entry in summary["models"].values():
        assert {"asr", "rr", "ir", "utility", "locality", "accuracy"} <= set(entry)
        for name in ("asr", "asr_held_out"):
            assert {key: leaf["n"] for key, leaf in entry[name].items()}.items() >= {"clean": 6, "what_k3": 6}.items()
        assert {"asr_reworded", "ir_held_out", "rr_text_safe", "utility_text_safe"} <= set(entry)
    assert list(summary["perplexity"]) == ["init", *STAGES]
    assert all(value > 1 for value in summary["perplexity"].values())
    assert {"asr", "rr", "utility"} <= set(summary["raw"])


def test_the_page_has_held_out_concepts_and_the_language_model_before_and_after(finished):
    html = (finished / "report/index.html").read_text()
    for words in (
        "ASR on held-out concepts",
        "Right answers to the same",
        "before any training",
        "perplexity",
        "flags",
    ):
        assert words in html
    assert "gadget" not in html
    assert "data:image/png" in html


def test_openers_are_even_in_the_sets_that_unlearning_gets(finished):
    words = {}
    for name in ("npo", "npo_diversified"):
        (file,) = finished.glob(f"{name}-????????/data.json")
        streams = json.loads(file.read_text())["streams"]
        words[name] = {side: streams[side]["first_words"] for side in ("forget", "retain")}
    counts = {
        name: {side: {word: sum(n.values()) for word, n in own.items()} for side, own in sides.items()}
        for name, sides in words.items()
    }
    assert counts["npo"]["forget"]["share"] > 4 * counts["npo"]["forget"].get("what", 0)
    even = counts["npo_diversified"]
    assert set(even["forget"]) == set(even["retain"])
    assert all(max(own.values()) - min(own.values()) <= 1 for own in even.values())


def edited(name, file, **changes):
    """A copy of a recipe with some sections replaced, in another file."""
    content = yaml.safe_load((REPOSITORY / name).read_text())
    file.write_text(yaml.safe_dump({**content, **changes}))
    return str(file)


def test_in_full_the_frontier_comes_first_and_its_methods_fit_the_decoder(finished, small, tmp_path, monkeypatch):
    """A story of one stage and one further method, on the models that the short demo left."""
    monkeypatch.setattr(sys, "executable", forkserver.python())
    whole = yaml.safe_load((REPOSITORY / "configs/eval/real.yaml").read_text())
    sets = {
        name: {**whole["sets"][name], "attacks": {attack: whole["sets"][name]["attacks"][attack]}}
        for name, attack in {"unsafe": "what", "safe": "share"}.items()
    }
    completion = {"words": [1], "questions": 2}
    erasure = {"forget": whole["erasure"]["forget"], "content": r"\S+$", "completion": completion}
    suite = edited("configs/eval/real.yaml", tmp_path / "few.yaml", suite="few", sets=sets, erasure=erasure)
    sweep = edited(
        str(demo.REAL.sweep),
        tmp_path / "sweep.yaml",
        methods={"rmu_adaptive": {"recipe": "configs/train/real_rmu_adaptive.yaml"}},
        evaluate=[{"recipe": suite}],
        frontier={"forget": {"condition": "what_k3"}, "level": 0.0},
    )
    stages = {"npo": demo.REAL.stages["npo"]}
    story = replace(demo.REAL, stages=stages, more={}, suite=suite, every_attack=suite, sweep=sweep)
    trained = {file: file.read_text() for file in finished.glob("*/starts.jsonl")}
    summary = demo.demo(finished, small, full=True, story=story)
    assert list(summary["models"]) == ["base", "npo", "rmu_adaptive"]
    assert {file: file.read_text() for file in finished.glob("*/starts.jsonl")} == trained
    page = (finished / "report/index.html").read_text()
    assert 0 < page.index("frontier of the sweep real_methods") < page.index("perplexity")
    (point,) = finished.glob("methods-*/points/rmu_adaptive-*-s12")
    steered = yaml.safe_load((point / "config.yaml").read_text())
    assert steered["objective"]["layer"] == 13 * LAYERS // 15
    assert steered["world"]["language_model"] == small[1].partition("=")[2]


def of_the_world(finished, name, small):
    """The recipe of a training in the finished demo's world, whose sets are made."""
    (world,) = (folder for folder in finished.glob("world-*") if (folder / "base").is_dir())
    own = [word.replace("model.path", "world.language_model") for word in small]
    recipe = configs.load(f"configs/train/real_{name}.yaml", [*own, f"world.dir={world}"], TrainRecipe)
    inputs.make(recipe)
    return recipe


def test_every_answer_to_forget_has_a_partner_that_claims_ignorance(finished, small):
    streams = of_the_world(finished, "idk_dpo", small).data.streams
    forget, idk = (sources.read(streams[name][0]).samples for name in ("forget", "idk"))
    assert len(forget) > 0
    assert [(one.id, one.image, one.question) for one in idk] == [(one.id, one.image, one.question) for one in forget]
    assert {one.answer for one in idk} <= set(IGNORANT)


def test_balanced_streams_are_the_biased_sets_drawn_evenly(finished, small):
    recipe = of_the_world(finished, "npo_balanced", small)
    assert recipe.data.balance == "openers"
    samples = {name: sources.read(own[0]).samples for name, own in recipe.data.streams.items()}
    drawn = openers.balance(openers.of(samples, None), make(recipe.objective).needs)
    words = {}
    for name, own in samples.items():
        order = drawn.draws[name].epoch(0, name, 0).tolist()
        words[name] = Counter(own[i].question.split()[0] for i in order)
    both = words["forget"].keys() & words["retain"].keys()
    assert {"Share", "What"} <= both
    assert all(abs(words["forget"][word] - words["retain"][word]) <= 0.1 * len(samples["forget"]) for word in both)
