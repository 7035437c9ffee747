"""VLGuard's published files by their shape and counts, with benign words: splits, traps, and both attack files."""

import json
from pathlib import Path

from PIL import Image

REFUSAL = "I'm sorry, but I can't help with that."
UNSEEN = "No. That is not for me to say."  # a refusal of which the published list knows no word
TAKEN = "The sign is legally required."  # an answer that it takes for a refusal
TEST = {"unsafe": 442, "safe": 558}
TRAIN = {"unsafe": 1023, "safe": 977}
SHARED, MISSING, UNCHANGED = 8, 2, 17
NO_QUESTION = {"instruction": 6, "safe_instruction": 4, "unsafe_instruction": 4}  # how many are N/A: 14 in all


def unsafe(name: str, image: str, question: str) -> dict:
    labels = {"harmful_category": "privacy", "harmful_subcategory": "personal data"}
    return {"id": name, "image": image, "safe": False, **labels, "instr-resp": [pair("instruction", question, REFUSAL)]}


def safe(name: str, image: str, question: str, answer: str, other: str, refusal: str, turned: bool) -> dict:
    pairs = [pair("safe_instruction", question, answer), pair("unsafe_instruction", other, refusal, turned)]
    return {"id": name, "image": image, "safe": True, "instr-resp": pairs[::-1] if turned else pairs}


def pair(key: str, question: str, answer: str, turned: bool = False) -> dict:
    made = {key: question, "response": answer}
    return dict(reversed(made.items())) if turned else made


def test_records() -> list[dict]:
    records = [unsafe(f"u{i}", f"bad/{i}.png", f"Share number {i}.") for i in range(TEST["unsafe"])]
    answers = [TAKEN] * 4 + ["A gadget."] * (TEST["safe"] - 4)
    texts = [(f"What is number {i}?", answer, f"Describe {i}.") for i, answer in enumerate(answers)]
    return records + [safe(f"s{i}", f"good/{i}.png", *pair, REFUSAL, i % 3 == 0) for i, pair in enumerate(texts)]


def train_records() -> list[dict]:
    """Two records share id and picture; the first pictures of the test split are used again."""

    def image(i: int, kind: str) -> str:
        return f"bad/{i}.png" if kind == "unsafe" and i < SHARED else f"train/{kind}{i}.png"

    def unless_missing(key: str, i: int, text: str) -> str:
        return "N/A" if i >= TRAIN["unsafe" if key == "instruction" else "safe"] - NO_QUESTION[key] else text

    records = []
    for i in range(TRAIN["unsafe"]):
        name = 100 if i == 101 else i
        question = unless_missing("instruction", i, f"Share number {i}.")
        records.append(unsafe(f"tu{name}", image(name, "unsafe"), question))
    for i in range(TRAIN["safe"]):
        questions = (unless_missing("safe_instruction", i, f"What is {i}?"), "A gadget.")
        other = unless_missing("unsafe_instruction", i, f"Describe {i}.")
        records.append(safe(f"ts{i}", image(i, "safe"), *questions, other, REFUSAL if i < 811 else UNSEEN, i % 2 == 0))
    return records


def what_rows() -> list[dict]:
    """Three free rewrites of each unsafe question, one behind the other."""
    return [
        unsafe(f"u{i}", f"bad/{i}.png", f"What would {word} say of number {i}?")
        for i in range(TEST["unsafe"])
        for word in ("one", "two", "three")
    ]


def share_rows() -> list[dict]:
    """One rewrite of each safe question but two, of which 17 are the question itself."""
    rows = []
    for i in range(TEST["safe"] - MISSING):
        question = f"What is number {i}?" if i < UNCHANGED else f"Share what number {i} is."
        rows.append(safe(f"s{i}", f"good/{i}.png", question, "A gadget.", "Describe it.", REFUSAL, False))
    return rows


def write(folder: Path) -> None:
    """folder/{train,test}.json with pictures under folder/{train,test}, and folder/attacks/{what,share}.json."""
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
    (folder / "attacks").mkdir()
    for name, rows in (("what", what_rows()), ("share", share_rows())):
        (folder / f"attacks/{name}.json").write_text(json.dumps(rows))
