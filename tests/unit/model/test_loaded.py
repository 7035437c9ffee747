"""What is loaded is what was hashed: nothing outside the directory, no other format, no code, no odd file."""

import json
import os
import pickle
import shutil
import sys
from contextlib import suppress

import pytest
from safetensors.torch import load_file, save_file

from mirage_dist.evals.models import subject
from mirage_dist.evals.models.hf import HuggingFace
from mirage_dist.model import directory, load, weights
from mirage_dist.model.families import configs, processors
from mirage_dist.schema import (
    ConfigError,
    EvalModelConfig,
    GenerationConfig,
    ModelConfig,
    RunError,
    TemplateConfig,
)


@pytest.fixture
def model(toy, tmp_path):
    return shutil.copytree(toy.root / "model", tmp_path / "model")


def put(file, path, value):
    """Set the value at a path of keys in a JSON file."""
    content = json.loads(file.read_text()) if file.exists() else {}
    tree = content
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value
    file.write_text(json.dumps(content))


def find(folder):
    return subject.find(EvalModelConfig(path=str(folder)), folder)


class Ran:
    """Leaves a file where it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


# ------------------------------------------------------------------------------------------------- code and pickles


@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "model.pt", "weights.pth", "model.ckpt", "adapter_model.bin", "training_args.bin", "tok.pkl"],
)
def test_a_pickle_beside_the_weights_is_neither_loaded_nor_hashed(model, tmp_path, name):
    before = directory.model_hash(model)
    (model / name).write_bytes(pickle.dumps(Ran(tmp_path / "ran")))
    assert find(model).model_hash == before
    load.policy(ModelConfig(path=str(model)), "fp32", {})
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("place", ["model.safetensors", "shard.bin", "../outside.safetensors"])
def test_weights_that_are_a_pickle_or_lie_elsewhere_are_refused(model, tmp_path, place):
    content = {"metadata": {}, "weight_map": dict.fromkeys(load_file(model / directory.WHOLE), place)}
    (model / directory.WHOLE).rename(model / "whole.safetensors")
    (model / place).write_bytes(pickle.dumps(Ran(tmp_path / "ran")))
    (model / directory.INDEX).write_text(json.dumps(content))
    with pytest.raises(
        ConfigError, match=r"no safetensors file|only .*safetensors are loaded|must lie in the model dir"
    ):
        find(model)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["adapter_model.bin", "x.bin", "../x.safetensors", "weights", 7, ["a"]])
def test_a_configuration_cannot_name_other_weights(model, name):
    put(model / "config.json", ["transformers_weights"], name)
    with pytest.raises(ConfigError, match="transformers_weights"):
        find(model)


def test_code_in_the_directory_never_runs_and_nobody_is_asked(model, tmp_path, monkeypatch):
    code = f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n"
    (model / "custom_generate").mkdir()
    for name in ("modeling_evil.py", "custom_generate/generate.py", "setup.py", "__init__.py"):
        (model / name).write_text(code)
    for file in ("config.json", "processor_config.json", "tokenizer_config.json", "preprocessor_config.json"):
        names = ("AutoConfig", "AutoProcessor", "AutoTokenizer", "AutoImageProcessor", "AutoModelForImageTextToText")
        put(model / file, ["auto_map"], dict.fromkeys(names, "modeling_evil.Evil"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question"))
    with suppress(ConfigError):
        find(model)
        HuggingFace(EvalModelConfig(path=str(model)), TemplateConfig(), GenerationConfig())
    assert not (tmp_path / "ran").exists()
    assert not any("modeling_evil" in name for name in sys.modules)


@pytest.mark.parametrize("name", ["kernels-community/flash-attn", "evil/kernel", "flash_attention_2", "paged|sdpa", 7])
@pytest.mark.parametrize("path", [["_attn_implementation"], ["text_config", "_attn_implementation"]])
def test_the_attention_is_this_machines_and_no_kernel_of_a_repository(model, name, path):
    put(model / "config.json", path, name)
    try:
        config = configs.load(model)
    except ConfigError:
        return
    assert all(part._attn_implementation in configs.ATTENTION for part in configs.parts(config))


# ------------------------------------------------------------------------------------------------- other files


@pytest.mark.parametrize("key", ["vocab", "merges", "merges_file", "gguf_file", "tokenizer_file", "vocab_file"])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_a_tokenizer_cannot_name_a_file_that_is_not_hashed(model, tmp_path, file, key):
    shutil.copy(model / "tokenizer.json", tmp_path / "other.json")
    put(model / file, [key], str(tmp_path / "other.json"))
    with pytest.raises(ConfigError, match=f"{file}: {key} names .*other.json', which is no tokenizer's file"):
        processors.load(model)


def test_versions_of_a_tokenizer_lie_in_the_directory(model):
    shutil.copy(model / "tokenizer.json", model.parent / "tokenizer.1.0.json")
    put(model / "tokenizer_config.json", ["fast_tokenizer_files"], ["../tokenizer.1.0.json"])
    with pytest.raises(ConfigError, match="fast_tokenizer_files names"):
        processors.load(model)


def test_places_of_the_machine_that_wrote_a_tokenizer_are_harmless(model):
    put(model / "tokenizer_config.json", ["special_tokens_map_file"], "/nowhere/special_tokens_map.json")
    processors.load(model)


@pytest.mark.parametrize(
    "name",
    ["dict.txt", "bpe.codes", "source.spm", "qformer_tokenizer/tokenizer.json", "additional_chat_templates/a.jinja"],
)
def test_every_file_that_a_tokenizer_may_read_is_hashed(model, name):
    before = directory.model_hash(model)
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_text("{}")
    assert directory.model_hash(model) != before


def test_a_file_in_another_place_is_another_model(model):
    (model / "a.jinja").write_text("{}")
    before = directory.model_hash(model)
    (model / "additional_chat_templates").mkdir()
    (model / "a.jinja").rename(model / "additional_chat_templates" / "a.jinja")
    assert directory.model_hash(model) != before


def test_all_files_that_are_opened_while_loading_are_hashed(model):
    opened, watching = set(), True

    def hook(event, arguments):
        if watching and event == "open" and str(arguments[0]).startswith(str(model)):
            opened.add(str(arguments[0]))

    sys.addaudithook(hook)  # it stays; `watching` ends it
    HuggingFace(EvalModelConfig(path=str(model)), TemplateConfig(), GenerationConfig())
    watching = False
    assert opened
    assert opened <= {str(file) for file in directory.files(model)}


# ------------------------------------------------------------------------------------------------- changes


def again(file):
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content)


def other(file):
    tensors = load_file(file)
    name = sorted(tensors)[0]
    save_file({**tensors, name: tensors[name] + 1}, file, {"format": "pt"})


def test_a_change_after_the_hash_is_noticed_and_a_copy_is_none(model):
    tested = find(model)
    again(model / directory.WHOLE)
    tested.check_unchanged()
    state = (model / directory.WHOLE).stat()
    other(model / directory.WHOLE)
    os.utime(model / directory.WHOLE, ns=(state.st_atime_ns, state.st_mtime_ns))
    with pytest.raises(RunError, match="the model's files changed since they were hashed"):
        tested.check_unchanged()


@pytest.mark.parametrize("name", ["adapter_config.json", "chat_template.json", "generation_config.json"])
def test_a_file_that_appears_after_the_hash_is_noticed(model, name):
    (model / name).unlink(missing_ok=True)
    tested = find(model)
    (model / name).write_text("{}")
    with pytest.raises(RunError, match="changed since they were hashed"):
        tested.check_unchanged()


def test_a_change_between_the_checks_and_the_hash_is_noticed(model):
    before = directory.state(model)
    other(model / directory.WHOLE)
    with pytest.raises(RunError, match="changed while they were read"):
        directory.hashed(model, before)


def test_a_change_while_the_weights_load_is_noticed(model, monkeypatch):
    check = weights.check_finite
    monkeypatch.setattr(weights, "check_finite", lambda *given: (check(*given), other(model / directory.WHOLE)))
    with pytest.raises(RunError, match="changed while they were loaded"):
        load.policy(ModelConfig(path=str(model)), "fp32", {})


# ------------------------------------------------------------------------------------------------- odd files

ODD = {
    "empty": b" ",
    "cut": b'{"a": {"b": 1',
    "binary": b"\xff\xfe\x00\x80",
    "list": b"[1]",
    "null": b"null",
    "text": b'"x"',
    "deep": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "generation_config.json",
        "processor_config.json",
    ],
)
def test_an_odd_file_is_a_sentence_before_weights_load(model, name, odd):
    (model / name).write_bytes(ODD[odd])
    with pytest.raises(ConfigError, match=str(model)):
        find(model)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["model_type"], []),
        (["architectures"], 7),
        (["architectures"], [7]),
        (["dtype"], "float7"),
        (["text_config", "num_hidden_layers"], 10**6),
        (["text_config", "num_hidden_layers"], -1),
        (["vision_config", "num_hidden_layers"], 10**6),
        (["text_config", "hidden_size"], 10**9),
        (["text_config", "hidden_size"], "x"),
        (["text_config", "vocab_size"], 10**12),
        (["text_config", "vocab_size"], 0),
        (["text_config", "head_dim"], 10**9),
        (["text_config", "head_dim"], 0),
        (["text_config", "num_attention_heads"], 0),
        (["text_config", "num_key_value_heads"], 0),
        (["text_config", "pad_token_id"], 10**9),
        (["text_config", "rope_parameters"], {"rope_type": "unknown"}),
        (["text_config"], None),
        (["vision_config", "patch_size"], 0),
        (["vision_config", "image_size"], 10**9),
    ],
)
def test_an_odd_value_of_a_configuration_is_a_sentence_at_once(model, path, value):
    put(model / "config.json", path, value)
    with pytest.raises(ConfigError, match=str(model)):
        weights.check(model, configs.load(model))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("eos_token_id", "x"),
        ("eos_token_id", [1, "x"]),
        ("eos_token_id", -5),
        ("pad_token_id", 1.5),
        ("num_return_sequences", 3),
        ("return_dict_in_generate", True),
        ("dola_layers", "low"),
        ("penalty_alpha", 0.6),
        ("max_time", 0.001),
        ("custom_generate", "evil/code"),
    ],
)
def test_a_generation_config_of_another_kind_is_a_sentence(model, key, value):
    put(model / "generation_config.json", [key], value)
    with pytest.raises(ConfigError, match=r"generation_config\.json: "):
        find(model)
