"""Fragments in any cut are read back over any ranges, in any dtype, by index and by headers; a reader opens only what
it needs, and missing elements are reported.
"""

import hashlib
import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from opens import Opens
from safetensors.torch import load_file, save_file

from mirage_dist import disk, state
from mirage_dist.disk import Written
from mirage_dist.model.shards import (
    INDEX,
    PARAM,
    Fragment,
    Layout,
    Shards,
    damage,
    index,
    placed,
    share,
    unpacked,
    write,
)
from mirage_dist.ranks import Group
from mirage_dist.schema import RunError
from mirage_dist.train.checkpoints import commit

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
    layouts = []
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
        layouts.append(Layout.of(held, {"a": {"rank": rank}}))
    chosen = {}
    for name, (shape, _) in parameters.items():
        count = math.prod(shape)
        chosen[name] = start = data.draw(st.integers(0, count), label="start")
        chosen[name] = start, data.draw(st.integers(0, count - start), label="count")
    for checkpoint in (named(folder), indexed(folder, layouts)):
        assert damage(checkpoint) is None
        with Shards(checkpoint) as read:
            assert read.shapes == {name: shape for name, (shape, _) in parameters.items()}
            for name, (shape, _) in parameters.items():
                assert torch.equal(read.whole(name), whole[PARAM, name].view(shape))
                start, size = chosen[name]
                for key in KEYS:
                    assert torch.equal(read.read(key, name, start, size), whole[key, name][start : start + size])
        name, (_, cuts) = next(iter(parameters.items()))  # by the index only shards that hold some of it are opened
        start, size = chosen[name]
        with Opens(checkpoint) as opens, Shards(checkpoint) as read:
            read.read(PARAM, name, start, size)
        stop = start + size
        overlapping = {r for r in range(ranks) if max(cuts[r], start) < min(cuts[r + 1], stop)}
        shards = {int(n[5:10]) for n in opens.names if n.startswith("rank-")}
        assert shards == (overlapping if opens.names[INDEX] else set(range(ranks)))


def named(folder: Path, *others: str) -> Path:
    """The folder, with a manifest that names its shards, and other files of it."""
    files = {name: written(folder / name) for name in [*(f.name for f in folder.glob("rank-*.safetensors")), *others]}
    (folder / "manifest.json").write_text(state.sealed("checkpoint", {"step": 1, "files": files}))
    return folder


def written(file: Path) -> dict:
    return asdict(Written(file.stat().st_size, disk.sha256(file)))


def indexed(folder: Path, layouts: list[Layout]) -> Path:
    """The folder, with an index of its shards as every rank's part of it arrives on rank 0, and a manifest."""
    packed = [layout.packed() for layout in layouts]
    names = sorted(file.name for file in folder.glob("rank-*.safetensors"))
    text = index(names, placed(unpacked(own) for own, _ in packed), [unpacked(own) for _, own in packed])
    (folder / INDEX).write_text(text)
    return named(folder, INDEX)


RANKS = 512


def zero3(rank: int, sizes: dict[str, int], values: dict[str, torch.Tensor] | None = None) -> list[Fragment]:
    """What rank `rank` of `RANKS` holds of parameters of these sizes under ZeRO-3 (see `partitions`)."""
    held = []
    for name, size in sizes.items():
        each = -(-size // RANKS)
        start = each * rank
        if (count := max(0, min(each, size - start))) > 0:
            whole = torch.zeros(1).expand(size) if values is None else values[name]
            held += [Fragment(key, name, (size,), start, whole[start : start + count]) for key in KEYS]
    return held


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint of 512 ranks with an index, and the values in it."""
    folder = tmp_path_factory.mktemp("large")
    values = {f"layer.{n}": torch.arange(float(5 * n + 3)) for n in (0, 1, 100, 300, 700)}
    sizes = {name: len(value) for name, value in values.items()}
    layouts = []
    for rank in range(RANKS):
        held = zero3(rank, sizes, values)
        write(folder / f"rank-{rank:05d}-of-{RANKS:05d}.safetensors", held)
        layouts.append(Layout.of(held, {f.name: {"step": {"float32": 3.0}} for f in held}))
    save_file({"vector": torch.ones(2)}, folder / "objective.safetensors")
    indexed(folder, layouts)
    return named(folder, INDEX, "objective.safetensors"), values


@pytest.mark.parametrize(
    ("rank", "ranks", "most"), [(0, 512, 8), (200, 512, 8), (511, 512, 8), (100, 511, 10), (7, 8, 138)]
)
def test_a_rank_opens_its_own_shards_alone_and_reads_them_whole(large, rank, ranks, most):
    """What a resume does in the folder, as one of `ranks` ranks: its share of the check, then the load."""
    folder, values = large
    with Opens(folder) as opens:
        assert damage(folder, rank, ranks) is None
        with Shards(folder) as shards:
            assert shards.scalars == {name: {"step": {"float32": 3.0}} for name in values}
            for name, value in values.items():
                each = -(-len(value) // ranks)
                part = value[each * rank : each * (rank + 1)]
                for key in KEYS:
                    assert torch.equal(shards.read(key, name, each * rank, len(part)), part)
        load_file(folder / "objective.safetensors")
    assert opens.count <= most, opens.names


@pytest.mark.parametrize("ranks", [1, 2, 7, 512, 600])
def test_every_file_is_checked_by_one_rank_and_shards_by_those_that_load_them(large, ranks):
    files = [file.name for file in large[0].iterdir()]
    shares = [share(files, rank, ranks) for rank in range(ranks)]
    assert sorted(name for own in shares for name in own) == sorted(files)
    assert max(map(len, shares)) - min(map(len, shares)) <= 3
    if ranks == RANKS:
        assert all(f"rank-{rank:05d}-of-{RANKS:05d}.safetensors" in own for rank, own in enumerate(shares))


@pytest.mark.parametrize("cut", ["ZeRO-3", "ZeRO-2", "no pattern"])
def test_the_index_of_900_parameters_on_512_ranks_is_small(cut):
    generator = torch.Generator().manual_seed(5)
    sizes = {f"model.language_model.layers.{n}.self_attn.some_proj.weight": 4096 * 4096 + n % 7 for n in range(900)}
    if cut == "ZeRO-3":
        each = {name: -(-size // RANKS) for name, size in sizes.items()}
        layouts = [
            [
                (f"/{name}", (size,), rank * each[name], min(each[name], size - rank * each[name]))
                for name, size in sizes.items()
            ]
            for rank in range(RANKS)
        ]
    else:  # each parameter is on a few ranks; without a pattern on 64 of them
        layouts, parts = [[] for _ in range(RANKS)], 2 if cut == "ZeRO-2" else 64
        for number, (name, size) in enumerate(sizes.items()):
            edges = [0, *torch.randint(size, (parts - 1,), generator=generator).sort().values.tolist(), size]
            for part in range(parts):
                own = layouts[(number + part * 7) % RANKS]
                own.append((f"/{name}", (size,), edges[part], edges[part + 1] - edges[part]))
    tensors = {key + title: place for title, place in placed(layouts).items() for key in KEYS}
    names = [f"rank-{rank:05d}-of-{RANKS:05d}.safetensors" for rank in range(RANKS)]
    size = len(index(names, tensors, [{name: {"step": {"float32": 100.0}} for name in sizes}]))
    assert size < (6 << 20 if cut == "no pattern" else 1 << 20)


def test_a_damaged_index_is_damage_and_the_older_checkpoint_is_used(tmp_path, capsys):
    alone = Group(0, 0, 1, torch.device("cpu"))
    for step in (1, 2, 3):
        folder = tmp_path / f"step-{step:06d}"
        folder.mkdir()
        write(folder / "rank-00000-of-00001.safetensors", fragments(0, 10))
        indexed(folder, [Layout.of(fragments(0, 10), {})])
        manifest = {"step": step, "files": {f.name: written(f) for f in folder.iterdir() if f.name != "manifest.json"}}
        (folder / "manifest.json").write_text(state.sealed("checkpoint", manifest))
    assert commit.newest(tmp_path, alone) == tmp_path / "step-000003"
    three, two = (tmp_path / f"step-00000{step}" / INDEX for step in (3, 2))
    three.write_bytes(three.read_bytes().replace(b"[0,1,0,10]", b"[0,1,0,11]"))
    with pytest.raises(RunError, match=r"index\.json: does not have the SHA-256 of the manifest"):
        Shards(three.parent)
    two.unlink()
    assert commit.newest(tmp_path, alone) == tmp_path / "step-000001"
    shown = capsys.readouterr().out
    assert "step-000003 is passed over: index.json does not have the SHA-256 of the manifest" in shown
    assert "step-000002 is passed over: index.json is missing" in shown


def test_an_index_of_other_shards_is_refused_where_it_is_read(tmp_path):
    """Only a bug can write one: the manifest has its SHA-256."""
    write(tmp_path / "rank-00000-of-00001.safetensors", fragments(0, 10))
    indexed(tmp_path, [Layout.of(fragments(2, 12), {})])
    with (
        Shards(tmp_path) as read,
        pytest.raises(RunError, match=r"rank-00000.* does not hold of param/w what index\.json"),
    ):
        read.read(PARAM, "w", 2, 3)
    content = json.loads((tmp_path / INDEX).read_text()) | {"files": ["rank-00000-of-00002.safetensors"]}
    content.pop("seal")
    (tmp_path / INDEX).write_text(state.sealed("index", content))
    named(tmp_path, INDEX)
    with pytest.raises(RunError, match=r"index\.json: is of other shards than those of the manifest"):
        Shards(tmp_path)


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
