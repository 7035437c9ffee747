"""The base of judges that ask a chat model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from mirage_dist.evals.judges.base import Judge, Opinion
from mirage_dist.evals.models.chat import Backend, backend
from mirage_dist.evals.models.replies import Failed
from mirage_dist.schema import ChatConfig, EvalRecipe


@dataclass(frozen=True, kw_only=True)
class ChatJudge(Judge, ChatConfig):
    """A judge whose options name a chat model (see `ChatConfig`), local or behind an endpoint.

    Not every option decides a verdict (`timeout` does not), and a verdict may have cost money: a subclass's
    `fingerprint` names what does, `backend.identity` included, in place of its source.
    """

    slow = True

    max_new_tokens: ClassVar[int]
    json_mode = False  # ask an endpoint for a JSON object

    @cached_property
    def backend(self) -> Backend:
        """The model; a local one is loaded when it is first asked."""
        return backend(self, self.max_new_tokens, self.json_mode)

    def of(self, recipe: EvalRecipe) -> Judge:
        """Raises ConfigError when the model's directory, or the key where one is named, does not exist."""
        _ = self.backend
        return self


def failed(reply: Failed) -> Opinion:
    """The opinion on a row that the model did not judge."""
    flags = {name: True for name in ("final", "untried") if getattr(reply, name)}
    return Opinion("failed", {"reason": reply.reason, **flags}, note=str(reply))
