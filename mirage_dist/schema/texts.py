"""Texts of recipes and records: what no tokenizer or file can take, and templates, which are filled in one pass."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from mirage_dist.schema.errors import ConfigError

BRACES = re.compile(r"{{|}}|{(\w+)}|([{}])")


def fault(text: str) -> str | None:
    """Why a text cannot be encoded, or None: half of a surrogate pair, which UTF-8 cannot hold."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return f"half of a surrogate pair (\\u{ord(text[error.start]):04x}), which UTF-8 cannot hold"
    return None


def fault_within(value: object, place: str = "") -> str | None:
    """The first fault of a text in a value of JSON, keys included, with the field that has it; None without one."""
    for where, text in texts(value, place):
        if (why := fault(text)) is not None:
            return f"field {where!a}: holds {why}" if where else f"holds {why}"
    return None


def texts(value: object, place: str = "", keys: bool = True) -> Iterator[tuple[str, str]]:
    """Each text in a value of JSON with its place, such as `a.b[0]`; keys: those of mappings too."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, Mapping):
        for name, part in value.items():
            inner = f"{place}.{name}" if place else str(name)
            if keys:
                yield inner, str(name)
            yield from texts(part, inner, keys)
    elif isinstance(value, Sequence) and not isinstance(value, bytes):
        for number, part in enumerate(value):
            yield from texts(part, f"{place}[{number}]", keys)


def check_template(template: str, names: Sequence[str], key: str) -> set[str]:
    """The placeholders in a template, in which {name} stands for a text, and {{ and }} for single braces.

    names: the placeholders that it may hold. key: the option that holds it, for errors. Raises ConfigError for anything
    else in braces, such as {name.attribute}, {0} or {name!r}.
    """
    allowed = " or ".join(f"{{{name}}}" for name in names)
    for match in BRACES.finditer(template):
        if match[2] or (match[1] and match[1] not in names):
            raise ConfigError(
                f"{key}: {template!r:.200}; use {allowed}, and nothing else in braces ({{{{ and }}}} write a brace)"
            )
    return {match[1] for match in BRACES.finditer(template) if match[1]}


def fill(template: str, **values: str) -> str:
    """The template with every {name} replaced, in one pass: braces within the values are text.

    Raises KeyError for a placeholder without a value; `check_template` comes first.
    """

    return BRACES.sub(lambda match: values[match[1]] if match[1] else match[0][0], template)
