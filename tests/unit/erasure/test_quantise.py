"""Rounding: each weight as near as the levels allow, on few values; a second rounding changes nothing."""

import os

import torch
from hypothesis import given
from hypothesis import strategies as st
from mirage_dist.evals.models.generate import Generator
from transformers import LlamaConfig, LlamaForCausalLM

from mirage_dist.erasure.quantise import round_decoder, rounded, write_rounded
from mirage_dist.erasure.setting import Forget, Setting
from mirage_dist.schema import EvalModelConfig, EvalRecipe, RunConfig

shapes = st.tuples(st.integers(1, 5), st.integers(1, 40))
BITS = st.integers(2, 8)
GROUP = st.one_of(st.none(), st.integers(1, 50))


def weights(shape: tuple[int, int], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = 10 ** torch.empty(shape[0], 1).uniform_(-3, 3, generator=generator)
    return scale * torch.randn(shape, generator=generator)


def groups(weight: torch.Tensor, group: int | None) -> list[torch.Tensor]:
    return [part for row in weight for part in row.split(group or weight.shape[1])]


@given(shape=shapes, seed=st.integers(0, 10_000), bits=BITS, group=GROUP)
def test_no_weight_moves_by_more_than_half_a_step_and_a_group_has_few_values(shape, seed, bits, group):
    weight = weights(shape, seed)
    after_rounding = rounded(weight, bits, group)
    levels = 2 ** (bits - 1) - 1
    for before, after in zip(groups(weight, group), groups(after_rounding, group), strict=True):
        largest = before.abs().max()
        assert (after - before).abs().max() <= largest / (2 * levels) * (1 + 1e-5)
        assert len(after.unique()) <= 2 * levels + 1
        steps = after / (largest / levels)
        assert torch.allclose(steps, steps.round(), atol=1e-3)


@given(shape=shapes, seed=st.integers(0, 10_000), bits=BITS, group=GROUP)
def test_a_second_rounding_changes_nothing(shape, seed, bits, group):
    once = rounded(weights(shape, seed), bits, group)
    assert torch.allclose(rounded(once, bits, group), once, rtol=1e-6, atol=0)


@given(shape=shapes, seed=st.integers(0, 10_000), bits=BITS)
def test_the_sign_and_the_zeros_stay(shape, seed, bits):
    weight = weights(shape, seed)
    weight[0] = 0
    once = rounded(weight, bits, None)
    assert torch.equal(rounded(-weight, bits, None), -once)
    assert (once[0] == 0).all()


def test_the_decoders_linear_layers_are_rounded_and_nothing_else():
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rounding = round_decoder(model, 4, 4)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "_proj" in name}
    assert rounding["layers"] == len(changed) == 14
    assert rounding["share"] == sum(before[name].numel() for name in changed) / sum(v.numel() for v in before.values())
    assert 0 < rounding["error"] < 0.2


def test_a_rounded_model_is_an_ordinary_directory_with_modes_by_the_umask(toy, tmp_path):
    model = EvalModelConfig(path=str(toy.root / "model"), dtype="fp32")
    recipe = EvalRecipe(run=RunConfig(str(tmp_path)), suite="s", model=model, sets={})
    setting = Setting(recipe, model, {}, Forget([], [], None, 0), "quantisation")
    out = tmp_path / "model-int4"
    out.mkdir()
    (out / "config.json").write_text("cut off by a killed st")
    before = os.umask(0o027)
    try:
        assert write_rounded(setting, 4, 8, out)["layers"] > 0
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in out.iterdir()} == {0o640}
    loaded = Generator(EvalModelConfig(path=str(out), dtype="fp32"), recipe.template, recipe.generation).model
    state = loaded.state_dict()
    name = next(name for name in state if "language_model" in name and "q_proj" in name)
    assert torch.allclose(rounded(state[name], 4, 8), state[name], rtol=1e-6, atol=0)
    assert [path.name for path in tmp_path.iterdir()] == ["model-int4"]
