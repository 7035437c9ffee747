"""Parts of the caches that are damaged, foreign or under another name cost a computation, never a run."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mirage_dist.model.reference import LogProbs
from mirage_dist.schema import RunError
from mirage_dist.train.caches import flat, vision_files
from mirage_dist.train.caches.flat import Flat
from mirage_dist.train.caches.reference import complete_set
from mirage_dist.train.caches.vision_files import indexed


def write(file, samples):
    cache = LogProbs()
    cache.table.update({("forget", number): torch.full((3,), float(number)) for number in samples})
    with file.open("wb") as handle:
        cache.save(handle)


def name(part: int) -> str:
    return f"ranks-00002-width-4-part-{part:03d}-of-002.npz"


def test_what_is_no_part_is_passed_over(tmp_path):
    write(tmp_path / name(0), range(4))
    for foreign in (
        "rank-mine.npz",
        "ranks-00002-width-4-part-001-of-002 (copy).npz",
        "rank-00000-of-00002-width-4-part-001-of-002.npz",
        name(7),
        "rank-1-2-3.npz",
    ):
        shutil.copy(tmp_path / name(0), tmp_path / foreign)
    (tmp_path / name(1)).mkdir()
    assert complete_set(tmp_path) is None
    (tmp_path / name(1)).rmdir()
    write(tmp_path / name(1), range(4, 8))
    assert complete_set(tmp_path) == [name(0), name(1)]


def test_a_complete_set_in_which_each_rank_wrote_its_own_parts_is_one(tmp_path):
    """As the first versions wrote them. The latest part comes last: of a repeated sample its value counts."""
    names = [f"rank-{rank:05d}-of-00002-width-4-part-{part:03d}-of-002.npz" for part in (0, 1) for rank in (0, 1)]
    for file in names[:-1]:
        write(tmp_path / file, range(2))
    assert complete_set(tmp_path) is None
    write(tmp_path / names[-1], range(2))
    assert complete_set(tmp_path) == names


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"null", b"{}", b"[" * 10_000, b"\x93NUMPY\x01\x00\xff\xff{", b"PK\x03\x04"]
)
def test_a_part_with_another_content_is_damaged(tmp_path, content):
    (tmp_path / name(0)).write_bytes(content)
    cache = LogProbs()
    with pytest.raises(ValueError, match=r"\w"):
        cache.load(tmp_path / name(0))
    assert not cache.table


def test_any_changed_byte_is_noticed_or_changes_nothing(tmp_path):
    file = tmp_path / name(0)
    write(file, range(4))
    raw, whole = file.read_bytes(), LogProbs()
    whole.load(file)
    for place in range(0, len(raw), 3):
        file.write_bytes(raw[:place] + bytes([raw[place] ^ 255]) + raw[place + 1 :])
        cache = LogProbs()
        try:
            cache.load(file)
        except ValueError:
            continue
        assert {key: row.tolist() for key, row in cache.table.items()} == {
            key: row.tolist() for key, row in whole.table.items()
        }


PICTURE = "ab" * 32


def part(folder, digest=PICTURE):
    """A part of the vision cache with one picture."""
    stored = {f"{digest}/features/connector": torch.arange(6.0).bfloat16().reshape(2, 3)}
    stored |= {f"{digest}/inputs/sizes": torch.tensor([[4, 5]]), f"{digest}/shapes/pixel_values": torch.tensor([1, 3])}
    before = set(vision_files.parts(folder))
    vision_files.write(stored, folder, folder)
    return stored, *({*vision_files.parts(folder)} - before)


def test_no_changed_byte_of_features_reaches_a_step(tmp_path, capsys):
    _, file = part(tmp_path)
    raw, digests = file.read_bytes(), {"a.png": PICTURE}
    vision_files.write_index(tmp_path, tmp_path)
    index = vision_files.Index(Flat(tmp_path / vision_files.INDEX))
    whole = repr(vision_files.Features(digests, tmp_path, index)(["a.png"]))
    damaged, header = 0, 8 + int.from_bytes(raw[:8], "little")
    for place in range(len(raw)):
        file.write_bytes(raw[:place] + bytes([raw[place] ^ (1, 32)[place % 2]]) + raw[place + 1 :])
        try:
            assert repr(vision_files.Features(digests, tmp_path, index)(["a.png"])) == whole
        except RunError as error:
            assert f"{file}: damaged since it was written" in str(error)  # noqa: PT017
            assert vision_files.damage(file) is not None, place  # `data.verify` mends what a step would end with
            damaged += 1
        else:
            assert place < header  # such as a space at the header's end
    assert damaged > len(raw) - header
    capsys.readouterr()


def test_verifying_finds_changed_features_and_a_start_finds_a_part_that_was_cut_off(tmp_path, capsys):
    _, file = part(tmp_path)
    assert vision_files.damage(file) is None
    raw = file.read_bytes()
    file.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    assert vision_files.damage(file) == f"picture {PICTURE} does not have its checksum"
    file.write_bytes(raw[:-1])
    assert indexed(tmp_path) == {}
    assert f"{file}: damaged" in capsys.readouterr().out


def test_parts_of_an_earlier_version_are_removed_and_said_to_be_computed_again(tmp_path, capsys):
    stored, file = part(tmp_path)
    save_file(stored, file)  # without checksums
    _, other = part(tmp_path, "cd" * 32)
    old = [[name.name, name.stat().st_size, name.stat().st_mtime_ns] for name in vision_files.parts(tmp_path)]
    arrays = {"digests": np.zeros((1, 32), np.uint8), "parts": np.zeros(1, np.int32)}
    flat.write(tmp_path / vision_files.INDEX, arrays, json.dumps(old), tmp_path)  # the index of that version knows them
    vision_files.write_index(tmp_path, tmp_path)
    assert vision_files.parts(tmp_path) == [other]
    assert "1 parts of an earlier version have no checksums" in capsys.readouterr().out
    index = vision_files.Index(Flat(tmp_path / vision_files.INDEX))
    assert index.missing([PICTURE, "cd" * 32]) == [PICTURE]


def test_files_that_hold_no_features_are_passed_over(tmp_path, capsys):
    _, own = part(tmp_path)
    save_file({"weight": torch.ones(2)}, tmp_path / "part-mine.safetensors")
    save_file({f"{PICTURE}/shapes/x": torch.ones(2)}, tmp_path / "part-shapes.safetensors")
    (tmp_path / "part-empty.safetensors").write_bytes(b"")
    (tmp_path / "part-folder.safetensors").mkdir()
    (tmp_path / "part-link.safetensors").symlink_to("nowhere")
    assert indexed(tmp_path) == {PICTURE: own.name}
    shown = capsys.readouterr().out
    assert [n for n in ("mine", "shapes", "empty", "folder", "link") if f"part-{n}.safetensors: " not in shown] == []
