"""What an endpoint's answers took, and how they ended: sums over rows. Imports no heavy library."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TypedDict, cast

from mirage_dist.evals.sharing.files import BLOCKED, CUT, Served
from mirage_dist.schema import PriceConfig

MILLION = 1_000_000


class Sums(TypedDict):
    """See `Usage`. usd: in US dollars, by the recipe's price; None without one."""

    answers: int
    prompt_tokens: int
    completion_tokens: int
    unmetered: int
    blocked: int
    cut: int
    empty: int
    usd: float | None


@dataclass
class Usage:
    """Sums over an endpoint's answers. unmetered: those whose reply states no number of tokens, such as blocked ones.

    blocked: by the endpoint's content filter. cut: ended by the limit of tokens. empty: without content. Tokens of
    replies that were no answer, and of those that no row holds because the worker was stopped, are in no sum.
    """

    answers: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    unmetered: int = 0
    blocked: int = 0
    cut: int = 0
    empty: int = 0

    def add(self, served: Served) -> None:
        self.answers += 1
        self.prompt_tokens += served.get("prompt_tokens", 0)
        self.completion_tokens += served.get("completion_tokens", 0)
        self.unmetered += "prompt_tokens" not in served or "completion_tokens" not in served
        finish = served.get("finish")
        self.blocked += finish == BLOCKED
        self.cut += finish == CUT
        self.empty += served.get("empty", False)

    def sums(self, price: PriceConfig | None) -> Sums:
        usd = None if price is None else cost(price, self.prompt_tokens, self.completion_tokens)
        return cast(Sums, {**asdict(self), "usd": usd})


def cost(price: PriceConfig, prompt_tokens: int, completion_tokens: int) -> float:
    """US dollars."""
    return (price.input * prompt_tokens + price.output * completion_tokens) / MILLION


def described(sums: Sums) -> str:
    """The sums as one line for people."""
    parts = [
        f"{sums['prompt_tokens']:,} prompt and {sums['completion_tokens']:,} completion tokens in {sums['answers']:,} "
        "answers"
    ]
    if sums["usd"] is not None:
        parts.append(f"{sums['usd']:,.4f} USD")
    words = {
        "unmetered": "answers whose reply states no tokens",
        "blocked": "blocked by the endpoint's content filter, which count as refusals",
        "cut": "cut off by the limit of tokens",
        "empty": "without any text",
    }
    return "; ".join([*parts, *(f"{sums[name]:,} {text}" for name, text in words.items() if sums[name])])
