"""Every page of the documentation says when to read it, and the keys, links and tests that it names exist."""

import ast
import json
import re
from pathlib import Path

import pytest
import yaml
from test_docs import PAGES, code

from mirage_dist.config import REPOSITORY
from tools.docs import pages as reference

NAV = REPOSITORY / "mkdocs.yml"
# The keys at the top of a recipe that a page writes with dots.
SECTIONS = ("run", "model", "data", "objective", "train", "monitor", "world", "generation", "template", "erasure")
KEY = re.compile(rf"(?:{'|'.join(SECTIONS)})(?:\.[a-z_]\w*|\[\d*\])+")
WORD = re.compile(rf"({KEY.pattern})(?:=.*|:)?")
FILE = re.compile(r".*\.(json|jsonl|yaml|md|py)")


def dotted() -> list[tuple[Path, str]]:
    """The dotted keys that pages write as code, alone or with a value."""
    written = []
    for file in (file for file in PAGES if file.parent.name == "docs"):
        words = (WORD.fullmatch(word) for line in code(file) for word in line.split())
        written += [(file, key) for key in dict.fromkeys(word[1] for word in words if word) if not FILE.fullmatch(key)]
    return written


def blocks() -> list[tuple[Path, str, str]]:
    """The examples of code with a language."""
    fence = re.compile(r"^```(python|yaml|json)\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return [(file, *match.groups()) for file in PAGES for match in fence.finditer(file.read_text())]


def known() -> dict[str, set[str]]:
    """Place in a recipe -> the keys there; what stands for a name or a position is left out of the place."""
    places: dict[str, set[str]] = {}
    roots = [("", root) for root in reference.keys.recipes().values()]
    roots += [("erasure.", reference.named(reference.ERASURE))]
    for registry, prefix in {
        "objectives": "objective",
        "optimizers": "train.optimizer",
        "formats": "data.streams",
    }.items():
        roots += [(prefix, cls) for cls in reference.registry(reference.REGISTRIES[registry][0]).values()]
        places[prefix] = {reference.REGISTRIES[registry][2]}
    for prefix, root in roots:
        for cls, where in reference.keys.within(root).items():
            names = {key.name for key in reference.keys.keys(cls)}
            for place in where:
                places.setdefault(re.sub(r"\[0\]|\.[A-Z]+", "", f"{prefix}{place}").strip("."), set()).update(names)
    return places


KNOWN = known()


@pytest.mark.parametrize(("file", "key"), dotted(), ids=lambda value: getattr(value, "name", value))
def test_a_key_that_a_page_writes_exists(file: Path, key: str):
    place = re.sub(r"\[\d*\]", "", key)
    place = re.sub(r"^data\.streams\.\w+", "data.streams", place)  # a stream's name is the objective's
    parent, _, name = place.rpartition(".")
    assert place in KNOWN or name in KNOWN.get(parent, set()), f"{file.name}: {key}"


def test_a_key_that_does_not_exist_is_not_known():
    assert "lrr" not in KNOWN["train"]
    assert {"lr", "micro_batch"} <= KNOWN["train"]
    assert "layer" in KNOWN["objective"]
    assert "layer" not in KNOWN["train.optimizer"]


def test_every_page_says_when_to_read_it():
    for file in PAGES[1:]:
        title, first = [line for line in file.read_text().splitlines() if line][:2]
        assert title.startswith("# "), file
        assert re.match(r"(Read this (page )?(when|before) |You need this page )", first), f"{file}: {first}"


def test_every_page_is_in_the_navigation_and_every_link_between_pages_leads_somewhere():
    made = set(reference.every())
    known = {file.name for file in PAGES[1:]} | made
    named = set(re.findall(r"^ +- (?:.*: )?(\S+\.md)$", NAV.read_text(), re.MULTILINE))
    assert named <= known
    assert made <= named
    for file in PAGES[1:]:
        for link in re.findall(r"\]\(([^)#:]+\.md)(?:#[^)]*)?\)", file.read_text()):
            assert link in known or (file.parent / link).is_file(), f"{file.name}: {link}"


@pytest.mark.parametrize(("file", "language", "block"), blocks(), ids=lambda value: getattr(value, "name", None))
def test_an_example_is_code_that_can_be_read(file: Path, language: str, block: str):
    read = {"python": ast.parse, "yaml": yaml.safe_load, "json": json.loads}
    assert read[language](block) is not None


def test_each_of_the_fifteen_questions_has_threads_and_a_test_that_exists():
    questions = re.split(r"^## ", (REPOSITORY / "docs/faq.md").read_text(), flags=re.MULTILINE)[1:]
    assert len(questions) == 15
    for question in questions:
        assert re.search(
            r"^- Asked in: .*\(https://github\.com/[\w.-]+/[\w.-]+/(issues|pull)/\d+\)", question, re.MULTILINE
        )
        assert question.splitlines()[0].rstrip().endswith(("?", "."))
        tests = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", question)
        assert tests, question
        for name, test in tests:
            assert f"\ndef {test}(" in (REPOSITORY / name).read_text(), f"{name}::{test}"
