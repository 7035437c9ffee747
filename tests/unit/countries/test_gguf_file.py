"""A GGUF file becomes the model that transformers makes of it, and a damaged or foreign one is refused."""

import struct

import pytest
import tiny_gguf
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mirage_dist.countries import gguf_file
from mirage_dist.schema import ConfigError


@pytest.mark.parametrize("tied", [True, False])
def test_the_converted_model_is_the_one_that_transformers_makes(tmp_path, tied):
    file = tiny_gguf.write(tmp_path / "tiny.gguf", tied=tied)
    (tmp_path / "out").mkdir()
    gguf_file.convert(file, tmp_path / "out")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    assert ours.config.tie_word_embeddings == tied
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, weight in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], weight), name
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(ours.eval()(ids).logits, theirs.eval()(ids).logits)
    tokenizers = [
        AutoTokenizer.from_pretrained(tmp_path / "out"),
        AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name),
    ]
    texts = [[t("hello world é 12<|im_end|>")["input_ids"], t.chat_template, t.eos_token] for t in tokenizers]
    assert texts[0] == texts[1]
    assert texts[0][1] == tiny_gguf.CHAT_TEMPLATE


def test_the_first_layers_are_those_of_the_whole_model(tmp_path):
    file = tiny_gguf.write(tmp_path / "tiny.gguf")
    for layers in (1, 2):
        (tmp_path / str(layers)).mkdir()
        gguf_file.convert(file, tmp_path / str(layers), layers)
    first, whole = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in "12")
    assert {name for name in whole if name not in first} == {name for name in whole if ".layers.1." in name}
    assert all(torch.equal(first[name], whole[name]) for name in first)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    content = tiny_gguf.write(tmp_path / "tiny.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    places = [0, 3, 4, 7, 12, 23, 24, 30, 100, 700, 3000, 6000, len(content) // 2, len(content) - 1]
    for place in places:
        cut.write_bytes(content[:place])
        with pytest.raises(ConfigError, match=r"cut\.gguf: .*(cut off|empty|no GGUF)") as refusal:
            gguf_file.header(cut)
        assert "again" in str(refusal.value), place


def test_another_architecture_is_refused_by_name(tmp_path):
    file = tiny_gguf.write(tmp_path / "other.gguf", architecture="gemma2")
    with pytest.raises(ConfigError, match=r"other\.gguf: a model of the architecture 'gemma2'; expected 'llama'"):
        gguf_file.header(file)


def test_what_is_no_gguf_file_or_names_absurd_sizes_is_refused(tmp_path):
    file = tmp_path / "bad.gguf"
    file.write_bytes(b"PK\x03\x04" * 100)
    with pytest.raises(ConfigError, match=r"no GGUF file"):
        gguf_file.header(file)
    for version, tensors, values in ((1, 0, 0), (9, 0, 0), (3, 2**60, 0), (3, 0, 2**60), (3, 1, 1)):
        file.write_bytes(b"GGUF" + struct.pack("<IQQ", version, tensors, values) + b"\xff" * 200)
        with pytest.raises(ConfigError, match=r"bad\.gguf: (damaged|cut off)"):
            gguf_file.header(file)
    with pytest.raises(ConfigError, match=r"cannot be read"):
        gguf_file.header(tmp_path / "missing.gguf")


def test_weights_that_do_not_make_the_model_are_refused(tmp_path):
    def lacking(tensors):
        del tensors["blk.1.ffn_up.weight"]

    def more(tensors):
        tensors["blk.0.attn_q.bias"] = tensors["blk.0.attn_norm.weight"]

    for change, words in ((lacking, r"do not fit its settings: .*up_proj"), (more, r"holds blk\.0\.attn_q\.bias")):
        file = tiny_gguf.write(tmp_path / "odd.gguf", change=change)
        with pytest.raises(ConfigError, match=words):
            gguf_file.convert(file, tmp_path)
