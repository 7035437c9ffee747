"""What a chat endpoint's reply says: an answer, a block by a content filter, or an error in the server's own words."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mirage_dist.evals.models import reasoning
from mirage_dist.schema import secrets

FILTERED = "filtered"  # the reason of an answer that the endpoint's content filter withheld
HOPELESS = (401, 402, 403, 404, 405)  # every other request to this address with this key would fail too
FILTER_STATUS = (400, 403, 422, 451)  # what endpoints send with the code of their content filter
LONGEST_WORDS = 300  # characters of a server's message that are shown
SHORTEST_ECHO = 20  # characters of the request that a message may repeat before they are masked

# Names of filters, without case and punctuation: `content_filter`, `SAFETY`, `ResponsibleAIPolicyViolation`, …
_FILTER_CODE = re.compile(
    "contentfilter|contentpolicy|policyviolation|responsibleai|moderation|guardrail|datainspection|prohibited|"
    "blocklist|safety|recitation|spii"
)
_FILTER_WORDS = re.compile(
    r"content (?:management )?polic|content[ _]filter|flagged|usage polic|content exists risk|inappropriate content|"
    r"\bmoderation\b|\bguardrail",
    re.IGNORECASE,
)
_CODE = re.compile(r"[A-Za-z][\w.:-]{0,60}")
_WORD = re.compile(r"\S+")


class Declined(str):
    """The words of `message.refusal`, with which a model declined to answer: an answer, but no verdict or rewrite."""


@dataclass(frozen=True)
class Failed:
    """A request without an answer.

    reason: in this package's words and the server's code. words: the server's message, shortened, without keys and
    without the request; for the screen, never for a file. final: the same request would get none again. untried: it
    was not sent, because the endpoint had been given up.
    """

    reason: str
    words: str = ""
    final: bool = False
    untried: bool = False

    def __str__(self) -> str:
        return f"{self.reason}: {self.words}" if self.words else self.reason


class NoAnswer(Exception):
    """A request without an answer.

    again: the request may succeed later; wait: seconds that the server requested before. alive: the reply shows that
    the server works. hopeless: every other request would fail in the same way.
    """

    def __init__(
        self,
        failure: Failed,
        *,
        again: bool = False,
        alive: bool = True,
        hopeless: bool = False,
        wait: float | None = None,
    ) -> None:
        super().__init__(str(failure))
        self.failure, self.again, self.alive, self.hopeless, self.wait = failure, again, alive, hopeless, wait


def answer(body: bytes) -> str:
    """The answer in the body of a completion, of a chat or of a text, without reasoning; empty if only reasoning came.

    Raises NoAnswer for a block by a content filter, for a completion without content, and for what is none.
    """
    try:
        choice = json.loads(body)["choices"][0]
        finish = choice.get("finish_reason")
        message = choice["message"] if "message" in choice else {"content": choice["text"]}
        content, refusal = message.get("content"), message.get("refusal")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise NoAnswer(Failed("not a chat completion"), again=True, alive=False) from None
    if isinstance(content, list):
        content, refusal = _parts(content, "text"), _parts(content, "refusal") or refusal
    if content is not None and not isinstance(content, str):
        raise NoAnswer(Failed("not a chat completion"), again=True, alive=False)
    if isinstance(finish, str) and _FILTER_CODE.search(_plain(finish)):
        raise NoAnswer(Failed(FILTERED, final=True))
    if finish == "error":  # of a relay whose own server broke off
        raise NoAnswer(Failed("an answer that was broken off"), again=True)
    if content and (text := _encodable(reasoning.answer(content))).strip():
        return text
    if isinstance(refusal, str) and refusal.strip():
        return Declined(_encodable(refusal))
    if content is None and finish != "length" and not message.get("reasoning_content"):
        raise NoAnswer(Failed("no content", final=True), again=True)
    return ""


def _encodable(text: str) -> str:
    """The text with "?" for each half of a surrogate pair, which a server may cut an answer at."""
    return text.encode(errors="replace").decode()


def _parts(content: list[Any], kind: Literal["text", "refusal"]) -> str:
    """The texts of the parts of one kind; parts of other kinds are reasoning."""
    parts = [part if isinstance(part, dict) else {"type": "text", "text": part} for part in content]
    texts = (part.get(kind) for part in parts if part.get("type", kind) in (kind, f"output_{kind}"))
    return "".join(text for text in texts if isinstance(text, str))


def error_in(body: bytes) -> bool:
    """Whether the body of a 200 is an error, as some relays send it."""
    tree = _tree(body)
    return isinstance(tree, dict) and isinstance(tree.get("error"), dict) and not tree.get("choices")


def error(status: int, body: bytes, wait: float | None, secret: str, request: str) -> NoAnswer:
    """What an error response means.

    secret: the key, which no word shown may repeat. request: the text that was sent, which may be a model's output.
    """
    tree = _tree(body)
    codes, message = _codes(tree), _message(tree, body)
    if status == 200:  # the error within it has the status
        status = next((code for code in codes if isinstance(code, int) and 400 <= code < 600), 500)
    names = [code for code in codes if isinstance(code, str) and _CODE.fullmatch(code)]
    if status in FILTER_STATUS and (
        any(_FILTER_CODE.search(_plain(name)) for name in names) or _FILTER_WORDS.search(message)
    ):
        return NoAnswer(Failed(FILTERED, shown(message, secret, request), final=True))
    name = next((f" {name}" for name in names if shown(name, secret, request) == name), "")
    failure = Failed(f"HTTP {status}{name}", shown(message, secret, request))
    if 300 <= status < 400:
        words = "a redirect, which is not followed because it would send the key elsewhere; set url to where it leads"
        return NoAnswer(Failed(failure.reason, words))
    if status in (408, 429) or status >= 500:
        return NoAnswer(failure, again=True, alive=False, wait=wait)
    return NoAnswer(failure, hopeless=status in HOPELESS)


def _tree(body: bytes) -> Any:
    try:
        tree = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return tree[0] if isinstance(tree, list) and tree else tree


def _errors(tree: Any) -> Iterator[Mapping[str, Any]]:
    """The error object of a response, and those within it, from the outside in."""
    for _ in range(4):
        if not isinstance(tree, dict):
            return
        yield tree
        tree = next((tree[name] for name in ("error", "innererror", "metadata") if name in tree), None)


def _codes(tree: Any) -> list[Any]:
    errors = [*_errors(tree)]
    inner = [error for error in errors if "error" not in error]  # not the envelope around it
    return [error[name] for name in ("code", "type", "status") for error in inner or errors if error.get(name)]


def _message(tree: Any, body: bytes) -> str:
    for own in _errors(tree):
        for name in ("message", "detail", "error"):
            if isinstance(own.get(name), str):
                return own[name]
            if name == "detail" and isinstance(own.get(name), list):
                return json.dumps(own[name], ensure_ascii=False)
    return re.sub(r"<[^>]{0,200}>", " ", body[:4096].decode(errors="replace"))


def _plain(code: str) -> str:
    return re.sub(r"[\W_]", "", code).lower()


def shown(message: str, secret: str, request: str) -> str:
    """A server's message for the screen: one line, shortened, without the key or what looks like one, and without what
    it repeats of the request.
    """
    message = message[: 4 * LONGEST_WORDS]
    message = secrets.masked(message.replace(secret, secrets.MASK) if secret else message)
    if echo := _echoed(message, request):
        message = "".join("\0" if i in echo else sign for i, sign in enumerate(message))
        message = re.sub("\0+", "[the request]", message)
    words = [_masked(word, secret) for word in _WORD.findall("".join(s if s.isprintable() else " " for s in message))]
    line = " ".join(words)
    return line if len(line) <= LONGEST_WORDS else line[:LONGEST_WORDS] + " …"


def _echoed(message: str, request: str) -> set[int]:
    """The places of the message that repeat SHORTEST_ECHO or more characters of the request."""
    quoted = json.dumps(request), json.dumps(request, ensure_ascii=False), request
    starts = range(len(message) - SHORTEST_ECHO + 1)
    hits = (i for i in starts if any(message[i : i + SHORTEST_ECHO] in text for text in quoted))
    return {place for i in hits for place in range(i, i + SHORTEST_ECHO)}


def _masked(word: str, secret: str) -> str:
    """The word, or a mask when it holds a piece of the key, or looks like a key itself."""
    size = min(6, len(secret))
    pieces = {secret[i : i + size].lower() for i in range(len(secret) - size + 1)} if size > 3 else {secret}
    if secret and any(piece in word.lower() for piece in pieces):
        return secrets.MASK
    looks = re.search(r"(?i)\b(?:sk|pk|hf|gsk|key|ghp|AIza|xai)[-_*]\S{4,}", word) or any(
        re.search(r"\d", run) and re.search(r"[A-Za-z]", run) for run in re.findall(r"[A-Za-z0-9_+=]{24,}", word)
    )
    return secrets.MASK if looks else word
