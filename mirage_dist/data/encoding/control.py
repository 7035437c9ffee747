"""Control tokens (ends, roles, pictures) come from the chat template alone: texts that spell one are encoded as text.

A tokenizer splits a text at its control tokens, whoever wrote them there, so a question could end its own turn or begin
the model's. Before a template is rendered, marks in the data are replaced by stand-ins, which no template and no
processor takes for marks. What was rendered then has the template's marks only. A second tokenizer, made from the first
one with every control token renamed, encodes it: the template's marks are renamed too, and the data's are words like
others. Both encode all other text alike, which is checked on the template itself.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

from mirage_dist.schema import ConfigError

OPEN, CLOSE = "\ufdd0", "\ufdd1"  # around a stand-in: noncharacters (Unicode 23.7), which texts do not have
STAND_IN = re.compile(f"{OPEN}(\\d+){CLOSE}")
OTHER_NAME = "qzx{:05d}xzq"  # of a control token: letters and digits, which every normaliser leaves as they are


class SpelledControl(ConfigError):
    """A text that spells a control token and cannot be encoded as text. The message names the token."""


class Control:
    """The control tokens of one model: those that are special, those of pictures, and those of its chat template.

    A token that was added to the vocabulary and is not special, such as <think>, is a control token if the template
    writes it around a user's turn, as DeepSeek-R1's templates write their roles. The token for unknown text is none.

    tokenizer, processor: those of the model. written: a conversation of two turns in the chat template. picture_token:
    the id at whose places the model puts a picture's features.
    """

    def __init__(self, tokenizer: Any, processor: Any, written: str, picture_token: int | None) -> None:
        self.tokenizer, self.written = tokenizer, written
        special = dict(zip(tokenizer.all_special_ids, map(str, tokenizer.all_special_tokens), strict=True))
        special |= {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        pictures = set(_marks(processor))
        others = {
            i: token.content
            for i, token in tokenizer.added_tokens_decoder.items()
            if i == picture_token
            or token.content in pictures
            or (token.content in written and not token.content.isalnum())
        }
        self.token_of = {i: content for i, content in {**others, **special}.items() if content.strip()}
        unknown, ends = tokenizer.unk_token, (tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token)
        self.unknown = unknown if unknown in self.token_of.values() and unknown not in ends else None
        # A noncharacter in the data gets a stand-in as marks do, so that it is never taken for a part of one.
        self.spellings = sorted({*self.token_of.values(), *pictures, OPEN, CLOSE}, key=len, reverse=True)
        self.ids = {i for i, content in self.token_of.items() if content != self.unknown}
        self.tokens = {self.token_of[i] for i in self.ids}
        self.number = {content: n for n, content in enumerate(self.spellings)}
        self.pattern = re.compile("|".join(map(re.escape, self.spellings)))

    # ------------------------------------------------------------------------------------------ stand-ins

    def shielded(self, text: str) -> str:
        """The text with a stand-in for each control token that it spells."""
        return self.pattern.sub(lambda match: f"{OPEN}{self.number[match[0]]}{CLOSE}", text)

    def neutral(self, text: str) -> str:
        """A rendered text with a letter in place of each stand-in."""
        return STAND_IN.sub("x", text)

    def plain(self, text: str, ids: Sequence[int], start: bool) -> bool:
        """Whether these are the ids of a rendered text as they should be: with the template's control tokens only.

        start: whether the tokenizer added its own ones at the ends.
        """
        return OPEN not in text and (not self._counts or self._count(ids) == self._expected(text, start))

    def _count(self, ids: Iterable[int]) -> int:
        return sum(i in self.ids for i in ids)

    def _expected(self, text: str, start: bool) -> int:
        return len(self._spelled(text)) + (self._added if start else 0)

    def _spelled(self, text: str) -> list[str]:
        return [content for content in self.pattern.findall(text) if content in self.tokens]

    @cached_property
    def _added(self) -> int:
        return self._count(self.tokenizer("", add_special_tokens=True)["input_ids"])

    @cached_property
    def _counts(self) -> bool:
        """Whether each mark of the template is one token, so that counting them shows any others."""
        return self._count(self._own(self.written, False)) == self._expected(self.written, False)

    def _own(self, text: str, start: bool) -> list[int]:
        return self.tokenizer(text, add_special_tokens=start)["input_ids"]

    # ------------------------------------------------------------------------------------------- as text

    def encoded(self, text: str, start: bool) -> list[int]:
        """Token ids of a rendered text in which the data spell control tokens. start: add the tokenizer's own ones.

        Raises SpelledControl where this tokenizer cannot encode it so.
        """
        if self._second is not None and self._counts:
            ids = self._second_ids(self._second, text, start)
            if self._count(ids) == self._expected(text, start):
                return ids
        raise SpelledControl(
            f"a text spells {self._offender(text)}, which is a control token of this model, and the tokenizer cannot "
            "encode it as text; reword it, or leave the record out"
        )

    def _offender(self, text: str) -> str:
        if match := STAND_IN.search(text):
            return repr(self.spellings[int(match[1])])
        ids = Counter(self.token_of[i] for i in self._own(text, False) if i in self.ids)
        return ", ".join(map(repr, ids - Counter(self._spelled(text)))) or "a mark"

    def _second_ids(self, second: Tokenizer, text: str, start: bool) -> list[int]:
        renamed = self.pattern.sub(lambda match: self._other_name(match[0]), text)
        spelled = STAND_IN.sub(lambda match: self.spellings[int(match[1])], renamed)
        return second.encode(spelled, add_special_tokens=start).ids

    def _other_name(self, content: str) -> str:
        return OTHER_NAME.format(self.number[content]) if content in self.tokens else content

    @cached_property
    def _second(self) -> Tokenizer | None:
        """The tokenizer with its control tokens renamed; None where it cannot be made, or encodes otherwise."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):  # one that is written in Python
            return None
        names = {content: self._other_name(content) for content in self.tokens}
        try:
            second = Tokenizer.from_str(json.dumps(_renamed(json.loads(backend.to_str()), names, self.unknown)))
        except Exception:  # of any kind: the library raises plain Exception for what it does not take
            return None
        second.no_truncation()
        second.no_padding()
        same = all(second.token_to_id(names[self.token_of[i]]) == i for i in self.ids)
        alike = (self._second_ids(second, self.written, s) == self._own(self.written, s) for s in (False, True))
        return second if same and all(alike) else None


def _marks(processor: Any) -> list[str]:
    """The marks that a processor looks for in texts, of pictures and videos: its attributes that are tokens."""
    values = (value for name, value in vars(processor).items() if name.endswith("token") and not name.startswith("_"))
    texts = (getattr(value, "content", value) for value in values)
    return [text for text in texts if isinstance(text, str) and text.strip()]


def _renamed(state: dict[str, Any], names: Mapping[str, str], unknown: str | None) -> dict[str, Any]:
    """A tokenizer's JSON with other names for these tokens, in its model too, which may know them as words.

    unknown: the token for unknown text, which only the model may give from now on.
    """
    model = state["model"]
    vocabulary = model["vocab"]
    listed = isinstance(vocabulary, list)  # a Unigram model's pieces with their scores, in the order of their ids
    known = {piece[0] for piece in vocabulary} if listed else vocabulary
    state["added_tokens"] = [
        {**token, "content": names.get(token["content"], token["content"])}
        for token in state["added_tokens"]
        if token["content"] != unknown or unknown not in known
    ]
    if listed:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    else:
        model["vocab"] = {names.get(piece, piece): i for piece, i in vocabulary.items()}
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if model.get("merges"):
        pairs = (tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"])
        model["merges"] = [list(pair) for pair in pairs if not {*pair, "".join(pair)} & names.keys()]
    return state
