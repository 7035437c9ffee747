"""VQAv2, TextVQA and VizWiz: LLaVA's question files, or the official ones, with ten annotators' answers each.

LLaVA's files (`question_id, image, text`, one object a line) hold the prompt itself. From official files the same
prompt is made: the question, and what LLaVA-1.5 puts behind it for short answers (Liu et al., CVPR 2024).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mirage_dist.data.formats.base import BadRecord, Opened, contents, decoded, get, picture, records, text, within
from mirage_dist.data.sample import Sample
from mirage_dist.schema import ConfigError, SourceConfig

ANNOTATORS = 10
SHORT = "\nAnswer the question using a single word or phrase."
UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
OCR = "Reference OCR token:"  # opens a line of LLaVA's TextVQA prompts

Key = Callable[[Mapping], Any]


def vqav2(config: SourceConfig) -> Opened:
    """Questions: LLaVA's, or the official file; answers: the official annotations (Goyal et al., CVPR 2017)."""
    questions, subtype = _vqav2_questions(Path(config.path))
    answers = _by_key(Path(str(config.annotations)), "annotations", lambda record: text(record, "question_id"))

    def parse(record: Mapping, number: int, dropped: Counter[str]) -> Iterator[Sample]:
        name = text(record, "question_id")
        found = _found(answers, name, config, "question_id")
        if subtype is None:
            asked, image = text(record, "text"), text(record, "image")
        else:
            asked = text(record, "question") + SHORT
            image = f"COCO_{subtype}_{get(record, 'image_id', int):012d}.jpg"
        yield _sample(config, name, image, asked, _answers(found), text(found, "answer_type"))

    return Opened(questions, parse)


def _vqav2_questions(path: Path) -> tuple[Sequence[Any], str | None]:
    """The records, and the official file's name for its pictures' split, such as val2014; None for LLaVA's."""
    start = contents(path)
    # LLaVA's lines and the official file both begin with a brace; only the second is one object to its end.
    if '"questions"' not in start:
        return records(path), None
    file = decoded(path, start)
    if not isinstance(file, dict) or not isinstance(file.get("questions"), list):
        raise ConfigError(f"{path}: field 'questions': expected a list of records")
    if not isinstance(file.get("data_subtype"), str):
        raise ConfigError(f"{path}: field 'data_subtype': expected the pictures' split, such as val2014")
    return file["questions"], file["data_subtype"]


def textvqa(config: SourceConfig) -> Opened:
    """Questions: LLaVA's (with OCR tokens), or the official file's own; answers: the official file (Singh et al.,
    CVPR 2019). LLaVA's are joined by picture and question, since their `question_id` is the picture's.
    """
    file = Path(config.annotations or config.path)
    if config.annotations is None:
        return Opened(within(file, "data"), lambda record, number, dropped: _textvqa_official(config, record))
    answers = _by_key(file, "data", lambda record: (text(record, "image_id"), text(record, "question").lower()))

    def parse(record: Mapping, number: int, dropped: Counter[str]) -> Iterator[Sample]:
        asked = text(record, "text")
        found = _found(answers, (text(record, "question_id"), _question(asked).lower()), config, "text")
        yield _sample(config, text(found, "question_id"), text(record, "image"), asked, _answers(found), "")

    return Opened(None, parse)


def _textvqa_official(config: SourceConfig, record: Mapping) -> Iterator[Sample]:
    image = f"{text(record, 'image_id')}.jpg"
    asked = text(record, "question") + SHORT
    yield _sample(config, text(record, "question_id"), image, asked, _answers(record), "")


def _question(prompt: str) -> str:
    lines = [line for line in prompt.split("\n") if not line.startswith(OCR) and line != SHORT.strip()]
    if len(lines) != 1:
        raise BadRecord(f"field 'text': expected a question, perhaps '{OCR} …', and '{SHORT.strip()}', a line each")
    return lines[0]


def vizwiz(config: SourceConfig) -> Opened:
    """Questions: LLaVA's, or the official file's own; answers: the official file (Gurari et al., CVPR 2018).

    The category is the answer's type, so that accuracy on unanswerable questions stands apart.
    """
    file = Path(config.annotations or config.path)
    if config.annotations is None:
        return Opened(records(file), lambda record, number, dropped: _vizwiz_official(config, record))
    answers = _keyed(file, records(file), lambda record: text(record, "image"))

    def parse(record: Mapping, number: int, dropped: Counter[str]) -> Iterator[Sample]:
        image = text(record, "image")
        found = _found(answers, image, config, "image")
        yield _sample(config, image, image, text(record, "text"), _answers(found), text(found, "answer_type"))

    return Opened(None, parse)


def _vizwiz_official(config: SourceConfig, record: Mapping) -> Iterator[Sample]:
    image = text(record, "image")
    asked = text(record, "question") + UNANSWERABLE + SHORT
    yield _sample(config, image, image, asked, _answers(record), text(record, "answer_type"))


# ---------------------------------------------------------------------------------------------- answers


def _sample(
    config: SourceConfig, name: str, image: str, question: str, answers: tuple[str, ...], category: str
) -> Sample:
    most = Counter(answers).most_common(1)[0][0]
    return Sample(name, picture(config, image), question, most, True, category, config.path, references=answers)


def _answers(record: Mapping) -> tuple[str, ...]:
    """Each annotator's answer: texts (TextVQA) or objects with `answer`. A test split, which has none, is told."""
    if "answers" not in record:
        raise BadRecord("field 'answers' is missing; a test split's answers are not public, take the validation split")
    found = get(record, "answers", list)
    said = [text(answer, "answer") if isinstance(answer, Mapping) else answer for answer in found]
    if not all(isinstance(answer, str) for answer in said):
        raise BadRecord("field 'answers': expected texts, or objects with 'answer'")
    if len(said) != ANNOTATORS:
        raise BadRecord(f"field 'answers': expected those of {ANNOTATORS} annotators, got {len(said)}")
    return tuple(said)


def _by_key(file: Path, name: str, key: Key) -> dict[Any, Mapping]:
    return _keyed(file, within(file, name), key)


def _keyed(file: Path, annotations: Sequence[Any], key: Key) -> dict[Any, Mapping]:
    """Annotations by what they are joined by. Raises ConfigError naming file and record of a bad or second one."""
    found: dict[Any, Mapping] = {}
    for number, record in enumerate(annotations):
        try:
            if not isinstance(record, Mapping):
                raise BadRecord(f"expected an object, got {type(record).__name__}")
            name = key(record)
            if found.setdefault(name, record) is not record:
                raise BadRecord(f"a second one for {name!r}")
        except BadRecord as error:
            raise ConfigError(f"{file}: record {number}: {error}") from error
    return found


def _found(answers: Mapping[Any, Mapping], name: Any, config: SourceConfig, field: str) -> Mapping:
    if name not in answers:
        raise BadRecord(f"field {field!r}: {name!r} has no answers in {config.annotations}; are both of one split?")
    return answers[name]
