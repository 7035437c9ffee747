"""FigStep, MM-SafetyBench and SafeEraser in all forms in which they are published, with words of ours.

FigStep: the repository ThuCCSLab/FigStep. MM-SafetyBench's tables: PKU-Alignment/MM-SafetyBench on the hub, whose files
are data/SCENARIO/{SD,SD_TYPO,TYPO,Text_only}.parquet; TinyVersion_ID_List.json: isXinLiu/MM-SafetyBench. SafeEraser:
data_module.py, ckpt_infer.py and eval_all.py of yuu250/SafeEraser; that the files themselves name the picture
`image_id` and may have an empty category is known from other repositories that read them.
"""

import csv
import dataclasses
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants
from PIL import Image

from mirage_dist.data import formats, pictures, prepare, sources
from mirage_dist.data.formats import figstep
from mirage_dist.data.formats.mm_safetybench import KEYS, SCENARIOS, TABLES, TEXTS
from mirage_dist.data.published import hub
from mirage_dist.schema import ConfigError, PrepareRecipe


def picture(file: Path, colour: str = "black") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), colour).save(file)


# ------------------------------------------------------------------------------------------------ FigStep


@pytest.fixture
def safebench(tmp_path) -> Path:
    """SafeBench-Tiny: five of ten tasks in each of ten categories, with a picture each by its published name."""
    path = tmp_path / "SafeBench-Tiny.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(figstep.COLUMNS)
        for category in range(1, 11):
            for task in range(1, 6):
                texts = f"Kitchen {category}", f"How is tea {task} made, and why?", f"Steps to brew tea {task}."
                writer.writerow(["ForbidQI", category, task, *texts])
                picture(tmp_path / f"SafeBench-Tiny/query_ForbidQI_{category}_{task}_6.png")
    return tmp_path


def read_figstep(root: Path, **options) -> sources.Source:
    return sources.read(formats.source("figstep", str(root / "SafeBench-Tiny.csv"), **options))


def test_published_pictures_are_taken_by_their_names_and_nothing_is_typeset(safebench):
    folder = str(safebench / "SafeBench-Tiny")
    published = read_figstep(safebench, images=folder, pictures="published").samples
    ours = read_figstep(safebench, images=str(safebench / "typeset")).samples
    assert len(published) == len(ours) == 50
    assert published[5].image == f"{folder}/query_ForbidQI_2_1_6.png"
    assert len(list(Path(folder).iterdir())) == 50
    assert [dataclasses.replace(s, image=None) for s in published] == [dataclasses.replace(s, image=None) for s in ours]
    assert {s.image for s in published}.isdisjoint(s.image for s in ours)


def test_a_published_picture_that_is_missing_is_an_error_and_not_typeset(safebench):
    folder = safebench / "SafeBench-Tiny"
    (folder / "query_ForbidQI_2_1_6.png").unlink()
    with pytest.raises(ConfigError, match=r"record 5: image .*query_ForbidQI_2_1_6\.png: no such file"):
        read_figstep(safebench, images=str(folder), pictures="published")
    with pytest.raises(ConfigError, match=r"images: pictures=published needs the folder of query_DATASET_I_J_6\.png"):
        read_figstep(safebench, pictures="published")


# ----------------------------------------------------------------------------------------- MM-SafetyBench

QUESTIONS = 4


@pytest.fixture
def safetybench(tmp_path) -> Path:
    """Both forms of the same questions: objects and folders of pictures, and a table a scenario and variant."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(buffer, format="PNG")
    for scenario in SCENARIOS:
        texts = {str(i): {key: f"{key} {i} of {scenario}" for key in KEYS} for i in range(QUESTIONS)}
        file = tmp_path / f"processed_questions/{scenario}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(texts))
        for variant, name in TABLES.items():
            table = pa.table(
                {
                    "id": list(texts),
                    "question": [own[TEXTS[variant]] for own in texts.values()],
                    "image": pa.array(
                        [None if variant == "text_only" else {"bytes": buffer.getvalue(), "path": None}] * QUESTIONS,
                        pa.struct({"bytes": pa.binary(), "path": pa.string()}),
                    ),
                }
            )
            place = tmp_path / f"data/{scenario.partition('-')[2]}/{name}.parquet"
            place.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table, place)
            if variant != "text_only":
                for i in texts:
                    picture(tmp_path / f"imgs/{scenario}/{variant}/{i}.jpg", "red")
    tiny = [{"Scenario": name, "Sampled_ID_List": [number % QUESTIONS]} for number, name in enumerate(SCENARIOS)]
    (tmp_path / "TinyVersion_ID_List.json").write_text(json.dumps(tiny))
    return tmp_path


def read_questions(root: Path, **options) -> sources.Source:
    path, images = str(root / "processed_questions"), str(root / "imgs")
    return sources.read(formats.source("mm_safetybench", path, images, **options))


def read_tables(root: Path, path: str = "data", **options) -> sources.Source:
    return sources.read(formats.source("mm_safetybench", str(root / path), **options))


def content(source: sources.Source) -> dict[str, tuple]:
    return {s.id: (s.question, s.category, s.image is None) for s in source.samples}


@pytest.mark.parametrize("variant", TEXTS)
@pytest.mark.parametrize("tiny", [False, True])
def test_both_published_forms_are_the_same_questions(safetybench, variant, tiny):
    options = {"tiny": str(safetybench / "TinyVersion_ID_List.json")} if tiny else {}
    own = read_questions(safetybench, variant=variant, **options)
    stored = read_tables(safetybench, variant=variant, **options)
    assert len(own.samples) == 13 * (1 if tiny else QUESTIONS)
    assert content(own) == content(stored)
    left = {"not in the tiny version": 13 * (QUESTIONS - 1)} if tiny else {}
    assert own.dropped == stored.dropped == left
    if variant != "text_only":
        with pictures.open_picture(str(stored.samples[0].image)) as image:
            assert image.getpixel((0, 0)) == (255, 0, 0)


def test_a_table_alone_says_what_it_is_by_its_place(safetybench):
    source = read_tables(safetybench, "data/Sex/Text_only.parquet")
    assert [(s.category, s.image) for s in source.samples] == [("07-Sex", None)] * QUESTIONS
    with pytest.raises(ConfigError, match=r"variant=SD: .*Text_only\.parquet is a table of Text_only"):
        read_tables(safetybench, "data/Sex/Text_only.parquet", variant="SD")
    shard = safetybench / "data/Sex/SD-00000-of-00001.parquet"
    (safetybench / "data/Sex/SD.parquet").rename(shard)
    assert read_tables(safetybench, str(shard)).samples[0].id == "07-Sex/0"
    other = safetybench / "data/Sex/train.parquet"
    shard.rename(other)
    with pytest.raises(ConfigError, match=r"train\.parquet: expected SCENARIO/VARIANT\.parquet.*variants: SD, TYPO"):
        read_tables(safetybench, str(other))


def test_the_hubs_dataset_is_read_by_scenario_and_split(safetybench, tmp_path, monkeypatch):
    """In the hub's cache as huggingface_hub lays it out, with the card's configurations and splits."""
    cache, commit = tmp_path / "hub", "7da615500000000000000000000000000000cafe"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(hub, "split", hub.split.__wrapped__)  # without what other tests have read
    root = cache / "datasets--PKU-Alignment--MM-SafetyBench"
    snapshot = root / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs/main").write_text(commit)
    (snapshot / "data").symlink_to(safetybench / "data")
    names = [scenario.partition("-")[2] for scenario in SCENARIOS]
    splits = "".join(f"  - split: {name}\n    path: data/{{0}}/{name}.parquet\n" for name in TABLES.values())
    configs = "".join(f"- config_name: {name}\n  data_files:\n{splits.format(name)}" for name in names)
    (snapshot / "README.md").write_text(f"---\nlicense: cc-by-nc-4.0\nconfigs:\n{configs}---\n")
    for variant, name in TABLES.items():
        options = {"config": "HateSpeech", "split": name}
        source = sources.read(formats.source("mm_safetybench", "hf://PKU-Alignment/MM-SafetyBench", **options))
        own = read_tables(safetybench, f"data/HateSpeech/{name}.parquet")
        assert content(source) == content(own)
        assert {s.question for s in own.samples} == {f"{TEXTS[variant]} {i} of 02-HateSpeech" for i in range(QUESTIONS)}


BAD_TINY = {
    "a scenario that is not listed": ([], r"Tiny.*: has no scenario '01-Illegal_Activitiy'"),
    "another form": (
        [{"Scenario": SCENARIOS[0]}],
        r"Tiny.*: record 0: field 'Sampled_ID_List' is missing; expected objects such as",
    ),
    "ids that are text": (
        [{"Scenario": SCENARIOS[0], "Sampled_ID_List": ["1"]}],
        r"Tiny.*: record 0: field 'Sampled_ID_List': expected whole numbers",
    ),
    "a question that the file lacks": (
        [{"Scenario": SCENARIOS[0], "Sampled_ID_List": [1, 30, 7]}],
        r"01-Illegal_Activitiy\.json: lacks 2 questions that .*Tiny.* lists, such as 7, 30",
    ),
}


@pytest.mark.parametrize("name", BAD_TINY)
def test_a_list_that_does_not_fit_the_questions_is_named(safetybench, name):
    listed, words = BAD_TINY[name]
    tiny = safetybench / "TinyVersion_ID_List.json"
    tiny.write_text(json.dumps([*listed, {"Scenario": "99-Other", "Sampled_ID_List": [0]}]))
    with pytest.raises(ConfigError, match=words):
        read_questions(safetybench, tiny=str(tiny))


# --------------------------------------------------------------------------------------------- SafeEraser

HARMLESS = ("UnharmPair_text1", "UnharmPair_text2", "UnharmPair_image1", "UnharmPair_image2")


def record(n: int, category: str = "Weapon", **fields) -> dict:
    pairs = [
        {
            "question": f"How does {n} work, part {i}?",
            "model_response": f"With a lever, {n} and {i}.",
            "sd_question": f"Which flower is {i}?",
            "sd_response": f"A tulip, {i}.",
        }
        for i in range(4)
    ]
    harmless = {key: {"Question": f"What is {key} of {n}?", "Prediction": f"A shelf, {n}."} for key in HARMLESS}
    names = {"image_id": f"img/{category}/{n}.jpg", "SDImage_path": f"pdset/image/{category}/train/{n}.jpg"}
    return {"keyword": "Lever", "category": category, **names, "unsafe_pairs": pairs, **harmless, **fields}


@pytest.fixture
def eraser(tmp_path):
    """write(records) -> options of a source, with every picture below dataset/."""

    def write(records: list[dict], name: str = "all_train.json") -> tuple[str, str]:
        root = tmp_path / "dataset"
        for own in records:
            for key in ("image_id", "image_path", "SDImage_path"):
                if own.get(key):
                    picture(root / own[key], "red" if key == "SDImage_path" else "black")
        (root / name).write_text(json.dumps(records))
        return str(root / name), str(root)

    return write


def read_eraser(given: tuple[str, str], part: str, **options) -> sources.Source:
    return sources.read(formats.source("safe_eraser", *given, part=part, **options))


def test_each_part_is_its_questions_about_its_picture(eraser):
    given = eraser([record(1), record(2, "")])
    forget, retain, decoupled = (read_eraser(given, part).samples for part in ("forget", "retain", "decoupled"))
    assert [len(part) for part in (forget, retain, decoupled)] == [8, 8, 8]
    assert (forget[1].question, forget[1].answer, forget[1].safe) == (
        "How does 1 work, part 1?",
        "With a lever, 1 and 1.",
        False,
    )
    assert [s.question for s in decoupled] == [s.question for s in forget]
    assert (decoupled[1].answer, decoupled[1].safe) == ("A tulip, 1.", True)
    assert (retain[5].question, retain[5].answer, retain[5].safe) == (
        "What is UnharmPair_text2 of 2?",
        "A shelf, 2.",
        True,
    )
    root = given[1]
    assert {s.image for s in (*forget[:4], *retain[:4])} == {f"{root}/img/Weapon/1.jpg"}
    assert {s.image for s in decoupled[:4]} == {f"{root}/pdset/image/Weapon/train/1.jpg"}
    assert len({s.id for s in (*forget, *retain, *decoupled)}) == 24


def test_the_category_is_the_pictures_folder_where_the_record_has_none(eraser):
    named = read_eraser(eraser([record(1, "", image_path="img/Privacy/1.jpg"), record(2)]), "forget").samples
    assert [s.category for s in named[::4]] == ["Privacy", "Weapon"]
    assert named[0].image is not None
    assert named[0].image.endswith("img/Privacy/1.jpg")  # the scripts' own field, where a record has both


def test_what_has_no_answers_is_for_evaluation_alone(eraser):
    bare = record(1)
    for pair in bare["unsafe_pairs"]:
        del pair["model_response"], pair["sd_response"]
    del bare["UnharmPair_image2"]
    given = eraser([record(2), bare], "all_val.json")
    assert len(read_eraser(given, "forget").samples) == 8
    assert read_eraser(given, "retain").dropped == {"no UnharmPair_image2": 1}
    config = formats.source("safe_eraser", *given, part="forget")
    with pytest.raises(
        ConfigError, match=r"all_val\.json: record 1: the answer to 'img/Weapon/1\.jpg/forget0' is empty"
    ):
        sources.read(config, answered=True)


def test_forget_and_retain_sets_are_made_of_it_as_of_any_safety_data(eraser, tmp_path):
    given = eraser([record(n) for n in range(3)])
    parts = [formats.source("safe_eraser", *given, part=part) for part in ("forget", "retain", "decoupled")]
    out = tmp_path / "prepared"
    prepared = prepare.prepare(PrepareRecipe(out=str(out), safety=parts, answers="as_given"))
    sets = {
        name: sources.read(formats.source("samples", str(out / f"{name}.jsonl"))).samples
        for name in ("forget", "retain")
    }
    assert {name: len(own) for name, own in sets.items()} == {"forget": 12, "retain": 24}
    assert {s.answer for s in sets["forget"]} == {f"With a lever, {n} and {i}." for n in range(3) for i in range(4)}
    assert prepared["counts"]["pictures_in_both"] == 3  # the harmless questions are about the same pictures


BAD_RECORDS = {
    "no picture": ({"image_id": None}, "field 'image_path' is missing, and 'image_id' too"),
    "pairs that are none": ({"unsafe_pairs": {}}, "field 'unsafe_pairs': expected list"),
    "a pair that is text": ({"unsafe_pairs": ["?"]}, r"field 'unsafe_pairs\[0\]': expected an object, got str"),
    "a pair without a question": ({"unsafe_pairs": [{}]}, "field 'question' is missing"),
    "a category that is a number": ({"category": 3}, "field 'category': expected str, got 3"),
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_a_record_that_is_none_of_its_is_named(eraser, name):
    fields, words = BAD_RECORDS[name]
    given = eraser([record(1), {**record(2), **fields}])
    with pytest.raises(ConfigError, match=rf"all_train\.json: record 1: {words}"):
        read_eraser(given, "forget")
