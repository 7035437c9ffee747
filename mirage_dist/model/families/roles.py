"""The parts of a model by their role, whatever its family calls them: through transformers' own interface.

Roles: `decoder`, the language model with embeddings and LM head; `head`, the LM head alone; `vision`, the encoder of
pictures; `connector`, what lies between the two; `audio`, an encoder of sounds.
"""

from __future__ import annotations

import difflib
import fnmatch
from typing import Any

from torch import nn

from mirage_dist.schema import ConfigError

ROLES = ("decoder", "head", "connector", "vision", "audio")


def auto_class(config: Any) -> Any:
    """The class that loads this configuration: AutoModelForImageTextToText, or AutoModelForCausalLM for text only.

    Raises ConfigError for a configuration of neither.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
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

    role_of: parameter name -> one of connector, decoder, head, vision, audio. A weight that embeddings and LM head
    share is the decoder's. alias_of: parameter name -> name relative to its role, such as
    `decoder.layers.7.mlp.down_proj.weight`, `vision.…`, `connector.…`, `head.weight`.
    """

    def __init__(self, model: Any) -> None:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        places = {id(module): name for name, module in model.named_modules()}
        roots: dict[str, Any] = {
            "head": base.get_output_embeddings(),
            "vision": encoder(base, "image"),
            "audio": encoder(base, "audio"),
            "decoder": decoder(base),
        }
        of: dict[int, str] = {}
        for role, module in roots.items():
            if module is not None:
                of |= {id(p): role for p in module.parameters()}
        prefixes = {role: f"{places[id(module)]}." for role, module in roots.items() if module is not None}
        self.role_of: dict[str, str] = {}
        self.alias_of: dict[str, str] = {}
        merged = _connector_within(roots["vision"]) if roots["vision"] is not None else set()
        for name, parameter in model.named_parameters():
            role = "connector" if id(parameter) in merged else of.get(id(parameter), "connector")
            self.role_of[name] = role
            self.alias_of[name] = f"{role}.{name.removeprefix(prefixes.get(role, ''))}"

    @property
    def roles(self) -> list[str]:
        """The roles that this model has."""
        present = set(self.role_of.values())
        return [role for role in ROLES if role in present]

    def matching(self, pattern: str) -> list[str]:
        """The names of the parameters that a role, or a shell glob over names or role-relative names, matches."""
        if pattern == "decoder":
            return [name for name, role in self.role_of.items() if role in ("decoder", "head")]
        if pattern in ROLES:
            return [name for name, role in self.role_of.items() if role == pattern]
        return [n for n, alias in self.alias_of.items() if _is(n, pattern) or _is(alias, pattern)]

    def nearest(self, pattern: str) -> str:
        """The roles of this model, and the three parameter names that resemble `pattern` most, for error messages."""
        names = [*self.alias_of.values(), *self.role_of]
        # Weights that differ in the layer's number only resemble a pattern alike.
        names = list(dict.fromkeys(names))[:4000]
        close = difflib.get_close_matches(pattern.replace("*", ""), names, n=3, cutoff=0.3)
        return f"roles here: {', '.join(self.roles)}; nearest names: {', '.join(close) or 'none'}"


def _is(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern)


def _connector_within(tower: nn.Module) -> set[int]:
    """Parameters of the connector where a family puts it inside the vision tower (Qwen-VL's patch mergers)."""
    mergers = [module for name, module in tower.named_children() if "merger" in name]
    return {id(p) for module in mergers for p in module.parameters()}
