"""The page of the command line, from the parser itself."""

from __future__ import annotations

import argparse
import re

from mirage_dist.cli.arguments import parser

HEAD = """# The command `mirage`

Read this when you want to know which verbs and options there are; `mirage VERB --help` says the same on a terminal.

Made from the code. `key=value` words change keys of the recipe and may stand anywhere behind it; `mirage completion`
teaches your shell the verbs and options.
"""


def verbs() -> dict[str, argparse.ArgumentParser]:
    """The parser of each verb."""
    (action,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


def arguments(verb: argparse.ArgumentParser) -> list[argparse.Action]:
    """Those of a verb that a user may write, without `--help`."""
    return [action for action in verb._actions if not isinstance(action, argparse._HelpAction)]


def title(action: argparse.Action) -> str:
    """As it is written on a command line."""
    value = action.metavar or ("|".join(action.choices) if action.choices else action.dest.upper())
    if not action.option_strings:
        return action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    return action.option_strings[-1] if action.nargs == 0 else f"{action.option_strings[-1]} {value}"


def without_meaning() -> list[str]:
    """The arguments without `help`, as `mirage VERB ARGUMENT`."""
    return [
        f"mirage {name} {title(action)}"
        for name, verb in verbs().items()
        for action in arguments(verb)
        if not (action.help or "").strip()
    ]


def page() -> str:
    """Every verb with every argument."""
    sections = [HEAD, "## `mirage`\n\n" + _table([a for a in arguments(parser()) if a.option_strings])]
    for name, verb in verbs().items():
        usage = " ".join(verb.format_usage().removeprefix("usage: ").split())
        text = f"## `mirage {name}`\n\n{(verb.description or '').capitalize()[:1]}{(verb.description or '')[1:]}."
        sections.append(f"{text}\n\n```\n{usage}\n```\n\n{_table(arguments(verb))}")
    return "\n\n".join(sections) + "\n"


def _table(actions: list[argparse.Action]) -> str:
    rows = [f"| `{_escaped(title(action))}` | {_meaning(action)} |" for action in actions]
    return "\n".join(["| argument | meaning |", "|---|---|", *rows])


def _meaning(action: argparse.Action) -> str:
    text = re.sub(r"%\((\w+)\)s", lambda match: str(getattr(action, match[1])), action.help or "").replace("%%", "%")
    if action.choices and not action.option_strings:
        text += f" ({', '.join(f'`{choice}`' for choice in action.choices)})"
    return _escaped(text)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
