"""POPE, MME and GQA in their published forms, with words of ours: what is read, what is asked, what is refused.

Forms are read from LLaVA's question files and scripts (playground/data/eval/ and llava/eval/ of haotian-liu/LLaVA),
the label files of AoiDragon/POPE, MME's calculation.py and LLaVA's convert_answer_to_mme.py, and GQA's eval.py. The
tables of the hub are lmms-lab/POPE and lmms-lab/MME.
"""

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mirage_dist.data import formats, sources
from mirage_dist.data.formats.yes_no import TASKS
from mirage_dist.schema import ConfigError

SHORT = "\nAnswer the question using a single word or phrase."


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, format="PNG")
    return buffer.getvalue()


def lines(file: Path, rows: list[dict]) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def picture(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(file)


def question(name, image: str, text: str, category: str = "default") -> dict:
    return {"question_id": name, "image": image, "text": text + SHORT, "category": category}


# --------------------------------------------------------------------------------------------------- POPE

COCO = "COCO_val2014_{:012d}.jpg"
OBJECTS = {"adversarial": ["spoon", "cup"], "popular": ["spoon", "chair"], "random": ["spoon", "kite"]}


def labels(category: str, spelled: str = "image") -> list[dict]:
    """Two pictures, one object that is there and one that is not."""
    return [
        {
            "question_id": 2 * n + i + 1,
            "image": COCO.format(n),
            "text": f"Is there a {name} in the {spelled}?",
            "label": "yes" if name == "spoon" else "no",
        }
        for n in range(2)
        for i, name in enumerate(OBJECTS[category])
    ]


@pytest.fixture
def pope(tmp_path) -> Path:
    """LLaVA's file numbers its questions through; an older copy of it misspells some of them."""
    for n in range(2):
        picture(tmp_path / "val2014" / COCO.format(n))
    rows = []
    for category in OBJECTS:
        lines(tmp_path / f"coco/coco_pope_{category}.json", labels(category))
        spelled = "imange" if category == "popular" else "image"
        rows += [
            question(len(rows) + i, r["image"], r["text"], category) for i, r in enumerate(labels(category, spelled))
        ]
    lines(tmp_path / "llava_pope_test.jsonl", rows)
    return tmp_path


def read_pope(root: Path, path: str = "llava_pope_test.jsonl", annotations: str | None = "coco") -> sources.Source:
    given = None if annotations is None else str(root / annotations)
    return sources.read(formats.source("pope", str(root / path), str(root / "val2014"), annotations=given))


def test_popes_questions_are_joined_to_the_labels_by_picture_and_question(pope):
    samples = read_pope(pope).samples
    assert [s.answer for s in samples] == ["yes", "no"] * 6
    assert [s.category for s in samples] == [name for name in OBJECTS for _ in range(4)]
    assert samples[0].question == f"Is there a spoon in the image?{SHORT}"
    assert samples[4].question == f"Is there a spoon in the imange?{SHORT}"  # the prompt is LLaVA's, letter by letter
    assert samples[0].image == str(pope / "val2014" / COCO.format(0))
    assert len({s.id for s in samples}) == 12
    shuffled = (pope / "llava_pope_test.jsonl").read_text().splitlines(keepends=True)[::-1]
    (pope / "turned.jsonl").write_text("".join(shuffled))
    turned = {s.id: (s.question, s.answer) for s in read_pope(pope, "turned.jsonl").samples}
    assert turned == {s.id: (s.question, s.answer) for s in samples}


def test_popes_label_files_and_the_hubs_table_ask_the_same(pope):
    own = [(s.question.replace("imange", "image"), s.answer, s.category) for s in read_pope(pope).samples]
    folder = read_pope(pope, "coco", annotations=None)
    assert [(s.question, s.answer, s.category) for s in folder.samples] == own
    assert folder.renamed == 0
    alone = read_pope(pope, "coco/coco_pope_random.json", annotations=None).samples
    assert [(s.question, s.answer, s.category) for s in alone] == own[8:]
    rows = [(row, category) for category in OBJECTS for row in labels(category)]
    table = pa.table(
        {
            "question_id": [str(row["question_id"]) for row, _ in rows],
            "question": [row["text"] for row, _ in rows],
            "answer": [row["label"] for row, _ in rows],
            "image_source": [Path(row["image"]).stem for row, _ in rows],
            "image": [{"bytes": png(), "path": None} for _ in rows],
            "category": [category for _, category in rows],
        }
    )
    pq.write_table(table, pope / "test-00000-of-00001.parquet")
    stored = read_pope(pope, "test-00000-of-00001.parquet", annotations=None).samples
    assert [(s.question, s.answer, s.category) for s in stored] == own


# ---------------------------------------------------------------------------------------------------- MME

APART = ("artwork", "celebrity", "landmark", "posters", "scene")  # tasks with pictures and texts in two folders


@pytest.fixture
def mme(tmp_path) -> Path:
    """One picture a task, in both of the release's arrangements; some questions have two blanks before the request."""
    root, rows = tmp_path / "MME_Benchmark_release_version", []
    for task in (task for tasks in TASKS.values() for task in tasks):
        place = f"{task}/images/0020.png" if task in APART else f"{task}/0020.png"
        texts = root / task / ("questions_answers_YN" if task in APART else "") / "0020.txt"
        picture(root / place)
        texts.parent.mkdir(parents=True, exist_ok=True)
        blank = "  " if task == "position" else " "
        texts.write_text(
            f"Is a café {task} shown?{blank}Please answer yes or no.\tYes\n"
            f"Is a barn {task} shown? Please answer yes or no.\tNo\n\n",
            encoding="utf-8",
        )
        rows += [question(place, place, f"Is a {name} {task} shown?", task) for name in ("café", "barn")]
    lines(tmp_path / "llava_mme.jsonl", rows)
    return tmp_path


def read_mme(root: Path, path: str = "llava_mme.jsonl", release: str | None = "MME_Benchmark_release_version"):
    given = None if release is None else str(root / release)
    return sources.read(formats.source("mme", str(root / path), given, annotations=given))


def test_mmes_answers_are_those_of_the_official_texts_for_each_picture(mme):
    source = read_mme(mme)
    assert (len(source.samples), source.renamed) == (28, 0)
    assert [s.answer for s in source.samples] == ["yes", "no"] * 14
    first = source.samples[0]
    assert (first.id, first.category) == ("existence/0020.png/yes", "perception/existence")
    assert first.question == f"Is a café existence shown?{SHORT}"
    assert {s.category.partition("/")[0] for s in source.samples} == {"perception", "cognition"}


def test_mmes_table_on_the_hub_is_the_same_questions_under_the_same_ids(mme):
    own = [(s.id, s.question, s.answer, s.category) for s in read_mme(mme).samples]
    rows = [(task, name) for tasks in TASKS.values() for task in tasks for name in ("café", "barn")]
    table = pa.table(
        {
            "question_id": [f"{task}/0020.png" for task, _ in rows],
            "image": [{"bytes": png(), "path": None} for _ in rows],
            "question": [f"Is a {name} {task} shown? Please answer yes or no." for task, name in rows],
            "answer": ["Yes" if name == "café" else "No" for _, name in rows],
            "category": [task for task, _ in rows],
        }
    )
    pq.write_table(table, mme / "test-00000-of-00001.parquet")
    stored = read_mme(mme, "test-00000-of-00001.parquet", None).samples
    assert [(s.id, s.question, s.answer, s.category) for s in stored] == own


# ---------------------------------------------------------------------------------------------------- GQA


def gqa_question(image: str, text: str, answer: str, structural: str, semantic: str) -> dict:
    types = {"detailed": f"{structural}Attr", "semantic": semantic, "structural": structural}
    more = {
        "semantic": [],
        "entailed": [],
        "equivalent": [],
        "isBalanced": True,
        "groups": {"global": None, "local": "x"},
    }
    texts = {"question": text, "imageId": image, "answer": answer, "fullAnswer": f"It is {answer}."}
    return {**more, **texts, "semanticStr": "", "annotations": {}, "types": types}


@pytest.fixture
def gqa(tmp_path) -> Path:
    official = {
        "201307251": gqa_question("n1", "Is it overcast?", "no", "verify", "global"),
        "201640614": gqa_question("n2", "Which colour is the tent?", "light blue", "query", "attr"),
    }
    for image in ("n1", "n2"):
        picture(tmp_path / f"images/{image}.jpg")
    (tmp_path / "testdev_balanced_questions.json").write_text(json.dumps(official))
    rows = [question(name, f"{own['imageId']}.jpg", own["question"]) for name, own in official.items()]
    lines(tmp_path / "llava_gqa_testdev_balanced.jsonl", rows[::-1])
    return tmp_path


def test_gqas_two_files_ask_the_same_and_its_types_are_categories(gqa):
    official = str(gqa / "testdev_balanced_questions.json")
    llavas = formats.source(
        "gqa", str(gqa / "llava_gqa_testdev_balanced.jsonl"), str(gqa / "images"), annotations=official
    )
    joined, alone = sources.read(llavas), sources.read(formats.source("gqa", official, str(gqa / "images")))
    content = [
        [(s.id, s.image, s.question, s.answer, s.category) for s in source.samples] for source in (joined, alone)
    ]
    assert content[0] == content[1][::-1]
    assert [row[3:] for row in content[1]] == [("no", "verify/global"), ("light blue", "query/attr")]
    assert content[1][0][2] == f"Is it overcast?{SHORT}"


# ------------------------------------------------------------------------------------------------ refused


def changed(file: Path, number: int, **fields) -> None:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[number] |= fields
    lines(file, rows)


BAD = {
    "an unknown choice of objects": (
        lambda root: (changed(root / "llava_pope_test.jsonl", 1, category="default"), read_pope(root)),
        r"llava_pope_test\.jsonl: record 1: category 'default': expected adversarial, popular, random",
        "pope",
    ),
    "a question of another version": (
        lambda root: (changed(root / "llava_pope_test.jsonl", 1, text=f"Is there a fork?{SHORT}"), read_pope(root)),
        r"record 1: field 'text': 'Is there a fork\?' about COCO.* has no answer in coco_pope_adversarial\.json",
        "pope",
    ),
    "one of three label files is missing": (
        lambda root: ((root / "coco/coco_pope_random.json").unlink(), read_pope(root)),
        r"coco_pope_random\.json: no such file; expected the folder of .*AoiDragon/POPE",
        "pope",
    ),
    "a label that is neither": (
        lambda root: (changed(root / "coco/coco_pope_random.json", 2, label="maybe"), read_pope(root)),
        r"coco_pope_random\.json: record 2: field 'label': expected yes or no, got 'maybe'",
        "pope",
    ),
    "two labels": (
        lambda root: (
            changed(root / "coco/coco_pope_random.json", 1, **{**labels("random")[0], "label": "no"}),
            read_pope(root),
        ),
        r"coco_pope_random\.json: record 1: a second answer to 'Is there a spoon in the image\?'",
        "pope",
    ),
    "labels of unknown name": (
        lambda root: ((root / "coco/coco_pope_random.json").rename(root / "a.json"), read_pope(root, "a.json", None)),
        r"a\.json: record 0: category 'a': expected adversarial",
        "pope",
    ),
    "a task that MME does not have": (
        lambda root: (changed(root / "llava_mme.jsonl", 3, question_id="taste/0020.png"), read_mme(root)),
        r"llava_mme\.jsonl: record 3: field 'question_id': 'taste/0020\.png': expected TASK/PICTURE",
        "mme",
    ),
    "a picture without a text": (
        lambda root: (changed(root / "llava_mme.jsonl", 3, question_id="count/0021.png"), read_mme(root)),
        r"count/0021\.txt: no such file; expected the folder MME_Benchmark_release_version",
        "mme",
    ),
    "a text of another form": (
        lambda root: (
            (root / "MME_Benchmark_release_version/count/0020.txt").write_text("Is it? Yes\n"),
            read_mme(root),
        ),
        r"count/0020\.txt: line 1: expected a question, a tab and its answer",
        "mme",
    ),
    "an answer of another form": (
        lambda root: (
            (root / "MME_Benchmark_release_version/count/0020.txt").write_text("Is it?\tYes\nIs it not?\t1\n"),
            read_mme(root),
        ),
        r"count/0020\.txt: line 2: the answer: expected yes or no, got '1'",
        "mme",
    ),
    "a question that the text does not have": (
        lambda root: (changed(root / "llava_mme.jsonl", 3, text=f"Is it?{SHORT}"), read_mme(root)),
        r"record 3: field 'text': 'Is it\?' is no question of .*0020\.txt",
        "mme",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_of_the_published_form_is_named(name, request):
    read, words, fixture = BAD[name]
    with pytest.raises(ConfigError, match=words):
        read(request.getfixturevalue(fixture))


def test_gqa_says_which_file_lacks_a_question_or_an_answer(gqa):
    file, official = gqa / "llava_gqa_testdev_balanced.jsonl", gqa / "testdev_balanced_questions.json"
    changed(file, 1, question_id="7")
    with pytest.raises(ConfigError, match=r"balanced\.jsonl: record 1: field 'question_id': '7' is no question of"):
        sources.read(formats.source("gqa", str(file), str(gqa / "images"), annotations=str(official)))
    content = json.loads(official.read_text())
    del content["201640614"]["answer"]
    official.write_text(json.dumps(content))
    with pytest.raises(
        ConfigError, match=r"record 1: field 'answer' is missing; a test split's answers are not public"
    ):
        sources.read(formats.source("gqa", str(official), str(gqa / "images")))
