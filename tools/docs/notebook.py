"""A notebook as a page: its text, its code, and the outputs that are saved in it."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def page(file: Path) -> str:
    """Markdown of a notebook (nbformat 4). Raises ValueError for a cell that failed, or was not run."""
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    return (
        "\n\n".join(part for number, cell in enumerate(cells) for part in _parts(cell, f"{file}: cell {number}")) + "\n"
    )


def _parts(cell: Mapping[str, Any], place: str) -> Iterator[str]:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        yield source
        return
    if cell["execution_count"] is None:
        raise ValueError(f"{place}: was not run; run the notebook and save it")
    yield _fenced(source, "python")
    for output in cell["outputs"]:
        if output["output_type"] == "error":
            raise ValueError(f"{place}: failed with {output['ename']}: {output['evalue']}")
        if output["output_type"] == "stream":
            yield _fenced("".join(output["text"]), "text")
            continue
        data = output["data"]
        if picture := data.get("image/png"):
            alt = html.escape("".join(data.get("text/plain", "a figure")))
            yield f'<p><img alt="{alt}" src="data:image/png;base64,{"".join(picture).replace(chr(10), "")}"></p>'
        elif "text/plain" in data:
            yield _fenced("".join(data["text/plain"]), "text")


def _fenced(text: str, language: str) -> str:
    """A block of code, in a fence that is longer than any in the text."""
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall(r"`+", text)), 0)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
