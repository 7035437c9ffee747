"""`mirage merge` is arithmetic on whole models: exact at scale 1, the formula elsewhere, refused for other bases."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from mirage_dist import cli
from mirage_dist.model import directory
from mirage_dist.model.adapters import task_vectors
from mirage_dist.model.adapters.task_vectors import PROVENANCE, Vector, merge
from mirage_dist.schema import ConfigError, RunError

CARD = "---\nbase_model: somewhere\nbase_model_hash: {}\n---\n# tuned\n"


@pytest.fixture(scope="module")
def base(toy, tmp_path_factory):
    """A model of two files, in bfloat16."""
    folder = tmp_path_factory.mktemp("merge") / "base"
    shutil.copytree(toy.root / "model", folder)
    (folder / directory.WHOLE).unlink()
    model = AutoModelForImageTextToText.from_pretrained(toy.root / "model").to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="200KB")
    assert len(directory.weight_files(folder)) > 1
    return folder


@pytest.fixture
def tuned(base, tmp_path):
    """Makes a model that was tuned from the base, with another seed for each."""

    def make(name, seed=0, size=0.01, dtype=torch.bfloat16):
        folder, generator = tmp_path / name, torch.Generator().manual_seed(seed)
        shutil.copytree(base, folder)
        for file in directory.weight_files(folder):
            moved = {
                key: (value.float() + size * torch.randn(value.shape, generator=generator)).to(dtype)
                for key, value in load_file(file).items()
            }
            save_file(moved, file, metadata={"format": "pt"})
        (folder / "README.md").write_text(CARD.format(directory.model_hash(base)))
        return folder

    return make


def weights(folder):
    return {name: value for file in directory.weight_files(folder) for name, value in load_file(file).items()}


def edited(folder, change):
    """Edits the weights of a model's first file."""
    file = next(iter(directory.weight_files(folder)))
    own = load_file(file)
    change(own, next(iter(own)))
    save_file(own, file, metadata={"format": "pt"})


def test_one_vector_of_scale_one_is_the_tuned_model_and_of_scale_nought_the_base(base, tuned, tmp_path):
    one = tuned("one")
    for scale, whole in ((1.0, one), (0.0, base)):
        merge(str(base), [Vector(str(one), scale)], tmp_path / f"out-{scale}")
        mine, oracle = weights(tmp_path / f"out-{scale}"), weights(whole)
        assert mine.keys() == oracle.keys()
        assert all(torch.equal(mine[name], oracle[name]) for name in oracle)
    assert directory.processing_hash(tmp_path / "out-1.0") == directory.processing_hash(base)


@pytest.mark.parametrize("block", [1 << 22, 7])
def test_several_vectors_add_and_a_negative_one_takes_away(base, tuned, tmp_path, block, monkeypatch):
    monkeypatch.setattr(task_vectors, "BLOCK", block if block > 7 else 4096 + 7)
    one, other = tuned("one", 1), tuned("other", 2)
    assert cli.main(["merge", str(base), str(tmp_path / "out"), f"{one}=0.5", f"{other}=-2"]) == 0
    start, first, second, mine = map(weights, (base, one, other, tmp_path / "out"))
    for name, values in mine.items():
        own = start[name].double()
        expected = own + 0.5 * (first[name].double() - own) - 2 * (second[name].double() - own)
        assert torch.equal(values, expected.to(torch.bfloat16))
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert all(torch.isfinite(p).all() for p in loaded.parameters())
    record = (tmp_path / "out" / PROVENANCE).read_text()
    assert directory.model_hash(one) in record
    assert "scale: -2.0" in record
    assert directory.model_hash(base) in (tmp_path / "out/README.md").read_text()


def test_the_result_has_the_tuned_models_dtype(base, tuned, tmp_path):
    merge(str(base), [Vector(str(tuned("wide", dtype=torch.float32)), 0.5)], tmp_path / "out")
    assert {value.dtype for value in weights(tmp_path / "out").values()} == {torch.float32}


def test_what_was_tuned_from_another_base_or_is_another_model_is_refused_by_name(base, tuned, tmp_path):
    stranger = tuned("stranger")
    (stranger / "README.md").write_text(CARD.format("0" * 64))
    deeper = tuned("deeper")
    config = json.loads((deeper / "config.json").read_text())
    config["text_config"]["rope_theta"] = 123.0
    config["text_config"]["max_position_embeddings"] = 77
    (deeper / "config.json").write_text(json.dumps(config))
    lacking, wide = tuned("lacking"), tuned("wide", dtype=torch.float32)
    edited(lacking, lambda own, name: own.update({"other": own[name].clone()}))
    index = json.loads((lacking / directory.INDEX).read_text())
    index["weight_map"]["other"] = next(iter(directory.weight_files(lacking))).name
    (lacking / directory.INDEX).write_text(json.dumps(index))
    shaped = tuned("shaped")
    edited(shaped, lambda own, name: own.update({name: own[name][..., :-1].contiguous()}))
    one = tuned("one")
    for models, words in (
        ([stranger], r"stranger: was trained from another base than .*base: its README.md has base_model_hash 0000"),
        ([deeper], r"deeper: is no model tuned from .*max_position_embeddings: .* here, 77 there"),
        ([lacking], r"lacking: its tensors are not those of .*: other .1 in all. is in .*lacking alone"),
        ([shaped], r"shaped: .* has shape .* there and .* in .*base; give the model"),
        ([one, wide], r"wide: .* is F32 there and BF16 in .*one; .*export both with the same train.dtype"),
        ([one, one], r"one: is given twice; give it once"),
        ([tmp_path / "nowhere"], "looks like a local path but does not exist"),
    ):
        with pytest.raises(ConfigError, match=words):
            merge(str(base), [Vector(str(model), 0.5) for model in models], tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_tuned_model_without_a_card_is_compared_by_its_architecture_and_the_log_says_so(
    base, tuned, tmp_path, caplog
):
    one = tuned("one")
    (one / "README.md").unlink()
    merge(str(base), [Vector(str(one), 1.0)], tmp_path / "out")
    assert "does not say which model it was tuned from" in caplog.text


def test_nothing_is_written_when_a_value_is_not_finite_or_leaves_the_dtype(base, tuned, tmp_path):
    broken, far = tuned("broken"), tuned("far", size=1e37)
    edited(broken, lambda own, name: own[name].view(-1)[-1:].fill_(float("nan")))
    with pytest.raises(ConfigError, match=r"broken/model-.*: NaN or infinity in "):
        merge(str(base), [Vector(str(broken), 1.0)], tmp_path / "out")
    with pytest.raises(RunError, match=r"the sum reaches .*; take smaller scales"):
        merge(str(base), [Vector(str(far), 1000.0)], tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith("out")] == []
    (tmp_path / "out").write_text("")
    with pytest.raises(ConfigError, match="out exists"):
        merge(str(base), [Vector(str(tuned("one")), 1.0)], tmp_path / "out")


@pytest.mark.parametrize("word", ["model", "model=", "model=much", "=1"])
def test_a_vector_that_is_no_directory_and_scale_is_refused(word, capsys):
    with pytest.raises(SystemExit):
        cli.main(["merge", "base", "out", word])
    assert "DIR=SCALE" in capsys.readouterr().err


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -1e9])
def test_a_scale_out_of_range_is_named(base, tuned, tmp_path, scale):
    with pytest.raises(ConfigError, match=r"expected a scale from −1,000,000 to 1,000,000"):
        merge(str(base), [Vector(str(tuned("one")), scale)], tmp_path / "out")
