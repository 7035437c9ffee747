"""Rounding: each weight as near as the levels allow, on few values, and a second time nothing changes."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from mirage_dist.erasure.quantise import round_decoder, rounded

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
    found = rounded(weight, bits, group)
    levels = 2 ** (bits - 1) - 1
    for before, after in zip(groups(weight, group), groups(found, group), strict=True):
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
    found = rounded(weight, bits, None)
    assert torch.equal(rounded(-weight, bits, None), -found)
    assert (found[0] == 0).all()


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
    told = round_decoder(model, 4, 4)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "_proj" in name}
    assert told["layers"] == len(changed) == 14
    assert told["share"] == sum(before[name].numel() for name in changed) / sum(v.numel() for v in before.values())
    assert 0 < told["error"] < 0.2
