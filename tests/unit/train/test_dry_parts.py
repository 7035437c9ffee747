"""The parts of a dry run: which samples, whether a state came back, and what to change when memory does not suffice."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mirage_dist import config as configs
from mirage_dist.data.sample import Sample
from mirage_dist.ranks import Group
from mirage_dist.schema import RunError, TrainRecipe
from mirage_dist.train.dry_run import sameness
from mirage_dist.train.dry_run.phases import Phases, remedies
from mirage_dist.train.dry_run.run import longest, share_of_longest
from mirage_dist.train.feed import Feed


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=2, max_size=40), st.data())
def test_a_checksum_changes_with_any_bit_and_any_order(numbers, data):
    tensor = torch.tensor(numbers, dtype=torch.int32)
    before = sameness.checksum(tensor)
    assert sameness.checksum(tensor.clone()) == before
    place, bit = data.draw(st.integers(0, len(numbers) - 1)), data.draw(st.integers(0, 31))
    other = tensor.clone().view(torch.uint8)
    other[4 * place + bit // 8] ^= 1 << (bit % 8)
    assert sameness.checksum(other.view(torch.int32)) != before
    moved = tensor.roll(1)
    assert (sameness.checksum(moved) == before) == torch.equal(moved, tensor)
    assert sameness.checksum(tensor.view(torch.float32)) != before


def test_a_checksum_does_not_depend_on_how_it_is_cut(monkeypatch):
    tensor = torch.arange(1000, dtype=torch.float32)
    before = sameness.checksum(tensor)
    monkeypatch.setattr(sameness, "CHUNK", 64)
    assert sameness.checksum(tensor) == before


def feed_of(lengths: dict[str, list[int]], answers: dict[str, list[int]], width: int, paired=(), packing=False):
    """What `longest` and `share_of_longest` use of a feed."""
    feed = SimpleNamespace(
        needs=SimpleNamespace(paired=paired, streams=tuple(lengths)),
        lengths={name: np.array(own, np.int64) for name, own in lengths.items()},
        samples={
            name: [Sample(f"{name}-{i}", None, "q", "a" * n, True, "", "", ()) for i, n in enumerate(own)]
            for name, own in answers.items()
        },
        pictured={},
        balance=None,
        steps=4,
        recipe=SimpleNamespace(
            train=SimpleNamespace(rows=width, global_batch=width),
            data=SimpleNamespace(packing=packing, group_by_length=False),
            seed=0,
        ),
    )
    feed.chosen = lambda name, step: Feed.chosen(feed, name, step)
    return feed


LENGTHS = st.lists(st.tuples(st.integers(1, 50), st.integers(1, 9)), min_size=1, max_size=30)


@given(LENGTHS, st.integers(1, 6), st.booleans())
def test_no_batch_of_the_run_is_longer_than_the_dry_runs(rows, width, packing):
    lengths, answers = map(list, zip(*rows, strict=True))
    feed = feed_of({"forget": lengths}, {"forget": answers}, width, packing=packing)
    chosen = longest(feed)["forget"]
    assert len(chosen) == width
    distinct = sorted({int(i) for i in chosen}, key=lambda i: -lengths[i])
    assert [lengths[i] for i in distinct] == sorted(lengths, reverse=True)[: len(distinct)]
    least = min(lengths[i] for i in distinct)
    tied = [answers[i] for i in range(len(rows)) if lengths[i] == least and i not in distinct]
    assert min(answers[i] for i in distinct if lengths[i] == least) >= max(tied, default=0)
    if len(rows) >= width:
        assert share_of_longest(feed, {"forget": chosen}, Group(0, 0, 1, torch.device("cpu"))) <= 1 + 1e-9


def test_paired_streams_get_the_same_samples():
    feed = feed_of({"a": [5, 1, 9, 2], "b": [1, 8, 1, 1]}, {"a": [1] * 4, "b": [1] * 4}, 2, paired=("a", "b"))
    assert {name: own.tolist() for name, own in longest(feed).items()} == {"a": [2, 1], "b": [2, 1]}


def recipe(*overrides: str) -> TrainRecipe:
    return configs.load("configs/train/npo.yaml", list(overrides), TrainRecipe)


def test_too_little_memory_names_the_phase_and_what_to_change():
    phases = Phases(torch.device("cpu"))
    phases.begin("forward and backward")
    with (
        pytest.raises(RunError) as error,
        phases.within_memory(recipe("train.micro_batch=2", "model.gradient_checkpointing=false"), 8),
    ):
        torch.empty(1 << 55, dtype=torch.uint8)
    text = str(error.value)
    assert text.startswith("dry run: out of memory in 'forward and backward' (at most ")
    assert "Change, in this order: model.gradient_checkpointing=true; train.micro_batch=1" in text


def test_what_is_in_the_recipe_already_is_not_advised():
    small = recipe(
        *("model.gradient_checkpointing=true", "train.micro_batch=1", "train.dtype=bf16", "data.max_length=512"),
        *("model.lora={rank: 8}", "deepspeed=configs/deepspeed/zero3_offload.json"),
    )
    assert remedies(small, 8) == ["more GPUs than 8"]
    assert "reference=cache" in remedies(recipe("reference=engine"), 8)


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="shapes"), Phases(torch.device("cpu")).within_memory(recipe(), 1):
        raise RuntimeError("shapes do not match")


def test_a_peak_is_of_its_own_phase():
    phases = Phases(torch.device("cpu"))
    phases.begin("large")
    torch.ones(40_000_000)
    phases.begin("small")
    phases.end()
    assert phases.peaks["large"] > phases.peaks["small"] + 100_000_000
    assert set(phases.seconds) == {"libraries and data", "large", "small"}
