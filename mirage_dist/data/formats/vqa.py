"""VQAv2, TextVQA and VizWiz: LLaVA's question files, or the official ones, with ten annotators' answers each.

LLaVA's files (`question_id, image, text`, one object a line) hold the prompt itself. From official files the same
prompt is made: the question, followed by LLaVA-1.5's instruction for short answers (Liu et al., CVPR 2024).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from mirage_dist.data import records as streamed
from mirage_dist.data.formats.base import BadRecord, Format, Opened, get, records, text, within
from mirage_dist.data.sample import Sample
from mirage_dist.schema import ConfigError
from mirage_dist.schema.texts import fault_within

ANNOTATORS = 10
SHORT = "\nAnswer the question using a single word or phrase."
UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
OCR = "Reference OCR token:"  # opens a line of LLaVA's TextVQA prompts

Record = Mapping[str, Any]
Key = Callable[[Record], Any]


@dataclass(frozen=True)
class OfficialAnswers(Format):
    """A benchmark whose answers are in a file of their own. annotations: the official answers to the questions."""

    annotations: str | None = None

    required: ClassVar[bool] = False  # whether `annotations` must be given

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.required and self.annotations is None:
            raise ConfigError(f"annotations: format={self.format} needs the file of the official answers")

    def other_files(self) -> dict[str, str]:
        return {"annotations": self.annotations} if self.annotations else {}


@dataclass(frozen=True)
class AnnotatedVQA(OfficialAnswers):
    """What VQAv2, TextVQA and VizWiz share: answers by ten annotators, and their score."""

    score = "vqa"

    def _sample(self, name: str, image: str, question: str, answers: tuple[str, ...], category: str) -> Sample:
        most = Counter(answers).most_common(1)[0][0]
        return Sample(name, self.picture(image), question, most, True, category, self.path, references=answers)

    def _matching(self, annotations: Mapping[Any, Record], key: Any, field: str) -> Record:
        if key not in annotations:
            raise BadRecord(f"field {field!r}: {key!r} has no answers in {self.annotations}; are both of one split?")
        return annotations[key]


@dataclass(frozen=True)
class VQAv2(AnnotatedVQA):
    """Questions: LLaVA's, or the official file; answers: the official annotations (Goyal et al., CVPR 2017)."""

    required = True

    def open(self) -> Opened:
        questions, subtype = _vqav2_questions(Path(self.path))
        annotations = _by_key(Path(str(self.annotations)), "annotations", lambda record: text(record, "question_id"))

        def parse(record: Record, number: int, dropped: Counter[str]) -> Iterator[Sample]:
            name = text(record, "question_id")
            annotation = self._matching(annotations, name, "question_id")
            if subtype is None:
                prompt, image = text(record, "text"), text(record, "image")
            else:
                prompt = text(record, "question") + SHORT
                image = f"COCO_{subtype}_{get(record, 'image_id', int):012d}.jpg"
            yield self._sample(name, image, prompt, _answers(annotation), text(annotation, "answer_type"))

        return Opened(questions, parse)


def _vqav2_questions(path: Path) -> tuple[Sequence[Any], str | None]:
    """The records, and the official file's name for its pictures' split, such as val2014; None for LLaVA's."""
    start = streamed.text(path)
    # LLaVA's lines and the official file both begin with a brace; only the second is one object to its end.
    if '"questions"' not in start:
        return records(path), None
    file = streamed.value(path, start)
    if not isinstance(file, dict) or not isinstance(file.get("questions"), list):
        raise ConfigError(f"{path}: field 'questions': expected a list of records")
    if not isinstance(file.get("data_subtype"), str):
        raise ConfigError(f"{path}: field 'data_subtype': expected the pictures' split, such as val2014")
    return file["questions"], file["data_subtype"]


@dataclass(frozen=True)
class TextVQA(AnnotatedVQA):
    """Questions: LLaVA's (with OCR tokens), or the official file's own; answers: the official file (Singh et al.,
    CVPR 2019). LLaVA's are joined by picture and question, since their `question_id` is the picture's.
    """

    def open(self) -> Opened:
        if self.annotations is None:
            return Opened(within(Path(self.path), "data"), self.parse)
        annotations = _by_key(
            Path(self.annotations), "data", lambda record: (text(record, "image_id"), text(record, "question").lower())
        )

        def parse(record: Record, number: int, dropped: Counter[str]) -> Iterator[Sample]:
            prompt = text(record, "text")
            key = (text(record, "question_id"), _question(prompt).lower())
            annotation = self._matching(annotations, key, "text")
            name = text(annotation, "question_id")
            yield self._sample(name, text(record, "image"), prompt, _answers(annotation), "")

        return Opened(None, parse)

    def parse(self, record: Record, number: int, dropped: Counter[str]) -> Iterator[Sample]:
        """A record of the official file."""
        image, prompt = f"{text(record, 'image_id')}.jpg", text(record, "question") + SHORT
        yield self._sample(text(record, "question_id"), image, prompt, _answers(record), "")


def _question(prompt: str) -> str:
    lines = [line for line in prompt.split("\n") if not line.startswith(OCR) and line != SHORT.strip()]
    if len(lines) != 1:
        raise BadRecord(f"field 'text': expected a question, perhaps '{OCR} …', and '{SHORT.strip()}', a line each")
    return lines[0]


@dataclass(frozen=True)
class VizWiz(AnnotatedVQA):
    """Questions: LLaVA's, or the official file's own; answers: the official file (Gurari et al., CVPR 2018).

    The category is the answer's type, so that the accuracy on unanswerable questions is reported separately.
    """

    def open(self) -> Opened:
        if self.annotations is None:
            return Opened(records(Path(self.path)), self.parse)
        file = Path(self.annotations)
        annotations = _keyed(file, records(file), lambda record: text(record, "image"))

        def parse(record: Record, number: int, dropped: Counter[str]) -> Iterator[Sample]:
            image = text(record, "image")
            annotation = self._matching(annotations, image, "image")
            category = text(annotation, "answer_type")
            yield self._sample(image, image, text(record, "text"), _answers(annotation), category)

        return Opened(None, parse)

    def parse(self, record: Record, number: int, dropped: Counter[str]) -> Iterator[Sample]:
        """A record of the official file."""
        image, prompt = text(record, "image"), text(record, "question") + UNANSWERABLE + SHORT
        yield self._sample(image, image, prompt, _answers(record), text(record, "answer_type"))


# ---------------------------------------------------------------------------------------------- answers


def _answers(record: Record) -> tuple[str, ...]:
    """Each annotator's answer: texts (TextVQA) or objects with `answer`. Raises BadRecord for a test split's record,
    which has none.
    """
    if "answers" not in record:
        raise BadRecord("field 'answers' is missing; a test split's answers are not public, take the validation split")
    listed = get(record, "answers", list)
    answers = [text(answer, "answer") if isinstance(answer, Mapping) else answer for answer in listed]
    if not all(isinstance(answer, str) for answer in answers):
        raise BadRecord("field 'answers': expected texts, or objects with 'answer'")
    if len(answers) != ANNOTATORS:
        raise BadRecord(f"field 'answers': expected those of {ANNOTATORS} annotators, got {len(answers)}")
    return tuple(answers)


def _by_key(file: Path, name: str, key: Key) -> dict[Any, Record]:
    return _keyed(file, within(file, name), key)


def _keyed(file: Path, annotations: Sequence[Any], key: Key) -> dict[Any, Record]:
    """Annotations by the key that joins them to questions. Raises ConfigError naming file and record of a bad record or
    a repeated key.
    """
    by_key: dict[Any, Record] = {}
    for number, record in enumerate(annotations):
        try:
            if not isinstance(record, Mapping):
                raise BadRecord(f"expected an object, got {type(record).__name__}")
            if (why := fault_within(record)) is not None:
                raise BadRecord(why)
            name = key(record)
            if by_key.setdefault(name, record) is not record:
                raise BadRecord(f"a second one for {name!r}")
        except BadRecord as error:
            raise ConfigError(f"{file}: record {number}: {error}") from error
    return by_key
