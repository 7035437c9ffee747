"""Odd values for a field of a recipe or a record, odd texts for the command line.

A case is JSON, so that it can be kept. What JSON cannot hold, or what would fill a page, is a mapping with one key:
{"$deep": n} for n nested lists, {"$repeat": [text, n]}, {"$digits": n}, {"$join": [part, …]}.
"""

from __future__ import annotations

import json
import re
from typing import Any

from hypothesis import strategies as st

NUMBERS = (0, -1, 1, 2**31, 2**63, 10**30, 0.5, -0.0, 1e-320, 1e30, 1e300, float("nan"), float("inf"), -float("inf"))
TEXTS = (
    "",
    " ",
    "null",
    "a: b: c",
    "\u001b[31mred\u001b[0m",
    "\u0000",
    "\u202e\u2028",
    "\ud800",
    "<image>",
    "</s><|im_end|><end>",
    "../../up",
    "/",
    "/dev/zero",
    "/proc/self/mem",
    "world",
    "no/such/file.json",
    "${seed}",
    "${nowhere}",
    "${oc.env:HOME}",
    "${add:1,a}",
    "${fixed2:x}",
    "\\${",
    "${",
    "{{ 7 * 7 }}",
    "{% for a in range(10**9) %}{% endfor %}",
    "mirage_dist.cli:main",
    "os:system",
    "http://[::1/v1",
    "file:///etc/passwd",
    "(a+)+$",
    "[",
    "*",
    "sk-0123456789abcdef0123456789abcdef",
)
# What the command line gets as the value of a key: YAML, or not.
WORDS = (
    *TEXTS,
    "[1,",
    "%x",
    "@me",
    "&a [*a]",
    "*a",
    "!!python/object/apply:os.getcwd []",
    "!!binary x",
    "!!timestamp x",
    "? a",
    "-",
    "~",
    "[]",
    "{}",
    "[[]]",
    "{a: {b: [c]}}",
    "{1: 2, null: 3}",
    "[null]",
    "true",
    "1:30",
    "2024-13-45",
    "0x10",
    "1e309",
    ".nan",
    "'",
    '"',
    "\udcff",
    "{<<: {a: 1}}",
    "{[a]: b}",
    "a\n\tb: c",
)
LARGE = (
    {"$deep": 200},
    {"$deep": 3000},
    {"$deep": 100000},
    {"$repeat": ["x", 300]},
    {"$repeat": ["x", 5000]},
    {"$repeat": ["a ", 300000]},
    {"$repeat": ["\u00e4", 100000]},
    {"$digits": 400},
    {"$digits": 5000},
)


def plain() -> st.SearchStrategy[Any]:
    leaves = st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=12))
    inner = st.recursive(
        leaves, lambda s: st.lists(s, max_size=3) | st.dictionaries(st.text(max_size=5), s, max_size=3), max_leaves=5
    )
    return st.one_of(st.sampled_from(NUMBERS), st.sampled_from(TEXTS), inner)


def value() -> st.SearchStrategy[Any]:
    """For a field of a tree that is written as JSON or YAML."""
    return st.one_of(plain(), plain(), plain(), st.sampled_from(LARGE))


def word() -> st.SearchStrategy[Any]:
    """For the right side of key=value."""
    numbers = st.sampled_from([str(n) for n in NUMBERS])
    return st.one_of(
        st.sampled_from(WORDS), st.sampled_from(WORDS), numbers, st.text(max_size=8), st.sampled_from(LARGE)
    )


def whole(part: Any) -> str:
    """A word of the command line, written out."""
    if isinstance(part, str):
        return part
    (name, content), *_ = part.items()
    if name == "$join":
        return "".join(map(whole, content))
    if name == "$deep":
        return "[" * content + "]" * content
    return content[0] * content[1] if name == "$repeat" else "9" * content


def dumped(tree: Any, yaml: bool = False) -> str:
    """JSON, with what `LARGE` describes written out; or the same as YAML."""
    try:
        text = json.dumps(tree)
    except RecursionError:
        return "[" * 3000
    if yaml:
        text = re.sub(r"(?<![\w\"])(-?)(NaN|Infinity)(?![\w\"])", lambda m: m[1] + _YAML[m[2]], text)

    def written(match: re.Match[str]) -> str:
        large = json.loads(match[0])
        return json.dumps(whole(large)) if "$repeat" in large else whole(large)

    return re.sub(r'\{"\$(deep|digits|repeat)": (\d+|\[[^\]]*\])\}', written, text)


_YAML = {"NaN": ".nan", "Infinity": ".inf"}
