"""Fragments in any cut are read back over any ranges, in any dtype; missing elements are reported."""

import hashlib
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from mirage_dist import disk, state
from mirage_dist.disk import Written
from mirage_dist.model.shards import PARAM, Fragment, Shards, write
from mirage_dist.schema import RunError

KEYS = (PARAM, "exp_avg", "exp_avg_sq")


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
            Fragment(key, name, shape, cuts[rank], whole[key, name][cuts[rank] : cuts[rank + 1]])
            for name, (shape, cuts) in parameters.items()
            for key in KEYS
            if cuts[rank] < cuts[rank + 1]
        ]
        file = folder / f"rank-{rank:05d}-of-{ranks:05d}.safetensors"
        written = write(file, held)
        assert written == Written(file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest())
        assert set(load_file(file)) == {f"{f.key}/{f.name}" for f in held}  # an ordinary safetensors file
    with Shards(named(folder)) as read:
        assert read.shapes == {name: shape for name, (shape, _) in parameters.items()}
        for name, (shape, _) in parameters.items():
            assert torch.equal(read.whole(name), whole[PARAM, name].view(shape))
            count = math.prod(shape)
            start = data.draw(st.integers(0, count), label="start")
            size = data.draw(st.integers(0, count - start), label="count")
            for key in KEYS:
                assert torch.equal(read.read(key, name, start, size), whole[key, name][start : start + size])


def named(folder: Path) -> Path:
    """The folder, with a manifest that names its shards."""
    files = {file.name: {} for file in folder.glob("rank-*.safetensors")}
    (folder / "manifest.json").write_text(state.sealed("checkpoint", {"step": 1, "files": files}))
    return folder


def test_a_shard_that_no_manifest_names_is_not_opened(tmp_path):
    write(tmp_path / "rank-00000-of-00001.safetensors", fragments(0, 10))
    named(tmp_path)
    (tmp_path / "rank-00001-of-00002.safetensors").write_text("no shard")
    write(tmp_path / "rank-00007-of-00009.safetensors", fragments(0, 3))
    with Shards(tmp_path) as read:
        assert read.read(PARAM, "w", 0, 10).tolist() == list(range(10))


def fragments(start: int, stop: int) -> list[Fragment]:
    return [Fragment(key, "w", (10,), start, torch.arange(float(start), float(stop))) for key in KEYS]


def test_elements_that_no_shard_holds_are_missed(tmp_path):
    write(tmp_path / "rank-00000-of-00002.safetensors", fragments(0, 4))
    write(tmp_path / "rank-00001-of-00002.safetensors", fragments(6, 10))
    with Shards(named(tmp_path)) as read:
        assert read.read(PARAM, "w", 6, 4).tolist() == [6, 7, 8, 9]
        with pytest.raises(RunError, match="holds 2 of 4 elements of exp_avg of w from 2 on"):
            read.read("exp_avg", "w", 2, 4)
        with pytest.raises(RunError, match="holds 0 of 1 elements"):
            read.read(PARAM, "absent", 0, 1)


def test_values_keep_every_bit_and_chunks_their_order(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "CHUNK_BYTES", 24)
    odd = torch.tensor([0.0, -0.0, float("inf"), float("nan"), 1e-45, 3.4e38, -1.5, 2.0, 7.0, 1 / 3])
    strided = torch.arange(20, dtype=torch.float64)[::2]
    tensors = {PARAM: odd, "exp_avg": strided, "exp_avg_sq": odd.flip(0)}
    held = [Fragment(key, "w", (2, 5), 0, tensor) for key, tensor in tensors.items()]
    written = write(tmp_path / "rank-00000-of-00001.safetensors", held)
    content = (tmp_path / "rank-00000-of-00001.safetensors").read_bytes()
    assert written == Written(len(content), hashlib.sha256(content).hexdigest())
    with Shards(named(tmp_path)) as read:
        assert torch.equal(read.read(PARAM, "w", 0, 10).view(torch.int32), odd.view(torch.int32))
        assert read.read("exp_avg", "w", 0, 10).tolist() == list(range(0, 20, 2))
        assert torch.equal(read.read("exp_avg_sq", "w", 0, 3), torch.tensor([1 / 3, 7.0, 2.0]))


def test_state_of_any_name_shape_and_dtype_is_read_back(tmp_path):
    generator = torch.Generator().manual_seed(3)
    states = {
        "row_var": torch.randn(3, 1, generator=generator),
        "momentum": torch.randn(3, 5, generator=generator).bfloat16(),
        "state1": torch.randint(0, 256, (3, 5), generator=generator, dtype=torch.uint8),
        "count": torch.arange(15, dtype=torch.int64).view(3, 5) + 2**40,
        "mask": torch.tensor([True, False, True]),
        "nothing": torch.zeros(0),
    }
    held = [Fragment(key, "w", tuple(t.shape), 0, t.reshape(-1)) for key, t in states.items()]
    scalars = {"w": {"step": {"float32": 7.0}, "RMS": 1 / 3, "none": None}, "v": {}}
    write(tmp_path / "rank-00000-of-00002.safetensors", held, scalars)
    write(tmp_path / "rank-00001-of-00002.safetensors", [Fragment(PARAM, "v", (2,), 0, torch.ones(2))], {"v": {"n": 1}})
    with Shards(named(tmp_path)) as read:
        assert read.shapes == {"v": (2,)}
        assert read.scalars == {**scalars, "v": {"n": 1}}
        assert read.states("v") == {}
        assert read.states("w") == {key: tuple(t.shape) for key, t in states.items()}
        for key, tensor in states.items():
            assert torch.equal(read.whole("w", key), tensor), key
            assert read.whole("w", key).dtype == tensor.dtype or not tensor.numel()
