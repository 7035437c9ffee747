"""File formats, one a module: a subclass of `Format`, and one line in the registry (docs/data.md)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mirage_dist.config import build
from mirage_dist.data.formats.base import BadRecord, Format, Opened, Split, get, identity, image, text
from mirage_dist.data.published import hub
from mirage_dist.registry import Registry
from mirage_dist.schema import ConfigError, SourceConfig

__all__ = [
    "REGISTRY",
    "BadRecord",
    "Format",
    "Opened",
    "Split",
    "as_format",
    "get",
    "identity",
    "image",
    "load",
    "make",
    "recognised",
    "scored",
    "signatures",
    "source",
    "text",
]

REGISTRY = Registry(
    "format",
    "format",
    {
        "vlguard": "mirage_dist.data.formats.vlguard:VLGuard",
        "llava": "mirage_dist.data.formats.llava:Llava",
        "spa_vl": "mirage_dist.data.formats.spa_vl:SpaVL",
        "samples": "mirage_dist.data.formats.samples:Samples",
        "figstep": "mirage_dist.data.formats.figstep:FigStep",
        "mm_safetybench": "mirage_dist.data.formats.mm_safetybench:MMSafetyBench",
        "vqav2": "mirage_dist.data.formats.vqa:VQAv2",
        "textvqa": "mirage_dist.data.formats.vqa:TextVQA",
        "vizwiz": "mirage_dist.data.formats.vqa:VizWiz",
        "scienceqa": "mirage_dist.data.formats.scienceqa:ScienceQA",
        "gqa": "mirage_dist.data.formats.vqa:GQA",
        "pope": "mirage_dist.data.formats.yes_no:POPE",
        "mme": "mirage_dist.data.formats.yes_no:MME",
        "safe_eraser": "mirage_dist.data.formats.safe_eraser:SafeEraser",
    },
)


def load(name: object, source: str, where: str) -> type[Format]:
    """The class of a format, by its name or `module:Class`. source, where: recipe and key, for errors.

    Raises ConfigError for an unknown name, listing all formats, and for a class that is no format.
    """
    cls = REGISTRY.load(name, source, where)
    if not issubclass(cls, Format):
        raise ConfigError(f"{source}: {where}={name!r}: not a subclass of mirage_dist.data.formats.Format")
    return cls


def make(options: Any, source: str, where: str) -> Format:
    """The source that a mapping of a recipe describes; `config.load` calls it for every source.

    Raises ConfigError for an unknown format, an option that the format does not have, or a wrong value.
    """
    if not isinstance(options, Mapping):
        raise ConfigError(f"{source}: {where} must be a mapping, got {options!r}")
    cls = load(options.get("format"), source, f"{where}.format")
    own = _own(cls)
    if str(options.get("path")).startswith(hub.SCHEME):
        own |= {"config", cls.split_key}
    foreign = {name: _owners(name) for name in options if name not in own}
    for name, owners in foreign.items():
        if owners and options[name] not in (None, *owners.values()):
            hubs = " or to a dataset of the hub (path: hf://OWNER/NAME)" if name == cls.split_key else ""
            raise ConfigError(
                f"{source}: {where}.{name}={options[name]!r}; belongs to format={' or '.join(owners)}{hubs}, with "
                f"{options['format']} leave it out"
            )
    # Recipes that earlier versions wrote out have the options of every format, at null or at their defaults.
    return build(cls, {name: value for name, value in options.items() if not foreign.get(name)}, source, where)


def source(format: str, path: str, images: str | None = None, **options: Any) -> Format:
    """A source made in code, not by a recipe. Raises ConfigError as `make`."""
    return make({"format": format, "path": path, "images": images, **options}, path, "source")


def as_format(config: SourceConfig) -> Format:
    """The source of a recipe as what it is. Raises TypeError for one that neither `make` nor `source` made."""
    if not isinstance(config, Format):
        raise TypeError(f"{config}: has no format; make it with data.formats.source")
    return config


def signatures() -> dict[str, frozenset[str]]:
    """Our formats whose records can be recognised -> the fields that identify them."""
    return {name: cls.signature for name in REGISTRY if (cls := load(name, "mirage", "format")).signature}


def recognised(record: Mapping[str, Any]) -> list[str]:
    """Our formats whose records look like this one."""
    return [name for name in signatures() if load(name, "mirage", "format").recognises(record)]


def scored() -> list[str]:
    """Our formats whose answers have a published score (`SourceConfig.score`)."""
    return [name for name in REGISTRY if load(name, "mirage", "format").score]


def _owners(option: str) -> dict[str, Any]:
    """Our formats that have an option -> its default there."""
    classes = {name: load(name, "mirage", "format") for name in REGISTRY}
    fields = {name: {f.name: f.default for f in dataclasses.fields(cls)} for name, cls in classes.items()}
    return {name: fields[name][option] for name, cls in classes.items() if option in _own(cls)}


def _own(cls: type[Format]) -> set[str]:
    """The options of a format, without those that are for datasets of the hub."""
    return {field.name for field in dataclasses.fields(cls)} - {"config", cls.split_key}
