"""Pictures that are stored in a table: the same samples, pixels and digests as from files, and nothing read needlessly.

The layouts are those of published tables: SPA-VL's `image` is a struct of bytes and path with columns question, chosen,
rejected (its dataset card on the hub, read 2026-11-26), as `datasets.features.Image` encodes it.
"""

import hashlib
import io
import itertools
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mirage_dist.data import formats, pictures, records, sources
from mirage_dist.data.audit import Options, audit
from mirage_dist.data.formats.samples import Samples, lines_of
from mirage_dist.data.pictures import stored
from mirage_dist.schema import ConfigError
from mirage_dist.train import prefetch

ROWS = 23
KINDS = ["table.parquet", "groups.parquet", "stream.arrow", "file.arrow", "saved", "shards"]


def encoded(number: int, size: int = 9) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (size, size + number % 3, 3), dtype=np.uint8)
    output = io.BytesIO()
    Image.fromarray(pixels).save(output, format="PNG")
    return output.getvalue()


def preference(number: int) -> dict:
    """A row of SPA-VL's training split, without its picture."""
    return {"question": f"What is number {number}?", "chosen": f"A gadget {number}.", "rejected": "No idea."}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """The rows as JSON beside their pictures."""
    folder = tmp_path_factory.mktemp("files")
    rows = []
    for number in range(ROWS):
        (folder / f"{number}.png").write_bytes(encoded(number))
        rows.append({**preference(number), "image": f"{number}.png"})
    (folder / "data.json").write_text(json.dumps(rows))
    return folder


def written(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as sink:
        new = pa.ipc.new_file if path.name == "file.arrow" else pa.ipc.new_stream
        with new(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=5)


def make(folder: Path, kind: str) -> Path:
    rows = [{"image": {"bytes": encoded(i), "path": f"{i}.png"}, **preference(i)} for i in range(ROWS)]
    table, path = pa.Table.from_pylist(rows), folder / kind
    if kind == "table.parquet":
        pq.write_table(table, path)
    elif kind == "groups.parquet":
        pq.write_table(table, path, row_group_size=4)
    elif kind == "saved":
        features = datasets.Features(
            {"image": datasets.Image(), **dict.fromkeys(preference(0), datasets.Value("string"))}
        )
        datasets.Dataset.from_list(rows, features=features).save_to_disk(path, num_shards=3)
    elif kind == "shards":
        path.mkdir()
        pq.write_table(table.slice(0, 10), path / "train-00000-of-00002.parquet")
        pq.write_table(table.slice(10), path / "train-00001-of-00002.parquet")
    else:
        written(path, table)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_gives_the_samples_pixels_and_digests_of_files(tmp_path, files, kind):
    """In any order and from several threads at once."""
    table = make(tmp_path, kind)
    plain = sources.read(formats.source("spa_vl", str(files / "data.json"))).samples
    inside = sources.read(formats.source("spa_vl", str(table)))
    assert [(s.question, s.answer, s.safe) for s in inside.samples] == [(s.question, s.answer, s.safe) for s in plain]
    places = [sample.image for sample in inside.samples]
    assert len(set(places)) == ROWS
    order = np.random.default_rng(0).permutation(ROWS)
    with ThreadPoolExecutor(8) as pool:
        opened = list(pool.map(lambda i: pictures.open_picture(places[i]), order))
    for number, picture in zip(order, opened, strict=True):
        expected = pictures.open_picture(plain[number].image)
        assert np.array_equal(np.asarray(picture), np.asarray(expected))
        assert pictures.size_of(places[number]) == expected.size
        assert pictures.encoded(places[number]) == pictures.encoded(plain[number].image)
        digest = hashlib.sha256(encoded(number)).hexdigest()
        assert pictures.sha256(places[number]) == inside.pictures[places[number]] == digest
    assert pictures.shared(places, (s.image for s in plain)) == set(places)


def test_a_prepared_set_keeps_pointing_into_the_table_whose_name_is_a_link(tmp_path, monkeypatch):
    """The hub's cache names its files by links to blobs without a suffix."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    make(tmp_path, "table.parquet").rename(blobs / "5f3c")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot/train.parquet").symlink_to("../blobs/5f3c")
    monkeypatch.chdir(tmp_path)
    samples = sources.read(formats.source("spa_vl", "snapshot/train.parquet")).samples
    (tmp_path / "sets.jsonl").write_text("".join(lines_of(samples)))
    monkeypatch.chdir("/")
    again = sources.read(formats.source("samples", str(tmp_path / "sets.jsonl"))).samples
    assert [pictures.sha256(s.image) for s in again] == [hashlib.sha256(encoded(i)).hexdigest() for i in range(ROWS)]


@pytest.mark.parametrize("group", [None, 2])
def test_rows_may_store_a_picture_or_name_a_file_or_have_none(tmp_path, files, group):
    rows = [
        {"image": {"bytes": encoded(0), "path": "0.png"}, **preference(0)},
        {"image": {"bytes": None, "path": "1.png"}, **preference(1)},
        {"image": {"bytes": encoded(2), "path": None}, **preference(2)},
    ]
    turns = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A gadget."}]
    path = tmp_path / "mixed.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
    samples = sources.read(formats.source("spa_vl", str(path), images=str(files))).samples
    assert [pictures.sha256(s.image) for s in samples] == [hashlib.sha256(encoded(i)).hexdigest() for i in range(3)]
    several = [{"conversations": turns, "image": row["image"]} for row in rows] + [
        {"conversations": turns, "image": None}
    ]
    pq.write_table(pa.Table.from_pylist(several), path, row_group_size=group)
    kept = sources.read(formats.source("llava", str(path), images=str(files))).samples
    assert [s.image is None for s in kept] == [False, False, False, True]


@pytest.mark.parametrize("kind", ["data.parquet", "data.arrow"])
@pytest.mark.parametrize("binary", [pa.binary(), pa.large_binary()])
def test_a_column_of_bytes_is_a_picture_where_the_format_expects_one_and_no_text_anywhere(tmp_path, kind, binary):
    columns = {
        "image": pa.array([encoded(0), encoded(1)], binary),
        **{name: pa.array([preference(i)[name] for i in range(2)]) for name in preference(0)},
    }
    write = written if kind.endswith("arrow") else (lambda path, table: pq.write_table(table, path))
    write(tmp_path / kind, pa.table(columns))
    samples = sources.read(formats.source("spa_vl", str(tmp_path / kind))).samples
    assert [pictures.sha256(s.image) for s in samples] == [hashlib.sha256(encoded(i)).hexdigest() for i in range(2)]
    other = tmp_path / f"other-{kind}"
    write(other, pa.table({**columns, "question": pa.array([b"What?", b"Why?"], binary)}))
    with pytest.raises(ConfigError, match=r"record 0: field 'question': expected str, got Binary"):
        sources.read(formats.source("spa_vl", str(other)))


def test_a_column_of_another_type_is_a_bad_record(tmp_path):
    for wrong in (3, [{"bytes": encoded(0), "path": None}], {"height": 3}):
        pq.write_table(pa.Table.from_pylist([{**preference(0), "image": wrong}]), tmp_path / "data.parquet")
        with pytest.raises(ConfigError, match=r"data\.parquet: record 0: field 'image': expected"):
            sources.read(formats.source("spa_vl", str(tmp_path / "data.parquet")))


def test_stored_bytes_that_are_no_picture_are_bad_records(tmp_path):
    path = tmp_path / "data.parquet"
    rows = [
        {**preference(i), "image": {"bytes": content, "path": "a.png"}} for i, content in enumerate([encoded(0), b"no"])
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
    with pytest.raises(
        ConfigError, match=r"data\.parquet: record 1: image .*data\.parquet/image/1: broken: no picture can"
    ):
        sources.read(formats.source("spa_vl", str(path)))
    kept = sources.read(formats.source("spa_vl", str(path), on_bad_record="skip"))
    assert (len(kept.samples), kept.skipped) == (1, 1)


def test_a_reference_that_leads_nowhere_says_so(tmp_path):
    table = make(tmp_path, "groups.parquet")
    (tmp_path / "text.txt").write_text("no table")
    (tmp_path / "cut.parquet").write_bytes(table.read_bytes()[:2000])
    (tmp_path / "data.json").write_text("[]")
    for name, why in (
        (f"{table}/image/{ROWS}", f"the table has {ROWS} rows"),
        (f"{table}/picture/0", "the table has no column 'picture' of pictures"),
        (f"{table}/question/0", "no picture is stored in column 'question', row 0"),
        (f"{tmp_path}/text.txt/image/0", "broken: .*text.txt is no table that can be read"),
        (f"{tmp_path}/cut.parquet/image/0", "broken: .*cut.parquet is no table that can be read"),
        (f"{table}/image/a", "no such file"),
        (f"{table}/0", "no such file"),
        (f"{tmp_path}/nowhere.parquet/image/0", "no such file"),
    ):
        with pytest.raises(pictures.PictureError, match=why):
            pictures.open_picture(name)


@pytest.mark.parametrize("kind", ["groups.parquet", "stream.arrow"])
def test_a_table_that_changes_under_a_process_is_noticed(tmp_path, kind):
    """Rows of another table are other pictures."""
    table = make(tmp_path, kind)
    first = next(iter(records.read(table)))["image"]
    pictures.open_picture(first)
    again = make(tmp_path, f"other-{kind}" if kind == "stream.arrow" else "table.parquet")
    os.utime(again, ns=(1, 1))
    again.replace(table)
    with pytest.raises(pictures.PictureError, match=f"{table} has changed since it was first read; start again"):
        pictures.open_picture(first)


def test_listing_samples_reads_no_picture(tmp_path):
    """Of a table with 40 MB of pictures some kilobytes are read, and one picture costs its own row group."""
    noise = [{"image": {"bytes": os.urandom(1 << 20), "path": None}, **preference(i)} for i in range(40)]
    pq.write_table(pa.Table.from_pylist(noise), tmp_path / "large.parquet", row_group_size=4, compression="none")

    def read() -> int:
        return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])

    before = read()
    samples = sources.read(formats.source("spa_vl", str(tmp_path / "large.parquet")), check_images=False).samples
    listed = read() - before
    assert len(samples) == 40
    assert listed < 1 << 20
    before = read()
    pictures.sha256(samples[7].image)
    assert read() - before < 6 << 20


def test_a_row_group_over_its_limit_is_refused_with_what_to_do(tmp_path, monkeypatch):
    table = make(tmp_path, "table.parquet")
    monkeypatch.setattr(stored, "ROW_GROUP", stored.ROW_GROUP.__class__("pictures", 1024, "bytes", ""))
    with pytest.raises(pictures.PictureError, match=r"expected at most 1 KiB\. Write the file anew with fewer rows"):
        pictures.open_picture(f"{table}/image/0")


@pytest.mark.parametrize("kind", ["groups.parquet", "saved"])
def test_forked_workers_read_the_pictures_that_their_parent_has_read(tmp_path, kind):
    places = [sample.image for sample in sources.read(formats.source("spa_vl", str(make(tmp_path, kind)))).samples]
    with ThreadPoolExecutor(2) as pool:  # whose threads hold the lock when the workers are forked
        busy = [pool.submit(pictures.sha256, place) for place in itertools.islice(itertools.cycle(places), 2000)]
        made = list(prefetch.made(pictures.sha256, places, workers=2))
        assert made == [hashlib.sha256(encoded(i)).hexdigest() for i in range(ROWS)]
        for one in busy:
            one.result()


def test_an_audit_takes_stored_pictures_as_one_place(tmp_path):
    table = make(tmp_path, "table.parquet")
    result = audit([table], Options(), "spa_vl")
    assert result["files"][0]["pairs"] == ROWS


def test_samples_of_our_own_format_may_store_pictures(tmp_path):
    row = {
        "id": "a",
        "image": {"bytes": encoded(1), "path": None},
        "question": "What?",
        "answer": "A gadget.",
        "safe": True,
    }
    schema = pa.schema(
        {"history": pa.list_(pa.list_(pa.string())), **{n: pa.string() for n in ("id", "question", "answer")}}
    )
    schema = schema.append(pa.field("safe", pa.bool_())).append(
        pa.field("image", pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    )
    pq.write_table(pa.Table.from_pylist([{**row, "history": []}], schema), tmp_path / "own.parquet")
    (sample,) = sources.read(Samples("samples", str(tmp_path / "own.parquet"))).samples
    assert pictures.sha256(sample.image) == hashlib.sha256(encoded(1)).hexdigest()
