"""Texts that look like keys: they belong in the environment, never in a recipe, a manifest, a log or W&B."""

from __future__ import annotations

import re

# Prefixes that services give their keys (OpenAI, Anthropic, Hugging Face, GitHub, GitLab, Google, AWS, Slack, NVIDIA,
# Groq, xAI, Replicate, W&B), a JSON web token, and the password in a URL.
_PATTERNS = (
    r"\bsk-[A-Za-z0-9_-]{16,}",
    r"\bhf_[A-Za-z0-9]{20,}",
    r"\b(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}|glpat-[A-Za-z0-9_-]{16,})",
    r"\bAIza[A-Za-z0-9_-]{30,}",
    r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    r"\bxox[abprs]-[A-Za-z0-9-]{10,}",
    r"\b(?:nvapi-|gsk_|xai-|r8_)[A-Za-z0-9_-]{20,}",
    r"\bwandb_v\d_[A-Za-z0-9_]{20,}",
    r"\beyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}",
    r"(?i:\bbearer )[A-Za-z0-9._~+/=-]{16,}",
    r"(?<=://)[^\s/@:]*:[^\s/@]+(?=@)",
)
_SECRET = re.compile("|".join(_PATTERNS))
# A value whose key says what it is: api_key=…, "token": "…", --password …
_NAMED = re.compile(
    r"""(?ix)(\b[\w.-]*(?:api_?key|secret|password|passwd|(?:access|auth|api|hf|wandb)_?token)["']?\s*[=:]\s*["']?)([^\s"',}]{8,})"""
)
MASK = "***"


def contains(text: str) -> bool:
    """Whether a part of `text` has the form of a known kind of key, or of a URL with a password."""
    return _SECRET.search(text) is not None


def masked(text: str) -> str:
    """`text` with such parts replaced, and with the values of what is named like a key."""
    return _NAMED.sub(rf"\1{MASK}", _SECRET.sub(MASK, text))
