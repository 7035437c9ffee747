"""Processors of every family load without torchvision and prepare pictures; what cannot be loaded is one sentence."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from families import models
from families.parts import chatml
from PIL import Image

from mirage_dist.model import directory, environment
from mirage_dist.model.families import configs, processors
from mirage_dist.schema import ConfigError

PICTURED = sorted(name for name in models.FAMILIES if not name.endswith("_text"))
VIDEOS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "llava_onevision", "smolvlm")
without_torchvision = pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Name -> a directory of that family with everything but weights."""
    made = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            models.write_files(name, made[name])
        return made[name]

    return folder


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.effect_noise((96, 64), 60).convert("RGB")


def encoded(processor, picture):
    text = f"{getattr(processor, 'boi_token', processor.image_token)} What is this ?"
    return processor(text=[text], images=[[picture]], return_tensors="pt")


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", PICTURED)
def test_a_processor_prepares_a_picture_as_its_image_processor_does(files, picture, name):
    processor = processors.load(files(name))
    inputs = encoded(processor, picture)
    alone = processor.image_processor(images=[[picture]], return_tensors="pt")["pixel_values"]
    if name != "mistral3":  # its processor sets the size of a patch itself
        assert torch.equal(inputs["pixel_values"].reshape(alone.shape), alone)
    token = configs.load(files(name)).image_token_id
    assert int((inputs["input_ids"] == token).sum()) > 0
    assert type(processor).__module__.startswith("transformers.")


@pytest.mark.parametrize("name", [*VIDEOS, "mistral3"])
def test_a_directory_that_a_processor_saved_gives_the_same_processor(files, picture, tmp_path, name):
    """The hub has both layouts: settings in preprocessor_config.json, and all of them in processor_config.json."""
    first = processors.load(files(name))
    first.save_pretrained(tmp_path)
    shutil.copyfile(files(name) / "config.json", tmp_path / "config.json")
    assert not (tmp_path / "preprocessor_config.json").exists()
    second = processors.load(tmp_path)
    assert same(encoded(first, picture), encoded(second, picture))
    assert second.chat_template == first.chat_template


@pytest.mark.parametrize(
    ("kind", "name", "images"),
    [
        ("glm4v", "Glm4vProcessor", "Glm4vImageProcessor"),
        ("gemma4", "Gemma4Processor", "Gemma4ImageProcessor"),
        ("qwen3_5", "Qwen3VLProcessor", "Qwen2VLImageProcessor"),
        ("llava_next_video", "LlavaNextVideoProcessor", "LlavaNextImageProcessor"),
    ],
)
@without_torchvision
def test_families_of_which_nothing_is_known_here_load_as_well(tmp_path, kind, name, images):
    tokens = {f"{token}_token": f"<{token}>" for token in ("image", "video", "audio", "boi", "eoi")}
    chatml(**tokens).save_pretrained(tmp_path)
    settings = {"processor_class": name, "image_processor_type": images}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    processor = processors.load(tmp_path)
    assert type(processor).__name__ == name
    assert environment.of(processor).image_processor == f"{images}Pil"


@without_torchvision
@pytest.mark.parametrize("name", PICTURED)
def test_a_cache_of_pictures_made_with_pil_is_not_taken_for_one_of_torchvision(files, name):
    own = environment.of(processors.load(files(name)))
    assert own.image_processor is not None
    assert own.image_processor.endswith("Pil")
    assert "torchvision" not in own.libraries


def test_a_video_is_not_prepared(files):
    processor = processors.load(files("smolvlm"))
    if find_spec("num2words") is None:
        with pytest.raises(ConfigError, match="needs the package num2words: pip install num2words"):
            vars(__import__("sys").modules[type(processor).__module__])["num2words"](3)


@pytest.mark.parametrize("name", ["llama_text", "qwen3_text"])
def test_a_text_only_model_has_a_tokenizer_whatever_its_files_say(files, tmp_path, name):
    """Published text models of multimodal families name a processor that their directory lacks."""
    shutil.copytree(files(name), tmp_path, dirs_exist_ok=True)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "processor_class": "Gemma3Processor"}))
    tokenizer = processors.load(tmp_path)
    assert tokenizer("What is this ?")["input_ids"] == processors.load(files(name))("What is this ?")["input_ids"]
    assert environment.of(tokenizer).image_processor is None


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            {"model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"]},
            "model_type llava_llama.*original format.*such as llava-hf/llava-1.5-7b-hf",
        ),
        (
            {"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"]},
            "the class LlavaLlamaForCausalLM.*original format.*such as llava-hf/llava-1.5-7b-hf",
        ),
        (
            {
                "model_type": "internvl_chat",
                "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
            },
            "model_type internvl_chat.*remote code, which is never run.*such as OpenGVLab/InternVL3-8B-hf",
        ),
        ({"model_type": "next_years_vlm"}, "model_type next_years_vlm, which transformers does not have"),
        ({"dim": 4096, "n_layers": 32}, "names no model_type"),
        ({"model_type": "clip"}, "clip is neither an image-text-to-text nor a causal language model"),
        ({"model_type": "llava", "vision_config": 3}, "config.json: no configuration of a model"),
        ([1], "config.json: expected a JSON object, found list"),
    ],
)
def test_a_configuration_that_is_not_in_transformers_format_is_refused(tmp_path, content, words):
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=words) as caught:
        processors.load(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_code_in_a_model_directory_is_never_run_nor_offered(files, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run the code"))
    shutil.copytree(files("llava_llama"), tmp_path, dirs_exist_ok=True)
    (tmp_path / "processor_config.json").unlink()
    file = tmp_path / "preprocessor_config.json"
    settings = {"auto_map": {"AutoImageProcessor": "own.Images"}, "image_processor_type": "OwnImages"}
    file.write_text(json.dumps(settings))
    (tmp_path / "own.py").write_text("raise SystemExit('the code was run')\n")
    with pytest.raises(ConfigError, match="processor"):
        processors.load(tmp_path)


@pytest.mark.parametrize(
    ("missing", "words"),
    [("preprocessor_config.json", "processor"), ("tokenizer.json", "processor"), ("config.json", "config.json")],
)
def test_a_missing_file_is_one_sentence_with_the_directory(files, tmp_path, missing, words):
    shutil.copytree(files("qwen2_5_vl"), tmp_path, dirs_exist_ok=True)
    (tmp_path / missing).unlink()
    with pytest.raises(ConfigError, match=words) as caught:
        processors.load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@without_torchvision
def test_a_family_without_a_pil_class_names_the_package(files, tmp_path):
    shutil.copytree(files("internvl"), tmp_path, dirs_exist_ok=True)
    settings = {"processor_class": "Cohere2VisionProcessor", "image_processor_type": "Cohere2VisionImageProcessor"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "cohere2_vision"}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="needs the package torchvision: pip install torchvision"):
        processors.load(tmp_path)


# ------------------------------------------------------------------------------------------------- copies


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava_llama", "llama_text"])
def test_the_files_of_a_processor_are_copied_as_they_are(files, tmp_path, name):
    folder = tmp_path / "base"
    shutil.copytree(files(name), folder)
    (folder / "additional_chat_templates").mkdir()
    extra = {
        "additional_chat_templates/tools.jinja": "{{ messages }}",
        "merges.txt": "a b",
        "tokenizer.model": "pieces",
        "README.md": "words",
        "model.safetensors": "weights",
        "model.safetensors.index.json": "{}",
    }
    for file, text in extra.items():
        (folder / file).write_text(text)
    out = tmp_path / "out"
    out.mkdir()
    directory.copy_processing(folder, out)
    copied = {str(file.relative_to(out)): file.read_bytes() for file in out.rglob("*") if file.is_file()}
    expected = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    for file in (
        "README.md",
        "model.safetensors",
        "model.safetensors.index.json",
        "config.json",
        "generation_config.json",
    ):
        expected.pop(file)
    assert copied == expected
