"""POPE and MME, whose answers are yes or no: LLaVA's question files with the official answers, or tables of the hub.

The hub's tables (`question_id, image, question, answer, category`) hold questions, pictures and answers together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from mirage_dist.data import records as streamed
from mirage_dist.data.formats.base import BadRecord, Opened, image, text
from mirage_dist.data.formats.vqa import SHORT, OfficialAnswers
from mirage_dist.data.sample import Sample
from mirage_dist.schema import ConfigError

ANSWERS = ("yes", "no")

Record = Mapping[str, Any]


def _answer(value: str, place: str) -> str:
    """Raises BadRecord for anything but yes and no, in any case."""
    if (answer := value.strip().lower()) not in ANSWERS:
        raise BadRecord(f"{place}: expected yes or no, got {value!r:.80}")
    return answer


# --------------------------------------------------------------------------------------------------- POPE

STRATEGIES = ("adversarial", "popular", "random")  # how the absent objects were chosen
LABELS = "coco_pope_{}.json"


@dataclass(frozen=True)
class POPE(OfficialAnswers):
    """POPE (Li et al., EMNLP 2023): whether an object is in the picture, under three choices of absent objects.

    annotations: the folder of the three official files, coco_pope_adversarial.json and so on. Without it, `path` is one
    of them, their folder, or a table of the hub. The category is the choice of absent objects.
    """

    score = "pope"
    official = "the folder of coco_pope_{adversarial,popular,random}.json, output/coco of the repository AoiDragon/POPE"
    folder = LABELS.format("*")

    def open(self) -> Opened:
        if self.annotations is None:
            self.with_answers()
            return Opened(None, self.parse)
        folder = self.answers()
        labels_of = cache(lambda category: _labels(folder / LABELS.format(category), self.official))

        def parse(record: Record, number: int, dropped: Counter[str]) -> Iterator[Sample]:
            """LLaVA joins its questions to the answers by position; here picture and question decide."""
            category, prompt, picture = self._category(record), text(record, "text"), text(record, "image")
            key = picture, _spelled(prompt.removesuffix(SHORT))
            if key not in (labels := labels_of(category)):
                raise BadRecord(f"field 'text': {key[1]!r} about {picture} has no answer in {LABELS.format(category)}")
            yield self._sample(record, category, picture, prompt, labels[key])

        return Opened(None, parse)

    def parse(self, record: Record, number: int, dropped: Counter[str]) -> Iterator[Sample]:
        """A record of an official file, which has a label, or of a table of the hub."""
        question, label = ("text", "label") if "label" in record else ("question", "answer")
        answer = _answer(text(record, label), f"field {label!r}")
        yield self._sample(record, self._category(record), image(record), text(record, question) + SHORT, answer)

    def _sample(self, record: Record, category: str, picture: str, prompt: str, answer: str) -> Sample:
        name = f"{category}/{text(record, 'question_id')}"
        return Sample(name, self.picture(picture), prompt, answer, True, category, self.path)

    def _category(self, record: Record) -> str:
        own = Path(self.path).stem.removeprefix(LABELS.partition("{")[0])
        category = text(record, "category") if "category" in record else own
        if category not in STRATEGIES:
            raise BadRecord(f"category {category!r}: expected {', '.join(STRATEGIES)}, by a field or the file's name")
        return category


def _labels(file: Path, official: str) -> dict[tuple[str, str], str]:
    """(picture, question) -> yes or no, of one official file."""
    if not file.is_file():
        raise ConfigError(f"annotations: {file}: no such file; expected {official}")
    labels: dict[tuple[str, str], str] = {}
    for number, record in streamed.checked(file):
        try:
            if not isinstance(record, Mapping):
                raise BadRecord(f"expected an object, got {type(record).__name__}")
            key = text(record, "image"), _spelled(text(record, "text"))
            answer = _answer(text(record, "label"), "field 'label'")
            if labels.setdefault(key, answer) != answer:
                raise BadRecord(f"a second answer to {key[1]!r} about {key[0]}")
        except BadRecord as error:
            raise ConfigError(f"{file}: record {number}: {error}") from error
    return labels


def _spelled(question: str) -> str:
    """The question without the misspelling that older copies of both files have in one question of a hundred."""
    return question.replace("imange", "image").strip()


# ---------------------------------------------------------------------------------------------------- MME

TASKS = {
    "perception": (
        *("existence", "count", "position", "color", "posters"),
        *("celebrity", "scene", "landmark", "artwork", "OCR"),
    ),
    "cognition": ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
}
ASK = "Please answer yes or no."  # ends each question of the official files; LLaVA's prompts have `SHORT` instead


@dataclass(frozen=True)
class MME(OfficialAnswers):
    """MME (Fu et al., 2023): two questions on each picture, one to answer with yes and one with no, in 14 tasks.

    annotations: the official folder, which has texts of questions and answers for each picture. Without it, `path` is
    a table of the hub. The category is kind and task, such as perception/existence; the id is PICTURE/ANSWER.
    """

    score = "mme"
    official = (
        "the folder MME_Benchmark_release_version, which MME's authors give on request (the repository "
        "BradyFU/Awesome-Multimodal-Large-Language-Models says how)"
    )

    def open(self) -> Opened:
        if self.annotations is None:
            self.with_answers()
            return Opened(None, self.parse)
        folder = self.answers()

        def parse(record: Record, number: int, dropped: Counter[str]) -> Iterator[Sample]:
            name, prompt = text(record, "question_id"), text(record, "text")
            file, question = self._file(folder, name), prompt.removesuffix(SHORT).strip()
            answers = _questions(file)
            if question not in answers:
                raise BadRecord(f"field 'text': {question!r} is no question of {file}")
            yield self._sample(name, text(record, "image"), prompt, answers[question])

        return Opened(None, parse)

    def parse(self, record: Record, number: int, dropped: Counter[str]) -> Iterator[Sample]:
        """A record of a table of the hub."""
        answer = _answer(text(record, "answer"), "field 'answer'")
        prompt = text(record, "question").strip().removesuffix(ASK).strip() + SHORT
        yield self._sample(text(record, "question_id"), image(record), prompt, answer)

    def _sample(self, name: str, picture: str, prompt: str, answer: str) -> Sample:
        task, file = _task(name), PurePosixPath(name).name
        kind = next(kind for kind, tasks in TASKS.items() if task in tasks)
        return Sample(
            f"{task}/{file}/{answer}", self.picture(picture), prompt, answer, True, f"{kind}/{task}", self.path
        )

    def _file(self, folder: Path, name: str) -> Path:
        """The official text of a picture. Some tasks have pictures and texts in two folders, others in one."""
        place = folder / _task(name)
        apart = place / "questions_answers_YN"
        file = (apart if apart.is_dir() else place) / f"{PurePosixPath(name).stem}.txt"
        if not file.is_file():
            raise ConfigError(f"annotations: {file}: no such file; expected {self.official}")
        return file


def picture_of(identity: str) -> str:
    """The picture of a sample's id, which both questions on it share."""
    return identity.rpartition("/")[0]


def _task(name: str) -> str:
    task = name.partition("/")[0]
    if not any(task in tasks for tasks in TASKS.values()):
        raise BadRecord(f"field 'question_id': {name!r}: expected TASK/PICTURE, of the tasks of MME")
    return task


def _questions(file: Path) -> dict[str, str]:
    """Question, without its request for yes or no, -> answer. Raises ConfigError naming file and line."""
    answers: dict[str, str] = {}
    for number, line in enumerate(streamed.text(file).splitlines(), start=1):
        if not line.strip():
            continue
        question, tab, answer = line.rpartition("\t")
        try:
            if not tab:
                raise BadRecord("expected a question, a tab and its answer")
            answers[question.strip().removesuffix(ASK).strip()] = _answer(answer, "the answer")
        except BadRecord as error:
            raise ConfigError(f"{file}: line {number}: {error}") from error
    return answers
