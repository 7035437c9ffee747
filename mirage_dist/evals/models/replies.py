"""What a chat endpoint's reply says: an answer, a block by a content filter, or an error in the server's own words.

The fields of a completion are those of OpenAI's published schema (`CreateChatCompletionResponse`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mirage_dist.evals.models import reasoning
from mirage_dist.schema import secrets

FILTERED = "filtered"  # the reason of an answer that the endpoint's content filter withheld
EMPTY = "no content"  # the reason of a completion that holds none
HOPELESS = (401, 402, 403, 404, 405)  # every other request to this address with this key would fail too
FILTER_STATUS = (400, 403, 422, 451)  # what endpoints send with the code of their content filter
LONGEST_WORDS = 300  # characters of a server's message that are shown
LONGEST_NAME = 200  # characters of a model's name and the like
LARGEST_COUNT = 10**12  # tokens of one completion
SHORTEST_KEY = 8  # characters of a key that no answer holds by chance
SHORTEST_ECHO = 20  # characters of the request that a message may repeat before they are masked

# Names of filters, without case and punctuation: `content_filter`, `SAFETY`, `ResponsibleAIPolicyViolation`, …
_FILTER_CODE = re.compile(
    "contentfilter|contentpolicy|policyviolation|responsibleai|moderation|guardrail|datainspection|prohibited|"
    "blocklist|safety|recitation|spii"
)
# The same as the code of an error that blocks one request. Others only mention a filter, such as an unknown setting.
_BLOCK_CODE = re.compile(
    "(?:prompt|input|output|response|request|image|text)?"
    "(?:contentfilter(?:ed)?|contentpolicy|policyviolation|responsibleaipolicy|moderation|guardrails?|datainspection|"
    "prohibitedcontent|blocklist|safety|recitation|spii)"
    "(?:policy)?(?:violation|violated|blocked|triggered|intervened|failed|flagged|error)?"
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
class Reply:
    """A completion.

    content: as it came, reasoning included. refusal: the words with which the model declined, where it did so in a
    field of their own. finish: why the text ends, such as `stop` or `length`. model: that it names as its own.
    fingerprint: of the backend's configuration. prompt_tokens, completion_tokens: its usage. What it does not state is
    None.
    """

    content: str
    refusal: str = ""
    finish: str | None = None
    model: str | None = None
    fingerprint: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None

    @property
    def text(self) -> str:
        """All that the model wrote, as an engine on this machine would give it."""
        return self.content.strip() or self.refusal.strip()

    @property
    def answer(self) -> str:
        """The answer without reasoning; empty if only reasoning came."""
        if (text := reasoning.answer(self.content)).strip():
            return text
        return Declined(self.refusal) if self.refusal.strip() else ""


@dataclass(frozen=True)
class Failed:
    """A request without an answer.

    reason: in this package's words and the server's code. words: the server's message, shortened, without keys and
    without the request; for the screen, never for a file. final: the same request would get none again. untried: it
    was not sent, because the endpoint had been given up. guessed: that a filter blocked it is known from the server's
    words alone, which may be about the key, the account or a wrong field. reply: the completion that holds no answer,
    if one came.
    """

    reason: str
    words: str = ""
    final: bool = False
    untried: bool = False
    guessed: bool = False
    reply: Reply | None = field(default=None, compare=False)

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


def completion(body: bytes, secret: str = "") -> Reply:
    """The body of a completion, of a chat or of a text. secret: the key, which no part of it may repeat.

    Raises NoAnswer for a block by a content filter, for a completion without content, and for what is none.
    """
    try:
        tree = json.loads(body)
        choice = tree["choices"][0]
        finish = choice.get("finish_reason")
        message = choice["message"] if "message" in choice else {"content": choice["text"]}
        content, refusal = message.get("content"), message.get("refusal")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise NoAnswer(Failed("not a chat completion"), again=True, alive=False) from None
    if isinstance(content, list):
        content, refusal = _parts(content, "text"), _parts(content, "refusal") or refusal
    if content is not None and not isinstance(content, str):
        raise NoAnswer(Failed("not a chat completion"), again=True, alive=False)
    usage = tree.get("usage")
    reply = Reply(
        _own(content or "", secret),
        _own(refusal, secret) if isinstance(refusal, str) else "",
        _name(finish, secret),
        _name(tree.get("model"), secret),
        _name(tree.get("system_fingerprint"), secret),
        *(_count(usage, name) for name in ("prompt_tokens", "completion_tokens")),
    )
    declined = finish == "refusal" and not reply.text
    if declined or (isinstance(finish, str) and _FILTER_CODE.search(_plain(finish))):
        raise NoAnswer(Failed(FILTERED, final=True, reply=reply))
    if finish == "error":  # of a relay whose own server broke off
        raise NoAnswer(Failed("an answer that was broken off"), again=True)
    cut = finish == "length" or message.get("reasoning_content")
    if content is None and not reply.refusal.strip() and not cut:
        raise NoAnswer(Failed(EMPTY, final=True, reply=reply), again=True)
    return reply


def _own(text: str, secret: str) -> str:
    """A text of the server's: with "?" for each half of a surrogate pair, which it may cut an answer at, and without
    the key.
    """
    text = text.encode(errors="replace").decode()
    # A word such as EMPTY, which servers without keys take for one, may stand in any answer.
    random = len(secret) >= SHORTEST_KEY and any(sign.isdigit() for sign in secret)
    return text.replace(secret, secrets.MASK) if random else text


def _name(value: Any, secret: str) -> str | None:
    """A word of the server's that may be written to a file: one short line."""
    if not isinstance(value, str) or not value.strip():
        return None
    line = "".join(sign if sign.isprintable() else " " for sign in _own(value, secret))
    return secrets.masked(line)[:LONGEST_NAME].strip() or None


def _count(usage: Any, name: str) -> int | None:
    count = usage.get(name) if isinstance(usage, dict) else None
    return count if isinstance(count, int) and not isinstance(count, bool) and 0 <= count <= LARGEST_COUNT else None


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
    codes, words = _codes(tree), shown(_message(tree, body), secret, request)
    names = [code for code in codes if isinstance(code, str) and _CODE.fullmatch(code)]
    blocked = any(_BLOCK_CODE.fullmatch(_plain(name)) for name in names) or _blocked(tree, names, words)
    if status == 200:  # the error within it has the status
        default = FILTER_STATUS[0] if blocked else 500
        status = next((code for code in codes if isinstance(code, int) and 400 <= code < 600), default)
    # Of the words, those that repeat no part of the request, which may be about filters.
    mentioned = _FILTER_WORDS.search(words) or any(_FILTER_CODE.search(_plain(name)) for name in names)
    if status in FILTER_STATUS and (blocked or mentioned):
        return NoAnswer(Failed(FILTERED, words, final=True, guessed=not blocked))
    name = next((f" {name}" for name in names if shown(name, secret, request) == name), "")
    failure = Failed(f"HTTP {status}{name}", words)
    if 300 <= status < 400:
        why = "a redirect, which is not followed because it would send the key elsewhere; set url to where it leads"
        return NoAnswer(Failed(failure.reason, why))
    if status in (408, 429) or status >= 500:
        return NoAnswer(failure, again=True, alive=False, wait=wait)
    return NoAnswer(failure, hopeless=status in HOPELESS)


def _blocked(tree: Any, names: list[str], words: str) -> bool:
    """Whether an error without a filter's code is a block all the same: of OpenAI's reasoning models, of OpenRouter,
    which gives reasons, and of DeepSeek.
    """
    if words.lower() == "content exists risk":
        return True
    reasons = any(isinstance(own.get("reasons"), list) for own in _errors(tree))
    return bool(_FILTER_WORDS.search(words)) and ("invalid_prompt" in names or reasons)


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
                # Of each fault the place and the words, not the input, which is the request.
                faults = [fault for fault in own[name] if isinstance(fault, dict)]
                return "; ".join(f"{json.dumps(fault.get('loc'))}: {fault.get('msg')}" for fault in faults)
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
