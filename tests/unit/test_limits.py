"""Every number of a recipe has a range, every limit is in the table of the docs, and every error names its key."""

import dataclasses
import math
import typing
from collections.abc import Iterator
from typing import Any, Literal

import pytest

from mirage_dist import config as configs
from mirage_dist.config import REPOSITORY
from mirage_dist.data.formats import REGISTRY as FORMATS
from mirage_dist.erasure.run import ErasureConfig
from mirage_dist.evals.attacks import REGISTRY as ATTACKS
from mirage_dist.evals.judges import REGISTRY as JUDGES
from mirage_dist.objectives.base import REGISTRY as OBJECTIVES
from mirage_dist.schema import ConfigError, EvalRecipe, PrepareRecipe, TrainRecipe
from mirage_dist.schema.limits import LIMITS
from mirage_dist.schema.names import Check
from mirage_dist.train.optimizers.base import REGISTRY as OPTIMIZERS

REGISTRIES = [FORMATS, ATTACKS, JUDGES, OBJECTIVES, OPTIMIZERS]
CLASSES = [
    *(TrainRecipe, EvalRecipe, PrepareRecipe, ErasureConfig),
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


NUMBERS = {f"{name} {number}": (name, number, plain) for name, number, plain in numbers()}


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
