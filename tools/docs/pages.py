"""The pages that are made from the code when the site is built: name of the page -> its Markdown."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from mirage_dist import cli, signals
from mirage_dist.schema import ConfigError, RunError
from tools.docs import commands, keys, kinds, notebook
from tools.docs.sources import ROOT, Class, Module, module, named, registry

REGISTRIES = {
    "objectives": ("mirage_dist.objectives.base:REGISTRY", "objective", "name", "objectives.md"),
    "attacks": ("mirage_dist.evals.attacks:REGISTRY", "sets.SET.attacks.NAME", "kind", "attacks.md"),
    "judges": ("mirage_dist.evals.judges:REGISTRY", "judges[0]", "kind", "judges.md"),
    "defences": ("mirage_dist.evals.defences:REGISTRY", "defences.NAME", "kind", "defences.md"),
    "formats": ("mirage_dist.data.formats:REGISTRY", "data.streams.STREAM[0]", "format", "data.md"),
    "optimizers": ("mirage_dist.train.optimizers.base:REGISTRY", "train.optimizer", "name", "optimizers.md"),
}
# Keys that many classes of a registry share, which their pages list once.
SHARED = {
    "formats": "mirage_dist.schema.data:SourceConfig",
    "judges": "mirage_dist.schema.chat:ChatConfig",
    "attacks": "mirage_dist.evals.attacks.base:Attack",
}
ERASURE = "mirage_dist.erasure.run:ErasureConfig"
# What code of yours may import: the contracts of extensions, and what reads recipes and numbers.
PUBLIC = {
    "mirage_dist.api": "`mirage_dist.train`, `evaluate`, `report` and `audit`, as in [the tour](../tour.md)",
    "mirage_dist.objectives.base": "the contract of an objective: what it needs, what it gets, what it returns",
    "mirage_dist.evals.attacks.base": "the contract of an attack",
    "mirage_dist.evals.judges.base": "the contract of a judge",
    "mirage_dist.evals.defences.base": "the contract of a defence",
    "mirage_dist.evals.models.base": "the contract of an engine that answers",
    "mirage_dist.data.formats.base": "the contract of a data format",
    "mirage_dist.train.optimizers.base": "the contract of an optimizer",
    "mirage_dist.data.sample": "a sample, which every format makes and every consumer takes",
    "mirage_dist.schema.numbers": "types of fields whose values are checked",
    "mirage_dist.config": "recipes: read, checked, printed",
    "mirage_dist.erasure.forgetting": "measures of forgetting",
    "mirage_dist.stats": "intervals and tests of rates",
    "mirage_dist.stats.power": "how many questions a difference needs",
}
# An override of each verb's recipes.
EXAMPLES = {
    "train": "train.lr=5e-7",
    "eval": "generation.max_new_tokens=64",
    "prepare": "harvest=runs/harvest/evals/harvest/rows",
    "paper": "out=runs/paper-2",
    "sweep": "seeds='[0,1,2]'",
}
NOTEBOOKS = {"tour.md": "docs/tour.ipynb"}
COPIES = {
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
    "conduct.md": "CODE_OF_CONDUCT.md",
}


class Incomplete(Exception):
    """Something public has no meaning; the message names all that lack one."""


def every() -> dict[str, str]:
    """All pages. Raises Incomplete for a key or an option without a meaning."""
    if lacking := [*keys.without_meaning(classes()), *commands.without_meaning()]:
        raise Incomplete(
            f"no meaning is given for: {', '.join(lacking)}. Write a comment at the field, an item `name: …` in the "
            "docstring of its class, or the argument's `help`"
        )
    pages = {"reference/cli.md": commands.page(), "reference/exit_codes.md": exit_codes()}
    pages |= {f"reference/{verb}_keys.md": recipe(verb, cls) for verb, cls in keys.recipes().items()}
    pages |= {f"reference/{name}.md": options(name) for name in REGISTRIES}
    pages |= {"reference/erasure.md": erasure(), "reference/api.md": api()}
    pages |= {name: notebook.page(ROOT / file) for name, file in NOTEBOOKS.items()}
    return pages | {page: copied(file) for page, file in COPIES.items()}


def classes() -> list[Class]:
    """All dataclasses that recipes describe."""
    roots = [*keys.recipes().values(), named(ERASURE)]
    roots += [cls for place, *_ in REGISTRIES.values() for cls in registry(place).values()]
    return list(dict.fromkeys(cls for root in roots for cls in keys.within(root)))


def recipe(verb: str, root: Class) -> str:
    """Every key of the recipes of a verb."""
    places = keys.within(root)
    sections = [
        _head(
            f"Keys of `mirage {verb}`",
            f"you want to know what a key of `mirage {verb}`'s recipes means, and what it is by default",
            "`mirage show RECIPE` prints a recipe's values with their origins, `mirage list` what can be named. On "
            f"the command line a key is written with dots: `{EXAMPLES[verb]}`. A word in capitals is a name of yours.",
        )
    ]
    for cls, where in places.items():
        title = f"## `{where[0]}`" if where[0] else "## The recipe"
        also = f"\n\nAlso at {', '.join(f'`{place}`' for place in where[1:])}." if len(where) > 1 else ""
        sections.append(f"{title}\n\n{_prose(cls)}{also}\n\n{_table(keys.keys(cls), _link(places))}")
    return "\n\n".join(sections) + "\n"


def options(name: str) -> str:
    """The options of every class of a registry."""
    place, where, key, guide = REGISTRIES[name]
    shared = named(SHARED[name]) if name in SHARED else None
    entries = registry(place)
    sections = [
        _head(
            f"{name.capitalize()} and their options",
            f"you set the options of one of the {name} in a recipe; [{guide}](../{guide}) says when to use which",
            f"A recipe names one under `{where}.{key}`, or `module:Class` of your own; the options are keys beside it.",
        )
    ]
    for entry, cls in entries.items():
        own = [one for one in keys.keys(cls) if shared is None or one.owner != shared]
        inherits = shared is not None and len(own) < len(keys.keys(cls))
        more = f"\n\nAnd the [options of {_of(name)}](#shared)." if inherits else ""
        text = _table(own, _inline) if own else "It has no options of its own."
        sections.append(f"## `{entry}`\n\n{_prose(cls)}\n\n{text}{more}")
    if shared is not None:
        sections.append(
            f"## Options of {_of(name)} {{ #shared }}\n\n{_prose(shared)}\n\n{_table(keys.keys(shared), _inline)}"
        )
    places = {c: p for cls in entries.values() for c, p in keys.within(cls).items() if c not in entries.values()}
    for cls in places:
        if cls != shared and cls.name not in ("SourceConfig",):
            sections.append(f"## {cls.name} {{ #{_slug(cls)} }}\n\n{_prose(cls)}\n\n{_table(keys.keys(cls), _inline)}")
    return "\n\n".join(sections) + "\n"


def erasure() -> str:
    """The section `erasure` of an evaluation's recipe."""
    places = keys.within(named(ERASURE))
    sections = [
        _head(
            "Tests of erasure and their options",
            "you write the section `erasure` of an evaluation's recipe; [erasure.md](../erasure.md) explains them",
        )
    ]
    for cls, where in places.items():
        if cls.name == "SourceConfig":
            continue
        title = f"`erasure.{where[0]}`" if where[0] else "`erasure`"
        sections.append(f"## {title}\n\n{_prose(cls)}\n\n{_table(keys.keys(cls), _link(places, 'erasure.'))}")
    return "\n\n".join(sections) + "\n"


def exit_codes() -> str:
    """Every status with which a command may end."""
    statuses = [
        (0, "what the command was for exists, whole, on disk"),
        (RunError.status, named("mirage_dist.schema.errors:RunError").summary),
        (ConfigError.status, named("mirage_dist.schema.errors:ConfigError").summary),
        (signals.STOPPED, _assigned(module("mirage_dist.signals"), "STOPPED")),
        (cli.INTERRUPTED, _assigned(module("mirage_dist.cli"), "INTERRUPTED")),
    ]
    rows = "\n".join(f"| {number} | {meaning} |" for number, meaning in statuses)
    head = _head(
        "Exit codes",
        "a script or a scheduler has to decide what to do after a command of `mirage`",
        "Above 128, a signal ended the process: its number is the code minus 128.",
    )
    return (
        f"{head}\n\n| code | meaning |\n|---:|---|\n{rows}\n\n"
        "`slurm/` starts a job again after 75, and after 138 and 143, with which a signal ends a process that has just "
        "begun ([cluster.md](../cluster.md)); [guarantees.md](../guarantees.md) has what holds after each code.\n"
    )


def api() -> str:
    """Docstrings of what code of yours may import."""
    head = _head(
        "API",
        "you use the package from Python, or write an objective, attack, judge, format, engine or optimizer",
        "What is not here is internal and may change with any version.",
    )
    return "\n\n".join([head, *(f"## `{name}`\n\nFor: {why}.\n\n::: {name}" for name, why in PUBLIC.items())]) + "\n"


def copied(file: str) -> str:
    """A page of the repository's top, with links as the site has them."""
    text = (ROOT / file).read_text(encoding="utf-8")
    text = re.sub(r"\]\(docs/", "](", text)
    for page, source in COPIES.items():
        text = text.replace(f"]({source})", f"]({page})")
    return text


def _head(title: str, when: str, more: str = "") -> str:
    return f"# {title}\n\nRead this when {when}.\n\nMade from the code. {more}".rstrip()


def _table(rows: Iterable[keys.Key], link: Callable[[Class], str]) -> str:
    lines = [
        f"| `{key.name}` | {kinds.words(key.annotation, key.owner.module, key.name, link)} | {key.shown_default} | "
        f"{_cell(key.meaning)} |"
        for key in rows
    ]
    return "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *lines])


def _link(places: dict[Class, list[str]], prefix: str = "") -> Callable[[Class], str]:
    def link(cls: Class) -> str:
        if cls.name == "SourceConfig" and prefix:
            return "source: [formats](formats.md)"
        where = places[cls][0]
        return f"[mapping](#{re.sub(r'[^a-z0-9_-]', '', f'{prefix}{where}'.lower())})"

    return link


def _inline(cls: Class) -> str:
    if cls.name == "SourceConfig":
        return "source: [formats](formats.md)"
    return f"[mapping](#{_slug(cls)})"


def _slug(cls: Class) -> str:
    return cls.name.lower()


def _prose(cls: Class) -> str:
    """What a class's docstring says beside the meanings of its keys, as Markdown."""
    names = "|".join(key.name for key in keys.keys(cls))
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", cls.docstring)] if cls.docstring else []
    kept = [p for p in paragraphs if not (names and re.match(rf"(?:{names})\b[^:.]*: ", p))]
    text = "\n\n".join(_cell(re.sub(rf"(?<=\. )(?:{names})\b[^:.]*: .*$", "", p) if names else p) for p in kept)
    begins = kept[:1] == paragraphs[:1]  # else the docstring begins with its keys, and the module's says what it is
    return text.strip() if begins and text.strip() else f"{_cell(cls.module.summary)}\n\n{text}".strip()


def _cell(text: str) -> str:
    """Text of a docstring or a comment as Markdown of one table cell: no HTML, no bar, no emphasis by accident."""
    parts = re.split(r"(`[^`]*`)", text)
    plain = [re.sub(r"([*_|<>\[\]])", r"\\\1", p) if i % 2 == 0 else p.replace("|", "\\|") for i, p in enumerate(parts)]
    return "".join(plain).replace(" -> ", " → ")


def _assigned(where: Module, name: str) -> str:
    """The comment at an assignment at a module's top, behind it or right before it."""
    node = where.statement(name)
    assert node is not None
    text, number = [], node.lineno - 1
    if node.lineno in where.comments:
        return where.comments[node.lineno][0]
    while number in where.comments:
        text.insert(0, where.comments[number][0])
        number -= 1
    return " ".join(text)


def _of(name: str) -> str:
    return {"formats": "every format", "judges": "judges that ask a chat model", "attacks": "every attack"}[name]
