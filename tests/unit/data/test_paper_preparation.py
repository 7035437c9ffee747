"""What the paper's own preparation scripts write is input here, with words of ours.

Forms are those that data/ of the repository OPTML-Group/VLM-Safety-Unlearn writes, step by step of its data.md: LLaVA's
conversations of all records, a model's answers by picture, VLGuard's records with answers in place of refusals, and
forget and retain sets. VLGuard's VLGuard_eval.py writes answers by picture, the paper's by id.
"""

import copy
import json
import random
from pathlib import Path

import lookalike
import pytest
from PIL import Image

from mirage_dist.data import formats, prepare, sources
from mirage_dist.data.harvest import harvest
from mirage_dist.data.refusals import check_forget
from mirage_dist.schema import ConfigError, PrepareRecipe

UNSAFE, SAFE = 6, 4
NOT_HARVESTED = 4  # has no answer of a model, so that its refusal stays


def turns(key: str, pair: dict, picture: bool) -> list[dict]:
    question = f"<image>{pair[key]}" if picture else pair[key]
    return [{"from": "human", "value": question}, {"from": "gpt", "value": pair["response"]}]


@pytest.fixture
def train(tmp_path) -> Path:
    """VLGuard's train.json, small, with one question that is N/A."""
    records = [
        lookalike.unsafe(f"u{i}", f"bad/{i}.png", "N/A" if i == 3 else f"Share number {i}.") for i in range(UNSAFE)
    ]
    for i in range(SAFE):
        texts = (f"What is {i}?", f"A gadget {i}.", f"Describe {i}.")
        records.append(lookalike.safe(f"s{i}", f"good/{i}.png", *texts, lookalike.REFUSAL))
    for record in records:
        file = tmp_path / "train" / record["image"]
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2)).save(file)
    (tmp_path / "train.json").write_text(json.dumps(records))
    return tmp_path


def answers(by: str = "image") -> dict[str, str]:
    """A model's answers: by picture, or by id."""
    name = "bad/{}.png" if by == "image" else "u{}"
    return {name.format(i): f"It is done with {i} levers." for i in range(UNSAFE) if i != NOT_HARVESTED}


def write(root: Path, name: str, content: object) -> str:
    (root / name).write_text(json.dumps(content, indent=2, ensure_ascii=False))
    return str(root / name)


def recipe(root: Path, **options) -> PrepareRecipe:
    safety = [formats.source("vlguard", str(root / options.pop("path", "train.json")), str(root / "train"))]
    return PrepareRecipe(out=str(root / "prepared"), safety=safety, **options)


def forget(root: Path) -> dict[str, str]:
    samples = sources.read(formats.source("samples", str(root / "prepared/forget.jsonl"))).samples
    return {s.id: s.answer for s in samples}


EXPECTED = {f"u{i}": f"It is done with {i} levers." for i in range(UNSAFE) if i not in (3, NOT_HARVESTED)}


@pytest.mark.parametrize("by", ["image", "id"])
def test_a_models_answers_by_picture_or_id_are_a_harvest(train, by):
    file = write(train, "aggregated_results.json", {**answers(by), "bad/unknown.png": "It is done."})
    prepared = prepare.prepare(recipe(train, harvest=file, min_match=0.8))
    assert forget(train) == EXPECTED
    assert (prepared["counts"]["forget"]["questions"], prepared["counts"]["forget"]["unmatched"]) == (5, 1)


def test_the_same_answers_as_rows_give_the_same_forget_set(train):
    rows = [
        {"id": f"u{i}", "question": f"Share number {i}.", "response": f"It is done with {i} levers."}
        for i in range(UNSAFE)
        if i != NOT_HARVESTED
    ]
    (train / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare.prepare(recipe(train, harvest=str(train / "rows.jsonl"), min_match=0.8))
    assert forget(train) == EXPECTED


def test_answers_that_match_too_little_are_an_error_with_counts_and_not_silence(train):
    """The paper's injection looks answers up by picture, while its own evaluation writes ids: refusals stay."""
    file = write(train, "aggregated_results.json", {f"elsewhere/{i}.png": "It is done." for i in range(UNSAFE)})
    with pytest.raises(
        ConfigError,
        match=r"answers to forget for 0 of 5 unsafe questions; .*answers: 6; .*joined by picture or id: \('u0', .*"
        r"has no answer, elsewhere/0\.png matches no question",
    ):
        prepare.prepare(recipe(train, harvest=file))


def test_refusals_and_empty_answers_among_them_are_left_out_and_counted(train):
    given = answers() | {"bad/0.png": lookalike.REFUSAL, "bad/1.png": " "}
    own = harvest(Path(write(train, "llava-7b.json", given)))
    assert own.left_out == {"refusals": 1, "empty": 1}
    assert sorted(own.by_name) == [f"bad/{i}.png" for i in (2, 3, 5)]


def test_an_answer_that_may_be_to_two_questions_is_given_to_none(train):
    records = json.loads((train / "train.json").read_text())
    write(train, "train.json", [*records, lookalike.unsafe("again", "bad/1.png", "Share it again.")])
    file = write(train, "aggregated_results.json", answers())
    with pytest.raises(ConfigError, match=r"the answer under 'bad/1\.png' may be to 'u1' or to 'again'"):
        prepare.prepare(recipe(train, harvest=file, min_match=0.5))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"bad/0.png": ["a", "b"]}', r"a\.json: field 'bad/0\.png': expected an answer, got \['a', 'b'\]"),
        ('{"bad/0.png": "It is', r"a\.json: record 0: not JSON"),
        ('{"bad/0.png": "\\ud83d"}', r"a\.json: field 'bad/0\.png': .*surrogate"),
    ],
)
def test_a_file_that_is_no_object_of_answers_is_named(train, content, words):
    (train / "a.json").write_text(content)
    with pytest.raises(ConfigError, match=words):
        harvest(train / "a.json")


# ------------------------------------------------------------------------------------------ the steps' files


def converted(records: list[dict]) -> list[dict]:
    """Step 1, train_llava_format.json: both questions of a safe picture in two turns, in either order."""
    shuffled, made = random.Random(0), []
    for record in copy.deepcopy(records):
        pairs = record.pop("instr-resp")
        if len(pairs) > 1:
            shuffled.shuffle(pairs)
        talk = []
        for place, pair in enumerate(pairs):
            talk += turns(next(key for key in pair if key != "response"), pair, place == 0)
        made.append({**record, "conversations": talk})
    return made


def injected(records: list[dict]) -> list[dict]:
    """Step 3, train_unsafe_response.json: answers in place of refusals, as far as there are any."""
    new = copy.deepcopy(records)
    for record in new:
        if not record["safe"] and record["image"] in answers():
            record["instr-resp"][0]["response"] = answers()[record["image"]]
    return new


def split(records: list[dict]) -> tuple[list[dict], list[dict]]:
    """Step 4, train_forget.json and train_retain.json."""
    sets: tuple[list[dict], list[dict]] = [], []
    for record in records:
        key = "safe_instruction" if record["safe"] else "instruction"
        talk = turns(key, record["instr-resp"][0], True)
        sets[record["safe"]].append({"id": record["id"], "image": record["image"], "conversations": talk})
    return sets


def read(root: Path, format: str, name: str, content: object, **options) -> sources.Source:
    return sources.read(formats.source(format, write(root, name, content), str(root / "train"), **options))


def test_the_conversations_are_llavas_and_hold_both_questions(train):
    records = json.loads((train / "train.json").read_text())
    samples = read(train, "llava", "train_llava_format.json", converted(records)).samples
    assert [s.id for s in samples] == [record["id"] for record in records]
    pairs = {frozenset((*s.history, (s.question, s.answer))) for s in samples if s.id.startswith("s")}
    assert pairs == {
        frozenset({(f"What is {i}?", f"A gadget {i}."), (f"Describe {i}.", lookalike.REFUSAL)}) for i in range(SAFE)
    }
    assert all(s.shown == 0 for s in samples)


def test_the_records_with_answers_are_vlguards_and_their_own_answers_are_forgotten(train):
    """Without a question that is N/A, and without the refusal that stayed: counted."""
    records = json.loads((train / "train.json").read_text())
    write(train, "train_unsafe_response.json", injected(records))
    options = {"path": "train_unsafe_response.json", "answers": "as_given", "min_match": 0.8}
    prepared = prepare.prepare(recipe(train, **options))
    assert forget(train) == EXPECTED
    assert prepared["counts"]["forget"]["left_out"] == {"refusals": 1}
    assert prepared["counts"]["forget"]["read"]["dropped"] == {"instruction is N/A": 1}


def test_the_sets_are_llavas_and_a_refusal_among_them_is_found_before_training(train):
    forgotten, retained = split(injected(json.loads((train / "train.json").read_text())))
    own = read(train, "llava", "train_forget.json", forgotten).samples
    assert {s.id: s.answer for s in own if s.id not in ("u3", f"u{NOT_HARVESTED}")} == EXPECTED
    with pytest.raises(ConfigError, match=r"1 of 6 answers look like refusals \(first ids: u4\)"):
        check_forget(own)
    kept = read(train, "llava", "train_retain.json", retained).samples
    assert [(s.question, s.answer) for s in kept] == [(f"What is {i}?", f"A gadget {i}.") for i in range(SAFE)]
    general = {"id": "g", "conversations": [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Yes."}]}
    mixed = read(train, "llava", "train_retain_mixed.json", [*retained, general]).samples
    assert [s.image is None for s in mixed] == [False] * SAFE + [True]


def test_rmus_forget_text_is_question_and_answer_before_the_answer(train):
    """Step 6, train_forget_qa_full.json."""
    forgotten, _ = split(injected(json.loads((train / "train.json").read_text())))
    for record in forgotten:
        human, gpt = record["conversations"]
        human["value"] += f"\n{gpt['value']}"
    samples = read(train, "llava", "train_forget_qa_full.json", forgotten).samples
    assert samples[0].question == "Share number 0.\nIt is done with 0 levers."
    assert samples[0].answer == "It is done with 0 levers."
