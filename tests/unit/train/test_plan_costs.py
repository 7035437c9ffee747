"""Operations and bytes of a plan against counts of real passes and collectives."""

from itertools import product

import numpy as np
import pytest
import torch
from families import models
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from mirage_dist import objectives
from mirage_dist.model import load
from mirage_dist.schema import ConfigError, ModelConfig
from mirage_dist.schema.training import LoraConfig
from mirage_dist.train.planning import batch
from mirage_dist.train.planning.costs import flops, lengths
from mirage_dist.train.planning.costs.communication import Transfer
from mirage_dist.train.planning.costs.hardware import hardware
from mirage_dist.train.planning.costs.lengths import Lengths

WIDTH = 24
SFT = objectives.base.make({"name": "sft"}).needs


def row_of(tokens: int) -> Lengths:
    return Lengths(np.array([tokens]), np.array([1]), 1, 0.0)


def counted(policy, tokens: int) -> float:
    """Operations of forward and backward through the decoder, without the LM head."""
    backbone = policy.backbone.to_empty(device="cpu")
    for parameter in backbone.parameters():
        torch.nn.init.zeros_(parameter)
    with FlopCounterMode(display=False) as counter:
        ids = torch.full((1, tokens), 5)
        hidden = backbone(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state
        hidden.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["llava_llama", "qwen2_5_vl", "gemma3", "llama_text", "qwen3_text"])
@pytest.mark.parametrize("how", ["full", "lora"])
def test_operations_are_those_that_pytorch_counts(name, how, tmp_path):
    models.write_files(name, tmp_path)
    lora = LoraConfig(rank=4, alpha=8, dropout=0.0) if how == "lora" else None
    model = ModelConfig(path=str(tmp_path), attention="eager", lora=lora, train=None if lora else ["decoder"])
    policy = load.weightless(model)
    own = flops.work(policy, SFT, False)
    planned = flops.row(own, row_of(WIDTH), None, False, False, False)
    # Of adapters in the first layer: their inputs have no gradient, so three of its products are not computed.
    tolerance = 1e-9 if how == "full" else 0.06
    assert planned.forward + planned.backward == pytest.approx(counted(policy, WIDTH), rel=tolerance)


def test_the_loss_head_and_checkpointing_cost_what_their_passes_cost(tmp_path):
    models.write_files("llama_text", tmp_path)
    policy = load.weightless(ModelConfig(path=str(tmp_path)))
    own = flops.work(policy, SFT, True)
    plain, again = (flops.row(own, row_of(WIDTH), None, True, on, False) for on in (False, True))
    assert again.recomputed == plain.forward
    assert again.model == plain.model == plain.all
    head = policy.base.get_output_embeddings().weight.numel()
    assert plain.head == 3 * 2 * head  # one response row: logits, hidden gradient and weight gradient


@given(st.integers(1, 4000), st.integers(1, 64), st.integers(1, 64))
def test_a_chosen_micro_batch_is_the_largest_that_keeps_the_global_batch(rows, ranks, largest):
    if rows % ranks:
        with pytest.raises(ConfigError, match="does not divide"):
            batch.choose(rows, ranks, largest)
        return
    chosen = batch.choose(rows, ranks, largest)
    assert rows % (chosen * ranks) == 0
    assert chosen <= largest
    assert not [n for n in range(chosen + 1, largest + 1) if rows % (n * ranks) == 0]


def test_a_batch_that_cannot_be_chosen_names_the_ranks_that_can():
    with pytest.raises(ConfigError, match="does not divide by 12 ranks; take 8 or 16 ranks"):
        batch.choose(16, 12, 2)
    with pytest.raises(ConfigError, match="not even one row fits"):
        batch.choose(16, 8, 0)


@given(st.sampled_from(["all_gather", "reduce_scatter", "all_reduce"]), st.integers(1, 1 << 40), st.integers(2, 1024))
def test_more_ranks_move_more_up_to_the_whole_payload(kind, payload, ranks):
    one, two = (Transfer("x", kind, payload, 1, n, True) for n in (ranks, ranks + 1))
    assert 0 <= one.volume <= two.volume <= (2 if kind == "all_reduce" else 1) * payload
    on = hardware("h100")
    assert one.seconds(on, 8) <= two.seconds(on, 8)


@given(st.floats(1, 3000), st.integers(1, 4000))
def test_described_lengths_have_the_mean_and_longest_that_they_were_given(mean, longest):
    if mean > longest:
        with pytest.raises(ConfigError, match="MEAN <= LONGEST"):
            lengths.Described(10, (mean, longest), (1, 1))
        return
    own = lengths.Described(10, (mean, longest), (1, 1)).of(10_000)
    assert own.longest == longest
    assert own.rows.min() >= 1
    assert own.mean == pytest.approx(mean, rel=0.01, abs=1 + longest / lengths.DRAWN)


ROWS = st.lists(st.integers(1, 9), min_size=1, max_size=3)


@given(ROWS, ROWS, st.integers(1, 2))
def test_a_padded_micro_batch_is_as_wide_as_the_mean_over_all_of_them(first, second, micro):
    streams = {name: Lengths(np.array(own), np.array(own), len(own)) for name, own in (("a", first), ("b", second))}
    every = product(*([own for own in (first, second) for _ in range(micro)]))
    widths = [max(rows) for rows in every]
    assert lengths.padded(streams, micro) == pytest.approx(sum(widths) / len(widths))
