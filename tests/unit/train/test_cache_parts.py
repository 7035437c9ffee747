"""Parts of the caches that are damaged, foreign or under another name cost a computation, never a run."""

import shutil

import pytest
import torch
from safetensors.torch import save_file

from mirage_dist.model.reference import LogProbs
from mirage_dist.train.caches.reference import complete_set
from mirage_dist.train.caches.vision import indexed


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


def test_files_that_hold_no_features_are_passed_over(tmp_path, capsys):
    digest = "ab" * 32
    save_file({f"{digest}/features/connector": torch.ones(2)}, tmp_path / "part-0123456789abcdef.safetensors")
    save_file({"weight": torch.ones(2)}, tmp_path / "part-mine.safetensors")
    save_file({f"{digest}/shapes/x": torch.ones(2)}, tmp_path / "part-shapes.safetensors")
    (tmp_path / "part-empty.safetensors").write_bytes(b"")
    (tmp_path / "part-folder.safetensors").mkdir()
    (tmp_path / "part-link.safetensors").symlink_to("nowhere")
    assert indexed(tmp_path) == {digest: "part-0123456789abcdef.safetensors"}
    shown = capsys.readouterr().out
    assert [n for n in ("mine", "shapes", "empty", "folder", "link") if f"part-{n}.safetensors: " not in shown] == []
