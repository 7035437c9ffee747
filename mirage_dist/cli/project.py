"""The verbs about the project itself: a directory to work in, what there is, what a recipe says, and completion."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mirage_dist.progress import put, show
from mirage_dist.schema import RunError


class Version(argparse.Action):
    """`--version`: this package's version and commit, and the versions of what it runs on; then the process ends."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from mirage_dist.project import versions

        show(*versions.lines())
        parser.exit()


def init(parsed: argparse.Namespace) -> None:
    from mirage_dist.project import directory

    for target in directory.make(parsed.folder):
        show(f"{target}{'/' if target.is_dir() else ''}")
    inside = "" if parsed.folder == Path() else f"cd {parsed.folder}, then "
    show(
        "next:",
        f"  {inside}mirage demo",
        "  cp .env.example .env, change it, and `source .env` before jobs are submitted",
        "  mirage list recipes",
    )


def listing(parsed: argparse.Namespace) -> None:
    from mirage_dist.project import listing

    show(listing.text((parsed.kind,) if parsed.kind else listing.KINDS))


def values(parsed: argparse.Namespace) -> None:
    from mirage_dist.config import provenance

    put(provenance.text(provenance.values(parsed.config, parsed.overrides)))


def completion(parser: Callable[[], argparse.ArgumentParser]) -> Callable[[argparse.Namespace], None]:
    """The verb that prints a completion script for the whole command line."""

    def run(parsed: argparse.Namespace) -> None:
        try:
            shtab = importlib.import_module("shtab")
        except ImportError as error:
            raise RunError("mirage completion needs the package shtab: pip install shtab") from error
        put(f"{shtab.complete(parser(), parsed.shell)}\n")

    return run
