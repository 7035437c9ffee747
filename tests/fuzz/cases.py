"""Which cases exist: strategies of hypothesis, and the batches that are drawn from them.

A case is JSON: `verb`, `overrides` (the end of the command line), `environment`, and `changes` to files, each with its
`kind`. Its id, SEED-VERB-BATCH-NUMBER, draws it again on the same version of the tests.
"""

from __future__ import annotations

import dataclasses
import typing
import zlib
from collections.abc import Iterator
from functools import cache
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from mirage_dist.schema import EvalRecipe, PrepareRecipe, TrainRecipe
from tests.fuzz import changes, values
from tests.fuzz.verbs import VERBS, Verb
from tests.fuzz.world import recipes

Case = dict[str, Any]
BATCH = 16
SHARES = st.integers(0, 999)
# Only what is refused, or changes nothing: more processes than one would wait for each other.
ENVIRONMENT = {
    "RANK": ("", "x", "-1", "1", "9" * 5000, "0"),
    "WORLD_SIZE": ("", "0", "x", "1", "-1", "1e3"),
    "LOCAL_RANK": ("", "x", "0", "99999999999999999999"),
    "MASTER_PORT": ("", "x", "0", "70000"),
    "SLURM_JOB_ID": ("", "x", "../..", "7" * 300, "a/b"),
    "SLURM_RESTART_COUNT": ("abc", "", "-1", "1e9", "3", "9" * 5000),
    "SLURM_STEP_ID": ("0", "x", ""),
    "SLURM_PROCID": ("0", "x", "", "5"),
    "SLURM_NTASKS": ("x", "", "0", "1"),
    "SLURM_LOCALID": ("0", "x", ""),
    "SLURM_JOB_END_TIME": ("x", "-1", "0", "1e400", ""),
    "COLUMNS": ("0", "-5", "x", "1000000"),
    "MIRAGE_KILL_SECONDS": ("x", "-1", "nan", ""),
    "HF_HOME": ("/dev/null", "no\udcff", ""),
    "WANDB_MODE": ("x", "disabled"),
    "TMPDIR": ("/dev/null", "no/such/folder", ""),
    "HOME": ("/dev/null", ""),
    "LANG": ("C", "xx_YY.UTF-8"),
    "PYTHONIOENCODING": ("ascii", "latin-1"),
    "OMP_NUM_THREADS": ("0", "x"),
}
NAMES = st.sampled_from(("x", "", "dirr", "__class__", "a.b", "1", "$", "\u001b[0m", "renamed", "name", "kind", "<<"))


# ----------------------------------------------------------------------------------------- changes to files


def broken_bytes(file: str, kind: str) -> st.SearchStrategy[Case]:
    byte = st.tuples(SHARES, st.integers(0, 255))
    places = st.sampled_from(changes.PLACES)
    larges = st.one_of(st.text(max_size=6), st.sampled_from(values.TEXTS), st.sampled_from(values.LARGE[:7]))
    own = {"file": st.just(file), "kind": st.just(kind), "pick": st.integers(0, 50)}
    return st.one_of(
        st.fixed_dictionaries({"do": st.just("flip"), "bytes": st.lists(byte, min_size=1, max_size=6), **own}),
        st.fixed_dictionaries({"do": st.just("cut"), "at": SHARES, **own}),
        st.fixed_dictionaries({"do": st.just("cut"), "at": st.just(0), **own}),
        st.fixed_dictionaries({"do": st.just("insert"), "at": SHARES, "put": larges, **own}),
        st.fixed_dictionaries({"do": st.just("append"), "put": larges, **own}),
        st.fixed_dictionaries({"do": st.just("double"), **own}),
        st.fixed_dictionaries({"do": st.just("place"), "what": places, **own}),
    )


def broken_tree(file: str, kind: str) -> st.SearchStrategy[Case]:
    return st.fixed_dictionaries(
        {
            "do": st.just("tree"),
            "file": st.just(file),
            "kind": st.just(kind),
            "pick": st.integers(0, 50),
            "line": st.integers(0, 50),
            "way": st.lists(st.integers(0, 40), max_size=7),
            "how": st.sampled_from(("replace", "replace", "replace", "remove", "add", "rename")),
            "name": NAMES,
            "value": values.value(),
        }
    )


def swapped(file: str, others: tuple[str, ...], kind: str) -> st.SearchStrategy[Case]:
    return st.fixed_dictionaries(
        {
            "do": st.just("swap"),
            "file": st.just(file),
            "kind": st.just(kind),
            "pick": st.integers(0, 50),
            "with": st.sampled_from(others),
            "other": st.integers(0, 50),
        }
    )


def header(file: str) -> st.SearchStrategy[Case]:
    """A picture's first bytes: another format, or a size of its own."""
    png = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
    sizes = st.tuples(*(st.sampled_from((0, 1, 20000, 2**31 - 1, 2**32 - 1)) for _ in "wh"))
    heads = st.one_of(
        sizes.map(lambda size: [*png, *size[0].to_bytes(4, "big"), *size[1].to_bytes(4, "big")]),
        st.sampled_from(
            (b"GIF89a", b"\xff\xd8\xff\xe0", b"BM", b"II*\0", b"RIFF", b"%!PS-Adobe-3.0 EPSF", b"%PDF-1.4")
        ).map(list),
        st.binary(min_size=1, max_size=24).map(list),
    )
    return st.fixed_dictionaries(
        {
            "do": st.just("head"),
            "file": st.just(file),
            "kind": st.just("picture"),
            "pick": st.integers(0, 50),
            "put": heads,
        }
    )


def broken_files(verb: Verb) -> list[st.SearchStrategy[Case]]:
    made: list[st.SearchStrategy[Case]] = []
    if verb.recipe:
        made += [broken_tree(verb.recipe, "recipe"), broken_tree(verb.recipe, "recipe")]
        made.append(broken_bytes(verb.recipe, "recipe"))
    for kind, files in (("data", verb.data), ("state", verb.state), ("model", verb.model)):
        for file in files:
            made += [broken_tree(file, kind), broken_bytes(file, kind)]
        if files:
            made.append(st.sampled_from(files).flatmap(lambda f, own=files, kind=kind: swapped(f, own, kind)))
    for file in verb.pictures:
        made += [broken_bytes(file, "picture"), header(file)]
    for folder in verb.owned:
        names = ("work-1.tmp", ".tmp", "step-000003", "x.gone", "rows", "evals", "manifest.json", "metrics.json", "a b")
        spots = st.sampled_from(names).map(lambda name, folder=folder: f"{folder}/{name}")
        made.append(foreign(spots, "state"))
    for name in verb.places:
        made.append(foreign(st.just(name), "place"))
    return made


def foreign(file: st.SearchStrategy[str], kind: str) -> st.SearchStrategy[Case]:
    what = st.sampled_from(("file", "folder", "link", "fifo", "dangling", "loop", "zero", "full", "socket"))
    return st.fixed_dictionaries({"do": st.just("foreign"), "file": file, "kind": st.just(kind), "what": what})


# ------------------------------------------------------------------------------------- overrides, arguments


@cache
def keys(recipe: str) -> list[str]:
    """Every key that the recipe has or its schema knows."""
    schema = {"train.yaml": TrainRecipe, "sft.yaml": TrainRecipe, "eval.yaml": EvalRecipe}.get(recipe, PrepareRecipe)
    return sorted({*_of_schema(schema), *_of_tree(recipes()[recipe])})


def _of_schema(schema: Any, prefix: str = "") -> Iterator[str]:
    for name, hint in typing.get_type_hints(schema).items():
        if typing.get_origin(hint) is typing.ClassVar:
            continue
        yield prefix + name
        for part in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(part):
                yield from _of_schema(part, f"{prefix}{name}.")


def _of_tree(tree: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(tree, dict | list):
        for key, part in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield f"{prefix}{key}"
            yield from _of_tree(part, f"{prefix}{key}.")


def override(recipe: str) -> st.SearchStrategy[Any]:
    key = st.one_of(st.sampled_from(keys(recipe)), st.sampled_from(keys(recipe)), ODD_KEYS)
    return st.tuples(key, values.word()).map(lambda pair: {"$join": [pair[0], "=", pair[1]]})


ODD_KEYS = st.sampled_from(
    ("", "a.b", "train..lr", "model[", "data.streams[0]", "sets.unsafe.sources[9].path", "seed.x", "\u001b", "include")
)
ARGUMENTS = {
    "audit": (
        ["--ngrams", "1000000000"],
        ["--ngrams", "x"],
        ["--format", "nowhere:X"],
        ["--format", "llava"],
        ["--format", "samples"],
        ["--format", "os:path"],
        ["--response-kind", "a=b"],
        ["--response-kind", "="],
        ["--response-kind", "published"],
        ["--response-kind", "label"],
        ["--refusals", "nowhere.json"],
        ["--refusals", "world"],
        ["--refusals", "/dev/zero"],
        ["--refusals", "model/model.safetensors"],
        ["--on-bad-record", "skip"],
        ["--length", "--image-roots"],
        ["world"],
        ["/dev/zero"],
        ["model"],
        ["data"],
        ["no/such\u001b[31m"],
        ["--fail"],
    ),
    "train": (["--ranks", "0"], ["--ranks", "10" * 9], ["--ranks", "3"], ["--chek"], ["--check", "--check-recipe"]),
    "plan": (["--ranks", "99999999999"], ["--ranks", "-1"], ["--nodes", "1"]),
    "eval": (["--worker", "1/0"], ["--worker", "x"], ["--worker", "0/3"], ["--workers", "0"], ["--workers", "\u0662x"]),
    "config": (["--get", "nowhere"], ["--get", "train.lr"], ["--get", "data.streams"], ["--get", ""], ["--get", "[["]),
    "report": (
        ["--suite", "nowhere"],
        ["--suite", "../demo"],
        ["--suite", "demo"],
        ["--suite", "\u001b"],
        ["prepared"],
        ["run"],
        ["notes.txt"],
        ["world"],
        ["--out", "run"],
        ["--out", "notes.txt"],
        ["--out", "/dev/null"],
        ["--out", "/proc/1/x"],
    ),
    "export": (
        ["--as", "adapter"],
        ["--as", "both"],
        ["--step", "1"],
        ["--step", "-1"],
        ["--step", "9" * 40],
        ["--step", "x"],
    ),
    "demo": (["--full"], ["--out", ""], ["--out", "/proc/x"], ["--out", "/dev/null/x"], ["--out", "notes.txt"]),
}


def arguments(verb: Verb) -> st.SearchStrategy[list[Any]]:
    known = st.sampled_from(ARGUMENTS.get(verb.words[0], (["--nowhere"],)))
    places = st.sampled_from(("/proc/x", "/dev/null", "/dev/null/x", "notes.txt", "notes.txt/x", "run", "world", ""))
    options = [known, known]
    if verb.places and verb.words[0] in ("report", "audit"):
        options.append(places.map(lambda place: ["--out", place]))
    return st.one_of(options)


# --------------------------------------------------------------------------------------------------- cases


def case(name: str) -> st.SearchStrategy[Case]:
    """All cases of one verb."""
    verb = VERBS[name]
    environment = st.sampled_from(sorted(ENVIRONMENT)).flatmap(
        lambda variable: st.sampled_from(ENVIRONMENT[variable]).map(lambda value: {variable: value})
    )
    files = broken_files(verb)
    # One strategy for each count of changes: what a case has most often is one fault.
    ways: list[st.SearchStrategy[Case]] = []
    if files:
        one = st.one_of(files)
        ways += [_case(name, changes=st.lists(one, min_size=1, max_size=1))] * 4
        ways.append(_case(name, changes=st.lists(one, min_size=2, max_size=3)))
    if verb.recipe:
        ways += [_case(name, overrides=st.lists(override(verb.recipe), min_size=1, max_size=2))] * 3
        if verb.places:
            places = ("/proc/x", "/dev/null", "/dev/null/x", "notes.txt/x", "world", "notes.txt", "no/such/deep/folder")
            key = "out" if verb.words[0] == "prepare" else "run.dir"
            place = st.sampled_from(places).map(lambda place: [f"{key}={place}"])
            ways.append(_case(name, overrides=place))
    elif name == "demo":
        ways += [_case(name, overrides=st.lists(override("train.yaml"), min_size=1, max_size=2))] * 3
    ways.append(_case(name, overrides=arguments(verb)))
    ways.append(_case(name, environment=environment))
    return st.one_of(ways)


def _case(name: str, **parts: st.SearchStrategy[Any]) -> st.SearchStrategy[Case]:
    empty = {"overrides": st.just([]), "environment": st.just({}), "changes": st.just([])}
    return st.fixed_dictionaries({"verb": st.just(name), **empty, **parts})


def kinds(own: Case) -> list[str]:
    """The kinds of mutation in a case."""
    made = {change["kind"] for change in own["changes"]}
    for part in own["overrides"]:
        made.add("argument" if isinstance(part, str) and "=" not in part else "override")
    return sorted(made | ({"environment"} if own["environment"] else set()))


def batch(seed: int, verb: str, number: int) -> list[tuple[str, Case]]:
    """(id, case) of one batch, always the same."""
    drawn: list[Case] = []

    @hypothesis.seed(zlib.crc32(f"{seed} {verb} {number}".encode()))
    @settings(
        max_examples=BATCH + 1,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case(verb))
    def draw(own: Case) -> None:
        drawn.append(own)

    draw()
    # The first is the least of all, in every batch.
    return [(f"{seed}-{verb}-{number}-{i}", own) for i, own in enumerate(drawn[1:])]


def of_id(name: str) -> Case:
    """The case of an id. Raises KeyError for an id that has none."""
    seed, _, rest = name.partition("-")
    verb, number, _ = rest.rsplit("-", 2)
    return dict(batch(int(seed), verb, int(number)))[name]
