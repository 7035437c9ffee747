"""For the API page: the items `name: …` of a docstring as a list, where the name is an attribute or a parameter."""

from __future__ import annotations

import re

from griffe import Class, Extension, Function


class Items(Extension):
    """An extension of griffe, which reads the sources for mkdocstrings."""

    def on_class_members(self, *, cls: Class, **_: object) -> None:
        _listed(cls, list(cls.members))

    def on_function_instance(self, *, func: Function, **_: object) -> None:
        _listed(func, [parameter.name for parameter in func.parameters])


def _listed(item: Class | Function, names: list[str]) -> None:
    if item.docstring is None or not names:
        return
    one = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    begin = re.compile(rf"(?:^|(?<=[.;:] ))((?:{one})\b(?:, (?:{one})\b)*): ")
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", item.docstring.value):
        text = paragraph if paragraph.startswith("    ") else " ".join(paragraph.split())
        parts = begin.split(text)
        items = [
            f"- `{name.replace(', ', '`, `')}`: {what.strip()}"
            for name, what in zip(parts[1::2], parts[2::2], strict=True)
        ]
        paragraphs.append("\n\n".join(part for part in [parts[0].strip(), "\n".join(items)] if part))
    item.docstring.value = "\n\n".join(paragraphs)
