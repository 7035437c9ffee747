"""The answers whose likelihoods measure forgetting: right ones, their paraphrases, and wrong ones made from the data.

Wrong answers are not written by a language model, as TOFU's are (Maini et al., 2024, arXiv 2401.06121): they are right
answers with another sample's content in place of their own.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mirage_dist import disk
from mirage_dist.data.sample import Sample
from mirage_dist.data.scripts import unspaced
from mirage_dist.erasure import forgetting
from mirage_dist.erasure.setting import content, group


@dataclass(frozen=True)
class Part:
    """A set of answers to score. contents: of each; equal ones are not independent. wrong: wrong answers to each.

    paraphrases: of each answer, None where the data have none. The wrong answers are in the wording of the paraphrase
    where there is one, and of the answer elsewhere.
    """

    samples: list[Sample]
    contents: list[str]
    paraphrases: list[str | None]
    wrong: list[list[str]]

    @classmethod
    def of(cls, samples: Sequence[Sample], pattern: str | None, wrong: int, most: int, seed: int) -> Part:
        """The first `most` samples, each with at most `wrong` wrong answers, whose contents are drawn from all samples.

        pattern: matches the content in an answer; the rest of the answer stays. None: the whole answer is the content.
        A wrong answer has another content, of a sample of the same topmost category. A content that any sample, or one
        of its references, states about the same picture (without a picture: in answer to the same question) is right,
        and not drawn; spelling, case and punctuation do not make another content. A sample has fewer wrong answers, or
        none, where there are no more contents, and none where the pattern does not match.
        """
        kept = list(samples[:most])
        contents = [content(sample.answer, pattern) or sample.answer.strip() for sample in kept]
        paraphrases = [paraphrase(sample, pattern) for sample in kept]
        drawn = _drawn(samples, pattern, wrong, most, seed)
        made = [
            [_restated(sample.answer if other is None else other, pattern, text) for text in texts]
            for sample, other, texts in zip(kept, paraphrases, drawn, strict=True)
        ]
        return cls(kept, contents, paraphrases, made)

    @property
    def rows(self) -> list[list[str]]:
        """Of each sample the texts to score: its answer, then its paraphrase where it has one, then wrong answers."""
        own = zip(self.samples, self.paraphrases, self.wrong, strict=True)
        return [[s.answer, *([] if other is None else [other]), *wrong] for s, other, wrong in own]

    @property
    def digest(self) -> str:
        """SHA-256 of what is scored; the folders of the files do not count."""
        own = [[s.id, s.question, s.category, Path(s.image or "").name, list(s.history)] for s in self.samples]
        return disk.digest([own, self.contents, self.rows])


def paraphrase(sample: Sample, pattern: str | None) -> str | None:
    """The first of the sample's references that states the answer's content, as `pattern` matches it, in other words.

    None without a pattern, which alone tells the content from its wording; and where the answer is itself one of the
    references: these are then what several annotators answered, who need not mean the same.
    """
    own = _content(sample.answer, pattern)
    answer = forgetting.key(sample.answer)
    if pattern is None or not own or answer in map(forgetting.key, sample.references):
        return None
    stated = ((text, _content(text, pattern)) for text in sample.references)
    return next((text for text, other in stated if other and forgetting.key(other) == forgetting.key(own)), None)


def _drawn(samples: Sequence[Sample], pattern: str | None, count: int, most: int, seed: int) -> list[list[str]]:
    """To each of the first `most` samples the contents of its wrong answers."""
    contents = [_content(sample.answer, pattern) for sample in samples]
    pools: dict[str, dict[str, str]] = {}  # topmost category -> what a content is compared by -> as it is first written
    right: dict[Hashable, set[str]] = {}
    for sample, own in zip(samples, contents, strict=True):
        known = right.setdefault(_subject(sample), set())
        known.update(forgetting.key(_content(text, pattern) or text) for text in sample.references)
        if own:
            pools.setdefault(_topmost(sample), {}).setdefault(forgetting.key(own), own)
            known.add(forgetting.key(own))
    made: list[list[str]] = []
    for sample, own in zip(samples[:most], contents[:most], strict=True):
        if not own or not count:
            made.append([])
            continue
        known = right[_subject(sample)]
        others = [text for name, text in pools[_topmost(sample)].items() if name not in known]
        made.append(heapq.nsmallest(count, others, lambda text, s=sample: disk.sha256_text(f"{seed} {s.id} {text}")))
    return made


def _span(answer: str, pattern: str | None) -> tuple[int, int] | None:
    """Where the content is, without white space around it; None where there is none."""
    match = re.search(r"(?s).*" if pattern is None else pattern, answer)
    if match is None or not (own := match[0].strip()):
        return None
    start = match.start() + match[0].index(own)
    return start, start + len(own)


def _content(answer: str, pattern: str | None) -> str | None:
    span = _span(answer, pattern)
    return None if span is None else answer[slice(*span)]


def _restated(answer: str, pattern: str | None, other: str) -> str:
    """The answer with `other` in place of its content, wherever it states this content in whole words."""
    span = _span(answer, pattern)
    assert span is not None
    start, end = span
    own = answer[start:end]
    words = r"\s+".join(map(re.escape, own.split()))
    # Scripts without spaces between words have no boundaries to look for.
    before, after = (r"" if unspaced(own[edge]) or not own[edge].isalnum() else r"\b" for edge in (0, -1))
    again = (match.span() for match in re.finditer(f"{before}{words}{after}", answer, re.IGNORECASE))
    places = sorted([span, *(one for one in again if one[1] <= start or one[0] >= end)])
    pieces, place = [], 0
    for first, last in places:
        pieces += [answer[place:first], other]
        place = last
    return "".join([*pieces, answer[place:]])


def _subject(sample: Sample) -> Hashable:
    """What an answer is about: answers to several questions about one picture may all be right to each."""
    return (sample.image is not None, group(sample))


def _topmost(sample: Sample) -> str:
    return sample.category.partition("/")[0]
