"""Readers: each format to `Sample`, each trap of the real files met, each bad record named by number and field."""

import dataclasses
import json
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mirage_dist.data import formats, pictures, sources, words
from mirage_dist.data.formats.samples import write_samples
from mirage_dist.data.pictures import PictureError, many, open_picture, opening, size_of
from mirage_dist.data.refusals import check_forget
from mirage_dist.data.sample import Sample
from mirage_dist.schema import ConfigError

REFUSAL = "I'm sorry, I can't help with that."


@pytest.fixture
def folder(tmp_path):
    """Three whole pictures, alike in size and not in content."""
    for name, colour in (("a.png", "red"), ("b.png", "blue"), ("c.jpg", "green")):
        noise = Image.effect_noise((64, 64), 80).convert("RGB")
        Image.blend(noise, Image.new("RGB", (64, 64), colour), 0.5).save(tmp_path / name)
    return tmp_path


@pytest.fixture
def read(folder):
    """read(records, format, **options): write the records to a file of the folder and read it."""

    def run(records, format="vlguard", **options):
        (folder / "data.json").write_text(records if isinstance(records, str) else json.dumps(records))
        return sources.read(formats.source(format, str(folder / "data.json"), **options))

    return run


def unsafe(identity="u", image="a.png", question="Share it.", response=REFUSAL):
    labels = {"harmful_category": "kind", "harmful_subcategory": "part"}
    pairs = [{"response": response, "instruction": question}]
    return {"id": identity, "image": image, "safe": False, **labels, "instr-resp": pairs}


def safe(identity="s", image="b.png", question="What is it?", other="Describe how."):
    pairs = [
        {"safe_instruction": question, "response": "A gadget."},
        {"response": REFUSAL, "unsafe_instruction": other},
    ]
    return {"id": identity, "image": image, "safe": True, "instr-resp": pairs}


def talk(*texts, **fields):
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"conversations": turns, **fields}


def preference(**fields):
    texts = {"question": "Which?", "chosen": "This one.", "rejected": "None."}
    return {"image": "a.png", **texts, "class1": "x", "class2": "y", "class3": "z", **fields}


# ------------------------------------------------------------------------------------------------ VLGuard


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("unsafes", [("u", "Share it.", REFUSAL, False)]),
        ("safe_safes", [("s", "What is it?", "A gadget.", True)]),
        ("safe_unsafes", [("s", "Describe how.", REFUSAL, False)]),
    ],
)
def test_vlguard_splits_are_found_by_key_whatever_the_order_of_keys_and_pairs(read, split, expected):
    flipped = safe()
    flipped["instr-resp"] = [dict(reversed(pair.items())) for pair in reversed(flipped["instr-resp"])]
    for records in ([unsafe(), safe()], [unsafe(), flipped]):
        samples = read(records, split=split).samples
        assert [(s.id, s.question, s.answer, s.safe) for s in samples] == expected


def test_all_is_the_three_splits_and_an_id_is_unique_in_each(read, folder):
    samples = read([unsafe(), safe()]).samples
    assert [(s.id, s.safe) for s in samples] == [("u", False), ("s", True), ("s", False)]
    assert [s.category for s in samples] == ["kind/part", "", ""]
    assert [s.image for s in samples] == [str(folder / n) for n in ("a.png", "b.png", "b.png")]


def test_a_missing_instruction_is_dropped_and_counted_by_kind(read):
    source = read([unsafe(question="N/A"), unsafe("v"), safe(question=" N/A "), safe("t", other="N/A")])
    assert [s.id for s in source.samples] == ["v", "s", "t"]
    assert source.dropped == {"instruction is N/A": 1, "safe_instruction is N/A": 1, "unsafe_instruction is N/A": 1}


def test_every_pair_of_a_record_is_read(read):
    record = unsafe()
    record["instr-resp"].append({"instruction": "Give it.", "response": REFUSAL})
    assert [(s.id, s.question) for s in read([record]).samples] == [("u", "Share it."), ("u#2", "Give it.")]


# ---------------------------------------------------------------------------------- duplicates, ids, limit


def test_an_exact_repeat_is_dropped_and_an_id_with_other_content_renamed_both_counted(read):
    records = [unsafe(), unsafe(), unsafe(question="Give it."), unsafe(question="List it.")]
    source = read(records)
    assert [(s.id, s.question) for s in source.samples] == [
        ("u", "Share it."),
        ("u#2", "Give it."),
        ("u#3", "List it."),
    ]
    assert source.dropped == {"exact duplicate": 1}
    assert source.renamed == 2


def test_a_renamed_id_never_takes_one_that_is_there(read):
    names = ["u", "u#2", "u", "u#2"]
    samples = read([unsafe(name, question=f"Share {i}.") for i, name in enumerate(names)]).samples
    assert [s.id for s in samples[:2]] == ["u", "u#2"]
    assert len({s.id for s in samples}) == len(names)


def test_limit_is_the_first_samples_in_file_order(read):
    source = read([unsafe(), unsafe(), safe("s"), safe("t")], limit=3)
    assert [(s.id, s.safe) for s in source.samples] == [("u", False), ("s", True), ("s", False)]
    with pytest.raises(ConfigError, match="limit=0; expected a whole number above 0"):
        read([unsafe()], limit=0)


def test_several_files_are_one_in_order_with_their_counts_added(folder):
    for name, records in (("x.json", [unsafe(), unsafe()]), ("y.json", [unsafe(question="N/A"), safe()])):
        (folder / name).write_text(json.dumps(records))
    source = sources.read_all([formats.source("vlguard", str(folder / n)) for n in ("x.json", "y.json")])
    assert [s.id for s in source.samples] == ["u", "s", "s"]
    assert source.dropped == {"exact duplicate": 1, "instruction is N/A": 1}


# -------------------------------------------------------------------------------------------------- LLaVA


def test_a_conversation_is_its_last_turn_with_the_earlier_ones_as_history(read, folder):
    talks = [talk("<image>\nWhich colour?", "Red.", "And where?", " Here.\n", id=7, image="a.png")]
    (sample,) = read(talks, "llava").samples
    assert (sample.id, sample.image, sample.safe) == ("7", str(folder / "a.png"), True)
    assert sample.history == (("Which colour?", "Red."),)
    assert (sample.question, sample.answer) == ("And where?", "Here.")


def test_a_picture_is_shown_by_the_turn_that_has_its_mark(read, folder):
    turns = ["Hi?", "Yes.", "Look:\n<image>", "Red.", "And now?", "Blue."]
    (later,) = read([talk(*turns, image="a.png")], "llava").samples
    assert (later.shown, later.history) == (1, (("Hi?", "Yes."), ("Look:", "Red.")))
    (last,) = read([talk("Hi?", "Yes.", "<image>\nAnd now?", "Blue.", image="a.png")], "llava").samples
    (first,) = read([talk("<image>Hi?", "Yes.", "And now?", "Blue.", image="a.png")], "llava").samples
    (unmarked,) = read([talk("Hi?", "Yes.", "And now?", "Blue.", image="a.png")], "llava").samples
    assert [s.shown for s in (last, first, unmarked)] == [1, 0, 0]
    assert (first.digest() == unmarked.digest(), first.digest() == last.digest()) == (True, False)
    write_samples(folder / "out.jsonl", [later, first])
    assert [s.shown for s in sources.read(formats.source("samples", str(folder / "out.jsonl"))).samples] == [1, 0]
    assert (folder / "out.jsonl").read_text().count('"shown"') == 1


def test_a_text_only_record_has_no_picture_and_a_record_without_id_is_its_number(read):
    samples = read([talk("Hello?", "Yes."), talk("Bye?\n<image>", "No.", image="b.png", id=None)], "llava").samples
    assert [(s.id, s.image is None, s.question) for s in samples] == [("0", True, "Hello?"), ("1", False, "Bye?")]


def test_pictures_are_looked_for_under_images_and_beside_the_file_by_default(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("json") / "data.jsonl"
    elsewhere.write_text(json.dumps(talk("<image>?", "Yes.", image="a.png")) + "\n")
    (sample,) = sources.read(formats.source("llava", str(elsewhere), images=str(folder))).samples
    assert sample.image == str(folder / "a.png")
    with pytest.raises(ConfigError, match=r"record 0: image .* no such file"):
        sources.read(formats.source("llava", str(elsewhere)))


def test_a_folder_without_tables_is_no_source(folder):
    with pytest.raises(ConfigError, match="a folder without a dataset"):
        sources.read(formats.source("llava", str(folder)))


# ------------------------------------------------------------------------------------------ SPA-VL, JSONL


@pytest.mark.parametrize(("response", "answer"), [("chosen", "This one."), ("rejected", "None.")])
def test_a_preference_record_gives_the_side_asked_for(read, response, answer):
    (sample,) = read([preference()], "spa_vl", response=response).samples
    assert (sample.id, sample.question, sample.answer, sample.category) == ("0", "Which?", answer, "x/y/z")


def test_a_preference_record_is_safe_where_its_chosen_answer_answers(read):
    samples = read([preference(id="a"), preference(id="b", chosen=REFUSAL)], "spa_vl", response="rejected").samples
    assert [(s.id, s.safe) for s in samples] == [("a", True), ("b", False)]


def test_a_preference_record_is_safe_by_the_list_that_its_source_names(read, folder):
    (folder / "fr.json").write_text(json.dumps({"phrases": ["je ne peux pas"]}))
    records = [preference(id="a"), preference(id="b", chosen="Je ne peux pas.")]
    for own, safe in (({}, [True, True]), ({"refusals": str(folder / "fr.json")}, [True, False])):
        assert [s.safe for s in read(records, "spa_vl", response="rejected", **own).samples] == safe
    config = formats.source("spa_vl", "x.json", refusals="fr.json")
    assert config.other_files() == {"refusals": "fr.json"}


def test_one_object_a_line_is_read_as_a_list_is(read):
    records = [unsafe(), safe()]
    lines = "\n\n".join(map(json.dumps, records)) + "\n"
    assert read(lines).samples == read(records).samples
    assert read("\ufeff" + json.dumps(records)).samples == read(records).samples


texts = st.text(max_size=12).filter(lambda text: "<image>" not in text)
samples = st.builds(
    Sample,
    id=texts,
    image=st.sampled_from([None, "a.png", "b.png"]),
    question=texts,
    answer=texts,
    safe=st.booleans(),
    category=texts,
    source=texts,
    history=st.lists(st.tuples(texts, texts), max_size=2).map(tuple),
)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(samples, min_size=1, max_size=5, unique_by=lambda s: (s.id, s.safe)))
def test_samples_written_are_the_samples_read(folder, given_samples):
    file = folder / "out.jsonl"
    placed = [dataclasses.replace(s, image=s.image and str(folder / s.image), source=str(file)) for s in given_samples]
    write_samples(file, placed)
    source = sources.read(formats.source("samples", str(file)))
    assert source.samples == placed
    assert (source.renamed, source.skipped, source.dropped) == (0, 0, {})


# --------------------------------------------------------------------------------------------- bad records

BAD = {
    "text": ("vlguard", "not a record", "expected an object, got str"),
    "llava as vlguard": ("vlguard", talk("?", "!", id="x", image="a.png"), "field 'safe' is missing"),
    "no id": ("vlguard", {"safe": False, "image": "a.png"}, "field 'id' is missing"),
    "safe is text": ("vlguard", {**unsafe(), "safe": "false"}, "field 'safe': expected bool, got 'false'"),
    "pairs are no list": ("vlguard", {**unsafe(), "instr-resp": {}}, "field 'instr-resp': expected list"),
    "a pair is text": ("vlguard", {**unsafe(), "instr-resp": ["?"]}, "field 'instr-resp': expected a list of objects"),
    "safe with unsafe pairs": ("vlguard", {**unsafe(), "safe": True}, "no pair with 'safe_instruction'"),
    "no category": ("vlguard", {**unsafe(), "harmful_category": None}, "field 'harmful_category': expected str"),
    "no response": ("vlguard", {**unsafe(), "instr-resp": [{"instruction": "?"}]}, "field 'response' is missing"),
    "marker in a question": ("vlguard", unsafe(question="<image> ?"), "holds <image>"),
    "odd turns": ("llava", talk("?"), "field 'conversations': expected human and gpt turns in pairs"),
    "no turns": ("llava", talk(), "field 'conversations': expected human and gpt turns in pairs"),
    "gpt first": (
        "llava",
        {"conversations": [{"from": "gpt", "value": ""}] * 2},
        "field 'conversations[0].from': expected 'human'",
    ),
    "two pictures": ("llava", talk("?", "!", image=["a.png", "b.png"]), "field 'image': expected one path"),
    "two markers": ("llava", talk("<image><image>?", "!", image="a.png"), "2 <image> markers for 1 picture"),
    "marker and no picture": ("llava", talk("<image>?", "!"), "1 <image> markers for 0 picture"),
    "a marker in an answer": (
        "llava",
        talk("?", "!", "?", "<image>", image="a.png"),
        "conversations[3].value': <image> in a gpt turn",
    ),
    "markers in two turns": (
        "llava",
        talk("<image>?", "!", "<image>?", "!", image="a.png"),
        "2 <image> markers for 1 picture",
    ),
    "marker in an answer and no picture": ("llava", talk("?", "<image>"), "1 <image> markers for 0 picture"),
    "shown in no turn": (
        "samples",
        {"id": "a", "history": [], "shown": 1},
        "field 'shown': expected a turn from 0 to 0",
    ),
    "a name with a null": ("vlguard", unsafe(image="a\0.png"), "a path cannot hold a NUL character"),
    "no chosen": ("spa_vl", preference(chosen=None), "field 'chosen': expected str, got None"),
    "no class": ("spa_vl", preference(class2=None), "field 'class2': expected str, got None"),
    "no question": ("spa_vl", {"image": "a.png"}, "field 'question' is missing"),
    "no history": ("samples", {"id": "a"}, "field 'history' is missing"),
    "flat history": ("samples", {"history": ["?", "!"]}, "field 'history': expected a list of [question, answer]"),
}
GOOD = {"vlguard": unsafe("good"), "llava": talk("?", "!", id="good"), "spa_vl": preference(id="good")}
GOOD["samples"] = {"id": "good", "image": None, "question": "?", "answer": "!", "safe": True, "history": []}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_is_named_by_file_number_and_field_or_skipped_and_counted(read, name):
    format, record, words = BAD[name]
    with pytest.raises(ConfigError) as error:
        read([GOOD[format], record], format)
    assert "data.json: record 1: " in str(error.value)
    assert words in str(error.value)
    source = read([record, GOOD[format], record], format, on_bad_record="skip")
    assert [s.id for s in source.samples] == ["good"]
    assert source.skipped == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (" \n", "the file is empty"),
        ("[{]", "record 0: not JSON: .*line 1 column 3"),
        ('"records"', "expected a list of records, got str"),
        ('{"id": "a"}\n{"id":', "record 1: not JSON: .*one object a line"),
        ('{\n "data": []\n}', "record 0: not JSON: .*a list of records"),
    ],
)
def test_a_file_that_is_no_list_of_records_is_said_so_even_when_bad_records_are_skipped(read, text, words):
    with pytest.raises(ConfigError, match=rf"data\.json: {words}"):
        read(text, on_bad_record="skip")


def test_a_file_that_is_not_there_or_not_text_is_named(folder):
    (folder / "binary.json").write_bytes(b"[\xff\xfe]")
    for name in ("nowhere.json", "binary.json"):
        with pytest.raises(ConfigError, match=f"{name}: cannot be read"):
            sources.read(formats.source("vlguard", str(folder / name)))


# ------------------------------------------------------------------------------------------------ pictures


def damage(folder, kind):
    if kind == "missing":
        (folder / "a.png").unlink()
    elif kind == "empty":
        (folder / "a.png").write_bytes(b"")
    elif kind == "text":
        (folder / "a.png").write_text("<html>no picture</html>")
    elif kind == "a folder":
        (folder / "a.png").unlink()
        (folder / "a.png").mkdir()
    else:
        whole = (folder / kind).read_bytes()
        (folder / "a.png").write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "a folder", "b.png", "c.jpg"])
def test_a_picture_that_is_missing_or_cut_off_is_found_before_training(read, folder, kind):
    damage(folder, kind)
    records = [safe("s"), safe("t", image="a.png"), unsafe("u", image="c.jpg")]
    with pytest.raises(ConfigError, match=r"data\.json: record 1: image .*a\.png: (no such file|broken)"):
        read(records)
    source = read(records, on_bad_record="skip")
    assert [s.id for s in source.samples] == ["s", "s", "u"]
    assert source.skipped == 1  # records, though this one has two questions


def test_a_file_header_alone_is_not_taken_for_a_picture(folder, read):
    # The reason for decoding: a cut-off picture still opens and has its size.
    damage(folder, "b.png")
    with Image.open(folder / "a.png") as image:
        assert image.size == (64, 64)
    with pytest.raises(ConfigError, match="broken"):
        read([unsafe()])


def test_a_picture_too_large_to_decode_is_a_bad_record_and_its_source_may_allow_it(read, folder, monkeypatch):
    monkeypatch.setattr(opening, "LARGEST", 64)
    assert len(read([unsafe()], max_pixels=4096).samples) == 1
    with pytest.raises(
        ConfigError, match=r"record 0: image .*: 4096 pixels by its header; at most 4095 are decoded.*raise max_pixels"
    ):
        read([unsafe()], max_pixels=4095)
    with pytest.raises(PictureError, match="at most 64 are decoded"):
        open_picture(folder / "a.png")


def test_a_picture_of_144_million_pixels_in_17_kilobytes_is_not_decoded_unless_allowed(read, folder):
    row = zlib.compress(bytes(1501 * 12_000), 9)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 12_000, 12_000, 1, 0, 0, 0, 0)), (b"IDAT", row), (b"IEND", b"")]
    parts = [struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks]
    (folder / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    with pytest.raises(ConfigError, match=r"144000000 pixels by its header; at most 64000000 are decoded"):
        read([unsafe()])
    assert size_of(folder / "a.png") == (12_000, 12_000)


@pytest.mark.parametrize(
    "value", ["data:image/png;base64," + "A" * 800_000, "/9j/" + "4AAQ" * 2000, "https://x.org/a.png"]
)
def test_a_picture_in_place_of_its_path_is_a_bad_record_that_shows_its_beginning(read, value):
    with pytest.raises(ConfigError, match=r"data\.json: record 1: field 'image': .* is not supported") as error:
        read([unsafe(), unsafe(image=value)])
    assert len(str(error.value)) < 600
    assert len(read([unsafe(), unsafe(image=value)], on_bad_record="skip").samples) == 1


def test_a_picture_that_a_model_refuses_is_a_bad_record_of_an_evaluation(folder):
    Image.new("RGB", (4, 1000)).save(folder / "long.png")
    (folder / "x.json").write_text(json.dumps([unsafe(), unsafe(image="long.png")]))
    config = formats.source("vlguard", f"{folder}/x.json")

    def refusals(sizes):
        return {size: "too long" for size in sizes if max(size) > 200 * min(size)}

    with pytest.raises(ConfigError, match=r"x\.json: record 1: image .*long\.png: too long"):
        sources.read_all([config], refusals=refusals)
    kept = sources.read_all([dataclasses.replace(config, on_bad_record="skip")], refusals=refusals)
    assert (len(kept.samples), kept.skipped) == (1, 1)


def ranks(size, streams):
    """`check_pictures` on so many ranks, each with streams of its own: what each came to, its streams or its error."""
    barrier, table = threading.Barrier(size), [{}] * size

    def one(rank):
        def exchange(own):
            table[rank] = own
            barrier.wait(timeout=60)
            return table

        read = streams()
        try:
            sources.check_pictures(read, rank, size, exchange)
        except ConfigError as error:
            return str(error)
        return read

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks_that_share_the_check_come_to_what_one_reader_comes_to(folder, monkeypatch, size):
    damage(folder, "missing")
    records = {
        "x": [safe("s"), safe("t", image="a.png"), unsafe("u", image="c.jpg")],
        "y": [unsafe("v", image="b.png")],
    }
    for name, own in records.items():
        (folder / f"{name}.json").write_text(json.dumps(own))
    decoded = []
    whole = many.inspect
    monkeypatch.setattr(many, "inspect", lambda path, most: decoded.append(path) or whole(path, most))

    def streams(on_bad_record, check_images=False):
        configs = {n: [formats.source("vlguard", f"{folder}/{n}.json", on_bad_record=on_bad_record)] for n in records}
        return {n: sources.read_all(own, check_images) for n, own in configs.items()}

    alone = streams("skip", check_images=True)
    assert alone["x"].skipped == 1
    decoded.clear()
    assert ranks(size, lambda: streams("skip")) == [alone] * size
    assert sorted(decoded) == [f"{folder}/{name}" for name in ("a.png", "b.png", "c.jpg")]  # each once, among all
    with pytest.raises(ConfigError, match=r"x\.json: record 1: image .*a\.png: no such file") as error:
        streams("error", check_images=True)
    assert ranks(size, lambda: streams("error")) == [str(error.value)] * size


def test_a_stream_that_loses_every_sample_is_an_error(folder):
    (folder / "x.json").write_text(json.dumps([unsafe(image="nowhere.png")]))
    config = formats.source("vlguard", f"{folder}/x.json", on_bad_record="skip")
    with pytest.raises(ConfigError, match=r"data\.streams\.train: no sample is left"):
        sources.check_pictures({"train": sources.read(config, check_images=False)})


def test_a_long_check_says_how_far_it_is_once_for_all_ranks(folder, monkeypatch, capsys):
    monkeypatch.setattr(many, "AT_ONCE", 2)
    monkeypatch.setattr(many, "PAUSE_SECONDS", 0.0)
    names = [f"{folder}/{name}" for name in ("a.png", "b.png", "c.jpg")]
    assert pictures.faults([*names, *names], "pictures", part=1, parts=2) == {}
    assert capsys.readouterr().out == ""
    assert pictures.faults([*names, *names], "pictures") == {}
    assert capsys.readouterr().out.splitlines() == ["pictures: 2 of 3 pictures", "pictures: 3 of 3 pictures"]


def test_pictures_are_not_looked_at_when_told_so(folder):
    (folder / "data.json").write_text(json.dumps([unsafe(image="nowhere.png")]))
    config = formats.source("vlguard", str(folder / "data.json"))
    source = sources.read(config, check_images=False)
    (sample,) = source.samples
    assert set(pictures.faults([sample.image], "test")) == {sample.image}
    assert source.unchecked == [(config, 0, sample.image)]


def test_a_shared_picture_is_known_by_its_bytes_in_whatever_folder_it_lies(folder):
    (folder / "test").mkdir()
    (folder / "test/a.png").write_bytes((folder / "a.png").read_bytes())
    (folder / "test/b.png").write_bytes((folder / "c.jpg").read_bytes() + b"\0")

    def paths(*names):
        return [name and str(folder / name) for name in names]

    train, test = paths("a.png", "b.png", None, "a.png"), paths("test/a.png", "test/b.png", None)
    assert pictures.shared(train, test) == {str(folder / "a.png")}


# -------------------------------------------------------------------------------------------------- counts


def test_first_words_are_counted_by_kind_of_answer_without_case_or_punctuation():
    pairs = [
        ("What is it?", "A gadget."),
        ('"What" is it?', REFUSAL),
        ("what's it?", "A gadget."),
        ("“Share” it", REFUSAL),
        ("share, it", REFUSAL),
        ("?!", "A gadget."),
    ]
    counts = words.first_words([Sample(str(i), None, q, a, True, "", "t") for i, (q, a) in enumerate(pairs)])
    assert list(counts.items()) == [
        ("share", {"refusal": 2, "answer": 0}),
        ("what", {"refusal": 1, "answer": 1}),
        ("", {"refusal": 0, "answer": 1}),
        ("what's", {"refusal": 0, "answer": 1}),
    ]


def test_a_forget_set_that_is_empty_or_refuses_is_an_error():
    answers = {"a": "A gadget.", "b": REFUSAL, "c": "Sorry, no.", "d": REFUSAL, "e": REFUSAL}
    forget = [Sample(name, None, "?", answer, False, "", "t") for name, answer in answers.items()]
    check_forget(forget[:1])
    with pytest.raises(ConfigError, match="no sample"):
        check_forget([])
    with pytest.raises(ConfigError, match=r"4 of 5 answers look like refusals \(first ids: b, c, d\).*mirage prepare"):
        check_forget(forget)
