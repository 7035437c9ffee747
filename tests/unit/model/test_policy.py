"""What one forward computes: no more layers and rows than requested, and the same numbers as the whole one."""

from collections import Counter

import pytest
import torch

from mirage_dist.embedded import model as embedded_model
from mirage_dist.model.activations import Narrow
from mirage_dist.model.families import roles
from mirage_dist.model.policy import HeadedModel, Request
from mirage_dist.model.reference import shared_layer

DEPTH, ROWS = 4, 4


@pytest.fixture(scope="module")
def policy():
    return HeadedModel(embedded_model.make_model(embedded_model.make_tokenizer(), seed=3).double())


@pytest.fixture
def inputs(policy):
    """Four rows with a picture each, right-padded to different lengths."""
    config = policy.base.config
    picture = [config.image_token_id] * config.image_seq_length
    rows = [
        [5, *picture, 9, 10, 11, 12],
        [5, *picture, 13, 14, 0, 0],
        [5, *picture, 9, 0, 0, 0],
        [5, *picture, 8, 7, 6, 0],
    ]
    ids = torch.tensor(rows)
    pixels = torch.randn(ROWS, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": pixels}


@pytest.fixture
def rows_of(policy):
    """Rows that each decoder layer has computed since."""
    rows = Counter()
    handles = [
        layer.register_forward_pre_hook(lambda _, given, number=number: rows.update({number: len(given[0])}))
        for number, layer in enumerate(roles.decoder(policy.backbone).layers)
    ]
    yield rows
    for handle in handles:
        handle.remove()


def test_rows_that_end_at_the_tapped_layer_are_computed_no_further(policy, inputs, rows_of):
    width = inputs["input_ids"].shape[1]
    index_N = torch.tensor([2 * width + 5, 3 * width + 6])  # of the last two rows
    labels_N = torch.tensor([7, 8])
    whole = policy(inputs, Request(index_N, labels_N, layers=(1,)))
    rows_of.clear()
    mine = policy(inputs, Request(index_N, labels_N, layers=(1,), narrow=Narrow(2, slice(2, 4))))
    assert rows_of == {0: 4, 1: 4, 2: 2, 3: 2}
    torch.testing.assert_close(mine.logp_N, whole.logp_N, atol=1e-12, rtol=0)
    torch.testing.assert_close(mine.activations_BSD[1], whole.activations_BSD[1], atol=1e-12, rtol=0)


@pytest.mark.parametrize("first", [1, 2])
def test_a_request_to_a_reference_is_computed_for_the_compared_rows_only(policy, inputs, rows_of, first):
    whole = policy(inputs, Request(layers=(2,))).activations_BSD[2]
    rows_of.clear()
    mine = policy(inputs, Request(layers=(2,), narrow=Narrow(first, slice(1, 3)))).activations_BSD[2]
    assert rows_of == {number: 4 if number < first else 2 for number in range(3)}
    torch.testing.assert_close(mine, whole[1:3], atol=1e-12, rtol=0)


def test_a_forward_goes_on_from_another_ones_prefix(policy, inputs, rows_of):
    first = policy(inputs, Request(layers=(2,), share=1))
    rows_of.clear()
    mine = policy({}, Request(layers=(2,), prefix=first.prefix.of(slice(0, 2)))).activations_BSD[2]
    assert rows_of == {1: 2, 2: 2}
    torch.testing.assert_close(mine, first.activations_BSD[2][:2], atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("trained", "layer"),
    [(["layers.1.", "layers.2."], 1), (["layers.2.mlp", "lm_head"], 2), (["layers.3."], None), (["projector"], None)],
)
def test_a_prefix_is_shared_up_to_the_first_layer_that_trains(policy, trained, layer):
    for name, parameter in policy.hf.named_parameters():
        parameter.requires_grad_("vision_tower" not in name and any(part in name for part in trained))
    try:
        assert shared_layer(policy, 2) == layer
    finally:
        policy.hf.requires_grad_(True)
