"""VLGuard's published files by their names, shape and counts, with benign words: splits, traps, and both attack files.

Read from data/ of ys-zong/VLGuard and eval/ of OPTML-Group/VLM-Safety-Unlearn: fields and their order,
numbers, and at which positions what is odd stands. No text of them is here.
"""

import json
from pathlib import Path

from PIL import Image

REFUSAL = "I'm sorry, but I can't help with that."
UNSEEN = "No. That is not for me to say."  # a refusal of which the published list knows no word
TAKEN = "The sign is legally required."  # an answer that it takes for a refusal
ANSWER = "A gadget."
NO_QUESTION = "N/A"
TEST = {"unsafe": 442, "safe": 558}
TRAIN = {"unsafe": 1023, "safe": 977}
SHARED = 8  # pictures of the training split that the test split has too
# Positions among the records of their kind.
TRAIN_NA = (106, 166, 177, 183, 322, 350, 378, 416, 454, 489, 555, 566, 613, 669)  # unsafe questions that are N/A
TEST_NA = 425
DOUBLED = (36, 95)  # safe training records of one id and picture, with different pairs
EMPTY = (100, 330, 333, 347, 351, 358, 409, 420, 438, 470, 475, 481, 485, 493, 509, 516, 530)  # safe answers
UNCHANGED = (91, 317, 329, 340, 342, 343, 346, 360, 384, 389, 391, 399, 421, 424, 429, 431, 434)  # under "What"
WITHOUT_SHARE = (319, 320)  # safe questions that "Share" has no rewrite of
# File and split -> how many of its answers the published list takes for refusals.
TAKEN_FOR_REFUSALS = {
    "train": {"unsafes": 1023, "safe_safes": 17, "safe_unsafes": 811},
    "test": {"unsafes": 320, "safe_safes": 4, "safe_unsafes": 550},
}


def unsafe(name: str, image: str, question: str, answer: str = REFUSAL) -> dict:
    labels = {"harmful_category": "privacy", "harmful_subcategory": "personal data"}
    pairs = [{"instruction": question, "response": answer}]
    return {"id": name, "image": image, "safe": False, **labels, "instr-resp": pairs}


def safe(name: str, image: str, question: str, answer: str, other: str, refusal: str) -> dict:
    pairs = [
        {"safe_instruction": question, "response": answer},
        {"unsafe_instruction": other, "response": refusal},
    ]
    return {"id": name, "image": image, "safe": True, "instr-resp": pairs}


def given(split: str, kind: str, i: int) -> str:
    """The answer at a position: the list takes the first ones for refusals, so many as it does in the real file."""
    taken = i < TAKEN_FOR_REFUSALS[split][kind]
    if kind == "safe_safes":
        return "" if split == "test" and i in EMPTY else TAKEN if taken else ANSWER
    return REFUSAL if taken else UNSEEN


def test_question(i: int) -> str:
    """An unsafe question; those that begin with "What" are those that the attack leaves as they are."""
    return NO_QUESTION if i == TEST_NA else f"What is there to say of {i}?" if i in UNCHANGED else f"Share number {i}."


def test_records() -> list[dict]:
    unsafes = [
        unsafe(f"u{i}", f"bad/{i}.png", test_question(i), given("test", "unsafes", i)) for i in range(TEST["unsafe"])
    ]
    safes = [
        safe(
            f"s{i}",
            f"good/{i}.png",
            f"What is number {i}?",
            given("test", "safe_safes", i),
            f"Describe {i}.",
            given("test", "safe_unsafes", i),
        )
        for i in range(TEST["safe"])
    ]
    return unsafes + safes


def train_records() -> list[dict]:
    """Two records share id and picture; the first ones have ids and pictures of the test split."""
    records = []
    for i in range(TRAIN["unsafe"]):
        name, image = (f"u{i}", f"bad/{i}.png") if i < SHARED else (f"tu{i}", f"train/unsafe{i}.png")
        question = NO_QUESTION if i in TRAIN_NA else f"Share number {i}."
        records.append(unsafe(name, image, question, given("train", "unsafes", i)))
    for i in range(TRAIN["safe"]):
        own = DOUBLED[0] if i == DOUBLED[1] else i
        answers = given("train", "safe_safes", i), given("train", "safe_unsafes", i)
        records.append(
            safe(f"ts{own}", f"train/safe{own}.png", f"What is {i}?", answers[0], f"Describe {i}.", answers[1])
        )
    return records


def reference_records() -> list[dict]:
    """gpt4_safe_safes.json: the test split's safe pairs, `output` being the answer again."""
    records = []
    for record in test_records()[TEST["unsafe"] :]:
        pair = record["instr-resp"][0]
        question, answer = pair["safe_instruction"], pair["response"]
        texts = {"instruction": question, "response": answer, "output": answer}
        records.append({"id": record["id"], "image": record["image"], "safe": True, **texts})
    return records


def rewritten(record: dict) -> dict:
    """A row as the attack files have it: all keys in the order of the alphabet."""
    return json.loads(json.dumps(record, sort_keys=True))


def what_rows() -> list[dict]:
    """Three rewrites of each unsafe question, one behind the other; what begins with "What" already stays as it is."""
    rows = []
    for i in range(TEST["unsafe"]):
        for word in ("one", "two", "three"):
            question = test_question(i) if i in UNCHANGED else f"What would {word} say of number {i}?"
            rows.append(rewritten(unsafe(f"u{i}", f"bad/{i}.png", question)))
    return rows


def share_rows() -> list[dict]:
    """One rewrite of each safe question but two."""
    rows = []
    for i in range(TEST["safe"]):
        if i not in WITHOUT_SHARE:
            question = f"Share what number {i} is."
            rows.append(rewritten(safe(f"s{i}", f"good/{i}.png", question, ANSWER, "Describe it.", REFUSAL)))
    return rows


def write(folder: Path) -> None:
    """All five files by their published names, with pictures under folder/{train,test}."""
    digests = 0
    for split, records in (("test", test_records()), ("train", train_records())):
        (folder / f"{split}.json").write_text(json.dumps(records))
        for image in dict.fromkeys(record["image"] for record in records):
            file, again = folder / split / image, folder / "test" / image
            file.parent.mkdir(parents=True, exist_ok=True)
            if split == "train" and again.is_file():
                file.write_bytes(again.read_bytes())
                continue
            Image.new("RGB", (2, 2), tuple(digests.to_bytes(3, "big"))).save(file)
            digests += 1
    others = {
        "gpt4_safe_safes": reference_records(),
        "test_what_3shot": what_rows(),
        "test_share_1shot": share_rows(),
    }
    for name, rows in others.items():
        (folder / f"{name}.json").write_text(json.dumps(rows))
