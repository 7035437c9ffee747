"""VQAv2, TextVQA, VizWiz and GQA: LLaVA's question files, or the official ones, with the official answers.

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
from mirage_dist.data import tables
from mirage_dist.data.formats.base import BadRecord, Format, Opened, get, records, table, text, within
from mirage_dist.data.sample import Sample
from mirage_dist.schema import ConfigError, documents
from mirage_dist.schema.limits import LINE
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
    official: ClassVar[str] = ""  # the name of the official answers, and where they are published

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.required and self.annotations is None:
            raise ConfigError(f"annotations: format={self.format} needs the official answers: {self.official}")

    def other_files(self) -> dict[str, str]:
        return {"annotations": self.annotations} if self.annotations else {}

    def answers(self) -> Path:
        """The place of the official answers. Raises ConfigError, saying what belongs there, where there is nothing."""
        path = Path(str(self.annotations))
        if not path.exists():
            raise ConfigError(f"annotations: {path}: nothing is there; format={self.format} expects {self.official}")
        return path

    def with_answers(self) -> Path:
        """`path`, which is to have its own answers. Raises ConfigError for LLaVA's questions, which have none."""
        path = Path(self.path)
        if path.is_file() and path.suffix not in tables.TABLES and _is_llavas(path):
            raise ConfigError(f"{path}: LLaVA's questions have no answers; `annotations` is missing: {self.official}")
        return path


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
    official = "v2_mscoco_val2014_annotations.json, published at visualqa.org"

    def open(self) -> Opened:
        annotations = _by_key(self.answers(), "annotations", lambda record: text(record, "question_id"))
        questions, subtype = _vqav2_questions(Path(self.path))

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

    official = "TextVQA_0.5.1_val.json, published at textvqa.org"

    def open(self) -> Opened:
        if self.annotations is None:
            return Opened(within(self.with_answers(), "data"), self.parse)
        annotations = _by_key(
            self.answers(), "data", lambda record: (text(record, "image_id"), text(record, "question").lower())
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

    official = "val.json of Annotations.zip, published at vizwiz.org"
    signature = frozenset({"answers", "answer_type", "answerable"})

    def open(self) -> Opened:
        if self.annotations is None:
            return Opened(records(self.with_answers()), self.parse)
        file = self.answers()
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


@dataclass(frozen=True)
class GQA(OfficialAnswers):
    """Questions: LLaVA's, or the official file's own; answers: the official file (Hudson and Manning, CVPR 2019).

    The category is the question's structural and semantic type, such as query/rel.
    """

    score = "gqa"
    official = "testdev_balanced_questions.json of questions1.2.zip, published at cs.stanford.edu/people/dorarad/gqa"

    def open(self) -> Opened:
        questions = table(self.with_answers() if self.annotations is None else self.answers())
        if self.annotations is None:
            rows = [{**row, "id": name} if isinstance(row, Mapping) else row for name, row in questions.items()]
            return Opened(rows, self.parse)

        def parse(record: Record, number: int, dropped: Counter[str]) -> Iterator[Sample]:
            name = text(record, "question_id")
            if not isinstance(own := questions.get(name), Mapping):
                raise BadRecord(
                    f"field 'question_id': {name!r} is no question of {self.annotations}; are both of one split?"
                )
            yield self._sample(name, text(record, "image"), text(record, "text"), own)

        return Opened(None, parse)

    def parse(self, record: Record, number: int, dropped: Counter[str]) -> Iterator[Sample]:
        """A question of the official file."""
        picture, question = f"{text(record, 'imageId')}.jpg", text(record, "question") + SHORT
        yield self._sample(text(record, "id"), picture, question, record)

    def _sample(self, name: str, image: str, question: str, official: Record) -> Sample:
        if "answer" not in official:
            raise BadRecord("field 'answer' is missing; a test split's answers are not public, take testdev_balanced")
        types = get(official, "types", dict)
        category = f"{text(types, 'structural')}/{text(types, 'semantic')}"
        return Sample(name, self.picture(image), question, text(official, "answer"), True, category, self.path)


# ---------------------------------------------------------------------------------------------- answers


def _is_llavas(path: Path) -> bool:
    """Whether a file's first line is one of LLaVA's questions."""
    with documents.open_file(path) as file:
        line = file.readline(LINE.value)
    try:
        first = documents.parse_json(line.decode("utf-8-sig"))
    except ValueError:
        return False
    return isinstance(first, Mapping) and {"question_id", "image", "text"} <= first.keys() and "label" not in first


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
