"""Every weight comes from the files or is tied to one that does; what is missing, renamed or damaged is named."""

import json
import os
import shutil
import struct
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from mirage_dist.cli import main
from mirage_dist.evals.models import subject
from mirage_dist.model import directory, load, weights
from mirage_dist.schema import ConfigError, EvalModelConfig, ModelConfig

TEXT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 64,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
}
EXPERTS = {"num_experts_per_tok": 2, "tie_word_embeddings": False}


def _llava():
    vision = CLIPVisionConfig(**VISION, patch_size=14)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=LlamaConfig(**TEXT)))


def _qwen2_vl():
    text = TEXT | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}, "tie_word_embeddings": True}
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14}
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)
    )


def _gemma3():
    config = Gemma3Config(text_config=TEXT, vision_config=VISION | {"patch_size": 14}, mm_tokens_per_image=4)
    return Gemma3ForConditionalGeneration(config)


MODELS = {
    "llava": _llava,
    "qwen2_vl": _qwen2_vl,
    "gemma3": _gemma3,
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**TEXT, tie_word_embeddings=True)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**TEXT, **EXPERTS, num_local_experts=3)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**TEXT, **EXPERTS, num_experts=3, moe_intermediate_size=8, decoder_sparse_step=1)
    ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """name -> a directory with one tiny model of this family, as transformers writes it."""
    root = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    for name, make in MODELS.items():
        make().save_pretrained(root / name)
    return root


@pytest.fixture
def copy(saved, tmp_path):
    """A copy of a model, whose tensors go through a function first."""

    def build(name: str, change=dict) -> Path:
        folder = tmp_path / name
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(saved / name, folder)
        tensors = change(load_file(folder / directory.WHOLE))
        save_file(tensors, folder / directory.WHOLE, {"format": "pt"})
        return folder

    return build


def check(folder: Path, depth: int | None = None) -> None:
    weights.check(directory.check(str(folder)), load.configuration(ModelConfig(path=str(folder)), depth))


def without(*names: str):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


def renamed(old: str, new: str):
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


# ------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("name", MODELS)
def test_what_transformers_writes_is_whole(name, saved):
    check(saved / name)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_one_tensor_that_is_left_out_is_named_with_the_files_name_for_it(name, saved, copy, data):
    """Also one expert's of several, which the model keeps in one fused weight. Tied weights are in the files once."""
    left_out = data.draw(st.sampled_from(sorted(load_file(saved / name / directory.WHOLE))))
    with pytest.raises(ConfigError, match="is in none of its files, and would start from random values") as caught:
        check(copy(name, without(left_out)))
    # Names of which no other weight in the files shows that they are spelt in another way there than in the model.
    for on_disk, in_model in (("language_model.lm_head", "lm_head"), ("block_sparse_moe.gate", "mlp.gate")):
        left_out = left_out.replace(on_disk, in_model)
    assert left_out in str(caught.value)


@pytest.mark.parametrize("name", ["qwen2_vl", "gemma3", "llama"])
def test_a_tied_weight_need_not_be_in_the_files_and_an_untied_one_must(name, saved, copy):
    assert not any("lm_head" in key for key in load_file(saved / name / directory.WHOLE))
    folder = copy(name)
    content = json.loads((folder / "config.json").read_text())
    for tree in (content, content.get("text_config", {})):
        tree["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"none of its files, .*: lm_head\.weight"):
        check(folder)


def test_names_of_older_checkpoints_are_those_that_transformers_loads(copy):
    old = {"vision_tower.": "vision_tower.vision_model.", "language_model.model.": "model.language_model."}
    for before, after in old.items():
        folder = copy("llava", renamed(before, after))
        check(folder)
        _, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
        assert not {*info["missing_keys"], *info["unexpected_keys"]}


def test_a_renamed_projector_is_named_with_the_names_that_the_files_have(copy):
    folder = copy("llava", renamed("multi_modal_projector.linear_", "mm_projector."))
    words = (
        r"4 weights of LlavaForConditionalGeneration are in none of its files, .*multi_modal_projector\.linear_1\.bias"
        r".* and 1 more\. The files hold mm_projector\.1\.bias, .*if these are the same weights under other names"
    )
    with pytest.raises(ConfigError, match=words):
        check(folder)
    with pytest.raises(ConfigError, match=words):
        load.policy(ModelConfig(path=str(folder)), "fp32", {})


def test_weights_that_the_model_has_no_place_for_are_no_fault_but_in_the_log(copy, caplog):
    check(copy("llava", lambda tensors: {**tensors, "v_head.weight": torch.zeros(3)}))
    assert "the model has no place for v_head.weight: not loaded" in caplog.text


def test_layers_that_a_run_does_not_load_may_be_in_the_files_or_not(copy):
    folder = copy("llava")
    check(folder, 1)
    later = without(*(name for name in load_file(folder / directory.WHOLE) if "language_model.model.layers.1" in name))
    folder = copy("llava", later)
    check(folder, 1)
    with pytest.raises(ConfigError, match=r"9 weights .*layers\.1\..*Give a directory with all weights"):
        check(folder)


# ------------------------------------------------------------------------------------------------- shapes, dtypes


def changed(name: str, change):
    return lambda tensors: {**tensors, name: change(tensors[name])}


@pytest.mark.parametrize(
    ("name", "tensor", "change", "words"),
    [
        ("llava", "multi_modal_projector.linear_1.bias", lambda t: t[:4], r"has shape \(4,\), but .* \(16,\);"),
        (
            "llava",
            "multi_modal_projector.linear_1.bias",
            lambda t: t[:0],
            r"has shape \(0,\), no value at all, but .*16",
        ),
        ("llama", "model.layers.1.mlp.up_proj.weight", lambda t: t.T.contiguous(), r"\(16, 24\), but .* \(24, 16\)"),
        ("qwen3_moe", "model.layers.0.mlp.experts.1.up_proj.weight", lambda t: t[:2], r"\(2, 16\), but .* \(8, 16\)"),
        (
            "llava",
            "multi_modal_projector.linear_1.bias",
            lambda t: t.to(torch.int8),
            r"is I8 there, but a weight is one",
        ),
        ("llama", "model.norm.weight", lambda t: t.to(torch.float8_e4m3fn), r"is F8_E4M3 there, .*quantised"),
    ],
)
def test_another_shape_or_dtype_is_named_with_the_file_and_both(copy, name, tensor, change, words):
    folder = copy(name, changed(tensor, change))
    with pytest.raises(ConfigError, match=words) as caught:
        check(folder)
    for part in (str(folder / directory.WHOLE), tensor):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"text_config": None}, r"has shape \(.*\), but in the model of config\.json \(.*so it is with \d+ more"),
        ({"text_config": TEXT | {"num_hidden_layers": 1000}}, "describes 1000 layers, but the files hold"),
        (
            {"text_config": TEXT | {"num_hidden_layers": 3}},
            r"9 weights .*none of its files, .*layers\.2\.input_layernorm",
        ),
        ({"text_config": TEXT | {"hidden_size": 32}}, r"has shape \(.*\b16\b.*\), but .*\b32\b"),
    ],
)
def test_a_configuration_of_another_model_is_named(copy, change, words):
    folder = copy("llava")
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | change))
    with pytest.raises(ConfigError, match=words):
        check(folder)


# ------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("llava", "multi_modal_projector.linear_2.weight"),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.2.w1.weight"),
    ],
)
def test_values_that_are_not_finite_are_counted_and_named_while_loading(copy, name, tensor, value):
    def spoilt(weight):
        weight = weight.clone()
        weight[1, 2:5] = value
        return weight

    folder = copy(name, changed(tensor, spoilt))
    check(folder)  # headers hold no values
    with pytest.raises(ConfigError, match=r"model\.safetensors: NaN or infinity in \S+ \(3 of its values\)"):
        load.policy(ModelConfig(path=str(folder)), "bf16", {})


# ------------------------------------------------------------------------------------------------- files


@pytest.fixture
def sharded(saved, tmp_path):
    folder = tmp_path / "sharded"
    LlavaForConditionalGeneration.from_pretrained(saved / "llava").save_pretrained(folder, max_shard_size="20KB")
    assert len(directory.weight_files(folder)) > 2
    return folder


def test_shards_are_read_as_one_model(sharded):
    check(sharded)
    first, *_ = directory.weight_files(sharded)
    lost = sorted(load_file(first))[0]
    save_file(without(lost)(load_file(first)), first, {"format": "pt"})
    with pytest.raises(ConfigError, match=f"{first.name}: lacks {lost}, which model.safetensors.index.json places"):
        check(sharded)


def _index(folder: Path, change) -> None:
    content = json.loads((folder / directory.INDEX).read_text())
    (folder / directory.INDEX).write_text(json.dumps(change(content)))


def _moved(content: dict, place: str) -> dict:
    name = next(iter(content["weight_map"]))
    return {**content, "weight_map": {**content["weight_map"], name: place}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: _moved(c, "nowhere.safetensors"), r"names 1 of \d+ files that do not exist here: nowhere"),
        (lambda c: _moved(c, "../x.safetensors"), r"lies in '\.\./x\.safetensors'; a shard must lie in the model dir"),
        (lambda c: _moved(c, "/x.safetensors"), r"lies in '/x\.safetensors'; a shard must lie in the model directory"),
        (lambda c: {**c, "weight_map": []}, r"expected `weight_map`, an object of tensor names"),
        (lambda c: {"weight_map": c["weight_map"]}, r'add "metadata": \{\}'),
        (lambda c: [], r"expected a JSON object"),
    ],
)
def test_an_index_that_leads_nowhere_is_named(sharded, change, words):
    _index(sharded, change)
    with pytest.raises(ConfigError, match=f"index.json: .*{words}"):
        check(sharded)


def test_a_tensor_that_two_shards_hold_is_ambiguous(sharded):
    first, second, *_ = directory.weight_files(sharded)
    save_file(load_file(first) | load_file(second), second, {"format": "pt"})
    with pytest.raises(ConfigError, match=f"{second.name}: holds .*, and so does {first.name}; only one can be loaded"):
        check(sharded)


def _header(content: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(content)) + content + data


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 14\n"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda b: POINTER, "a Git-LFS pointer, .*git lfs pull"),
        (lambda b: b"", "an empty file"),
        (lambda b: b[:-1], r"cut off: \d+ bytes, but its header describes \d+"),
        (lambda b: b[:100], r"cut off within its header: 100 bytes of at least \d+"),
        (lambda b: b[:5], "no safetensors file"),
        (lambda b: b + b"x", r"\d+ bytes, but its header describes only \d+"),
        (lambda b: b"<html>404 not found</html>", r"no safetensors file \(its header would have \d+ bytes\)"),
        (lambda b: _header(b"{no json"), "no safetensors file .its header cannot be read"),
        (lambda b: _header(b"[" * 100_000), "no safetensors file .its header cannot be read"),
        (lambda b: _header(b'{"w": {"dtype": "I8", "shape": [Infinity], "data_offsets": [0, 1]}}'), "cannot be read"),
        (lambda b: _header(b"[1]"), "no safetensors file .its header cannot be read"),
        (lambda b: _header(b'{"w": {"dtype": "F32"}}'), "no safetensors file .its header cannot be read"),
        (
            lambda b: _header(b'{"w": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}', b"x"),
            "has dtype F4, which",
        ),
        (lambda b: _header(b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', b"xxxx"), "do not fit"),
        (lambda b: _header(b'{"w": {"dtype": "I8", "shape": [2], "data_offsets": [2, 4]}}', b"xxxx"), "do not fit"),
        (
            lambda b: _header(b'{"w": {"dtype": "I8", "shape": [-2], "data_offsets": [0, -2]}}'),
            "its header cannot be read",
        ),
    ],
)
def test_damaged_weights_are_named_before_anything_loads(copy, change, words):
    folder = copy("llama")
    file = folder / directory.WHOLE
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(ConfigError, match=f"{file}: .*{words}"):
        check(folder)


def test_a_tensor_of_more_dimensions_than_torch_has_is_bad_input(copy):
    folder = copy("llama")
    entry = {"dtype": "I8", "shape": [1] * 100, "data_offsets": [0, 1]}
    (folder / directory.WHOLE).write_bytes(_header(json.dumps({"model.norm.weight": entry}).encode(), b"x"))
    with pytest.raises(ConfigError):
        check(folder)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 200), value=st.integers(0, 255))
def test_any_changed_byte_of_a_header_is_bad_input_or_another_whole_model(copy, place, value):
    """Never an error of another kind: some changes only rename a tensor, or its metadata."""
    folder = copy("llama")
    content = bytearray((folder / directory.WHOLE).read_bytes())
    content[place] = value
    (folder / directory.WHOLE).write_bytes(content)
    with suppress(ConfigError):
        check(folder)
        load.policy(ModelConfig(path=str(folder)), "fp32", {})


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "chat_template.jinja", "tokenizer.model"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: f.write_bytes(POINTER), "a Git-LFS pointer, not the file itself"),
        (lambda f: f.write_bytes(b""), "an empty file"),
        (lambda f: (f.unlink(missing_ok=True), f.symlink_to("nowhere")), "a link to a file that does not exist"),
        (lambda f: (f.unlink(missing_ok=True), os.mkfifo(f)), "no regular file"),
    ],
)
def test_every_deciding_file_must_be_there_itself(copy, name, change, words):
    folder = copy("llama")
    change(folder / name)
    for required in (True, False):
        with pytest.raises(ConfigError, match=f"{name}: {words}"):
            directory.check(str(folder), required)


def test_weights_under_other_names_are_not_taken_for_the_models(copy):
    folder = copy("llama")
    (folder / directory.WHOLE).rename(folder / "consolidated.safetensors")
    with pytest.raises(ConfigError, match=r"neither model\.safetensors nor .*here: consolidated\.safetensors"):
        check(folder)


# ------------------------------------------------------------------------------------------------- places


@pytest.mark.parametrize("path", ["./my/model", "/nowhere/model", "~/model", "a/b/c", "models/", "tests/nowhere"])
def test_a_local_path_that_does_not_exist_is_no_hub_name(path):
    with pytest.raises(ConfigError, match="looks like a local path but does not exist"):
        directory.resolve(path)


def test_a_hub_name_that_is_not_in_the_cache_is_named_with_what_to_do():
    for name in ("some-lab/some-model", "some-model"):
        with pytest.raises(
            ConfigError, match=f"no such directory .*, and no hub model of this name in the cache .*hf download {name}"
        ):
            directory.resolve(name)
    with pytest.raises(ConfigError, match="neither a directory nor a valid hub name"):
        directory.resolve("some lab/some..model")


@pytest.mark.parametrize("path", ["a" * 5000, "a/" * 3000, "a\0b"])
def test_a_path_that_no_file_system_takes_is_bad_input(path):
    with pytest.raises(ConfigError, match=r"model\.path=a"):
        directory.resolve(path)


def test_a_file_is_no_model(saved):
    with pytest.raises(ConfigError, match="this is a file; give the Hugging Face model directory that holds it"):
        directory.resolve(str(saved / "llama" / directory.WHOLE))


def test_a_snapshot_of_links_is_a_model_and_what_is_loaded_is_what_is_hashed(copy, tmp_path):
    """The layout of the hub's cache: snapshots/COMMIT/NAME links to blobs/DIGEST."""
    folder, blobs = copy("llava"), tmp_path / "blobs"
    before = directory.model_hash(folder)
    blobs.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(Path("..") / "blobs" / str(number))
    check(folder)
    assert directory.model_hash(folder) == before
    assert set(directory.weight_files(folder)) <= set(directory.files(folder))
    load.policy(ModelConfig(path=str(folder)), "fp32", {})


def test_an_adapter_beside_a_whole_model_is_refused(copy):
    """transformers would load both, and its report would be on the adapter alone."""
    folder = copy("llama")
    (folder / directory.ADAPTER_CONFIG).write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x"}))
    with pytest.raises(ConfigError, match=r"a whole model and a peft adapter .*in one directory"):
        directory.check(str(folder))


# ------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def toy_copy(toy, tmp_path):
    folder = shutil.copytree(toy.root / "model", tmp_path / "model")
    file = folder / directory.WHOLE
    lost = next(name for name in load_file(file) if "projector" in name)
    return folder, lost


def test_check_and_plan_end_with_status_2_and_one_paragraph(toy, toy_copy, tmp_path, capsys):
    folder, lost = toy_copy
    file = folder / directory.WHOLE
    whole = file.read_bytes()
    overrides = [*toy.overrides("sft", tmp_path / "run"), f"model.path={folder}"]
    for content, words in ((POINTER, "Git-LFS pointer"), (whole[:-8], "cut off"), (None, lost.removeprefix("model."))):
        if content is None:
            file.write_bytes(whole)
            save_file(without(lost)(load_file(file)), file, {"format": "pt"})
        else:
            file.write_bytes(content)
        for verb, more in (("train", ["--check"]), ("plan", [])):
            assert main([verb, "configs/train/demo_sft.yaml", *more, *overrides]) == 2
            error = capsys.readouterr().err
            assert words in error
            assert str(folder) in error
            assert "Traceback" not in error
            assert sum(line.startswith("mirage: ") for line in error.splitlines()) == 1


def test_a_configuration_is_enough_for_a_check_and_not_for_a_run(toy, toy_copy, tmp_path, capsys):
    folder, _ = toy_copy
    (folder / directory.WHOLE).unlink()
    arguments = ["configs/train/demo_sft.yaml", *toy.overrides("sft", tmp_path / "run"), f"model.path={folder}"]
    assert main(["train", "--check", *arguments]) == 0
    assert main(["train", *arguments]) == 2
    assert "no *.safetensors here" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_model_under_test_or_a_judge_is_whole_before_it_is_hashed(toy_copy, monkeypatch, tmp_path):
    folder, lost = toy_copy
    file = folder / directory.WHOLE
    save_file(without(lost)(load_file(file)), file, {"format": "pt"})
    monkeypatch.setattr(directory, "model_hash", lambda _: pytest.fail("gigabytes were hashed first"))
    with pytest.raises(ConfigError, match="is in none of its files"):
        subject.find(EvalModelConfig(path=str(folder)), tmp_path)
