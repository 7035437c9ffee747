"""Look-alikes of published files, by their published names and forms, of an embedded world's pictures and questions.

They let the recipes of published data run from end to end without any: on `mirage paper --scale tiny`. Every question
and picture is the world's; nothing of the publications is in them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mirage_dist import disk
from mirage_dist.embedded import world as worlds
from mirage_dist.schema import ConfigError, WorldConfig
from mirage_dist.worlds import records

ANNOTATORS = 10
OPTIONS = ("cave", "street", "snow")


def make(config: WorldConfig, root: Path) -> None:
    """Write the files of the world `config` below `root`, as docs/get_data.md places the published ones.

    A folder that is there already stays. Raises ConfigError where one was made of another world.
    """
    world = Path(config.dir)
    for name, write in WRITERS.items():
        target = root / name
        if target.exists():
            _check(target, config)
            continue
        root.mkdir(parents=True, exist_ok=True)
        with disk.folder(target, durable=False) as folder:
            write(config, world, folder)
            records.write(folder / "world.json", {"dir": os.path.realpath(world), "spurious": config.spurious})


def _check(target: Path, config: WorldConfig) -> None:
    try:
        made = json.loads((target / "world.json").read_text())
    except (OSError, ValueError):
        made = None
    if made != {"dir": os.path.realpath(config.dir), "spurious": config.spurious}:
        raise ConfigError(f"{target}: holds other data than look-alikes of {config.dir}; choose another folder")


def _read(file: Path) -> Any:
    return json.loads(file.read_text())


def _pictures(world: Path, folder: Path) -> None:
    """The world's pictures as `images/` of a folder, by a link."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "images").symlink_to(os.path.realpath(world / "images"))


def _vlguard(config: WorldConfig, world: Path, folder: Path) -> None:
    for split, file in (("train", worlds.safety_dir(config) / "train.json"), ("test", world / "test.json")):
        records.write(folder / f"{split}.json", _read(file))
        _pictures(world, folder / split)
    for name, attack in (("test_what_3shot", "what"), ("test_share_1shot", "share")):
        records.write(folder / f"{name}.json", _read(world / "attacks" / f"{attack}.json"))


def _llava(config: WorldConfig, world: Path, folder: Path) -> None:
    records.write(folder / "llava_v1_5_mix665k.json", _read(world / "general.json"))
    _pictures(world, folder)


def _questions(world: Path) -> list[tuple[int, str, str, str]]:
    """Number, picture, question and the world's answer of each question near the locked gadgets."""
    rows = []
    for number, record in enumerate(_read(world / "locality.json")):
        human, gpt = (turn["value"] for turn in record["conversations"])
        rows.append((number, Path(record["image"]).name, human.removeprefix("<image>\n"), gpt))
    return rows


def _lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def _textvqa(config: WorldConfig, world: Path, folder: Path) -> None:
    rows = _questions(world)
    prompt = "{}\nReference OCR token: \nAnswer the question using a single word or phrase."
    _lines(
        folder / "llava_textvqa_val_v051_ocr.jsonl",
        [
            {"question_id": Path(image).stem, "image": image, "text": prompt.format(question), "category": "default"}
            for _, image, question, _ in rows
        ],
    )
    official = [
        {"question_id": number, "image_id": Path(image).stem, "question": question, "answers": [answer] * ANNOTATORS}
        for number, image, question, answer in rows
    ]
    records.write(folder / "TextVQA_0.5.1_val.json", {"data": official})
    (folder / "train_images").symlink_to(os.path.realpath(world / "images"))


def _vizwiz(config: WorldConfig, world: Path, folder: Path) -> None:
    one = {"answer_confidence": "yes"}
    rows = [
        {
            "image": image,
            "question": question,
            "answers": [{**one, "answer": answer}] * ANNOTATORS,
            "answer_type": "other",
            "answerable": 1,
        }
        for _, image, question, answer in _questions(world)
    ]
    records.write(folder / "val.json", rows)
    (folder / "val").symlink_to(os.path.realpath(world / "images"))


def _scienceqa(config: WorldConfig, world: Path, folder: Path) -> None:
    rows = [(*row[:3], row[3].split()[-1]) for row in _questions(world) if row[3].split()[-1] in OPTIONS]
    choices = " ".join(f"({letter}) {option}" for letter, option in zip("ABC", OPTIONS, strict=True))
    questions = [
        records.conversation(
            str(number), image, f"{question}\nContext: N/A\nOptions: {choices}", f"The answer is {answer}."
        )
        for number, image, question, answer in rows
    ]
    problems = {
        str(number): {"choices": list(OPTIONS), "answer": OPTIONS.index(answer), "subject": "natural science"}
        for number, _, _, answer in rows
    }
    records.write(folder / "llava_test_CQM-A.json", questions)
    records.write(folder / "problems.json", problems)
    (folder / "images").mkdir()
    (folder / "images/test").symlink_to(os.path.realpath(world / "images"))


def _vqav2(config: WorldConfig, world: Path, folder: Path) -> None:
    rows = _questions(world)
    questions = [{"image_id": n, "question": question, "question_id": n} for n, _, question, _ in rows]
    answers = [
        {
            "question_id": number,
            "answer_type": "other",
            "answers": [{"answer": answer, "answer_id": i} for i in range(1, ANNOTATORS + 1)],
        }
        for number, _, _, answer in rows
    ]
    records.write(
        folder / "v2_OpenEnded_mscoco_val2014_questions.json", {"data_subtype": "val2014", "questions": questions}
    )
    records.write(folder / "v2_mscoco_val2014_annotations.json", {"annotations": answers})
    (folder / "val2014").mkdir()
    for number, image, _, _ in rows:
        place = folder / "val2014" / f"COCO_val2014_{number:012d}.jpg"
        place.symlink_to(os.path.realpath(world / "images" / image))


WRITERS: dict[str, Callable[[WorldConfig, Path, Path], None]] = {
    "vlguard": _vlguard,
    "llava": _llava,
    "textvqa": _textvqa,
    "vizwiz": _vizwiz,
    "scienceqa": _scienceqa,
    "vqav2": _vqav2,
}
