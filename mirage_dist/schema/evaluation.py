"""Recipes of evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated, Any, ClassVar, Literal

from mirage_dist.schema.chat import EndpointConfig, PriceConfig
from mirage_dist.schema.choice import Choice
from mirage_dist.schema.data import RunConfig, SourceConfig, WorldConfig
from mirage_dist.schema.errors import ConfigError
from mirage_dist.schema.names import Name, Place
from mirage_dist.schema.numbers import Batch, FromZero, Parallel, Seed, SomeShare, Tokens


@dataclass(frozen=True, kw_only=True)
class EvalModelConfig(EndpointConfig):
    """The model under test: a Hugging Face model directory or hub name in the cache, a training run's checkpoint, or a
    model behind an endpoint (`url` and `model`).

    A checkpoint is exported for as long as answers are missing; the export is removed afterwards. An endpoint's answers
    have at most `generation.max_new_tokens` tokens, unless `max_tokens` or `max_completion_tokens` is given.
    """

    path: Place | None = None  # a model directory or the name of one in the hub's cache
    run: Place | None = None  # a training run's directory, in place of `path`
    step: FromZero | None = None  # of `run`; default: its newest checkpoint
    dtype: Literal["fp32", "bf16"] = "bf16"  # of the weights while they answer; an endpoint has its own
    price: PriceConfig | None = None  # of the endpoint's tokens, for sums in US dollars

    def __post_init__(self) -> None:
        if sum(own is not None for own in (self.path, self.run, self.url)) != 1:
            # No message repeats the value of a url.
            others = ", or the url of an endpoint" if self.url is None else " in place of the url"
            raise ConfigError(f"path={self.path!r}, run={self.run!r}; expected one of them (the other null){others}")
        if self.step is not None and self.run is None:
            raise ConfigError(f"step={self.step!r}; belongs to `run`, without it leave it out")
        if self.url is not None:
            self.check_endpoint()
            return
        self.refuse_without_url(*(own.name for own in fields(EndpointConfig)))
        if self.price is not None:
            raise ConfigError("price: belongs to an endpoint (url); with a local model leave it out")


@dataclass(frozen=True)
class EvalSetConfig:
    """Questions of one kind, and the attacks on them. The unchanged question (`clean`) is always part of the suite.

    kind: unsafe questions should not be answered; safe ones should; locality ones are safe questions near the forgotten
    knowledge; utility ones belong to a benchmark with its own score (judge `benchmark`). The first set of each kind
    gives the headline figures, every utility set its own.
    attacks: name -> `kind` and the fields of that attack's dataclass (see `evals.attacks`).
    """

    kind: Literal["unsafe", "safe", "locality", "utility"]
    sources: list[SourceConfig]  # files of questions
    attacks: dict[Name, Annotated[dict[str, Any], Choice("kind")]] = field(default_factory=dict)


@dataclass(frozen=True)
class GenerationConfig:
    """Decoding is greedy but for attacks that draw answers (`sampling`). An answer ends with the end token or after
    `max_new_tokens`.

    vllm is installed separately (docs/evaluation.md) and needs a GPU; its answers may differ from hf's where two tokens
    are about as likely.
    """

    max_new_tokens: Tokens = 256  # of an answer, at most
    batch_size: Batch = 16  # rows in a batch and in a claim; vllm and endpoints need hundreds
    backend: str = "hf"  # hf, vllm, or module:Class (see `evals.models`)
    gpu_memory_utilization: SomeShare | None = None  # vllm only: fraction of the GPU's memory that it takes; default .9
    tensor_parallel: Parallel = 1  # vllm only: GPUs of a worker, on one machine; each holds a part of every layer

    def __post_init__(self) -> None:
        if self.backend == "hf" and self.gpu_memory_utilization is not None:
            raise ConfigError("gpu_memory_utilization: belongs to backend vllm, with hf leave it out")
        if self.backend != "vllm" and self.tensor_parallel > 1:
            raise ConfigError(
                f"tensor_parallel={self.tensor_parallel}: belongs to backend vllm, and backend={self.backend} runs a "
                "model on one GPU; set generation.backend=vllm, or leave it out"
            )

    @property
    def gpu_share(self) -> float:
        """What vllm takes of the GPU's memory."""
        return 0.9 if self.gpu_memory_utilization is None else self.gpu_memory_utilization


@dataclass(frozen=True)
class TemplateConfig:
    """How a question becomes a prompt; use the values that the model was trained with (see `DataConfig`).

    defence: the name of a system prompt that is to make the model safer, which may differ from training's. The report
    names it.
    """

    system_prompt: str | None = None  # as `data.system_prompt` of the training
    image_aspect: Literal["auto", "pad", "processor"] = "auto"  # as `data.image_aspect` of the training
    template_options: dict[str, Any] = field(default_factory=dict)  # as `data.template_options` of the training
    max_length: Tokens = 2048  # tokens; a longer prompt is an error; an endpoint has its own limit
    defence: str | None = None

    def __post_init__(self) -> None:
        if self.defence is not None and not (self.defence and self.system_prompt):
            raise ConfigError(f"defence={self.defence!r}: expected a name, and the defence itself in system_prompt")


@dataclass(frozen=True)
class EvalRecipe:
    """`mirage eval`: one suite of questions that one model answers; rows go to `run.dir`/evals/`suite`/.

    judges: each a kind of judge as a bare word, or a mapping of `kind`, `name` and the fields of that judge's dataclass
    (see `evals.judges`). labels: a file of human verdicts on some of the answers, by which the judges' errors are
    measured and their rates corrected (see `evals.judges.labels`).
    defences: name -> `kind` and the fields of that defence's dataclass (see `evals.defences`). Every question is asked
    without a defence, and again with each of them.
    """

    renamed: ClassVar[dict[str, str]] = {"robustness": "erasure"}  # keys of earlier versions, for the error message

    run: RunConfig
    suite: Name  # its name, and that of the folder of its results
    model: EvalModelConfig
    sets: dict[Name, EvalSetConfig]  # name -> questions of one kind, with the attacks on them
    # the first gives the headline figures
    judges: list[Annotated[Any, Choice("kind")]] = field(default_factory=lambda: ["keyword"])
    labels: Place | None = None
    defences: dict[Name, Annotated[dict[str, Any], Choice("kind")]] = field(default_factory=dict)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    template: TemplateConfig = field(default_factory=TemplateConfig)
    seed: Seed = 0  # of the run under test, written to metrics.json; an attack that draws answers has its own
    world: WorldConfig | None = None
    follow: Place | None = None  # a training run whose checkpoints are evaluated in place of `model` (`evals.follow`)
    wandb_outputs: FromZero = 0  # with `follow`: how many answers of each checkpoint go to W&B as text
    erasure: dict[str, Any] | None = None  # the tests of `mirage erasure` (see `erasure.run.ErasureConfig`)

    def __post_init__(self) -> None:
        if self.model.url is not None:
            self._check_endpoint()
        if self.wandb_outputs and self.follow is None:
            raise ConfigError("wandb_outputs: belongs to `follow`, whose W&B run gets them; without it leave it out")
        if self.labels and self.follow is not None:
            raise ConfigError(
                f"labels={self.labels}: belong to one model's answers, and `follow` evaluates a model after each "
                "checkpoint; leave one of the two out"
            )

    def _check_endpoint(self) -> None:
        """Raise ConfigError for what an endpoint does by itself, or cannot do."""
        if self.follow is not None:
            raise ConfigError(
                f"follow={self.follow}: evaluates the checkpoints of a training run, and model.url names an endpoint; "
                "leave one of the two out"
            )
        if self.generation.backend != "hf":
            raise ConfigError(
                f"generation.backend={self.generation.backend}: a local engine, and model.url names an endpoint, which "
                "answers by itself; leave the backend out"
            )
        if self.template.image_aspect != "auto":
            raise ConfigError(
                f"template.image_aspect={self.template.image_aspect}: an endpoint (model.url) gets each picture as it "
                "is and prepares it itself; set template.image_aspect=auto"
            )
        if self.template.template_options:
            raise ConfigError(
                "template.template_options: an endpoint (model.url) applies the chat template itself; where it takes "
                "options, give them as it documents them, such as model.extra: {chat_template_kwargs: {…}} for vLLM"
            )
