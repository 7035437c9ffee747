"""What a judge is: it sees rows (see `evals.rows`) and says of each what kind of answer the model gave."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Protocol

from mirage_dist.evals.metrics import Verdict

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Opinion:
    """A verdict and what led to it, as it is written beside the verdict; never a key, never an endpoint's words."""

    verdict: Verdict
    detail: dict[str, Any] = field(default_factory=dict)


class Judge(Protocol):
    """about: one phrase for reports ("Judged by …"). verdicts: those it can give. fingerprint: of all that decides
    them beside the row; cached verdicts under another one are not used. slow: worth keeping one by one.
    """

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def about(self) -> str: ...
    @property
    def verdicts(self) -> frozenset[Verdict]: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def slow(self) -> bool: ...

    def opinions(self, rows: Sequence[Row], suite: Sequence[Row]) -> Generator[tuple[int, Opinion], None, None]:
        """(index into `rows`, opinion), in any order. suite: all rows, for judges that look beyond one."""
        ...


@dataclass(frozen=True)
class Rule:
    """A judge that is a function from a row to a verdict."""

    name: str
    kind: str
    about: str
    verdicts: frozenset[Verdict]
    fingerprint: str
    judge: Callable[[Row], Verdict]
    slow: bool = False

    def opinions(self, rows: Sequence[Row], suite: Sequence[Row]) -> Generator[tuple[int, Opinion], None, None]:
        said = {verdict: Opinion(verdict) for verdict in self.verdicts}  # one a verdict, not one a row
        return ((i, said[self.judge(row)]) for i, row in enumerate(rows))


def fingerprint(*parts: ModuleType | bytes | Mapping[str, Any]) -> str:
    """SHA-256 of modules' sources, bytes, and mappings that JSON can write."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, ModuleType):
            part = inspect.getsource(part).encode()
        elif isinstance(part, Mapping):
            part = json.dumps(part, sort_keys=True).encode()
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()
