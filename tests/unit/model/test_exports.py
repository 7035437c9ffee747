"""Files that several ranks write tensor by tensor hold the bytes that transformers and peft save of the whole model."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from mirage_dist import state
from mirage_dist.model import load, weights
from mirage_dist.model.exports import merged, whole
from mirage_dist.model.shards import PARAM, Fragment, Shards, write
from mirage_dist.ranks import Group
from mirage_dist.schema import ConfigError, LoraConfig, ModelConfig

ONE = "model.safetensors"
LORA = LoraConfig(rank=2, alpha=4, dropout=0.0, targets=["decoder"], also_train=["connector"])


def trained(model: ModelConfig, dtype: str, folder: Path, depth: int | None = None):
    """The policy after a training that changed all that trains, and a checkpoint of it, cut in two."""
    policy = load.policy(model, dtype, {})
    if depth is not None:
        for parameter in policy.unused(depth):
            parameter.requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    fragments: list[list[Fragment]] = [[], []]
    for name, parameter in policy.hf.named_parameters():
        if parameter.requires_grad:
            master = torch.randn(parameter.shape, generator=generator) / 7
            parameter.data.copy_(master)
            flat = master.reshape(-1)
            for rank, (start, stop) in enumerate(((0, len(flat) // 3), (len(flat) // 3, len(flat)))):
                fragments[rank].append(Fragment(PARAM, name, tuple(parameter.shape), start, flat[start:stop]))
    folder.mkdir()
    files = {}
    for rank, held in enumerate(fragments):
        file = folder / f"rank-{rank:05d}-of-00002.safetensors"
        files[file.name] = asdict(write(file, held))
    (folder / "manifest.json").write_text(state.sealed("checkpoint", {"step": 1, "files": files}))
    return policy


def saved_whole(policy, model: ModelConfig, out: Path) -> dict[str, bytes]:
    """What one process saves with the libraries' own functions."""
    hf = policy.hf.merge_and_unload() if model.lora is not None else policy.hf
    hf.get_output_embeddings().__class__ = torch.nn.Linear
    hf.save_pretrained(out)
    return {file.name: file.read_bytes() for file in out.glob("*.json")}


def by_ranks(plan, checkpoint: Path, out: Path, ranks: int) -> dict[str, torch.Tensor]:
    """What `ranks` ranks write, one after the other."""
    out.mkdir()
    files, written = merged.Files.of(plan, ranks), {}
    with Shards(checkpoint) as shards:
        for rank in range(ranks):
            own = merged.write(out, plan, files, shards, Group(rank, rank, ranks, torch.device("cpu")))
            assert not written.keys() & own.keys()
            written |= own
    merged.describe(out, plan)
    merged.index(out, plan, files, written)
    assert set(written) == {file.name for file in out.glob("*.safetensors")}
    sums = dict(reversed(line.split()) for line in (out / merged.SUMS).read_text().splitlines())
    assert sums == {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in written}
    weights.check(out, plan.saved.config)  # as a directory that is loaded
    return {name: tensor for file in written for name, tensor in load_file(out / file).items()}


CASES = {
    "full": ("llava_llama", "fp32", {}, None),
    "renamed on disk": ("internvl", "bf16", {}, None),
    "tied head": ("gemma3", "bf16", {}, None),
    "text": ("llama_text", "bf16", {"train": ["*"]}, None),
    "first layers": ("llava_llama", "bf16", {}, 1),
    "LoRA": ("llava_llama", "bf16", {"lora": LORA}, None),
    "LoRA, first layers": ("llava_mistral", "bf16", {"lora": LORA}, 1),
}


@pytest.mark.parametrize("case", CASES)
def test_tensors_are_those_of_the_libraries_bit_by_bit_whatever_number_of_ranks_writes(
    family, tmp_path, monkeypatch, case
):
    name, dtype, options, depth = CASES[case]
    model = ModelConfig(path=str(family(name)), **options)
    policy = trained(model, dtype, tmp_path / "checkpoint", depth)
    texts = saved_whole(policy, model, tmp_path / "whole")
    expected = load_file(tmp_path / "whole" / ONE)
    with Shards(tmp_path / "checkpoint") as shards:
        plan = merged.planned(model, dtype, depth, shards)
    assert plan is not None
    one = by_ranks(plan, tmp_path / "checkpoint", tmp_path / "one", 1)
    assert {file.name for file in (tmp_path / "one").iterdir()} == {*texts, ONE, merged.SUMS}
    assert {file.name: file.read_bytes() for file in (tmp_path / "one").glob("*.json")} == texts
    monkeypatch.setattr(merged, "SMALLEST", 1)
    three = by_ranks(plan, tmp_path / "checkpoint", tmp_path / "three", 3)
    assert 3 <= len(list((tmp_path / "three").glob("model-*-of-*.safetensors"))) <= 6
    for tensors in (one, three):
        assert tensors.keys() == expected.keys()
        for tensor, value in expected.items():
            assert tensors[tensor].dtype == value.dtype
            assert torch.equal(bits(tensors[tensor]), bits(value)), tensor
    content = json.loads((tmp_path / "three" / "model.safetensors.index.json").read_text())
    assert content["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def test_a_file_is_cut_by_size_and_no_smaller_than_is_worth_it():
    def cut(layers: int, parameters: int, ranks: int) -> merged.Files:
        own = {f"layer.{n}": torch.empty(parameters, dtype=torch.bfloat16, device="meta") for n in range(layers)}
        return merged.Files.of(merged.Merged(own, {}, None, None, {}), ranks)

    for ranks, files in ((1, 6), (2, 6), (8, 12), (512, 12)):  # of at most 5 GB; a tensor has 2
        large = cut(12, 10**9, ranks)
        assert len(large.tensors) == files
        writers = [rank for rank in range(ranks) for _ in large.of_rank(rank, ranks)]
        assert len(writers) == files
        assert max(map(writers.count, writers)) <= -(-files // ranks)
    assert list(cut(9, 10**7, 512).tensors) == ["model.safetensors"]


def test_a_checkpoint_of_another_model_is_named(family, tmp_path):
    trained(ModelConfig(path=str(family("llava_llama"))), "fp32", tmp_path / "checkpoint")
    with (
        Shards(tmp_path / "checkpoint") as shards,
        pytest.raises(ConfigError, match=r"checkpoint: does not belong to this model: missing \['"),
    ):
        merged.planned(ModelConfig(path=str(family("qwen2_5_vl"))), "fp32", None, shards)


def test_many_tensors_are_made_of_one_stack_of_experts(tmp_path):
    """transformers stacks the experts' matrices, which lie one by one in the files."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_hidden_layers=1, head_dim=8,
        num_attention_heads=2, num_key_value_heads=1, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "model")
    model = ModelConfig(path=str(tmp_path / "model"), train=["*"])
    saved_whole(trained(model, "fp32", tmp_path / "checkpoint"), model, tmp_path / "whole")
    with Shards(tmp_path / "checkpoint") as shards:
        plan = merged.planned(model, "fp32", None, shards)
    assert plan is not None
    assert len(plan.tensors) > len(set(plan.parameters.values())) + 8
    tensors, expected = (
        by_ranks(plan, tmp_path / "checkpoint", tmp_path / "out", 2),
        load_file(tmp_path / "whole" / ONE),
    )
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(bits(tensors[name]), bits(value)) for name, value in expected.items())


def test_a_tensor_of_several_parameters_is_written_by_one_process_that_has_all(family, tmp_path, monkeypatch):
    """As of a family whose files hold query, key and value in one matrix; transformers converts them together."""

    def fused(_model, weights):
        fused = dict(weights)
        for query in [name for name in weights if name.endswith(".q_proj.weight") and "language" in name]:
            parts = [query.replace(".q_proj.", f".{kind}_proj.") for kind in "qkv"]
            fused[query.replace(".q_proj.", ".qkv.")] = torch.cat([fused.pop(part) for part in parts])
        return fused

    model = ModelConfig(path=str(family("llava_llama")))
    policy = trained(model, "fp32", tmp_path / "checkpoint")
    with Shards(tmp_path / "checkpoint") as shards:
        with monkeypatch.context() as patch:
            patch.setattr(transformers.core_model_loading, "revert_weight_conversion", fused)
            assert merged.planned(model, "fp32", None, shards) is None
        (tmp_path / "out").mkdir()
        whole.write(tmp_path / "out", model, "fp32", None, shards)
    saved_whole(policy, model, tmp_path / "whole")
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    assert len(list((tmp_path / "out").iterdir())) == len(list((tmp_path / "whole").iterdir()))
