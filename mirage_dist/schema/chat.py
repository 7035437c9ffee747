"""OpenAI-compatible endpoints, and the chat models that judge answers and reword questions."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from mirage_dist.schema import secrets
from mirage_dist.schema.errors import ConfigError
from mirage_dist.schema.names import Place
from mirage_dist.schema.numbers import Batch, Parallel, Pause, Retries, Timeout, Tokens, Weight

# Fields of a request that have a key of their own, or that the client depends on.
OWN_FIELDS = ("messages", "model", "temperature", "max_tokens", "max_completion_tokens", "stream", "n")


@dataclass(frozen=True, kw_only=True)
class EndpointConfig:
    """A model behind an OpenAI-compatible endpoint (`url` and `model`). Without a `url` the model is a local one.

    The endpoint's key comes from the environment only. No error message repeats the value of an endpoint's option,
    because somebody may have written a key into the wrong one.
    """

    url: str | None = None  # up to the version, such as http://localhost:8000/v1
    model: str | None = None  # its name at the endpoint
    key_env: str | None = None  # NAME of the environment variable that holds the key; null sends none
    max_tokens: Tokens | None = None  # of one reply, reasoning included; default: what a reply needs
    max_completion_tokens: Tokens | None = None  # for endpoints that want this field in place of max_tokens
    temperature: Literal[0, None] = 0  # null leaves it out, for endpoints that reject it
    extra: dict[str, Any] = field(default_factory=dict)  # further fields of each request: {reasoning_effort: low}
    concurrency: Parallel = 8  # requests at a time
    timeout: Timeout = 60.0  # seconds for one request, from its start to its last byte
    retries: Retries = 5  # of a request that timed out, was rate-limited or broke; then it counts as failed
    backoff: Pause = 1.0  # seconds before the first retry; doubles each time, Retry-After is honoured

    def refuse_without_url(self, *names: str) -> None:
        """Raise ConfigError for one of these fields that is given although the model is a local one."""
        defaults = EndpointConfig()
        for name in names:
            if getattr(self, name) != getattr(defaults, name):
                raise ConfigError(f"{name}: belongs to an endpoint (url); with a local model leave it out")

    def check_endpoint(self) -> None:
        """Raise ConfigError for an address, a field or the name of a key's variable that cannot be one."""
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ConfigError("max_completion_tokens: takes the place of max_tokens; give one of them")
        if own := [name for name in OWN_FIELDS if name in self.extra]:
            raise ConfigError(f"extra.{own[0]}: the client sets this field; use its own key where there is one")
        if secret := [name for name in self.extra if secrets.named(name)]:
            raise ConfigError(f"extra.{secret[0]}: a key belongs in the environment (key_env)")
        try:
            json.dumps(self.extra, allow_nan=False)
        except (TypeError, ValueError):
            raise ConfigError("extra: holds a value that JSON cannot hold, such as a date or .inf") from None
        try:
            parts = urlsplit(self.url or "")
            whole = (
                parts.scheme in ("http", "https")
                and bool(parts.hostname)
                and parts.port != 0
                and not re.search(r"\s", self.url or "")
            )
        except ValueError:  # of a port or a bracket
            whole = False
        if not whole:
            raise ConfigError("url: expected an address such as http://localhost:8000/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ConfigError("url: must hold no user, password or query; a key belongs in the environment (key_env)")
        if self.model is None:
            raise ConfigError("model: an endpoint needs the name of its model")
        if self.key_env is not None and not re.fullmatch(r"[A-Z][A-Z0-9_]*", self.key_env):
            raise ConfigError(
                "key_env: expected the NAME of an environment variable, such as OPENAI_API_KEY, not a key"
            )


@dataclass(frozen=True, kw_only=True)
class ChatConfig(EndpointConfig):
    """A chat model: a local Hugging Face directory (`path`), or an OpenAI-compatible endpoint (`url` and `model`)."""

    path: Place | None = None  # a local model's directory, in place of `url`
    dtype: Literal["fp32", "bf16"] = "bf16"  # of a local model
    batch_size: Batch = 8  # rows that a local model answers at once

    def __post_init__(self) -> None:
        if (self.path is None) == (self.url is None):
            raise ConfigError("path: a chat model needs either path (a local model) or url (an endpoint)")
        if self.url is None:
            self.refuse_without_url("max_completion_tokens", "temperature", "extra")
        else:
            self.check_endpoint()


@dataclass(frozen=True, kw_only=True)
class PriceConfig:
    """What an endpoint takes for a million tokens, in US dollars."""

    input: Weight  # of prompts
    output: Weight  # of answers, reasoning included
