"""The demo on a local instruct model, a real one's tokenizer and a tiny decoder, in a few steps: it runs through, and
reports everything.
"""

import json
import sys

import forkserver
import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mirage_dist import cli
from mirage_dist.cli import verbs
from mirage_dist.config import REPOSITORY
from mirage_dist.countries import vision

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
def finished(tmp_path_factory, real):
    out = tmp_path_factory.mktemp("real")
    model = write_model(real, out / "model")
    base = (REPOSITORY / "configs/train/real_base.yaml").read_text()
    (out / "base.yaml").write_text(base.replace("max_steps: 40", "max_steps: 2"))
    small = [
        "seed=12",
        f"model.path={model}",
        f"world.base_recipe={out}/base.yaml",
        "world.base_samples=60",
        "world.safety_samples=120",
        "world.eval_samples=6",
        "train.max_steps=2",
    ]
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
