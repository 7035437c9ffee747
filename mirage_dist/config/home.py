"""Where recipes, launchers and Slurm scripts lie, and which source this is: of a checkout, or of an installed package.

In a checkout they are the folders at its top. A built package has a copy of them in `mirage_dist/resources` (setup.py
makes it), with the commit that it was built from. Nothing is ever written there: a package may be installed by root.
"""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress
from functools import cache
from pathlib import Path

from mirage_dist.progress import ON_STDERR, log
from mirage_dist.schema import ConfigError, documents
from mirage_dist.schema.names import PLACE

PACKAGE = Path(__file__).resolve().parents[1]
REPOSITORY = PACKAGE.parent  # holds the package: a checkout, or site-packages; a child process imports it from there
RESOURCES = PACKAGE / "resources"
INSTALLED = RESOURCES.is_dir()
HOME = RESOURCES if INSTALLED else REPOSITORY  # holds configs/, launch/ and slurm/


def find(path: str | Path) -> Path:
    """A file as given, or relative to MIRAGE_HOME where that is set, or to `HOME` (recipes name each other that way).

    The first one wins; where `HOME` has another one of that name, with other content, the log says so.
    Raises ConfigError for a path that no file can have, and where no regular file is in any of these places.
    """
    PLACE(str(path), "a recipe's path")
    own = os.environ.get("MIRAGE_HOME") or HOME  # as slurm/ has it, whose jobs may run in another folder
    places = {Path(path): "here", Path(own, path): f"in {own}", HOME / path: f"in {HOME}"}
    for candidate, place in places.items():
        if os.path.isfile(candidate):
            if candidate != HOME / path and _differs(candidate, HOME / path):
                log.warning(f"{path}: the file {place} is used; the one in {HOME} differs from it", extra=ON_STDERR)
            return candidate
        if os.path.exists(candidate):
            documents.open_file(candidate).close()  # says what it is
    raise ConfigError(f"{path}: no such file (looked {' and '.join(dict.fromkeys(places.values()))})")


def _differs(one: Path, other: Path) -> bool:
    with suppress(OSError):
        return os.path.isfile(other) and not os.path.samefile(one, other) and one.read_bytes() != other.read_bytes()
    return False


@cache
def commit() -> str | None:
    """The commit of this source: the checkout's, or that which the package was built from; None where none is known.

    `+changes` follows that of a package built from a checkout with changes of its own. Where git does not answer for a
    checkout, as in an image without git, it is MIRAGE_COMMIT, which slurm/common.sh takes from the host's git.
    """
    # Only of a checkout of ours: an environment may lie in somebody else's repository.
    if not INSTALLED and os.path.exists(REPOSITORY / ".git"):
        command = ["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"]
        with suppress(OSError, subprocess.CalledProcessError):
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        return os.environ.get("MIRAGE_COMMIT") or None
    with suppress(OSError):
        return (HOME / "commit.txt").read_text(encoding="utf-8").strip() or None
    return None
