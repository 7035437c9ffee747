"""Fragments in any cut, read back over any ranges; what is missing or damaged is told."""

import hashlib
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from mirage_dist.model import shards
from mirage_dist.model.shards import MOMENTS, PARAM, Fragment, Shards, write
from mirage_dist.schema import RunError

KEYS = (PARAM, *MOMENTS)


@st.composite
def fragmentations(draw):
    """Parameters, and how many ranks hold which elements of each: cuts that leave ranks with nothing, too."""
    ranks = draw(st.integers(1, 5))
    parameters = {}
    for number in range(draw(st.integers(1, 4))):
        shape = tuple(draw(st.lists(st.integers(1, 7), min_size=0, max_size=3)))
        count = math.prod(shape)
        cuts = sorted(draw(st.lists(st.integers(0, count), min_size=ranks - 1, max_size=ranks - 1)))
        parameters[f"layer.{number}.weight"] = (shape, [0, *cuts, count])
    return ranks, parameters


@given(fragmentations(), st.data())
def test_any_fragmentation_is_read_back_over_any_ranges(tmp_path_factory, fragmentation, data):
    folder = tmp_path_factory.mktemp("shards")
    ranks, parameters = fragmentation
    generator = torch.Generator().manual_seed(7)
    whole = {
        (key, name): torch.randn(math.prod(shape), generator=generator)
        for name, (shape, _) in parameters.items()
        for key in KEYS
    }
    for rank in range(ranks):
        held = [
            Fragment(name, shape, cuts[rank], {k: whole[k, name][cuts[rank] : cuts[rank + 1]] for k in KEYS})
            for name, (shape, cuts) in parameters.items()
            if cuts[rank] < cuts[rank + 1]
        ]
        file = folder / f"rank-{rank:05d}-of-{ranks:05d}.safetensors"
        told = write(file, held)
        assert told == {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        assert set(load_file(file)) == {f"{k}/{f.name}" for f in held for k in KEYS}  # an ordinary safetensors file
    with Shards(folder) as read:
        assert read.shapes == {name: shape for name, (shape, _) in parameters.items()}
        for name, (shape, _) in parameters.items():
            assert torch.equal(read.whole(name), whole[PARAM, name].view(shape))
            count = math.prod(shape)
            start = data.draw(st.integers(0, count), label="start")
            size = data.draw(st.integers(0, count - start), label="count")
            for key in KEYS:
                assert torch.equal(read.read(key, name, start, size), whole[key, name][start : start + size])


def fragment(start: int, stop: int) -> Fragment:
    return Fragment("w", (10,), start, {key: torch.arange(float(start), float(stop)) for key in KEYS})


def test_elements_that_no_shard_holds_are_missed(tmp_path):
    write(tmp_path / "rank-00000-of-00002.safetensors", [fragment(0, 4)])
    write(tmp_path / "rank-00001-of-00002.safetensors", [fragment(6, 10)])
    with Shards(tmp_path) as read:
        assert read.read(PARAM, "w", 6, 4).tolist() == [6, 7, 8, 9]
        with pytest.raises(RunError, match="holds 2 of 4 elements of exp_avg of w from 2 on"):
            read.read("exp_avg", "w", 2, 4)
        with pytest.raises(RunError, match="holds 0 of 1 elements"):
            read.read(PARAM, "absent", 0, 1)


def test_values_keep_every_bit_and_chunks_their_order(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "CHUNK", 24)
    odd = torch.tensor([0.0, -0.0, float("inf"), float("nan"), 1e-45, 3.4e38, -1.5, 2.0, 7.0, 1 / 3])
    strided = torch.arange(20, dtype=torch.float64)[::2]
    held = Fragment("w", (2, 5), 0, {PARAM: odd, "exp_avg": strided, "exp_avg_sq": odd.flip(0)})
    told = write(tmp_path / "rank-00000-of-00001.safetensors", [held])
    content = (tmp_path / "rank-00000-of-00001.safetensors").read_bytes()
    assert told == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    with Shards(tmp_path) as read:
        assert torch.equal(read.read(PARAM, "w", 0, 10).view(torch.int32), odd.view(torch.int32))
        assert read.read("exp_avg", "w", 0, 10).tolist() == list(range(0, 20, 2))
        assert torch.equal(read.read("exp_avg_sq", "w", 0, 3), torch.tensor([1 / 3, 7.0, 2.0]))
