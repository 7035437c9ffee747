"""Recipes: YAML files merged with dot-list overrides, checked against frozen dataclasses.

OmegaConf reads, merges and interpolates; `schema` holds the dataclasses. Every error names the key, its value and the
allowed values. This module imports neither torch nor transformers, so that a typo is reported in a fraction of a
second.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import itertools
import re
import types
import typing
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import omegaconf
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException, UnsupportedInterpolationType
from packaging.version import Version

from mirage_dist.config.home import HOME as HOME
from mirage_dist.config.home import REPOSITORY as REPOSITORY
from mirage_dist.config.home import find as find
from mirage_dist.config.writing import config_hash as config_hash
from mirage_dist.config.writing import differences as differences
from mirage_dist.config.writing import literal as literal
from mirage_dist.config.writing import override as override
from mirage_dist.config.writing import to_dict as to_dict
from mirage_dist.config.writing import to_yaml as to_yaml
from mirage_dist.config.writing import with_paths_as_text as with_paths_as_text
from mirage_dist.config.writing import write_yaml as write_yaml
from mirage_dist.schema import ConfigError, EvalRecipe, PrepareRecipe, TrainRecipe, choice, documents, numbers, secrets
from mirage_dist.schema.limits import INCLUDES, OVERRIDE_KEY, RECIPE_FILE
from mirage_dist.schema.names import Check, shown
from mirage_dist.schema.texts import fault_within, texts

T = TypeVar("T")
# What a resolver reads would stand in config.yaml, in the manifest and in W&B: of OmegaConf's own, oc.env could read a
# key from the environment.
for name in ("env", "create", "decode", "deprecated", "dict.keys", "dict.values", "select"):
    OmegaConf.clear_resolver(f"oc.{name}")
# 2.4 gave this function its name, under which 2.3 has an older one; by the name of 2.3, it warns.
register = (
    OmegaConf.register_resolver if Version(omegaconf.__version__) >= Version("2.4") else OmegaConf.register_new_resolver
)
# ${fixed2:0.5} is 0.50, as folders named after a number spell it.
register("fixed2", lambda number: f"{number:.2f}", replace=True)
register("add", lambda *numbers: sum(numbers), replace=True)
INCLUDE = "include"  # the key of a recipe that names files to merge it over
IN_MEMORY = Path("the recipe")  # what errors call one that is no file


# ------------------------------------------------------------------------------------- merge and validate


def load(path: str | Path | Mapping[str, Any], overrides: Sequence[str], schema: type[T]) -> T:
    """Read a YAML recipe, or a mapping of the same form, apply `key=value` overrides, check and freeze.

    `include`, in a file and among the overrides, names files of the same form (see `_read`): a recipe's own keys win
    over what it includes, and a file that an override includes wins over the recipe.
    Raises ConfigError for a file that does not exist or is not YAML, an override that is not `key=value`, an unknown
    key (naming the nearest known one) and a wrong value (naming the allowed ones).
    """
    tree, source = merged(path, overrides, schema)
    return from_tree(tree, _assignments(overrides), schema, source)


def merged(
    path: str | Path | Mapping[str, Any], overrides: Sequence[str], schema: Any, layers: list[Path] | None = None
) -> tuple[Any, str]:
    """The tree of a recipe with what it and the overrides include, without the other overrides; and how errors name it.

    layers: gets the files in the order of merging, in which a later one wins. Raises ConfigError as `load` does.
    """
    tree, files = _read(path, schema, layers=layers)
    for word in (o for o in overrides if o.startswith(f"{INCLUDE}=")):
        for name in _names(item(word)[1], shown(word)):
            own, more = _read(name, schema, layers=layers)
            tree, files = _merged(schema, tree, own, more[0]), files + more
    return tree, str(files[0]) + (f" (with {', '.join(map(str, files[1:]))})" if files[1:] else "")


def _assignments(overrides: Sequence[str]) -> list[str]:
    return [o for o in overrides if not o.startswith(f"{INCLUDE}=")]


def _read(
    path: str | Path | Mapping[str, Any],
    schema: Any,
    within: tuple[Path, ...] = (),
    layers: list[Path] | None = None,
) -> tuple[Any, list[Path]]:
    """The tree of a file or mapping merged over the files that its `include` names, later ones over earlier ones.

    Returns it with the files read, `path`'s own first, IN_MEMORY for a mapping. Raises ConfigError as `load` does, and
    for a file that includes itself.
    """
    layers = [] if layers is None else layers
    file = IN_MEMORY if isinstance(path, Mapping) else find(path)
    if file in within:
        raise ConfigError(f"{within[-1]}: {INCLUDE}: {path} includes this file in turn")
    text = "" if isinstance(path, Mapping) else text_of(file)
    try:
        documents.check_yaml(text)
        tree: Any = OmegaConf.load(StringIO(text)) if file != IN_MEMORY else OmegaConf.create(with_paths_as_text(path))
        # As written: an interpolation names keys of the whole recipe, which is not there yet.
        plain: Any = OmegaConf.to_container(tree, resolve=False)
    except Exception as error:  # also that of a mapping which holds itself
        raise ConfigError(f"{file}: not readable as YAML: {_problem(error)}") from error
    if not isinstance(plain, dict) or INCLUDE not in plain:
        layers.append(file)
        return tree, [file]
    del tree[INCLUDE]
    whole, files = OmegaConf.create({}), [file]
    for name in _names(plain[INCLUDE], str(file)):
        other, more = _read(name, schema, (*within, file), layers)
        whole, files = _merged(schema, whole, other, more[0]), files + more
        if len(files) > INCLUDES.value:
            raise ConfigError(f"{file}: {INCLUDE}: more than {INCLUDES} in all; a file counts each time it is included")
    layers.append(file)
    return _merged(schema, whole, tree, file), files


def text_of(file: Path) -> str:
    """The text of a recipe's file. Raises ConfigError for one that is too large, or not UTF-8."""
    return documents.decoded(documents.read_bytes(file, RECIPE_FILE), file)


def _names(value: Any, source: str) -> list[str]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, Sequence) or isinstance(names, bytes) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{source}: {INCLUDE}={shown(value)}; expected a file or a list of files")
    return list(names)


def _merged(schema: Any, below: Any, above: Any, source: Path) -> Any:
    if not OmegaConf.is_dict(above):
        raise ConfigError(f"{source}: expected a mapping of a recipe's keys")
    try:
        choice.replaced(schema, below, above)
        return OmegaConf.merge(below, above)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: {_problem(error)}") from error


def from_tree(tree: Any, overrides: Sequence[str], schema: type[T], source: str) -> T:
    """`load` for a tree that is already in memory; `source` names it in errors."""
    return _build(schema, resolved(tree, overrides, schema, source), source, "")


def resolved(tree: Any, overrides: Sequence[str], schema: Any, source: str) -> dict[str, Any]:
    """The tree with its overrides and without interpolations, as plain containers; not yet checked by the schema.

    Changes `tree`. Raises ConfigError as `load` does.
    """
    for word in overrides:
        key, equals, _ = word.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"override {shown(word)}: expected key=value, such as train.lr=5e-7")
        if len(key) > OVERRIDE_KEY.value:
            raise ConfigError(f"override {shown(word)}: its key has {len(key)} characters; at most {OVERRIDE_KEY}")
    try:
        items = [item(word) for word in overrides]
        # Classes are chosen first, so that their options may stand before the choice on the command line.
        for key, value in items:
            choice.choose(schema, tree, key, value)
        for key, value in items:
            _update(tree, key, value)
        plain = OmegaConf.to_container(tree, resolve=True)
    except UnsupportedInterpolationType as error:
        raise ConfigError(
            f"{source}: {error.full_key}: {_problem(error)}; a recipe can use ${{other.key}}, ${{fixed2:…}} "
            "and ${add:…}. What is secret stays in the environment, and the recipe names its variable (key_env)"
        ) from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: {_problem(error)}") from error
    if (why := fault_within(plain)) is not None:
        raise ConfigError(f"{source}: {why}")
    if (key := _secret(plain)) is not None:
        raise ConfigError(
            f"{source}: {key} holds what looks like a key or a password; recipes are written to run directories and to "
            "W&B. Put it into an environment variable and give the variable's name (key_env)"
        )
    return typing.cast("dict[str, Any]", plain)


def _update(tree: Any, key: str, value: Any) -> None:
    try:
        OmegaConf.update(tree, key, value, merge=True)
    except OmegaConfBaseException:
        raise
    except Exception as error:  # OmegaConf checks few keys before it uses them
        raise ConfigError(
            f"override {shown(key)}: no such place in the recipe ({error}); an entry of a list is named by its number, "
            "as in data.streams.forget[0].path"
        ) from error


def _secret(plain: Any) -> str | None:
    """The place of a text, keys of mappings included, that looks like a key or whose own key says that it is one."""
    shaped = (place for place, text in texts(plain) if secrets.contains(text))
    named = (
        place for place, text in texts(plain, keys=False) if text and secrets.named(re.sub(r"(\[\d+\])+$", "", place))
    )
    return next(itertools.chain(shaped, named), None)


def item(override: str) -> tuple[str, Any]:
    """Key and value of an override. OmegaConf's own dot-list parser reads the value, so 5e-7 is a float here."""
    key, _, value = override.partition("=")
    try:
        # Unresolved: an interpolation names keys of the recipe, and `\${` escapes one.
        documents.check_yaml(value)
        given: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]), resolve=False)
        return key, given["value"]
    except Exception as error:  # yaml's errors, whatever library OmegaConf parses with, and OmegaConf's
        raise ConfigError(
            f"override {shown(override)}: its value is not YAML ({_problem(error)}); quote names with [ ] in lists"
        ) from error


def _problem(error: Exception) -> str:
    """In one line. OmegaConf's further lines name its own objects."""
    lines = str(error).splitlines()
    return " ".join(" ".join(lines[:1] if isinstance(error, OmegaConfBaseException) else lines).split())


def _build(schema: Any, value: Any, source: str, key: str) -> Any:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{source}: {key or 'the recipe'} must be a mapping, got {shown(value)}")
    try:
        hints = typing.get_type_hints(schema, include_extras=True)
    except Exception as error:  # a class from outside the package may name what it never imported
        raise ConfigError(f"{source}: {key}: the types of {schema.__qualname__}'s fields: {error}") from error
    fields = {f.name: f for f in dataclasses.fields(schema) if f.init}
    for name in value:
        if name in (renamed := getattr(schema, "renamed", {})):
            raise ConfigError(f"{source}: {_join(key, name)!r} is now called {_join(key, renamed[name])!r}")
        if name not in fields:
            raise ConfigError(f"{source}: unknown key {_join(key, name)!r}; {nearest(str(name), list(fields))}")
    given = {n: _check(hints[n], v, source, _join(key, n)) for n, v in value.items()}
    for name, spec in fields.items():
        no_default = spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING
        if name not in given and no_default:
            raise ConfigError(f"{source}: {_join(key, name)} is missing")
    try:
        return schema(**given)
    except ConfigError as error:
        raise ConfigError(f"{source}: {_join(key, str(error))}") from error


def _check(hint: Any, value: Any, source: str, key: str, ranged: bool = False) -> Any:
    """The value as its type has it. ranged: a check of its own follows, which names a number's range."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        if (why := documents.value_fault(value, key)) is not None:
            raise ConfigError(f"{source}: {why}")
        return value
    if origin is Annotated:
        value = _check(args[0], value, source, key, ranged=True)
        for check in (mark for mark in args[1:] if isinstance(mark, Check)):
            check(value, f"{source}: {key}")
        return value
    if origin in (typing.Union, types.UnionType):
        return numbers.or_word(args, value, lambda hint: _check(hint, value, source, key))
    if origin is Literal:
        if any(value is choice for choice in args):
            return value
        # YAML reads a bare off/on as a boolean; as a choice it is the word.
        word = {False: "off", True: "on"}.get(value, value) if isinstance(value, bool) else value
        if word in args:
            return word
        raise ConfigError(f"{source}: {key}={shown(value)}; allowed: {', '.join(map(_word, args))}")
    if origin is list:
        items = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        return [_check(args[0], item, source, f"{key}[{i}]") for i, item in enumerate(items)]
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{source}: {key} must be a mapping, got {shown(value)}")
        named = {_check(args[0], str(name), source, f"a key of {key}"): own for name, own in value.items()}
        return {name: _check(args[1], own, source, _join(key, name)) for name, own in named.items()}
    if dataclasses.is_dataclass(hint):
        if factory := vars(hint).get("factory"):  # the value decides which subclass it describes
            module, _, function = factory.partition(":")
            return getattr(importlib.import_module(module), function)(value, source, key)
        bare = getattr(hint, "bare", None)  # the one field that a plain word stands for
        return _build(hint, {bare: value} if bare and isinstance(value, str) else value, source, key)
    right = {
        int: isinstance(value, int) and not isinstance(value, bool),
        float: isinstance(value, (int, float)) and not isinstance(value, bool),
        bool: isinstance(value, bool),
        str: isinstance(value, (str, int, float)) and not isinstance(value, bool),
    }
    if hint not in right:
        raise ConfigError(
            f"{source}: {key}: its class declares the type {hint}, which a recipe cannot hold; expected int, float, "
            "bool, str, Any, Literal, a dataclass, or a list, dict or optional of these"
        )
    if not right[hint]:
        raise ConfigError(f"{source}: {key}={shown(value)}; expected {_PLAIN[hint]}")
    if not ranged and hint in (int, float) and not -(2**63) <= typing.cast(float, value) < 2**63:  # also .nan
        raise ConfigError(f"{source}: {key}={shown(value)}; expected {_PLAIN[hint]} from -2^63 to below 2^63")
    try:
        # Of 0.0 and -0.0 it is 0.0: two recipes that ask for the same are equal.
        return float(value) + 0.0 if hint is float else hint(value)
    except (OverflowError, ValueError) as error:  # of a whole number with more digits than Python converts
        raise ConfigError(f"{source}: {key}={shown(value)}; expected {_PLAIN[hint]} of fewer digits") from error


def _word(choice: Any) -> str:
    return str(choice).lower() if isinstance(choice, bool) else str(choice)


_PLAIN = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def build(schema: type[T], options: Mapping[str, Any], source: str, key: str) -> T:
    """Check a mapping against any dataclass (objectives use it for their own options)."""
    return _build(schema, options, source, key)


def nearest(name: str, known: Sequence[str]) -> str:
    """`did you mean …?` for a name that is not in `known`, or the list of what is known."""
    return suggestion(name, known) or f"known here: {', '.join(known)}"


def suggestion(name: str, known: Sequence[str], cutoff: float = 0.5) -> str:
    """`did you mean …?` where `name` resembles one of `known` (difflib's ratio ≥ cutoff), else an empty string."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return f"did you mean {close[0]!r}?" if close else ""


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else str(name)


def value(recipe: Any, dotted: str) -> Any:
    """The value of a resolved recipe's key, such as `run.dir` or `data.streams.forget[0].path`, as plain containers.

    Raises ConfigError for a key that the recipe does not have, naming the nearest one.
    """
    node: Any = to_dict(recipe)
    way = ""
    for part in re.findall(r"[^.\[\]]+", dotted):
        entries = dict(enumerate(node)) if isinstance(node, list) else node
        key: Any = documents.whole_number(part) if isinstance(node, list) else part
        if not isinstance(entries, Mapping) or key not in entries:
            known = list(map(str, entries)) if isinstance(entries, Mapping) else []
            raise ConfigError(f"{dotted}: unknown key {_join(way, part)!r}; {nearest(part, known)}")
        node, way = node[key], _join(way, part)
    return node


def load_any(path: str | Path, overrides: Sequence[str]) -> TrainRecipe | EvalRecipe | PrepareRecipe:
    """`load` with the class that the recipe's own keys show. Raises ConfigError as `load`, and where they show none."""
    return load(path, overrides, schema_of(path))


def schema_of(path: str | Path) -> type[TrainRecipe] | type[EvalRecipe] | type[PrepareRecipe]:
    """The class that a recipe's own keys show. Raises ConfigError where they show none, and for an unreadable file."""
    tree, _ = _read(path, Any)
    others = {"methods": "mirage sweep CONFIG --check", "published": "mirage paper CONFIG --plan"}
    if command := next((command for key, command in others.items() if OmegaConf.is_dict(tree) and key in tree), None):
        raise ConfigError(f"{path}: no recipe of training, evaluation or preparation; `{command}` shows what it does")
    kinds = {"objective": TrainRecipe, "sets": EvalRecipe, "safety": PrepareRecipe}
    kind = next((schema for key, schema in kinds.items() if OmegaConf.is_dict(tree) and key in tree), None)
    if kind is None:
        keys = ", ".join(kinds)
        raise ConfigError(
            f"{path}: has none of the keys {keys}; expected a recipe of training, evaluation or preparation"
        )
    return kind
