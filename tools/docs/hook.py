"""The hook of mkdocs.yml: adds the pages that are made from the code, and pages of docs/ that the navigation lacks."""

from __future__ import annotations

import html
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("COLUMNS", "100")  # argparse breaks its lines there
MORE = "Guides"  # the group of a page that mkdocs.yml does not name
# What a browser would fetch from elsewhere by itself; a link that a reader follows is none.
FOREIGN = re.compile(
    r"""<(?:script|img|iframe|source|link(?![^>]*rel=["']?canonical))\b[^>]*\b(?:src|href)=["']?(?:https?:)?//[^>]*>"""
)
# Code with a bar in a row of a table, `a\|b` on GitHub: Python's Markdown would show the backslash.
BARRED = re.compile(r"`([^`]*\\\|[^`]*)`")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Raises PluginError for a key or an option that has no meaning."""
    from tools.docs import pages

    try:
        made = pages.every()
    except pages.Incomplete as error:
        raise PluginError(str(error)) from error
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    known = {name for name, _ in _titles(config["nav"])}
    group = next(entry[MORE] for entry in config["nav"] if MORE in entry)
    group += sorted(file.src_uri for file in files.documentation_pages() if file.src_uri not in known)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to files at the repository's top lead to their copies here; a link with a file's name gets a title."""
    from tools.docs.pages import COPIES

    for name, file in COPIES.items():
        markdown = markdown.replace(f"](../{file})", f"]({name})")
    titles = {file: title for file, title in _titles(config["nav"]) if "/" not in file}
    titles |= {file: titles[name] for name, file in COPIES.items()}
    markdown = re.sub(r"\[(\w+\.md)\]\(", lambda link: f"[{titles.get(link[1], link[1])}](", markdown)
    return re.sub(r"^\|.*\\\|.*$", lambda row: BARRED.sub(_code, row[0]), markdown, flags=re.MULTILINE)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Raises PluginError for a page that would fetch something from the network: the site works without one."""
    if fetched := FOREIGN.search(output):
        raise PluginError(f"{page.file.src_uri}: {fetched[0]} is fetched from elsewhere; keep a copy under docs/assets")
    return output


def _code(span: re.Match[str]) -> str:
    return f"<code>{html.escape(span[1]).replace(chr(92) + '|', '&#124;')}</code>"


def _titles(nav: list[Any]) -> Iterator[tuple[str, str]]:
    """The files of the navigation with their titles."""
    for entry in nav:
        for name, below in entry.items() if isinstance(entry, dict) else [(str(entry), entry)]:
            yield from _titles(below) if isinstance(below, list) else [(below, name)]
