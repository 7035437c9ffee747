"""The parts of a model by their role, whatever its family calls them: through transformers' own interface.

Roles: `decoder`, the language model with embeddings and LM head; `head`, the LM head alone; `vision`, the encoder of
pictures; `connector`, what lies between the two; `audio`, an encoder of sounds.
"""

from __future__ import annotations

import difflib
import fnmatch
import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from mirage_dist.schema import ConfigError

ROLES = ("decoder", "head", "connector", "vision", "audio")


def auto_class(config: Any) -> Any:
    """The class that loads this configuration: AutoModelForImageTextToText, or AutoModelForCausalLM for text only.

    Raises ConfigError for a configuration of neither, or of a model with a text encoder.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    if config.is_encoder_decoder:
        raise ConfigError(
            f"model.path: {config.model_type} is an encoder-decoder model; expected one that has a decoder only"
        )
    pictured: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    # Some text models are in this mapping as well.
    if type(config) in pictured and "image" in pictured[type(config)].input_modalities:
        return AutoModelForImageTextToText
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    raise ConfigError(
        f"model.path: {config.model_type} is neither an image-text-to-text nor a causal language model of transformers"
    )


def text_only(config: Any) -> bool:
    """Whether models of this configuration take no pictures."""
    from transformers import AutoModelForCausalLM

    return auto_class(config) is AutoModelForCausalLM


def picture_token(config: Any) -> int | None:
    """The token id whose places in a prompt the model fills with a picture's features; None for text-only models."""
    return getattr(config, "image_token_id", None)


def decoder(model: Any) -> Any:
    """The text decoder of a Hugging Face model or of its backbone: the module that has `layers`.

    Raises ConfigError when transformers' `get_decoder` leads to no such module.
    """
    module = model
    while not hasattr(module, "layers"):
        try:
            inner = module.get_decoder()
        except (AttributeError, NotImplementedError):
            inner = None
        if inner is None or inner is module:
            raise ConfigError(f"{type(model).__name__}: its decoder has no `layers`; this family is not supported")
        module = inner
    return module


def encoder(model: Any, modality: str) -> Any | None:
    """The encoder of a modality ("image", "audio") of a Hugging Face model; None where it has none."""
    tower = model.get_encoder(modality=modality)
    whole = (model, model.base_model, decoder(model))
    return None if any(tower is module for module in whole) else tower


class Parts:
    """Role and role-relative name of every parameter of a model (with peft's adapters, if it has them).

    role_of: parameter name -> one of ROLES. A weight that embeddings and LM head share is the decoder's. alias_of:
    parameter name -> name relative to its role, such as `decoder.layers.7.mlp.down_proj.weight`, `vision.…`,
    `connector.…`, `head.weight`; a weight that an adapter wraps has the alias that it had without.

    Raises ConfigError for an image-text model in which no vision tower can be found, for a model without LM head, and
    for one with a part that has none of these roles: its parameters would train under a wrong name.
    """

    def __init__(self, model: Any) -> None:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        places = {id(module): name for name, module in model.named_modules()}
        roots = _roots(base)
        of: dict[int, str] = {}
        # Outer parts first: a tower may lie inside the decoder, and the decoder's own class may hold the LM head.
        for module, role in sorted(roots, key=lambda root: places[id(root[0])].count(".")):
            of |= {id(p): role for p in module.parameters()}
        if (inputs := base.get_input_embeddings()) is not None:
            of |= {id(p): "decoder" for p in inputs.parameters()}  # tied to the LM head or not
        towers = [module for module, role in roots if role == "vision"]
        of |= {id(p): "connector" for tower in towers for p in _connector_within(tower, base.config)}
        # Names are relative to the module that has the role, or else to the backbone.
        outer = f"{places[id(base)]}." if places[id(base)] else ""  # what peft puts before every name
        backbone = f"{places[id(base.base_model)]}." if base.base_model is not base else outer
        prefixes = {role: f"{places[id(module)]}." for module, role in reversed(roots) if role != "connector"}
        prefixes["decoder"] = f"{places[id(decoder(base))]}."
        rest = "decoder" if text_only(base.config) else "connector"
        self.role_of: dict[str, str] = {}
        self.alias_of: dict[str, str] = {}
        self._plain: dict[str, str] = {}
        for name, parameter in model.named_parameters():
            role = of.get(id(parameter), rest)
            if role in ("decoder", "connector") and _of_sounds(name):
                role = "audio"
            plain = name.replace(".base_layer.", ".")
            relative = next(
                (plain[len(p) :] for p in (prefixes.get(role), backbone) if p and plain.startswith(p)), plain
            )
            self.role_of[name], self.alias_of[name] = role, f"{role}.{relative.removeprefix(outer)}"
            self._plain[name] = plain.removeprefix(outer)
        self._check(base)

    def _check(self, base: Any) -> None:
        kind = f"{type(base).__name__} ({base.config.model_type})"
        if text_only(base.config):
            if "vision" in self.roles:
                raise ConfigError(
                    f"model.path: {kind} takes pictures, but is no image-text-to-text model of transformers"
                )
        elif "vision" not in self.roles:
            raise ConfigError(
                f"model.path: no vision tower can be found in {kind}; this family is not supported, since its tower "
                "would train unnoticed"
            )

    @property
    def roles(self) -> list[str]:
        """The roles that this model has."""
        present = set(self.role_of.values())
        return [role for role in ROLES if role in present]

    def matching(self, pattern: str) -> list[str]:
        """The names of the parameters that a role, or a shell glob over names or role-relative names, matches.

        Names are those of the model without adapters, too.
        """
        if pattern in ROLES:
            within = (pattern, "head") if pattern == "decoder" else (pattern,)
            return [name for name, role in self.role_of.items() if role in within]
        is_match = matcher(pattern)
        return [n for n, alias in self.alias_of.items() if any(map(is_match, (n, self._plain[n], alias)))]

    def selected(self, patterns: Sequence[str], key: str) -> set[str]:
        """The names that roles and patterns match. Raises ConfigError, with the recipe's `key`, for one without any."""
        names: set[str] = set()
        for pattern in patterns:
            if not (matches := self.matching(pattern)):
                raise ConfigError(f"{key}: {pattern!r} matches no parameter; {self.nearest(pattern)}")
            names.update(matches)
        return names

    def nearest(self, pattern: str) -> str:
        """The roles of this model, and the three names that resemble `pattern` most, for error messages."""
        if pattern in ROLES:
            return f"roles here: {', '.join(self.roles)}; leave {pattern!r} out for this model"
        names = {n: (alias, self._plain[n]) for n, alias in self.alias_of.items()}
        return f"roles here: {', '.join(self.roles)}; nearest names: {closest(pattern, names.values())}"


def closest(pattern: str, names: Iterable[tuple[str, ...]], count: int = 3) -> str:
    """The `count` names that resemble a shell glob most, with commas between them.

    names: the spellings of each, of which the one that resembles it most is returned. Of names that differ in numbers
    only (those of other layers), the first one counts.
    """
    pieces = [piece for piece in re.split(r"[*?]+", re.sub(r"\[[^]]*\]", "0", pattern)) if piece.strip(".")]
    seen: set[str] = set()
    scores: list[tuple[float, str]] = []
    for spellings in names:
        if (kind := re.sub(r"\d+", "N", spellings[0])) not in seen:
            seen.add(kind)
            best = max(spellings, key=lambda spelling: _resemblance(pieces, spelling))
            scores.append((_resemblance(pieces, best), best))
    return ", ".join(name for _, name in sorted(scores, key=lambda score: -score[0])[:count]) or "none"


def _resemblance(pieces: Sequence[str], name: str) -> float:
    """How far the literal pieces of a glob resemble parts of a dotted name: difflib's ratios, by length."""
    words, total = name.split("."), 0.0
    for piece in pieces:
        length = piece.strip(".").count(".") + 1
        windows = {".".join(words[i : i + length]) for i in range(max(1, len(words) - length + 1))}
        ratios = (difflib.SequenceMatcher(None, piece.strip("."), window).ratio() for window in windows)
        total += len(piece) * max(ratios)
    return total


def matcher(pattern: str) -> Callable[[str], bool]:
    """Whether a name matches a shell glob, as a function of the name."""
    expression = re.compile(fnmatch.translate(pattern))
    return lambda name: expression.match(name) is not None


def _roots(base: Any) -> list[tuple[nn.Module, str]]:
    """The modules whose parameters have a role, each with it: decoder, LM head, encoders, and connectors of their own
    class.

    Raises ConfigError for a model without LM head, or with a part of unknown role.
    """
    from transformers import PreTrainedModel

    head, text = base.get_output_embeddings(), decoder(base)
    if head is None:
        raise ConfigError(f"model.path: {type(base).__name__} has no LM head; this family is not supported")
    whole = base.get_decoder()
    roots = [(whole if whole is not base.base_model else text, "decoder"), (head, "head")]
    for role, modality in (("vision", "image"), ("vision", "video"), ("audio", "audio")):
        if (tower := encoder(base, modality)) is not None:
            roots.append((tower, role))
    known = {id(inner) for module, role in roots if role in ("vision", "audio") for inner in module.modules()}
    of_text = {id(inner) for inner in text.modules()}
    for name, module in base.named_modules():
        if not isinstance(module, PreTrainedModel) or id(module) in known:
            continue
        if any(inner is text for inner in module.modules()):
            continue
        known |= {id(inner) for inner in module.modules()}
        role = _role_by_input(module)
        if role is None and id(module) not in of_text:
            raise ConfigError(
                f"model.path: {name} ({type(module).__name__}) of {type(base).__name__} is neither its decoder nor an "
                "encoder of pictures or sounds, nor a connector; this family is not supported"
            )
        if role is not None:
            roots.append((module, role))
    return roots


def _role_by_input(module: Any) -> str | None:
    """The role of a model inside a model, by what its forward takes first; None when that is text."""
    first = next(p for p in inspect.signature(type(module).forward).parameters if p != "self")
    inputs = {first, type(module).main_input_name} - {"input_ids"}
    if any("pixel" in name or "patches" in name for name in inputs):
        return "vision"
    if any(name in ("input_features", "input_values") for name in inputs) or module.input_modalities in ("audio",):
        return "audio"
    # A Q-Former or a resampler: takes features, or queries.
    takes = inspect.signature(type(module).forward).parameters
    return "connector" if first != "input_ids" or "query_embeds" in takes else None


def _of_sounds(name: str) -> bool:
    """Whether a parameter's name is that of a projection of sounds; by the words of transformers' `get_encoder`."""
    return any(word in part for part in name.split(".") for word in ("audio", "speech"))


def _connector_within(tower: nn.Module, config: Any) -> list[nn.Parameter]:
    """Parameters of the connector where a family puts it inside the vision tower: Qwen-VL's patch mergers.

    These end in the decoder's width; a merger of patches between two layers of the tower does not.
    """
    width = config.get_text_config().hidden_size
    mergers = [module for name, module in tower.named_children() if "merger" in name or "connector" in name]
    ends = [m for m in mergers if any(getattr(inner, "out_features", None) == width for inner in m.modules())]
    return [p for module in ends for p in module.parameters()]
