"""The chat models that judge answers and reword questions."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from mirage_dist.schema.errors import ConfigError, require
from mirage_dist.schema.names import Place


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """A chat model: a local Hugging Face directory (`path`), or an OpenAI-compatible endpoint (`url` and `model`).

    The endpoint's key comes from the environment only. No error message repeats the value of an endpoint's option,
    because somebody may have written a key into the wrong one.
    """

    path: Place | None = None
    dtype: Literal["fp32", "bf16"] = "bf16"
    batch_size: int = 8
    url: str | None = None  # up to the version, such as http://localhost:8000/v1
    model: str | None = None  # its name at the endpoint
    key_env: str | None = None  # NAME of the environment variable that holds the key; null sends none
    concurrency: int = 8  # requests at a time
    timeout: float = 60.0  # seconds for one request, from its start to its last byte
    retries: int = 5  # of a request that timed out, was rate-limited or broke; then it counts as failed
    backoff: float = 1.0  # seconds before the first retry; doubles each time, Retry-After is honoured

    def __post_init__(self) -> None:
        require(self, ("batch_size", "concurrency"), "a whole number above 0", lambda x: x >= 1)
        require(self, ("timeout",), "a number above 0", lambda x: 0 < x < math.inf)
        require(self, ("retries", "backoff"), "a number of at least 0", lambda x: 0 <= x < math.inf)
        if (self.path is None) == (self.url is None):
            raise ConfigError("path: a chat model needs either path (a local model) or url (an endpoint)")
        if self.url is None:
            return
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError("url: expected an address such as http://localhost:8000/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ConfigError("url: must hold no user, password or query; a key belongs in the environment (key_env)")
        if self.model is None:
            raise ConfigError("model: an endpoint needs the name of its model")
        if self.key_env is not None and not re.fullmatch(r"[A-Z][A-Z0-9_]*", self.key_env):
            raise ConfigError(
                "key_env: expected the NAME of an environment variable, such as OPENAI_API_KEY, not a key"
            )
