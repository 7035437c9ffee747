"""Formulas of memory against what PyTorch keeps, and against what must hold for every size."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaModel

from mirage_dist.train.planning.costs import memory
from mirage_dist.train.planning.costs.memory import Place

SIZES = st.lists(st.integers(1, 50), min_size=1, max_size=6)


@given(st.lists(SIZES, min_size=1, max_size=3), st.sampled_from([2, 3]), st.integers(1, 5))
def test_the_ranks_together_hold_every_trained_element_once(groups, stage, ranks):
    held = memory.state_elements(groups, stage, ranks)
    assert len(held) == ranks
    assert sum(held) == sum(map(sum, groups))
    assert max(held) == held[0]
    sizes = [size for group in groups for size in group]
    for elementwise in (True, False):
        state = memory.optimizer_bytes(groups, [8 * size for size in sizes], elementwise, stage, ranks)
        assert sum(state) == 12 * sum(sizes)
    assert memory.exchange(groups, stage, 1).device == 4 * 6 * max(map(sum, groups))


def kept(config: LlamaConfig, attention: str, dtype: torch.dtype, rows: int, width: int) -> int:
    """Bytes that autograd keeps of a forward, weights left out."""
    model = LlamaModel._from_config(config, attn_implementation=attention, dtype=dtype)
    ours = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    seen: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    mask = torch.ones(rows, width, dtype=torch.long)
    mask[0, width // 2 :] = 0
    hidden = torch.randn(rows, width, config.hidden_size, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(inputs_embeds=hidden, attention_mask=mask, use_cache=False)
    return sum(t.untyped_storage().nbytes() for place, t in seen.items() if place not in ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("hidden", "forward", "heads"), [(64, 192, 4), (128, 344, 8)])
def test_the_estimate_of_activations_is_near_what_a_decoder_keeps(hidden, forward, heads, attention, dtype):
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=hidden,
        intermediate_size=forward,
        num_hidden_layers=4,
        num_attention_heads=heads,
    )
    estimate = memory.activations(config, 2 * 64, 64, 4, dtype.itemsize, attention == "eager", False)
    assert estimate == pytest.approx(kept(config, attention, dtype, 2, 64), rel=0.12)


def test_what_zero_cuts_and_what_it_offloads():
    sizes, stage2 = [100, 7], {"stage": 2}
    stage3 = {"stage": 3, "stage3_param_persistence_threshold": 10, "stage3_prefetch_bucket_size": 5}
    offload = {name: {"device": "cpu"} for name in ("offload_param", "offload_optimizer")}
    assert memory.weights(sizes, 2, stage2, 2) == Place(214)
    assert memory.weights(sizes, 2, stage3, 2) == Place(2 * (50 + 4))
    assert memory.weights(sizes, 2, {**stage3, **offload}, 2) == Place(host=2 * (50 + 4))
    assert memory.weights(sizes, 2, stage2, 2, quantized=100) == Place(2 * 7 + int(100 * memory.NF4))
    assert memory.optimizer([sizes], [800, 56], True, {**stage3, **offload}, 2) == Place(0, 12 * 54)
    assert memory.optimizer([sizes], [800, 56], False, stage3, 2) == Place(4 * 54 + 800)
    assert memory.gradients([sizes], stage2, 2) == Place(4 * 54)


def test_the_running_module_and_what_is_fetched_ahead_are_whole():
    """7 elements are small and always whole; 30 run; 5 are fetched ahead."""
    zero = {"stage": 3, "stage3_param_persistence_threshold": 10, "stage3_prefetch_bucket_size": 5}
    assert memory.gathered([100, 7], 2, zero, 2, 30) == Place(2 * (7 + 30 + 5))
    assert memory.gathered([100, 7], 2, zero, 2, 100) == Place(2 * 107)
    assert memory.gathered([100, 7], 2, {"stage": 2}, 2, 30) == Place()
    # A single rank has every parameter whole already; in host memory it has them there.
    assert memory.gathered([100, 7], 2, zero, 1, 30) == Place()
    there = {**zero, "offload_param": {"device": "cpu"}}
    assert memory.gathered([100, 7], 2, there, 1, 30) == Place(2 * (7 + 30 + 5))


def test_checkpointing_keeps_layer_inputs_and_one_layer():
    config = LlamaConfig(hidden_size=8, intermediate_size=16, num_attention_heads=2)
    one, three = (memory.activations(config, 10, 5, depth, 2, False, False) for depth in (1, 3))
    assert three == 3 * one
    assert memory.activations(config, 10, 5, 3, 2, False, True) == 10 * 3 * 8 * 2 + one
