"""Versions of this package and of what it runs on, from the installed metadata: no library is imported."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from mirage_dist import __version__
from mirage_dist.config import home

LIBRARIES = ("torch", "transformers", "deepspeed", "peft", "accelerate", "datasets", "vllm", "flash-attn")
OPTIONAL = ("vllm", "flash-attn")  # named where they are installed


def lines() -> list[str]:
    """A line for this package with its commit, for the folder of its recipes, for Python, and for each library."""
    own = f"mirage-dist {__version__}, commit {home.commit() or 'unknown'}"
    installed = {name: _version(name) for name in LIBRARIES}
    listed = [
        f"{name} {number or 'not installed'}" for name, number in installed.items() if number or name not in OPTIONAL
    ]
    return [own, f"recipes and scripts: {home.HOME}", f"python {platform.python_version()}", *listed]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
