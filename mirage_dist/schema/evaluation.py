"""Recipes of evaluation."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from mirage_dist.schema.chat import ChatConfig
from mirage_dist.schema.choice import Choice
from mirage_dist.schema.data import RunConfig, SourceConfig, WorldConfig
from mirage_dist.schema.errors import ConfigError, require


@dataclass(frozen=True)
class EvalModelConfig:
    """Who answers: a Hugging Face model directory or hub name in the cache, or a checkpoint of a training run.

    A checkpoint is exported for as long as answers are missing, and then removed.
    """

    path: str | None = None
    run: str | None = None  # a training run's directory, in place of `path`
    step: int | None = None  # of `run`; default: its newest checkpoint
    dtype: Literal["fp32", "bf16"] = "bf16"

    def __post_init__(self) -> None:
        if (self.path is None) == (self.run is None):
            raise ConfigError(f"path={self.path!r}, run={self.run!r}; expected one of them (the other null)")
        if self.step is not None and self.run is None:
            raise ConfigError(f"step={self.step!r}; belongs to `run`, with `path` leave it out")


@dataclass(frozen=True)
class EvalSetConfig:
    """Questions of one kind, and the attacks on them. The question as it is (`clean`) is always asked.

    kind: unsafe questions should not be answered; safe ones should; locality ones are safe questions near
    the forgotten knowledge; utility ones are a benchmark's, with a score of its own (judge `benchmark`). The first set
    of a kind gives the headline figures, every utility set its own.
    attacks: name -> `kind` and the fields of that attack's dataclass (see `evals.attacks`).
    """

    kind: Literal["unsafe", "safe", "locality", "utility"]
    sources: list[SourceConfig]
    attacks: dict[str, Annotated[dict[str, Any], Choice("kind")]] = field(default_factory=dict)


@dataclass(frozen=True)
class JudgeConfig(ChatConfig):
    """Who says what kind of answer a row is (see docs/judges.md). A bare word in a recipe is the kind.

    vlm and published_parity ask a vision-language model.
    """

    bare: ClassVar[str] = "kind"

    kind: Literal["keyword", "world", "vlm", "published_parity", "benchmark"]
    name: str | None = None  # in metrics.json; default: the kind
    phrases: Literal["ours", "published"] | None = None  # keyword only (see data/refusals.json); default: ours
    json_mode: bool = True  # ask the endpoint for a JSON object; false for servers that know no response_format
    prompts: str | None = None  # published_parity only: JSON file with another wording

    def __post_init__(self) -> None:
        require(self, ("name",), "letters, digits, - and _", lambda x: bool(re.fullmatch(r"[\w-]+", x)))
        for name, kinds in (
            *((name, ("vlm", "published_parity")) for name in ("path", "url", "model", "key_env")),
            ("phrases", ("keyword",)),
            ("prompts", ("published_parity",)),
        ):
            if getattr(self, name) is not None and self.kind not in kinds:
                raise ConfigError(f"{name}: belongs to kind {' or '.join(kinds)}, with {self.kind} leave it out")
        if self.kind in ("vlm", "published_parity"):
            self._check_chat(f"kind {self.kind}")
        if self.kind == "keyword":
            object.__setattr__(self, "phrases", self.phrases or "ours")
        published = "_published" if self.phrases == "published" else ""
        object.__setattr__(self, "name", self.name or self.kind + published)


@dataclass(frozen=True)
class GenerationConfig:
    """Decoding is greedy; an answer ends with the end token or after `max_new_tokens`.

    vllm is for GPUs: an optional extra, and answers that may differ from hf's where two tokens are about as likely.
    """

    max_new_tokens: int = 256
    batch_size: int = 16  # rows that are answered, and claimed, at once; vllm wants hundreds
    backend: Literal["hf", "vllm"] = "hf"
    gpu_memory_utilization: float | None = None  # vllm only: share of the GPU that it takes at once; default .9

    def __post_init__(self) -> None:
        require(self, ("max_new_tokens", "batch_size"), "a whole number above 0", lambda x: x >= 1)
        require(self, ("gpu_memory_utilization",), "a share above 0, at most 1", lambda x: 0 < x <= 1)
        if self.backend == "vllm":
            object.__setattr__(self, "gpu_memory_utilization", self.gpu_memory_utilization or 0.9)
        elif self.gpu_memory_utilization is not None:
            raise ConfigError("gpu_memory_utilization: belongs to backend vllm, with hf leave it out")


@dataclass(frozen=True)
class TemplateConfig:
    """How a question becomes a prompt; the values the model was trained with (see `DataConfig`)."""

    system_prompt: str | None = None
    image_aspect: Literal["pad", "processor"] = "pad"
    max_length: int = 2048  # tokens a prompt; a longer one is an error


@dataclass(frozen=True)
class EvalRecipe:
    """`mirage eval`: one suite of questions put to one model; rows go to `run.dir`/evals/`suite`/."""

    run: RunConfig
    suite: str
    model: EvalModelConfig
    sets: dict[str, EvalSetConfig]
    judges: list[JudgeConfig] = field(default_factory=lambda: [JudgeConfig("keyword")])  # the first: headline
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    template: TemplateConfig = field(default_factory=TemplateConfig)
    seed: int = 0  # of the run under test, for the record: greedy decoding draws nothing
    world: WorldConfig | None = None
    follow: str | None = None  # a training run, each of whose checkpoints answers in place of `model` (`evals.follow`)
    wandb_outputs: int = 0  # with `follow`: so many answers of each checkpoint go to W&B too, in the model's words
    robustness: dict[str, Any] | None = None  # `mirage eval CONFIG robustness` (see `robustness.run.RobustnessConfig`)

    def __post_init__(self) -> None:
        require(self, ("wandb_outputs",), "a whole number from 0", lambda x: x >= 0)
        if self.wandb_outputs and self.follow is None:
            raise ConfigError("wandb_outputs: belongs to `follow`, whose W&B run they go to; without it leave it out")
