"""Files are read a record at a time, and give what reading them whole gives: records, faults and their places."""

import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mirage_dist.data import formats, gold, records, sources
from mirage_dist.data.formats import figstep
from mirage_dist.data.harvest import harvest
from mirage_dist.evals import attacks
from mirage_dist.evals.attacks.file import read_rewrites
from mirage_dist.schema import ConfigError

text = st.text(st.characters(codec="utf-8"), max_size=8)
leaves = st.none() | st.booleans() | st.integers() | text
objects = st.dictionaries(text, leaves | st.lists(leaves, max_size=3), max_size=3)
shared_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # each example writes it anew


def whole(text: str):
    """The records, or the place of what is wrong."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        return f"line {error.lineno} column {error.colno}"


def in_pieces(file):
    """The same of `records.read`."""
    try:
        return list(records.read(file))
    except ConfigError as error:
        return str(error)


@shared_folder
@given(st.lists(objects, max_size=5), st.sampled_from([None, 1]), st.integers(1, 9), st.booleans())
def test_a_list_is_what_json_reads_however_it_is_cut_into_pieces(tmp_path, monkeypatch, listed, indent, chunk, mark):
    monkeypatch.setattr(records, "CHUNK", chunk)
    file = tmp_path / "data.json"
    written = json.dumps(listed, indent=indent, ensure_ascii=False) + "\n"
    file.write_text(written, encoding="utf-8-sig" if mark else "utf-8")
    assert in_pieces(file) == listed


@shared_folder
@given(st.lists(objects, min_size=1, max_size=4), st.integers(1, 9), st.data())
def test_broken_json_is_refused_where_json_refuses_it(tmp_path, monkeypatch, listed, chunk, data):
    """One character is left out."""
    monkeypatch.setattr(records, "CHUNK", chunk)
    written = json.dumps(listed, indent=1)
    place = data.draw(st.integers(1, len(written) - 1))
    written = written[:place] + written[place + 1 :]
    file = tmp_path / "data.json"
    file.write_text(written)
    expected, actual = whole(written), in_pieces(file)
    assert actual == expected if isinstance(expected, list) else str(actual).endswith(expected)


@shared_folder
@given(st.lists(objects, min_size=1, max_size=5), st.integers(1, 9))
def test_lines_are_a_list(tmp_path, monkeypatch, listed, chunk):
    monkeypatch.setattr(records, "CHUNK", chunk)
    file = tmp_path / "data.jsonl"
    file.write_text("\n\n".join(json.dumps(record) for record in listed))
    assert in_pieces(file) == listed


@pytest.mark.parametrize("kind", ["list", "lines"])
def test_a_file_takes_the_memory_of_some_pieces(tmp_path, kind):
    record, file, sizes = {"text": "x" * 1000}, tmp_path / "data", []
    rows = [json.dumps(record)] * 20_000
    file.write_text("[" + ",".join(rows) + "]" if kind == "list" else "\n".join(rows))
    tracemalloc.start()
    try:
        assert sum(1 for _ in records.read(file, sizes.append)) == 20_000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * records.CHUNK < file.stat().st_size
    assert sum(sizes) == records.size(file) == file.stat().st_size


def test_a_list_whose_record_never_ends_is_not_read_to_the_end_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "CHUNK", 100)
    monkeypatch.setattr(records, "LARGEST", 1000)
    file, sizes = tmp_path / "data.json", []
    file.write_text('[{"a": 1}, {"b: 2}' + " " * 10_000)
    with pytest.raises(ConfigError, match=r"record 1: not JSON: Unterminated string .*: line 1 column 13"):
        list(records.read(file, sizes.append))
    assert sum(sizes) < 2000


def test_a_folder_that_holds_no_data_set_is_refused(tmp_path):
    for name in ("nowhere", "."):
        with pytest.raises(ConfigError, match="no such file, or a folder without a dataset"):
            records.size(tmp_path / name)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ConfigError, match=r"several splits \(train, test\)"):
        records.size(tmp_path)


ROWS = [
    {"id": "a", "image": "a/1.png", "safe": False, "instr-resp": [{"instruction": "Share?", "response": "Sorry."}]},
    {"id": "b", "safe": True, "instr-resp": [{"safe_instruction": "What?", "response": "Red."}]},
    {"id": "c", "image": "c/3.png", "safe": True, "instr-resp": []},
]


@pytest.mark.parametrize("kind", ["data.parquet", "stream.arrow", "file.arrow", "saved", "folder"])
def test_tables_give_records_without_their_empty_fields_and_a_picture_as_its_path(tmp_path, kind):
    """As `datasets` writes them: pictures as {"bytes", "path"}, every field in every record, files in parts.

    Of pictures that are stored in the table, see test_stored.
    """
    pictures = [{"bytes": None, "path": "a/1.png"}, None, {"bytes": None, "path": "c/3.png"}]
    table = pa.Table.from_pylist([{**r, "image": picture} for r, picture in zip(ROWS, pictures, strict=True)])

    def written(file, rows, open_file=pa.ipc.new_stream):
        with pa.OSFile(str(file), "wb") as sink, open_file(sink, rows.schema) as writer:
            writer.write_table(rows)

    path = tmp_path / kind
    if kind in ("saved", "folder"):
        path.mkdir()
    if kind == "saved":  # datasets.save_to_disk; the order is state.json's
        names = ["z.arrow", "a.arrow"]
        (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
        written(path / "z.arrow", table.slice(0, 1))
        written(path / "a.arrow", table.slice(1))
    elif kind == "folder":
        pq.write_table(table.slice(0, 2), path / "train-0.parquet")
        pq.write_table(table.slice(2), path / "train-1.parquet")
    elif kind == "data.parquet":
        pq.write_table(table, path)
    else:
        written(path, table, pa.ipc.new_file if kind == "file.arrow" else pa.ipc.new_stream)
    sizes = []
    assert list(records.read(path, sizes.append)) == ROWS
    assert sum(sizes) == records.size(path)


def test_a_table_that_is_none_is_refused(tmp_path):
    for name in ("a.parquet", "a.arrow"):
        (tmp_path / name).write_text("no table")
        with pytest.raises(ConfigError, match=rf"{name}: cannot be read"):
            list(records.read(tmp_path / name))


# ------------------------------------------------------------------------------- forms that every reader takes

FORMS = {
    "list": lambda rows: json.dumps(rows, indent=1),
    "lines": lambda rows: "\n".join(map(json.dumps, rows)),
    "lines with blank ones": lambda rows: "\n \n" + "\n\n\t\n".join(map(json.dumps, rows)) + "\n\n",
}


@pytest.fixture(
    params=[(form, mark, end) for form in FORMS for mark in (False, True) for end in ("\n", "\r\n")], ids=str
)
def as_form(request):
    """Records as the bytes of a file in one of the forms."""
    form, mark, end = request.param
    return lambda rows: FORMS[form](rows).replace("\n", end).encode("utf-8-sig" if mark else "utf-8")


UNSAFE = {"id": "a", "image": "x.png", "safe": False, "harmful_category": "k", "harmful_subcategory": "p"}
UNSAFE["instr-resp"] = [{"instruction": "What é 😀?", "response": "Red."}]


def test_every_reader_takes_every_form(tmp_path, as_form):
    file = tmp_path / "data.jsonl"
    file.write_bytes(as_form([UNSAFE]))
    assert list(records.read(file)) == [UNSAFE]
    assert list(read_rewrites(file)) == [("a", "What é 😀?")]
    assert gold.refusals(file)["unsafes"]["answers"] == 1
    (sample,) = sources.read(formats.source("vlguard", str(file)), check_images=False).samples
    assert (sample.question, sample.answer) == ("What é 😀?", "Red.")
    file.write_bytes(as_form([{"id": 1, "question": "What?", "response": "Rot é"}]))
    assert harvest(tmp_path).by_question == {("1", "What?"): "Rot é"}
    assert harvest(file).left_out == {}
    file.write_bytes('{"words":\r\n {"answered": ["what"]}}\r\n'.encode("utf-8-sig"))
    words = attacks.make({"kind": "words", "words": ["auto"], "audit": str(file)}, "recipe", "attack", "unsafe")
    assert words.shots == 1
    row = dict.fromkeys(figstep.COLUMNS, "1") | {"instruction": "Steps to bake."}
    file.write_bytes(as_form([row]))
    config = formats.source("figstep", str(file), variant="text_only")
    assert [s.question for s in sources.read(config).samples] == ["1"]
    question = {"question_id": "q", "image": "x.jpg", "text": "What?"}
    annotated = {"image": "x.jpg", "answer_type": "other", "answers": [{"answer": "red"}] * 10}
    file.write_bytes(as_form([question]))
    (tmp_path / "annotations.json").write_bytes(as_form([annotated]))
    config = formats.source("vizwiz", str(file), annotations=str(tmp_path / "annotations.json"))
    assert [s.answer for s in sources.read(config, check_images=False).samples] == ["red"]


@pytest.mark.parametrize(("suffix", "sign"), [("csv", ","), ("tsv", "\t")])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [False, True])
def test_a_sheet_is_its_rows_by_name(tmp_path, suffix, sign, end, mark):
    rows = [["id", "text"], [], ["1", 'a "quoted", é\nline'], [], ["2", ""]]
    quoted = [sign.join('"' + value.replace('"', '""') + '"' for value in row) for row in rows]
    file = tmp_path / f"data.{suffix}"
    file.write_bytes((end + end.join(quoted) + end).encode("utf-8-sig" if mark else "utf-8"))
    assert list(records.read(file)) == [{"id": "1", "text": 'a "quoted", é\nline'}, {"id": "2", "text": ""}]


HALF = '{"id": "h", "question": "Q \\ud83d?", "response": "A", "instr-resp": []}'
WHOLE = '{"id": "w", "question": "Q \\ud83d\\ude00?", "response": "A"}'


@pytest.mark.parametrize(
    "half",
    [HALF, HALF.replace("Q \\ud83d", "Q").replace('"A"', '"\\udc00"'), HALF.replace('"instr-resp"', '"k\\ud800"')],
)
def test_half_a_surrogate_pair_is_a_bad_record_where_it_is_read(tmp_path, half):
    file = tmp_path / "data.jsonl"
    file.write_text(f"{WHOLE}\n{half}\n")
    for reader in (lambda: list(records.checked(file)), lambda: harvest(file), lambda: harvest(tmp_path)):
        with pytest.raises(ConfigError, match=r"data\.jsonl: record 1: field '.*': holds half of a surrogate pair"):
            reader()
    row = json.loads(half)
    file.write_text(json.dumps([UNSAFE, {**UNSAFE, "id": "b", **row}]))
    for reader in (
        lambda: list(read_rewrites(file)),
        lambda: gold.refusals(file),
        lambda: sources.read(formats.source("vlguard", str(file)), check_images=False),
    ):
        with pytest.raises(ConfigError, match=r"data\.jsonl: record 1: field '.*': holds half of a surrogate pair"):
            reader()
    source = sources.read(formats.source("vlguard", str(file), on_bad_record="skip"), check_images=False)
    assert ([s.id for s in source.samples], source.skipped) == (["a"], 1)
    (tmp_path / "whole.json").write_text('{"a": "\\ud83d"}')
    with pytest.raises(ConfigError, match=r"whole\.json: field 'a': holds half"):
        records.value(tmp_path / "whole.json")


@pytest.mark.parametrize("written", ["[\n{}]", "{}\n{}\n{}"])
def test_what_is_not_utf8_or_has_a_trailing_comma_is_named_by_file_and_line(tmp_path, written):
    file = tmp_path / "data.json"
    readers = (lambda: list(records.read(file)), lambda: list(read_rewrites(file)), lambda: harvest(file))
    file.write_text(written.replace("{}", '{"a": 1,}'))
    place = "line 2 column" if written.startswith("[") else "line 1 column"
    for reader in readers:
        with pytest.raises(ConfigError, match=rf"data\.json: record 0: not JSON: .*{place}"):
            reader()
    file.write_text('[{"id": 1, "question": "q", "response": "r"},\n]')
    for reader in (readers[0], readers[2]):
        with pytest.raises(ConfigError, match=r"data\.json: record 1: not JSON: .*line [12] column"):
            reader()
    file.write_text(written, encoding="utf-16")
    for reader in readers:
        with pytest.raises(ConfigError, match=r"data\.json: cannot be read: line 1 is not UTF-8.*convert the file"):
            reader()
    file.write_bytes(b'{"id": 1, "question": "q", "response": "r"}\n\n{"id": "\xe9"}\n{}')
    for reader in (readers[0], readers[2]):
        with pytest.raises(ConfigError, match=r"cannot be read: line 3 is not UTF-8"):
            reader()


def test_a_record_nested_without_end_and_a_line_that_never_ends_are_refused(tmp_path, monkeypatch):
    file = tmp_path / "data.json"
    for start in ("", "[", '{"a":'):
        file.write_text(start + "[" * 100_000)
        with pytest.raises(ConfigError, match=r"record 0: not JSON: nested too deep: over 100 levels: line 1"):
            list(records.read(file))
    monkeypatch.setattr(records, "LARGEST", 1000)
    monkeypatch.setattr(records, "CHUNK", 100)
    file.write_text('{"a": 1}\n{"a": "' + "x" * 100_000)
    sizes = []
    with pytest.raises(ConfigError, match=r"record 1: not JSON: line 2 is longer than"):
        list(records.read(file, sizes.append))
    assert sum(sizes) < 2000
