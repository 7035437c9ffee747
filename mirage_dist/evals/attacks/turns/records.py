"""Records of multi-turn files, in the forms in which such sets are published.

    {"id": "7", "messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}, …]}
    {"id": "7", "message_0": "{\\"role\\": \\"user\\", \\"body\\": \\"…\\"}", "message_1": …}     MHJ (arXiv 2408.15221)
    {"id": "7", "multi_turn_queries": ["…", "…"]}                                    SafeMTData (arXiv 2410.10700)

A message of the assistant is a fixed answer to the one before it; where none follows a user's message, the model under
test answers. Messages may number their turns (`turn`), which must then be in order. The last message is a user's. The
file has any form that `data.records` reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mirage_dist.data import records
from mirage_dist.data.formats.base import BadRecord
from mirage_dist.schema import ConfigError

MOST = 1000  # messages of a conversation; a table has a column for each
FORMS = "'messages', 'message_0' and so on, or 'multi_turn_queries'"


@dataclass(frozen=True)
class Exchange:
    """One turn. answer: None where the model under test answers."""

    question: str
    answer: str | None


def read(path: Path, key: str) -> Iterator[tuple[int, str, list[Exchange]]]:
    """(number, id, turns) of each record; numbers are from 0.

    Raises ConfigError that names file, record and field for a missing id, no conversation, an empty or missing message,
    an unknown role, and messages out of order.
    """
    number = -1
    for number, record in records.checked(path):
        try:
            if not isinstance(record, Mapping) or record.get(key) in (None, ""):
                raise BadRecord(f"field {key!r} is missing; expected the id of the question that it belongs to")
            yield number, str(record[key]), _turns(record)
        except BadRecord as error:
            raise ConfigError(f"{path}: record {number}: {error}") from error
    if number < 0:
        raise ConfigError(f"{path}: holds no conversation; expected records with {FORMS}")


def _turns(record: Mapping[str, Any]) -> list[Exchange]:
    messages = list(_messages(record))
    if not messages:
        raise BadRecord(f"holds no conversation; expected the field {FORMS}")
    turns: list[Exchange] = []
    answered = True  # the last message so far, by the assistant
    for field, role, content in messages:
        if role not in ("user", "assistant"):
            hint = "; a system prompt is the recipe's template.system_prompt" if role == "system" else ""
            raise BadRecord(f"field {field!r}: unknown role {role!r:.80}; expected 'user' or 'assistant'{hint}")
        if not isinstance(content, str) or not content.strip():
            raise BadRecord(f"field {field!r}: expected text, got {content!r:.80}")
        if role == "assistant" and answered:
            which = "a second answer in a row" if turns else "an answer before the first question"
            raise BadRecord(f"field {field!r}: out of order: {which}; expected a message of the user")
        if role == "assistant":
            turns[-1] = Exchange(turns[-1].question, content)
        else:
            turns.append(Exchange(content, None))
        answered = role == "assistant"
    if answered:
        raise BadRecord(f"field {messages[-1][0]!r}: the last message is an answer; expected a question for the model")
    return turns


def _messages(record: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(field, role, content) of each message, in order."""
    if "messages" in record:
        given = record["messages"]
        if not isinstance(given, list):
            raise BadRecord(f"field 'messages': expected a list, got {type(given).__name__}")
        first = None
        for place, message in enumerate(given):
            field = f"messages[{place}]"
            yield field, *_message(field, message)
            if "turn" in message:
                first = message["turn"] if place == 0 else first
                _check_number(field, message["turn"], first, place, given)
    elif "multi_turn_queries" in record:
        given = record["multi_turn_queries"]
        if not isinstance(given, list):
            raise BadRecord(f"field 'multi_turn_queries': expected a list, got {type(given).__name__}")
        for place, text in enumerate(given):
            yield f"multi_turn_queries[{place}]", "user", text
    elif "message_0" in record:
        yield from _columns(record)


def _check_number(field: str, number: Any, first: Any, place: int, messages: list[Any]) -> None:
    """Turn numbers count either messages or the user's messages; the first of them is 0 or 1."""
    of_user = sum(m.get("role") == "user" for m in messages[: place + 1]) - 1
    if first not in (0, 1) or number not in (first + place, first + of_user):
        expected = f"{first + of_user} or {first + place}" if first in (0, 1) else "0 or 1"
        raise BadRecord(f"field '{field}.turn': out of order, or one is missing: got {number!r}, expected {expected}")


def _columns(record: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """The columns of a table: each message as JSON, empty ones after the last."""
    end = None
    for place in range(MOST):
        field = f"message_{place}"
        if not isinstance(value := record.get(field), Mapping) and (value is None or not str(value).strip()):
            end = field if end is None else end
            continue
        if end is not None:
            raise BadRecord(f"field {end!r} is missing, and {field!r} is there; expected messages without a gap")
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise BadRecord(f"field {field!r}: no JSON: {error}") from error
        yield field, *_message(field, value)


def _message(field: str, message: Any) -> tuple[Any, Any]:
    """Role and text. MHJ has the text as `body`."""
    if not isinstance(message, Mapping) or "role" not in message:
        raise BadRecord(f"field {field!r}: expected an object with role and content, got {message!r:.80}")
    return message["role"], message.get("content", message.get("body"))
