"""LoRA, KL, offload and the paper's parity mode on real DeepSpeed processes; W&B as one offline run."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import launch, losses, metrics
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from mirage_dist.model import export
from mirage_dist.model.shards import Shards
from mirage_dist.schema import ConfigError

STEPS = 4
SHORT = (f"train.max_steps={STEPS}", "train.global_batch=8", "train.micro_batch=4")
LORA = (
    "model.lora={rank: 4, alpha: 8, dropout: 0.0, targets: [decoder]}",
    "model.gradient_checkpointing=true",
    "objective.retain_weight=0.1",  # so that the forget term decides where four steps go
)
NO_PIN = {
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "cpu"},
    }
}
RUNS = {
    "lora_cache": (2, (*LORA, "reference=cache", "monitor.wandb=offline", "train.save_every=2")),
    "lora_off": (2, (*LORA, "reference=adapters_off", "train.export=false")),
    "kl_engine": (1, ("objective.retain=kl", "reference=engine", "train.micro_batch=8", "train.export=false")),
    "kl_engine_2": (2, ("objective.retain=kl", "reference=engine", "train.export=false")),
    "plain": (2, ("train.export=false",)),
    "offload": (2, ("deepspeed={offload}", "train.export=false")),
    "parity": (2, ("train.export=false", "objective={name: npo, beta: 0.9, reduction: batch_mean, ce_weight: 1.0}")),
}


@pytest.fixture(scope="module")
def finished(toy):
    (toy.root / "offload.json").write_text(json.dumps(NO_PIN))
    folders = {}
    for name, (ranks, own) in RUNS.items():
        folder = toy.root / "more" / name
        overrides = [
            *toy.overrides("npo", folder),
            *SHORT,
            *(o.replace("{offload}", f"{toy.root}/offload.json") for o in own),
        ]
        if name == "parity":
            overrides.append(f"data.streams.retain_ce=[{{format: samples, path: {toy.root}/retain.jsonl}}]")
        launch(ranks, "train", "configs/train/demo_npo.yaml", *overrides)
        folders[name] = folder
    return folders


@pytest.mark.parametrize(
    ("one", "other"), [("lora_cache", "lora_off"), ("kl_engine", "kl_engine_2"), ("plain", "offload")]
)
def test_the_same_losses_by_another_way(finished, one, other):
    torch.testing.assert_close(losses(finished[other]), losses(finished[one]), atol=5e-6, rtol=5e-6)


def test_lora_learns_although_layers_are_checkpointed(finished):
    lines = metrics(finished["lora_cache"])
    assert all(m["grad_norm"] > 0 for m in lines)
    # At the reference every margin is 0; the batches differ, this value does not.
    assert lines[0]["terms"]["forget"] == pytest.approx(2 / 0.5 * math.log(2), abs=1e-5)
    assert lines[-1]["terms"]["forget"] < lines[0]["terms"]["forget"] - 1e-3


def test_a_lora_checkpoint_holds_adapters_only_and_its_export_is_merged(finished, toy):
    base = load_file(toy.root / "model/model.safetensors")
    out = load_file(finished["lora_cache"] / "export/model.safetensors")
    assert set(out) == set(base)
    changed = {name for name in out if not torch.equal(out[name], base[name])}
    assert changed
    assert all("language_model.model.layers" in name and "_proj" in name for name in changed)
    manifest = json.loads((finished["lora_cache"] / f"checkpoints/step-{STEPS:06d}/manifest.json").read_text())
    # Adapters, their two moments and their master copy, against the model's own size.
    assert sum(f["bytes"] for f in manifest["files"].values()) < 4 * sum(t.nbytes for t in base.values())


def test_parity_mode_starts_where_its_formula_says(finished):
    """Policy and reference are equal at first: log σ(0) on both sides, and plain CE."""
    first = metrics(finished["parity"])[0]["terms"]
    zero = 2 / 0.9 * torch.log(torch.tensor(0.5)).item()
    assert first["forget"] == pytest.approx(-zero, abs=1e-5)
    assert first["retain"] == pytest.approx(zero, abs=1e-5)


def test_kl_is_zero_at_the_reference_and_grows(finished):
    lines = [m["terms"]["retain_kl"] for m in metrics(finished["kl_engine"])]
    assert lines[0] == pytest.approx(0, abs=1e-6)
    assert lines[-1] > 1e-4


def test_wandb_is_one_run_with_the_manifests_id(finished):
    folders = list((finished["lora_cache"] / "wandb").glob("offline-run-*"))
    identity = json.loads((finished["lora_cache"] / "manifest.json").read_text())["wandb_id"]
    assert [f.name.rsplit("-", 1)[1] for f in folders] == [identity]
    assert list(folders[0].glob("*.wandb"))


def test_exported_logits_are_the_trained_models(finished, toy):
    """The exported model in transformers, against the base with the checkpoint's low-rank update added by hand."""
    folder = finished["lora_cache"]
    exported = AutoModelForImageTextToText.from_pretrained(folder / "export").eval()
    plain = AutoModelForImageTextToText.from_pretrained(toy.root / "model").eval()
    import peft

    with Shards(folder / f"checkpoints/step-{STEPS:06d}") as shards:
        own = {name: shards.whole(name) for name in shards.shapes}
    targets = [n for n, m in plain.named_modules() if "language_model" in n and n.endswith("_proj")]
    lora = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=targets)
    wrapped = peft.get_peft_model(plain, lora).eval()
    missing = wrapped.load_state_dict(own, strict=False)
    assert not missing.unexpected_keys
    processor = AutoProcessor.from_pretrained(folder / "export")
    text = "<user><image>what the colour of this gadget ?<assistant>it is red<end>"
    inputs = processor(text=[text], images=[Image.new("RGB", (32, 32), "red")], return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(exported(**inputs).logits, wrapped(**inputs).logits, atol=2e-5, rtol=1e-5)


def test_an_exported_adapter_on_its_base_is_the_merged_model(finished, toy, tmp_path):
    """By peft alone, from the directory alone; and the same files lie beside a merged model."""
    import peft

    folder = finished["lora_cache"]
    export.export(folder, tmp_path / "adapter", form="adapter")
    export.export(folder, tmp_path / "both", form="both")
    about = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert Path(about["base_model_name_or_path"]) == (toy.root / "model").resolve()
    assert {name.rsplit(".", 1)[-1] for name in about["target_modules"]} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    assert not any("vision" in name for name in about["target_modules"])
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "both").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "both")
    text = "<user><image>what the colour of this gadget ?<assistant>it is red<end>"
    inputs = processor(text=[text], images=[Image.new("RGB", (32, 32), "red")], return_tensors="pt")
    for own in (tmp_path / "adapter", tmp_path / "both/adapter"):
        base = AutoModelForImageTextToText.from_pretrained(about["base_model_name_or_path"]).eval()
        with torch.no_grad():
            before = base(**inputs).logits
            adapted = peft.PeftModel.from_pretrained(base, own).eval()
            torch.testing.assert_close(adapted(**inputs).logits, merged(**inputs).logits, atol=1e-5, rtol=1e-5)
            assert not torch.allclose(before, merged(**inputs).logits, atol=1e-4)


def test_a_run_without_adapters_has_none_to_export(finished, tmp_path):
    with pytest.raises(ConfigError, match=r"no adapter without model\.lora"):
        export.export(finished["plain"], tmp_path / "out", form="adapter")
    assert not (tmp_path / "out").exists()
