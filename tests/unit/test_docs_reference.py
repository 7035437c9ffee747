"""The site's reference is the code's: keys, types and defaults of the dataclasses, options of the parser."""

import dataclasses
import re
import typing

import pytest
from test_limits import CLASSES, within

from mirage_dist import cli
from mirage_dist.config import REPOSITORY
from mirage_dist.paper.recipe import PaperRecipe
from mirage_dist.schema import ConfigError, RunError
from mirage_dist.signals import STOPPED
from tools.docs import commands, keys, pages, sources

PAGES = pages.every()
STATIC = {f"{cls.module.name}.{cls.name}": cls for cls in pages.classes()}


def runtime() -> dict[str, type]:
    """The dataclasses behind the recipes and registries, imported."""
    seen: dict[type, None] = {}

    def walk(hint: typing.Any) -> None:
        if dataclasses.is_dataclass(hint) and isinstance(hint, type) and hint not in seen:
            seen[hint] = None
            for field in dataclasses.fields(hint):
                walk(typing.get_type_hints(hint)[field.name])
        for part in typing.get_args(hint):
            walk(part)

    for cls in (*CLASSES, PaperRecipe):
        walk(cls)
    return {f"{cls.__module__}.{cls.__qualname__}": cls for cls in seen}


RUNTIME = runtime()


def test_the_same_classes_are_read_as_are_imported():
    assert set(STATIC) == set(RUNTIME)
    assert len(STATIC) > 60


@pytest.mark.parametrize("name", STATIC)
def test_keys_and_defaults_are_those_of_the_dataclass(name: str):
    cls = RUNTIME[name]
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    read = {key.name: key for key in keys.keys(STATIC[name])}
    assert list(read) == list(fields)
    for key, field in fields.items():
        default = read[key].default
        if default is keys.REQUIRED:
            assert field.default is dataclasses.MISSING
            assert field.default_factory is dataclasses.MISSING
        elif default is keys.OWN:
            assert dataclasses.is_dataclass(field.default_factory)
        elif field.default_factory is not dataclasses.MISSING:
            assert default == field.default_factory()
        else:
            assert default == field.default


@pytest.mark.parametrize("name", STATIC)
def test_a_type_in_words_has_the_range_of_its_number(name: str):
    """Each number's own check, asked about values outside, says what the page says."""
    hints = typing.get_type_hints(RUNTIME[name], include_extras=True)
    for key in keys.keys(STATIC[name]):
        text = pages.kinds.words(key.annotation, key.owner.module, key.name, lambda cls: cls.name)
        for number, _ in within(hints[key.name]):
            for mark in typing.get_args(number)[1:]:
                message = mark.problem(-(10**30)) or mark.problem(10**30)
                assert message.removeprefix("expected ").removeprefix("a ") in text
        literals = [part for part in walked(hints[key.name]) if typing.get_origin(part) is typing.Literal]
        for word in (word for literal in literals for word in typing.get_args(literal) if isinstance(word, str)):
            assert f"`{word}`" in text


def walked(hint: typing.Any) -> typing.Iterator[typing.Any]:
    yield hint
    for part in typing.get_args(hint):
        yield from walked(part)


def test_every_key_and_every_option_has_a_meaning():
    assert keys.without_meaning(pages.classes()) == []
    assert commands.without_meaning() == []


@pytest.mark.parametrize(
    ("body", "meaning"),
    [
        ("    key: int = 3  # behind it\n", "behind it"),
        ("    # before it,\n    # in two lines\n    key: int = 3\n", "before it, in two lines"),
        ('    """Title.\n\n    key: in the docstring.\n    """\n\n    key: int = 3\n', "in the docstring"),
        ('    """Title. key, other: both. third: no key.\n    """\n\n    key: int = 3\n    other: int = 4\n', "both"),
        ('    """Title.\n\n    key: one.\n    """\n\n    key: int = 3  # two\n', "one; two"),
        ("    key: int = 3\n", ""),
        ("    other: int = 3  # of another\n    key: int = 3\n", ""),
    ],
)
def test_a_meaning_is_found_where_it_is_written(body: str, meaning: str, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    (tmp_path / "one.py").write_text(f"@dataclass\nclass One:\n{body}")
    cls = sources.Class(one := sources.Module("one"), one.statement("One"))
    assert {key.name: key.meaning for key in keys.keys(cls)}["key"] == meaning
    assert ("one.One.key" in keys.without_meaning([cls])) == (not meaning)


def test_every_key_of_every_class_stands_on_a_page_with_its_meaning():
    whole = "\n".join(PAGES.values())
    for cls in pages.classes():
        for key in keys.keys(cls):
            assert re.search(rf"^\| `{key.name}` \| [^\n]+ \| \S[^\n]*\|$", whole, re.MULTILINE), (
                f"{cls.name}.{key.name}"
            )
    assert all(line.count("|") - line.count("\\|") == 5 for line in whole.splitlines() if line.startswith("| `lr`"))


def test_every_verb_and_option_stands_on_the_page_of_the_command():
    page = PAGES["reference/cli.md"]
    assert set(commands.verbs()) == set(re.findall(r"^## `mirage (\S+)`", page, re.MULTILINE))
    for name, verb in commands.verbs().items():
        section = page.partition(f"## `mirage {name}`")[2].partition("\n## ")[0]
        options = set(re.findall(r"(--[a-z][a-z-]*)", verb.format_help())) - {"--help"}
        listed = set(re.findall(r"^\| `(--[a-z-]+)", section, re.MULTILINE))
        assert listed <= options
        assert {option for action in commands.arguments(verb) for option in action.option_strings} == listed


def test_the_exit_codes_are_those_of_the_code_and_of_the_guarantees():
    def codes(text: str) -> set[int]:
        return {int(number) for number in re.findall(r"^\| (\d+) \| \w", text, re.MULTILINE)}

    known = {0, RunError.status, ConfigError.status, STOPPED, cli.INTERRUPTED}
    assert codes(PAGES["reference/exit_codes.md"]) == known
    assert codes((REPOSITORY / "docs/guarantees.md").read_text()) == known


def test_what_the_api_page_names_exists_and_has_docstrings():
    for name in pages.PUBLIC:
        assert sources.module(name).tree.body[0].value.value.strip()
    shown = set(re.findall(r"^::: (\S+)$", PAGES["reference/api.md"], re.MULTILINE))
    assert shown == set(pages.PUBLIC)


@pytest.mark.parametrize("page", PAGES)
def test_a_made_page_says_when_to_read_it(page: str):
    lines = [line for line in PAGES[page].splitlines() if line]
    assert lines[0].startswith("# ")
    if page != "changelog.md":
        assert lines[1].startswith("Read this ")
