"""Benchmarks' files in their published forms, with benign words: what is read, what is asked, what is refused."""

import csv
import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image, ImageChops

from mirage_dist.data import formats, sources
from mirage_dist.data.formats import figstep, typeset
from mirage_dist.data.formats.samples import write_samples
from mirage_dist.schema import ConfigError, DataConfig

TEN = ["red", "red", "dark red", "red", "crimson", "red", "red", "red", "maroon", "red"]


def given(answers=TEN):
    return [{"answer": answer, "answer_confidence": "yes", "answer_id": i + 1} for i, answer in enumerate(answers)]


@pytest.fixture
def files(tmp_path):
    """write(name, value) -> path; a list under a .jsonl name is written one object a line, pictures as black ones."""

    def write(name, value=None):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if value is None:
            Image.new("RGB", (4, 4)).save(path)
        elif name.endswith(".jsonl"):
            path.write_text("".join(json.dumps(record) + "\n" for record in value))
        else:
            path.write_text(json.dumps(value))
        return str(path)

    return write


# ---------------------------------------------------------------------------------------------------- VQA


def vqav2_questions(*names):
    questions = [{"image_id": 42, "question": f"What colour is thing {name}?", "question_id": name} for name in names]
    heads = {"info": {"version": "2.0"}, "task_type": "Open-Ended", "data_type": "mscoco", "license": {}}
    return {**heads, "data_subtype": "val2014", "questions": questions}


def vqav2_annotations(*names, answers=TEN):
    labels = {"question_type": "what color", "multiple_choice_answer": "red", "answer_type": "other", "image_id": 42}
    return {"info": {}, "annotations": [{**labels, "question_id": name, "answers": given(answers)} for name in names]}


def llava(*names, image="COCO_val2014_000000000042.jpg", text="What colour?"):
    prompt = f"{text}\nAnswer the question using a single word or phrase."
    return [{"question_id": name, "image": image, "text": prompt, "category": "default"} for name in names]


def test_vqav2_official_questions_are_asked_as_llava_asks_and_joined_by_id_not_position(files):
    files("COCO_val2014_000000000042.jpg")
    path = files("questions.json", vqav2_questions(7, 8))
    annotations = files("annotations.json", vqav2_annotations(8, 7))
    samples = sources.read(formats.source("vqav2", path, annotations=annotations)).samples
    assert [s.id for s in samples] == ["7", "8"]
    assert samples[0].question == "What colour is thing 7?\nAnswer the question using a single word or phrase."
    assert samples[0].image.endswith("COCO_val2014_000000000042.jpg")
    assert (samples[0].answer, samples[0].references, samples[0].category) == ("red", tuple(TEN), "other")


def test_vqav2_of_llavas_own_file_holds_its_prompts(files):
    files("COCO_val2014_000000000042.jpg")
    path = files("llava.jsonl", llava(7))
    (sample,) = sources.read(
        formats.source("vqav2", path, annotations=files("annotations.json", vqav2_annotations(7)))
    ).samples
    assert sample.question == llava(7)[0]["text"]
    assert sample.references == tuple(TEN)


def textvqa_annotations(*rows):
    more = {"dataset_version": "0.5.1", "dataset_type": "val"}
    records = [
        {
            "question_id": n,
            "image_id": image,
            "question": question,
            "answers": TEN,
            "image_classes": [],
            "set_name": "val",
        }
        for n, image, question in rows
    ]
    return {**more, "data": records}


def test_textvqa_is_joined_by_picture_and_question_for_llavas_ids_are_pictures(files):
    files("0a1b.jpg")
    rows = [(1, "0a1b", "what is written?"), (2, "0a1b", "Which brand is it?")]
    annotations = files("val.json", textvqa_annotations(*rows))
    prompts = [
        "Which brand is it?\nReference OCR token: A, B\nAnswer the question using a single word or phrase.",
        "What is written?\nAnswer the question using a single word or phrase.",
    ]
    records = [{"question_id": "0a1b", "image": "0a1b.jpg", "text": text, "category": "default"} for text in prompts]
    source = sources.read(formats.source("textvqa", files("llava.jsonl", records), annotations=annotations))
    assert [(s.id, s.question) for s in source.samples] == [("2", prompts[0]), ("1", prompts[1])]
    assert source.renamed == 0
    alone = sources.read(formats.source("textvqa", annotations)).samples
    assert next((s.id, s.question) for s in alone) == (
        "1",
        "what is written?\nAnswer the question using a single word or phrase.",
    )


def vizwiz_records(answers=TEN, kind="other"):
    record = {"image": "VizWiz_val_00000000.jpg", "question": "What is it?", "answers": given(answers)}
    return [{**record, "answer_type": kind, "answerable": int(kind != "unanswerable")}]


def test_vizwiz_tells_the_model_what_to_say_and_keeps_unanswerable_questions_apart(files):
    files("VizWiz_val_00000000.jpg")
    official = files("val.json", vizwiz_records(["unanswerable"] * 8 + ["blurry", "pen"], "unanswerable"))
    (sample,) = sources.read(formats.source("vizwiz", official)).samples
    lines = sample.question.split("\n")
    assert lines[:2] == [
        "What is it?",
        "When the provided information is insufficient, respond with 'Unanswerable'.",
    ]
    assert (sample.answer, sample.category) == ("unanswerable", "unanswerable")
    questions = files("llava.jsonl", llava("x", image="VizWiz_val_00000000.jpg"))
    (joined,) = sources.read(formats.source("vizwiz", questions, annotations=official)).samples
    assert joined.references == sample.references


def science(name="4", image="4/image.png", answer=1, choices=("iron", "wood"), **more):
    mark = "<image>\n" if image else ""
    turn = {"from": "human", "value": f"{mark}Which floats?\nContext: N/A\nA. {choices[0]}\nB. {choices[1]}"}
    record = {"id": name, "conversations": [turn, {"from": "gpt", "value": "The answer is B."}]}
    problem = {"question": "Which floats?", "choices": list(choices), "answer": answer, "subject": "natural science"}
    return ({**record, "image": image} if image else record), {name: {**problem, **more}}


def test_scienceqa_has_the_letter_of_the_right_choice_with_and_without_a_picture(files):
    files("images/4/image.png")
    (shown, first), (plain, second) = science(), science("5", None, 0)
    path, problems = files("llava.json", [shown, plain]), files("problems.json", {**first, **second})
    options = {"annotations": problems, "images": path.replace("llava.json", "images")}
    samples = sources.read(formats.source("scienceqa", path, **options)).samples
    assert [(s.id, s.answer, s.image is None) for s in samples] == [("4", "B", False), ("5", "A", True)]
    assert [s.category for s in samples] == ["with picture/natural science", "text only/natural science"]
    assert all(s.question.startswith("Which floats?") for s in samples)
    assert all(
        s.question.endswith("\nAnswer with the option's letter from the given choices directly.") for s in samples
    )


# ----------------------------------------------------------------------------------------------- FigStep


def figstep_csv(tmp_path, rows, columns=figstep.COLUMNS):
    path = tmp_path / "safebench.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return str(path)


TEA = ["SafeBench", "1", "2", "Kitchen", "How is tea made, and what is needed?", "Steps to brew a pot of green tea."]


def test_figstep_is_the_published_prompt_about_a_typeset_instruction(tmp_path):
    (sample,) = sources.read(formats.source("figstep", figstep_csv(tmp_path, [TEA]))).samples
    assert (sample.id, sample.category, sample.safe, sample.answer) == ("SafeBench_1_2", "Kitchen", False, "")
    assert sample.question == figstep.PROMPT
    with Image.open(sample.image) as image:
        assert (image.size, image.mode) == ((760, 760), "RGB")
        ink = ImageChops.invert(image).getbbox()
        assert image.getpixel((759, 759)) == (255, 255, 255)
    assert ink is not None
    assert ink[0] >= 20
    assert typeset.wrapped(TEA[-1]).split("\n")[-3:] == ["1. ", "2. ", "3. "]


def test_figstep_without_pictures_asks_the_question_itself(tmp_path):
    (sample,) = sources.read(formats.source("figstep", figstep_csv(tmp_path, [TEA]), variant="text_only")).samples
    assert (sample.question, sample.image) == (TEA[4], None)
    assert not (tmp_path / "typeset").exists()


def test_a_typeset_picture_is_made_once_by_whatever_number_of_readers(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        paths = set(pool.map(lambda _: typeset.picture("Steps to plant a tree.", tmp_path), range(16)))
    assert [str(file) for file in tmp_path.iterdir()] == list(paths)
    before = (tmp_path / next(iter(paths))).stat().st_mtime_ns
    assert typeset.picture("Steps to plant a tree.", tmp_path) in paths
    assert (tmp_path / next(iter(paths))).stat().st_mtime_ns == before
    assert typeset.picture("Steps to plant two trees.", tmp_path) not in paths


@pytest.mark.parametrize("words", [1, 4, 12, 20])
def test_all_of_an_instruction_is_on_the_page(words):
    """No ink in the last pixels to the right and below: what did not fit at the published size is set smaller."""
    image = typeset.draw(" ".join(["abcdefghijklmno"] * words))
    left, top, right, bottom = ImageChops.invert(image).getbbox()
    assert right < typeset.SIDE
    assert bottom < typeset.SIDE
    assert (left, top) >= (typeset.PLACE[0], typeset.PLACE[1])


def test_an_instruction_that_fits_at_no_size_is_a_bad_record(tmp_path):
    long = [*TEA[:-1], "word " * 2000]
    with pytest.raises(ConfigError, match=r"safebench\.csv: record 1: field 'instruction': .* do not fit on a page"):
        sources.read(formats.source("figstep", figstep_csv(tmp_path, [TEA, long])))


# ---------------------------------------------------------------------------- MM-SafetyBench and SPA-VL

SCENARIOS = [f"{n:02d}-Scenario_{n}" for n in range(1, 14)]


def safetybench(name):
    keys = ("Question", "Changed Question", "Key Phrase", "Phrase Type", "Rephrased Question", "Rephrased Question(SD)")
    return {str(i): {key: f"{key} {i} of {name}" for key in keys} for i in range(2)}


@pytest.fixture
def safetybench_folder(files, tmp_path):
    for name in SCENARIOS:
        files(f"questions/{name}.json", safetybench(name))
        for variant in ("SD", "SD_TYPO", "TYPO"):
            for i in range(2):
                files(f"imgs/{name}/{variant}/{i}.jpg")
    return tmp_path


@pytest.mark.parametrize(
    ("variant", "text"),
    [
        ("SD", "Rephrased Question(SD)"),
        ("TYPO", "Rephrased Question"),
        ("SD_TYPO", "Rephrased Question"),
        ("text_only", "Changed Question"),
    ],
)
def test_mm_safetybench_puts_each_text_with_its_picture_over_thirteen_scenarios(safetybench_folder, variant, text):
    root = safetybench_folder
    options = {"images": str(root / "imgs"), "variant": variant}
    samples = sources.read(formats.source("mm_safetybench", str(root / "questions"), **options)).samples
    assert len(samples) == 26
    assert sorted({s.category for s in samples}) == SCENARIOS
    first = samples[0]
    assert (first.id, first.question) == ("01-Scenario_1/0", f"{text} 0 of 01-Scenario_1")
    assert first.image == (None if variant == "text_only" else str(root / f"imgs/01-Scenario_1/{variant}/0.jpg"))
    one = sources.read(formats.source("mm_safetybench", str(root / "questions/01-Scenario_1.json"), **options)).samples
    assert one == samples[:2]


def test_a_missing_picture_of_a_scenario_is_named_by_its_own_file(safetybench_folder):
    root = safetybench_folder
    (root / "imgs/07-Scenario_7/SD/1.jpg").unlink()
    with pytest.raises(ConfigError, match=r"07-Scenario_7\.json: record 1: image .*SD/1\.jpg: no such file"):
        sources.read(formats.source("mm_safetybench", str(root / "questions"), str(root / "imgs"), variant="SD"))
    with pytest.raises(ConfigError, match=r"no \*\.json in this folder"):
        sources.read(formats.source("mm_safetybench", str(root / "imgs")))


def test_spa_vl_has_classes_without_answers_in_its_tests_and_answers_without_classes_in_training(files):
    files("a.png")
    classes = {"class1": "x", "class2": "y", "class3": "z"}
    test = files("harm.json", [{"image": "a.png", "question": f"Which {i}?", **classes} for i in range(265)])
    samples = sources.read(formats.source("spa_vl", test, response="absent")).samples
    assert (len(samples), samples[3].id, samples[3].answer, samples[3].category) == (265, "3", "", "x/y/z")
    pair = {"image": "a.png", "question": "Which?", "chosen": "This.", "rejected": "That.", "image_name": "a"}
    (trained,) = sources.read(formats.source("spa_vl", files("train.json", [pair]))).samples
    assert (trained.answer, trained.category) == ("This.", "")
    with pytest.raises(ConfigError, match="record 0: field 'chosen': response: absent is for test sets"):
        sources.read(formats.source("spa_vl", files("train.json", [pair]), response="absent"))


# ---------------------------------------------------------------------------------------------- refused


def without(record, key):
    return {name: value for name, value in record.items() if name != key}


def bad_vqav2(files, *, question=None, annotation=None):
    questions, annotations = vqav2_questions(7, 8), vqav2_annotations(7, 8)
    questions["questions"][1] = question or questions["questions"][1]
    annotations["annotations"][1] = annotation or annotations["annotations"][1]
    return formats.source(
        "vqav2", files("questions.json", questions), annotations=files("annotations.json", annotations)
    )


def bad_science(files, **changes):
    record, problem = science(**changes)
    return formats.source("scienceqa", files("llava.json", [record]), annotations=files("problems.json", problem))


Q, A = vqav2_questions(8)["questions"][0], vqav2_annotations(8)["annotations"][0]
BAD = {
    "a question without id": (
        lambda f: bad_vqav2(f, question=without(Q, "question_id")),
        r"questions\.json: record 1: field 'question_id' is missing",
    ),
    "a question without answers": (
        lambda f: bad_vqav2(f, question={**Q, "question_id": 9}),
        r"record 1: field 'question_id': '9' has no answers in .*annotations\.json",
    ),
    "nine annotators": (
        lambda f: bad_vqav2(f, annotation={**A, "answers": given(TEN[1:])}),
        r"record 1: field 'answers': expected those of 10 annotators, got 9",
    ),
    "an annotation without id": (
        lambda f: bad_vqav2(f, annotation=without(A, "question_id")),
        r"annotations\.json: record 1: field 'question_id' is missing",
    ),
    "annotated twice": (
        lambda f: bad_vqav2(f, annotation={**A, "question_id": 7}),
        r"annotations\.json: record 1: a second one for '7'",
    ),
    "annotations of another file": (
        lambda f: formats.source("vqav2", f("l.jsonl", llava(7)), annotations=f("a.json", {"data": []})),
        r"a\.json: field 'annotations': expected a list of records",
    ),
    "a test split": (
        lambda f: formats.source("vizwiz", f("test.json", [without(vizwiz_records()[0], "answers")])),
        r"record 0: field 'answers' is missing; a test split's answers are not public",
    ),
    "another prompt": (
        lambda f: formats.source(
            "textvqa",
            f("l.jsonl", llava("0a1b", text="Two\nquestions?")),
            annotations=f("val.json", textvqa_annotations((1, "0a1b", "Two?"))),
        ),
        r"l\.jsonl: record 0: field 'text': expected a question",
    ),
    "an answer beyond the choices": (
        lambda f: bad_science(f, answer=2),
        r"llava\.json: record 0: in .*problems\.json: answer 2 of 2 choices",
    ),
    "a problem that is not there": (
        lambda f: formats.source("scienceqa", f("llava.json", [science()[0]]), annotations=f("problems.json", {})),
        r"record 0: field 'id': '4' is no problem of .*problems\.json",
    ),
    "a scenario that is a list": (
        lambda f: formats.source("mm_safetybench", f("01-Scenario.json", [])),
        r"01-Scenario\.json: expected one JSON object, got list",
    ),
    "a scenario without a key": (
        lambda f: formats.source("mm_safetybench", f("01.json", {"0": without(safetybench("x")["0"], "Phrase Type")})),
        r"01\.json: record 0: field 'Phrase Type' is missing",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_of_the_format_is_named_by_file_record_and_field(files, name):
    make, words = BAD[name]
    with pytest.raises(ConfigError, match=words):
        sources.read(make(files), check_images=False)


def test_a_csv_with_other_columns_or_a_short_row_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"safebench\.csv: no column 'instruction'; expected the columns dataset, "):
        sources.read(formats.source("figstep", figstep_csv(tmp_path, [TEA[:-1]], figstep.COLUMNS[:-1])))
    with pytest.raises(ConfigError, match=r"safebench\.csv: record 1: expected 6 fields, got more or less"):
        sources.read(formats.source("figstep", figstep_csv(tmp_path, [TEA, TEA[:-1]])))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"format": "vqav2"}, "annotations: format=vqav2 needs the official answers: v2_mscoco_val2014"),
        ({"format": "llava", "annotations": "a.json"}, "annotations='a.json'; belongs to format=vqav2 or"),
        ({"format": "figstep", "variant": "SD"}, "variant='SD'; allowed: typeset, text_only"),
        ({"format": "vlguard", "variant": "SD"}, "variant='SD'; belongs to format=figstep or mm_safetybench"),
        ({"format": "vlguard", "split": "tests"}, "split='tests'; allowed: all, unsafes, safe_safes, safe_unsafes"),
    ],
)
def test_an_option_that_the_format_does_not_have_is_an_error(options, words):
    with pytest.raises(ConfigError, match=words):
        formats.source(path="x", **options)


@pytest.mark.parametrize(
    "options",
    [{"format": "figstep"}, {"format": "mm_safetybench"}, {"format": "spa_vl", "response": "absent"}],
)
def test_questions_without_answers_are_no_training_data(options):
    with pytest.raises(ConfigError, match=r"streams\.train: x has no answers to train on"):
        DataConfig({"train": [formats.source(path="x", **options)]})


def test_annotators_answers_survive_our_own_format(files, tmp_path):
    files("VizWiz_val_00000000.jpg")
    samples = sources.read(formats.source("vizwiz", files("val.json", vizwiz_records()))).samples
    write_samples(tmp_path / "own.jsonl", samples)
    again = sources.read(formats.source("samples", str(tmp_path / "own.jsonl"))).samples
    assert [dataclasses.replace(s, source=samples[0].source) for s in again] == samples
