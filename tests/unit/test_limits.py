"""Every number of a recipe has a range, every limit is in the table of the docs, and every error names its key."""

import dataclasses
import math
import os
import typing
from collections.abc import Iterator
from typing import Any, Literal

import pytest

from mirage_dist import cli
from mirage_dist import config as configs
from mirage_dist.config import REPOSITORY
from mirage_dist.data.formats import REGISTRY as FORMATS
from mirage_dist.erasure.run import ErasureConfig
from mirage_dist.evals.attacks import REGISTRY as ATTACKS
from mirage_dist.evals.defences import REGISTRY as DEFENCES
from mirage_dist.evals.judges import REGISTRY as JUDGES
from mirage_dist.objectives.base import REGISTRY as OBJECTIVES
from mirage_dist.schema import ConfigError, EvalRecipe, PrepareRecipe, TrainRecipe
from mirage_dist.schema.limits import LIMITS
from mirage_dist.schema.names import Check
from mirage_dist.sweep.recipe import SweepRecipe
from mirage_dist.train.optimizers.base import REGISTRY as OPTIMIZERS

REGISTRIES = [FORMATS, ATTACKS, JUDGES, DEFENCES, OBJECTIVES, OPTIMIZERS]
CLASSES = [
    *(TrainRecipe, EvalRecipe, PrepareRecipe, ErasureConfig, SweepRecipe),
    *(registry.load(name, "test", registry.key) for registry in REGISTRIES for name in registry),
]
# Below, between and above all ranges, and what is no number.
WRONG = {int: [-(10**30), -(2**63), 10**30, 10**400], float: [-1e300, 1e300, math.inf, -math.inf, math.nan, 10**400]}


def classes(seen: dict[type, None], hint: Any) -> dict[type, None]:
    """The dataclasses within a type, with all that their fields lead to."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and hint not in seen:
        seen[hint] = None
        for part in typing.get_type_hints(hint, include_extras=True).values():
            classes(seen, part)
    for part in typing.get_args(hint):
        classes(seen, part)
    return seen


def numbers() -> Iterator[tuple[str, Any, type]]:
    """Name, annotated type and plain type of every number in every recipe and every class that one may name."""
    seen: dict[type, None] = {}
    for cls in CLASSES:
        classes(seen, cls)
    for cls in seen:
        hints = typing.get_type_hints(cls, include_extras=True)
        for field in dataclasses.fields(cls):
            if field.init:
                yield from ((f"{cls.__name__}.{field.name}", *number) for number in within(hints[field.name]))


def within(hint: Any) -> Iterator[tuple[Any, type]]:
    if typing.get_origin(hint) is Literal:
        return
    if hint in (int, float):
        yield hint, hint
    elif typing.get_args(hint)[:1] in ((int,), (float,)) and typing.get_origin(hint) not in (list, dict):
        yield hint, typing.get_args(hint)[0]
    else:
        for part in typing.get_args(hint):
            yield from within(part)


NUMBERS = {f"{name} {place}": (name, number, plain) for place, (name, number, plain) in enumerate(numbers())}


def test_the_numbers_of_every_kind_of_class_are_tested():
    assert len(NUMBERS) > 80
    names = {name for name, _, _ in NUMBERS.values()}
    assert names >= {"TrainConfig.lr", "ChatConfig.timeout", "Suffix.steps", "AdamW.betas", "Relearning.samples"}


@pytest.mark.parametrize(("name", "number", "plain"), NUMBERS.values(), ids=NUMBERS)
def test_a_number_has_a_range_and_the_error_names_the_key(name, number, plain):
    owner = dataclasses.make_dataclass("Owner", [("key", number)])
    for wrong in WRONG[plain]:
        with pytest.raises(ConfigError, match=r"^recipe: key=.*; expected a") as error:
            configs.build(owner, {"key": wrong}, "recipe", "")
        assert len(str(error.value)) < 300
    assert any(isinstance(mark, Check) for mark in typing.get_args(number))


@pytest.mark.parametrize("limit", LIMITS, ids=lambda limit: limit.name)
def test_a_limit_stands_in_the_table_of_the_docs_with_its_value(limit):
    table = (REPOSITORY / "docs/limits.md").read_text()
    assert f"| {limit.name} | {limit} | {limit.key or '-'} | {limit.reason} |" in table


TRAIN = "configs/train/npo.yaml"
BOMB = "{a: &a [x,x,x,x,x,x,x,x,x,x], b: &b [" + "*a," * 100 + "], c: &c [" + "*b," * 100 + "]}"


def refused(arguments, capsys):
    """What a command says that ends with status 2."""
    try:
        status = cli.main(arguments)
    except SystemExit as end:
        status = end.code
    output = capsys.readouterr().err
    assert status == 2, output
    assert "Traceback" not in output
    assert len(output) < 3000
    return output


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed=[1,", ["seed=[1,", "is not YAML"]),
        ("run.name=a: b: c", ["run.name=a: b: c", "is not YAML"]),
        ("%x", ["'%x'", "key=value"]),
        ("@me", ["'@me'", "key=value"]),
        ("=5", ["'=5'", "key=value"]),
        ("seed=@me", ["seed=@me", "is not YAML"]),
        ("seed=" + "9" * 5000, ["override 'seed=999", "digits"]),
        ("seed=0x" + "f" * 5000, ["seed=a number of thousands of digits", "from 0 to 9,223,372,036,854,775,807"]),
        ("run.name=0x" + "f" * 5000, ["run.name=a number of thousands of digits", "fewer digits"]),
        ("train.lr=0x" + "f" * 400, ["train.lr=", "fewer digits"]),
        ("a." * 100_000 + "b=1", ["200001 characters", "300 characters"]),
        ("seed=" + "[" * 10_000, ["override 'seed=[[", "nest"]),
        ("seed=" + "[" * 33 + "]" * 33, ["override 'seed=[[", "nested too deep: over 32 levels"]),
        ("data.template_options=" + BOMB, ["data.template_options", "20,000 values"]),
        ("data.template_options={x: &a [*a]}", ["data.template_options", "alias *a stands within"]),
        ("data.template_options={x: [{1: a}]}", ["data.template_options.x[0] has the key 1"]),
        ("data.template_options={x: [.nan]}", ["data.template_options.x[0]=nan", "finite"]),
        ("data.template_options={x: !!binary aGk=}", ["data.template_options.x", "bytes"]),
        ("data.template_options={a: 1, a: 2}", ["data.template_options", "duplicate key"]),
        ("seed=!!python/object/apply:os.system [ls]", ["seed=", "constructor"]),
        ("seed=1000000000000000000000000000000", ["seed=1000", "9,223,372,036,854,775,807"]),
        ("train.epochs=1e300", ["train.epochs=1e+300", "1e+06"]),
        ("train.hang_seconds=1e30", ["train.hang_seconds=1e+30", "2.592e+06"]),
        ("model.path=" + "x/" * 2500, ["model.path=", "at most 3000 bytes"]),
        ("include=[", ["include=[", "is not YAML"]),
        ("include=5", ["include=5", "a file or a list of files"]),
        ("include=${", ["include=${", "no viable alternative"]),
        ("include={1: 2, null: 3}", ["include={1: 2, null: 3}", "key type"]),
        ("include=${model.path}", ["${model.path}: no such file"]),
        ("include=/tmp", ["/tmp: cannot be read: it is a folder"]),
        ("include=/dev/zero", ["/dev/zero", "a FIFO, a socket or a device"]),
        ("include=" + "x" * 5000, ["a recipe's path", "at most 3000 bytes"]),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_an_override_that_cannot_be_is_a_sentence(override, words, capsys):
    output = refused(["train", TRAIN, "--check-recipe", override], capsys)
    assert all(word in output for word in words), output


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["is missing"]),
        (b"5", ["recipe.yaml"]),
        (b"[1, 2]", ["recipe.yaml: the recipe must be a mapping"]),
        (b"text", ["recipe.yaml"]),
        (b"\xff\xfea\x00:\x00", ["recipe.yaml: cannot be read: line 1 is not UTF-8", "convert"]),
        (bytes(range(256)), ["recipe.yaml"]),
        (b"x: " + b"a" * (1 << 18), ["recipe.yaml: larger than 256 KiB, the limit of a recipe file"]),
        (b"x: " + b"[" * 10_000, ["recipe.yaml: not readable as YAML", "nest"]),
        (b"x: " + b"[" * 40 + b"]" * 40, ["recipe.yaml: not readable as YAML: nested too deep: over 32 levels"]),
        (f"x: {BOMB}".encode(), ["recipe.yaml: not readable as YAML", "20,000 values"]),
        (b"a: 1\na: 2\n", ["recipe.yaml: not readable as YAML", "duplicate key"]),
        (b"include: recipe.yaml\n", ["recipe.yaml", "includes this file in turn"]),
        (b"include: [b.yaml, b.yaml]\n", ["include: more than 64 files in all"]),
        (b"include: {a: 1}\n", ["recipe.yaml: include", "a file or a list of files"]),
        (b"1: 2\n", ["recipe.yaml: unknown key '1'"]),
        (b"? [a]\n: b\n", ["recipe.yaml: not readable as YAML"]),
        (b"seed: !!python/object/apply:os.system [ls]\n", ["recipe.yaml: not readable as YAML", "constructor"]),
    ],
    ids=range(17),
)
def test_a_recipe_that_cannot_be_is_a_sentence(content, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for one, two in zip("bcdefgh", "cdefghi", strict=True):
        (tmp_path / f"{one}.yaml").write_text(f"include: [{two}.yaml, {two}.yaml]")
    (tmp_path / "i.yaml").write_text("{}")
    (tmp_path / "recipe.yaml").write_bytes(content)
    output = refused(["train", "recipe.yaml", "--check-recipe"], capsys)
    assert all(word in output for word in words), output


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            (name, value)
            for name in ("SLURM_RESTART_COUNT", "SLURM_PROCID")
            for value in ("abc", "-1", "1e3", "9" * 5000)
        ),
        *(("SLURM_JOB_ID", value) for value in ("../../x", "a b", "x" * 5000, "\x1b[31m")),
        *((name, value) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") for value in ("abc", "9" * 5000, "-1", "1.0")),
    ],
)
def test_a_variable_that_is_no_number_is_named(name, value, monkeypatch, capsys):
    for other in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(other, {"WORLD_SIZE": "1"}.get(other, "0"))
    monkeypatch.setenv(name, value)
    assert f"mirage: {name}=" in refused(["train", TRAIN, "--check-recipe"], capsys)


@pytest.mark.parametrize("port", ["abc", "0", "65536", "9" * 5000])
def test_a_port_that_is_none_is_named(port, monkeypatch, capsys):
    for name, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "h",
        "MASTER_PORT": port,
    }.items():
        monkeypatch.setenv(name, value)
    assert "MASTER_PORT=" in refused(["train", TRAIN], capsys)


@pytest.mark.parametrize("value", ["0", "-1", "1e3", "1000000000", "9" * 5000, "x", ""])
@pytest.mark.parametrize(
    "arguments",
    [
        ["audit", "data.json", "--ngrams"],
        ["train", TRAIN, "--check", "--ranks"],
        ["plan", TRAIN, "--ranks"],
        ["eval", "configs/eval/vlguard.yaml", "--workers"],
        ["eval", "configs/eval/vlguard.yaml", "--worker"],
        ["sweep", "configs/sweep/demo.yaml", "--jobs"],
    ],
    ids=lambda arguments: arguments[0] + arguments[-1],
)
def test_a_number_on_the_command_line_has_a_range(arguments, value, capsys):
    output = refused([*arguments[:-1], f"{arguments[-1]}={value}"], capsys)
    assert arguments[-1] in output
    assert "expected" in output


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[" * 10_000, "not JSON: nested too deep: over 100 levels"),
        ("", "the file is empty"),
        ("5", "expected a JSON object"),
        ('{"zero_optimization": 5}', "'zero_optimization' is 5; expected a JSON object"),
        ('{"zero_optimization": {"stage": 3, "offload_param": []}}', "'offload_param' is []; expected a JSON object"),
        ('{"a": ' + "9" * 5000 + "}", "a number of 5000 digits"),
        (None, "a FIFO, a socket or a device"),
    ],
    ids=range(7),
)
def test_a_deepspeed_file_that_cannot_be_is_a_sentence(content, words, tmp_path, capsys):
    file = tmp_path / "zero.json"
    if content is None:
        os.mkfifo(file)
    else:
        file.write_text(content)
    output = refused(["train", TRAIN, "--check-recipe", f"deepspeed={file}"], capsys)
    assert f"{file}: " in output
    assert words in output
