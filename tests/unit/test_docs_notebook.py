"""A notebook becomes a page of the site with its code and its saved outputs, or an error."""

import json
from pathlib import Path

import pytest

from tools.docs.notebook import page


def cell(source: str, *outputs: dict, kind: str = "code", count: int | None = 1) -> dict:
    own = {"cell_type": kind, "source": source.splitlines(keepends=True), "metadata": {}}
    return own | ({"outputs": list(outputs), "execution_count": count} if kind == "code" else {})


def written(folder: Path, *cells: dict) -> Path:
    (folder / "n.ipynb").write_text(json.dumps({"cells": list(cells), "nbformat": 4, "nbformat_minor": 5}))
    return folder / "n.ipynb"


def test_text_code_and_outputs_stand_in_their_order(tmp_path):
    picture = {"output_type": "display_data", "data": {"image/png": "AAAA\n//BB\n", "text/plain": ["<a & b>"]}}
    file = written(
        tmp_path,
        cell("# Title\n\nRead this when.", kind="markdown"),
        cell("a = 1\nprint(a)", {"output_type": "stream", "name": "stdout", "text": ["1\n", "2\n"]}),
        cell("a", {"output_type": "execute_result", "data": {"text/plain": "'```'"}}, picture),
        cell("pass"),
    )
    assert page(file) == (
        "# Title\n\nRead this when.\n\n"
        "```python\na = 1\nprint(a)\n```\n\n```text\n1\n2\n```\n\n"
        "```python\na\n```\n\n````text\n'```'\n````\n\n"
        '<p><img alt="&lt;a &amp; b&gt;" src="data:image/png;base64,AAAA//BB"></p>\n\n'
        "```python\npass\n```\n"
    )


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (cell("1 / 0", {"output_type": "error", "ename": "ZeroDivisionError", "evalue": "division"}), "Zero.*division"),
        (cell("1", count=None), "was not run; run the notebook and save it"),
    ],
)
def test_a_notebook_that_failed_or_was_not_run_is_no_page(tmp_path, bad, message):
    with pytest.raises(ValueError, match=rf"n\.ipynb: cell 1: .*{message}"):
        page(written(tmp_path, cell("2"), bad))
