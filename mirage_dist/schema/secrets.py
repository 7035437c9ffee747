"""Texts that look like keys: they belong in the environment, never in a recipe, a manifest, a log or W&B."""

from __future__ import annotations

import re

# A random part: letters and digits without a break, some of them digits, or both cases. Words joined by hyphens, as in
# `runs/sk-baseline-experiment-3`, have no such part.
_RANDOM = r"(?:(?=[A-Za-z]*\d)|(?=[A-Z]*[a-z]+[A-Z]))[A-Za-z0-9]{16,}"
_UUID = r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}"
_TAIL = rf"(?:[A-Za-z0-9]{{1,15}}[_-]+){{0,24}}(?:{_RANDOM}|{_UUID})[A-Za-z0-9_-]*"
_PATTERNS = (
    # OpenAI and those that follow it (Anthropic, DeepSeek, OpenRouter, Langfuse), Stripe
    rf"(?<![A-Za-z0-9])sk-{_TAIL}",
    rf"(?<![A-Za-z0-9])(?:sk|rk|pk|whsec)_(?:live_|test_)?{_RANDOM}",
    # Hugging Face, GitHub, GitLab
    rf"(?<![A-Za-z0-9])(?:hf_|api_org_|gh[pousr]_){_RANDOM}",
    rf"(?<![A-Za-z0-9])(?:github_pat_|gl[a-z]{{2,8}}-){_TAIL}",
    # Google: API keys, OAuth tokens and secrets
    r"(?<![A-Za-z0-9])(?:AIza[A-Za-z0-9_-]{30,}|ya29\.[A-Za-z0-9_-]{20,}|GOCSPX-[A-Za-z0-9_-]{20,})",
    # AWS, Slack
    r"(?<![A-Za-z0-9])(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    r"(?<![A-Za-z0-9])xox[a-z]-(?=[A-Za-z-]*\d)[A-Za-z0-9-]{10,}",
    # NVIDIA, Groq, xAI, Replicate, Perplexity, Fireworks, Together, Pinecone, DigitalOcean, npm, PyPI, Docker, W&B
    rf"(?<![A-Za-z0-9])(?:nvapi-|gsk_|xai-|r8_|pplx-|fw_|tgp_v\d_|pcsk_|do[opr]_v\d_|npm_|pypi-|dckr_pat_|wandb_v\d_){_TAIL}",
    r"(?<![A-Za-z0-9])SG\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,}",
    # a JSON web token, a private key
    r"(?<![A-Za-z0-9])eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}",
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----(?:[^-]*-----END [A-Z ]*PRIVATE KEY-----)?",
    r"(?i:(?<![A-Za-z0-9])(?:bearer|basic) )(?=[A-Za-z._~+/=-]*\d)[A-Za-z0-9._~+/=-]{16,}",
    # in a URL: a password, a token in place of a user's name, and a key in its query
    r"(?<=://)[^\s/@:]*:[^\s/@]+(?=@)",
    r"(?<=://)(?=[^\s/@:]*\d)[^\s/@:]{20,}(?=@)",
    r"(?i:(?<=[?&])(?:[\w-]*(?:key|token|secret|passw(?:or)?d|signature|credential)|sig|auth)=)[^\s&#\"']{8,}",
)
_SECRET = re.compile("|".join(_PATTERNS))
_NAME = r"(?:api[_-]?key|secret(?:[_-]?key)?|passw(?:or)?d|authorization|(?:access|auth|api|hf|wandb|bearer)[_-]?token)"
_FIELD = re.compile(rf"(?i)(?:^|[._-])(?:{_NAME}|access[_-]?key)$")
# A value whose key says what it is: api_key=…, "token": "…"
_NAMED = re.compile(rf"""(?i)({_NAME}["']?\s{{0,4}}[=:]\s{{0,4}}["']?)([^\s"',}}]{{8,}})""")
MASK = "***"


def contains(text: str) -> bool:
    """Whether a part of `text` has the form of a known kind of key, or of a URL with a password or a key."""
    return _SECRET.search(text) is not None


def named(key: str) -> bool:
    """Whether a key, such as `headers.Authorization` or `api_key`, says that its value is secret."""
    return _FIELD.search(key) is not None


def masked(text: str) -> str:
    """`text` with such parts replaced, and with the values of what is named like a key."""
    return _NAMED.sub(rf"\1{MASK}", _SECRET.sub(MASK, text))
