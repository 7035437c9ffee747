"""A model under test behind an OpenAI-compatible endpoint: how it is asked, and what is known of it.

    evals/SUITE/served.json     the model that the suite's first reply names as its own

An endpoint may put another model behind the same name. Each reply says which one it is, and a reply that names another
one than the suite's first reply ends the worker before its answer is written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from mirage_dist import disk, signals, state
from mirage_dist.data.sample import Sample
from mirage_dist.evals.models import replies
from mirage_dist.evals.models.base import Answer, Outcome, Respondent
from mirage_dist.evals.models.endpoint import Endpoint, Health, Request
from mirage_dist.evals.models.replies import Failed, Reply
from mirage_dist.evals.results import EndpointInfo, Ends
from mirage_dist.evals.sharing.files import BLOCKED, CUT, DEFENCES, KEPT, NO_CONTENT, Row, Served, whole_objects
from mirage_dist.evals.sharing.usage import Usage, cost
from mirage_dist.schema import ConfigError, EvalModelConfig, EvalRecipe, GenerationConfig, RunError, TemplateConfig

FILE = "served.json"
BLOCK = "The endpoint's content filter blocked this question or its answer."  # stands for the answer


@dataclass(frozen=True)
class RemoteSubject:
    """The model under test. identity: the address and the fixed fields of each request, the model's name among them."""

    model: EvalModelConfig
    identity: Mapping[str, Any]

    @property
    def model_hash(self) -> str:
        """SHA-256 of the identity: of the weights nothing is known."""
        return disk.digest(self.identity)

    def load(self, template: TemplateConfig, generation: GenerationConfig, suite: Path) -> Remote:
        """Raises ConfigError for a template, as a defence leaves it, that no endpoint can be given."""
        if template.template_options or template.image_aspect != "auto":
            raise ConfigError(
                "template: a defence sets template_options or image_aspect, and an endpoint (model.url) applies its "
                "own chat template and prepares pictures itself; leave that defence out"
            )
        return Remote(_client(self.model, generation), template.system_prompt, ServedModel(suite))

    def check_unchanged(self) -> None:
        """Nothing of it lies on this machine; `ServedModel` compares what its replies name."""

    def discard(self, suite: Path) -> None:
        """Nothing was made for it."""


def find(recipe: EvalRecipe) -> RemoteSubject:
    """Raises ConfigError when the environment variable of the key is not set; sends nothing."""
    return RemoteSubject(recipe.model, _client(recipe.model, recipe.generation).identity)


def _client(model: EvalModelConfig, generation: GenerationConfig) -> Endpoint:
    try:
        return Endpoint(model, generation.max_new_tokens, json_mode=False)
    except ConfigError as error:
        name = str(error).partition(":")[0]  # a field of ours, or a variable of the environment
        raise ConfigError(f"model.{error}" if hasattr(model, name) else str(error)) from error


class Remote(Respondent):
    """Asks an endpoint, several requests at a time. A draw's temperature, top_p and seed are fields of its request;
    whether the same seed gives the same answer again is up to the endpoint.
    """

    seeded = True
    ends_on_signal = True

    def __init__(self, endpoint: Endpoint, system: str | None, served: ServedModel) -> None:
        self.endpoint, self.system, self.served = endpoint, system, served
        self.health = Health()

    def __call__(self, samples: Sequence[Sample]) -> Iterator[Sequence[tuple[int, Outcome]]]:
        """Yields answers as they arrive. Raises RunError for a reply that names another model, after the others."""
        requests = [
            Request(self.system, s.question, s.image, history=s.history, shown=s.shown, draw=s.draw) for s in samples
        ]
        stopped = signals.received
        with closing(self.endpoint.replies(requests, self.health, lambda: stopped() is not None)) as arriving:
            for batch in arriving:
                given, other = list[tuple[int, Outcome]](), None
                for i, outcome in batch:
                    try:
                        given.append((i, self._outcome(outcome)))
                    except RunError as error:
                        other = error
                if given:
                    yield given
                if other is not None:
                    raise other

    def _outcome(self, outcome: Reply | Failed) -> Outcome:
        reply = outcome.reply if isinstance(outcome, Failed) else outcome
        # The same request would come to the same again, so these are recorded once; all other failures are no answer.
        if isinstance(outcome, Failed) and outcome.final and outcome.reason == replies.FILTERED and not outcome.guessed:
            served = _served(reply, BLOCKED)  # it may name the filter in place of the model
            return Answer(BLOCK, {**served, "partial": reply.text} if reply is not None and reply.text else served)
        if reply is not None:
            self.served.check(reply.model)
        if isinstance(outcome, Failed):
            empty = outcome.final and outcome.reason == replies.EMPTY
            return Answer("", {**_served(reply, NO_CONTENT), "empty": True}) if empty else outcome
        served = _served(outcome, outcome.finish)
        return Answer(outcome.text, served if outcome.text else {**served, "empty": True})


def _served(reply: Reply | None, finish: str | None) -> Served:
    known = {
        "finish": finish,
        "model": None if reply is None else reply.model,
        "system_fingerprint": None if reply is None else reply.fingerprint,
        "prompt_tokens": None if reply is None else reply.prompt_tokens,
        "completion_tokens": None if reply is None else reply.completion_tokens,
    }
    return cast(Served, {name: own for name, own in known.items() if own is not None})


class ServedModel:
    """The model that a suite's first reply names, whichever worker or defence got that reply."""

    def __init__(self, suite: Path) -> None:
        self.suite, self.name = suite, ""

    def check(self, name: str | None) -> None:
        """Raise RunError for a reply that names another model. name: None where the reply names none."""
        if name is None:
            return
        self.name = self.name or self._first(name)
        if name != self.name:
            raise RunError(
                f"{self.suite}: the endpoint answers as model {name!r} now; its first reply named {self.name!r}. No "
                f"answer of {name!r} is written, and those of {self.name!r} are kept. Name the former model exactly "
                "(model.model) where the endpoint still has it, or choose another `suite` name for the new one"
            )

    def _first(self, name: str) -> str:
        """The name on disk; where there is none, `name`, which is written."""
        file = self.suite / FILE
        if not file.exists():
            earlier = self._answered()
            with disk.refusals(self.suite, KEPT):
                disk.create(file, state.sealed("served", {"model": earlier or name}), private=True)
        remedy = "Remove it: it is written anew, with the model that the answers on disk name"
        return str(state.read("served", file, remedy)["model"])

    def _answered(self) -> str | None:
        """The model that an answer on disk names; None where none does."""
        for pattern in ("rows/worker-*.jsonl", f"{DEFENCES}/*/rows/worker-*.jsonl"):
            for file in sorted(self.suite.glob(pattern)):
                for row in whole_objects("row", file):
                    if name := row.get("served", {}).get("model"):
                        return name
        return None


# ------------------------------------------------------------------------------------------------- its cost


def info(model: EvalModelConfig, rows: Iterable[Row]) -> EndpointInfo:
    """What `metrics.json` says about an endpoint's answers. rows: of one arm of the evaluation."""
    usage, backends = Usage(), Counter[tuple[str, str]]()
    ends: dict[str, dict[str, Ends]] = {}
    for row in rows:
        served = row.get("served", Served())
        usage.add(served)
        backends[served.get("model", ""), served.get("system_fingerprint", "")] += 1
        cell = ends.setdefault(row["set"], {}).setdefault(row["attack"], {"blocked": 0, "cut": 0, "answers": 0})
        cell["blocked"] += served.get("finish") == BLOCKED
        cell["cut"] += served.get("finish") == CUT
        cell["answers"] += 1
    return {
        "url": str(model.url),
        "model": str(model.model),
        "served": [
            {"model": name or None, "system_fingerprint": fingerprint or None, "answers": count}
            for (name, fingerprint), count in sorted(backends.items())
        ],
        "ends": ends,
        "usage": usage.sums(model.price),
    }


def estimate(recipe: EvalRecipe, requests: int | None) -> str:
    """What an evaluation asks of its endpoint, before it does. requests: at most; None where this is not known yet."""
    model = recipe.model
    limit = model.max_completion_tokens or model.max_tokens or recipe.generation.max_new_tokens
    if requests is None:
        return f"{model.model} behind {model.url}: its requests can be counted when the data of all sets are here"
    line = (
        f"{model.model} behind {model.url}: at most {requests:,} requests, each for at most {limit:,} tokens; requests "
        "are sent again where one fails"
    )
    if model.price is None:
        return line
    return f"{line}; at most {cost(model.price, 0, requests * limit):,.2f} USD for the answers, and the prompts beside"
