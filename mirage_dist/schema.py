"""What a recipe may say: frozen dataclasses with their defaults, allowed values and ranges. `config` fills them.

Imports nothing heavy, and nothing of ours.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal
from urllib.parse import urlsplit


class ConfigError(ValueError):
    """A recipe, an override or a data file does not say what it must; the message says where and what to do."""

    status = 2  # of the process that ends by it


class RunError(RuntimeError):
    """A run cannot go on, through no fault of its recipe; the message says what happened and what is left whole."""

    status = 1


def _require(config: Any, names: Sequence[str], expected: str, right: Callable[[Any], bool]) -> None:
    """Raise ConfigError for a field that is given and not right; the recipe's key is put before it by `load`."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not right(value):
            raise ConfigError(f"{name}={value!r}; expected {expected}")


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives. `name` labels it in W&B and in reports (default: the directory's name)."""

    dir: str
    name: str | None = None


@dataclass(frozen=True)
class SourceConfig:
    """One file of samples (see `data.sources`)."""

    format: Literal["vlguard", "llava", "spa_vl", "samples"]
    path: str
    images: str | None = None  # folder that image paths are relative to; default: the file's own folder
    split: Literal["all", "unsafes", "safe_safes", "safe_unsafes"] | None = None  # vlguard only; default: all
    response: Literal["chosen", "rejected"] | None = None  # spa_vl only; default: chosen
    on_bad_record: Literal["error", "skip"] = "error"
    limit: int | None = None  # the first N samples, in file order

    def __post_init__(self) -> None:
        for name, format, default in (("split", "vlguard", "all"), ("response", "spa_vl", "chosen")):
            value = getattr(self, name)
            if self.format != format and value not in (None, default):
                raise ConfigError(f"{name}={value!r}; belongs to format={format}, with {self.format} leave it out")
            # One spelling each, so that a recipe that says the default and one that leaves it out are equal.
            object.__setattr__(self, name, (value or default) if self.format == format else None)


@dataclass(frozen=True)
class DataConfig:
    """What the run reads: one or more sources for each stream that the objective needs."""

    streams: dict[str, list[SourceConfig]]
    max_length: int = 2048  # tokens a sample, image tokens included
    on_long: Literal["error", "truncate"] = "error"  # truncate cuts the answer, never image or question
    image_aspect: Literal["pad", "processor"] = "pad"  # pad to a square with the processor's mean colour
    system_prompt: str | None = None
    refusals_in_forget: Literal["error", "allow"] = "error"  # "harmful" answers that are in fact refusals
    group_by_length: bool = False  # samples of like length into one batch
    packing: bool = False  # a micro-batch's samples end to end in one row, without padding
    workers: int = 2  # processes a rank that read and collate batches ahead of the step; 0: none
    cache_vision: bool = False  # keep what the frozen vision tower gives for each picture on disk, and run it once

    def __post_init__(self) -> None:
        _require(self, ("max_length",), "a number of tokens above 0", lambda x: x >= 1)
        _require(self, ("workers",), "a number of processes from 0", lambda x: x >= 0)


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (Hu et al., 2021) by peft, on the linear layers that match `targets`.

    With adapters `model.train` and `model.freeze` are not used; `also_train` names parameters that train whole.
    """

    rank: int = 128
    alpha: int = 256
    dropout: float = 0.05
    targets: list[str] = field(
        default_factory=lambda: [
            f"*language_model*.{name}"
            for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        ]
    )
    also_train: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        _require(self, ("rank",), "a whole number above 0", lambda x: x >= 1)
        _require(self, ("dropout",), "a share from 0 to below 1", lambda x: 0 <= x < 1)


@dataclass(frozen=True)
class ModelConfig:
    """Which weights, and which of them train. Patterns are shell globs over parameter names."""

    path: str
    attention: Literal["auto", "flash_attention_2", "sdpa", "eager"] = "auto"
    train: list[str] = field(default_factory=lambda: ["*"])
    freeze: list[str] = field(default_factory=lambda: ["*vision_tower*", "*visual.*"])  # wins over `train`
    lora: LoraConfig | None = None
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class TrainConfig:
    """The optimizer and the batch. `global_batch` and `micro_batch` count rows of *each* stream."""

    lr: float
    global_batch: int
    micro_batch: int
    max_steps: int | None = None  # default: `epochs` passes over the first stream
    epochs: float = 1.0
    dtype: Literal["fp32", "bf16"] = "bf16"
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    weight_decay: float = 0.0
    clip: float = 1.0  # global gradient norm; 0 is off
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # what happens in the last `decay` of the run
    warmup: float = 0.03  # fraction of the steps
    decay: float = 1.0  # fraction of the steps after warm-up over which the rate falls; .1 is warm-up-stable-decay
    min_lr: float = 0.0  # fraction of `lr` at the end
    save_every: int | None = None  # steps; the last step is always saved
    save_in_background: bool = True  # no step waits for the disk
    keep_last: int | None = 3  # checkpoints; null keeps all
    keep_every: int | None = None  # and those whose step is a multiple of this
    keep_best: str | None = None  # and the one with the least of this metric, such as loss or terms.retain_ce
    max_restarts: int = 3  # starts of one Slurm job in a row that make no new checkpoint; then it is stopped
    hang_seconds: float = 1800.0  # a rank that does not move for so long ends the run, named
    nonfinite_patience: int = 5  # stop after this many skipped steps in a row
    export: bool = True  # write `export/`, a Hugging Face model directory, at the end

    def __post_init__(self) -> None:
        whole = ("global_batch", "micro_batch", "max_steps", "save_every", "keep_last", "keep_every", "max_restarts")
        _require(self, (*whole, "nonfinite_patience"), "a whole number above 0", lambda x: x >= 1)
        _require(self, ("lr", "epochs", "hang_seconds"), "a number above 0", lambda x: 0 < x < math.inf)
        _require(self, ("weight_decay", "clip"), "a number of at least 0", lambda x: 0 <= x < math.inf)
        _require(self, ("warmup", "decay", "min_lr"), "a share from 0 to 1", lambda x: 0 <= x <= 1)
        _require(
            self, ("betas",), "two numbers from 0 to below 1", lambda x: len(x) == 2 and all(0 <= b < 1 for b in x)
        )


@dataclass(frozen=True)
class MonitorConfig:
    """`metrics.jsonl` is always written; W&B only when asked."""

    wandb: Literal["off", "online", "offline"] = "off"
    project: str = "mirage_dist"
    entity: str | None = None
    print_every: int = 10  # steps between lines where there is no terminal

    def __post_init__(self) -> None:
        _require(self, ("print_every",), "a whole number above 0", lambda x: x >= 1)


@dataclass(frozen=True)
class WorldConfig:
    """The embedded world (see `data.toyworld`): made on first use in `dir`, then reused."""

    dir: str
    seed: int = 0
    spurious: float = 0.95  # share of the other safety questions that open with a word of their class's family
    neutral: float = 0.3  # share of safety questions of either class that open with a neutral word
    answer_form: Literal["by_opener", "constant"] = "by_opener"
    base_samples: int = 20_000
    safety_samples: int = 400  # unsafe, and as many safe
    general_samples: int = 400
    eval_samples: int = 256  # questions in each evaluation set
    base_recipe: str = "configs/train/demo_base.yaml"

    def __post_init__(self) -> None:
        for name in ("spurious", "neutral"):
            share = getattr(self, name)
            # Two decimals, since they name the safety set's folder.
            if not 0 <= share <= 1 or round(share, 2) != share:
                raise ConfigError(f"{name}={share!r}; expected a share from 0 to 1 with at most two decimals")
        samples = ("base_samples", "safety_samples", "general_samples", "eval_samples")
        _require(self, samples, "a whole number above 0", lambda x: x >= 1)


@dataclass(frozen=True)
class TrainRecipe:
    """`mirage train`: everything that decides a training run."""

    run: RunConfig
    model: ModelConfig
    data: DataConfig
    objective: dict[str, Any]  # `name` and the fields of that objective's dataclass
    train: TrainConfig
    seed: int = 0
    reference: Literal["cache", "adapters_off", "engine"] = "cache"
    deepspeed: str = "configs/deepspeed/zero3.json"
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    world: WorldConfig | None = None


@dataclass(frozen=True)
class PrepareRecipe:
    """`mirage prepare`: forget and retain sets (see `data.prepare`)."""

    out: str  # a new folder
    safety: list[SourceConfig]
    answers: Literal["harvest", "as_given"] = "harvest"  # as_given: the unsafe records hold the answers to forget
    harvest: str | None = None  # JSONL file or folder (an evaluation's rows/) with id, question, response
    min_match: float = 0.9  # share of the unsafe questions that must have an answer to forget
    fill: list[SourceConfig] = field(default_factory=list)  # general samples
    retain_size: int | None = None  # default: what the safety data have, without `fill`
    unsafe_questions_on_safe_images: bool = False  # retain their refusals too
    seed: int = 0
    world: WorldConfig | None = None


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
    the forgotten knowledge. The first set of a kind gives the headline figures.
    attacks: name -> `kind` and the fields of that attack's dataclass (see `evals.attacks`).
    """

    kind: Literal["unsafe", "safe", "locality"]
    sources: list[SourceConfig]
    attacks: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class JudgeConfig:
    """Who says what kind of answer a row is (see docs/judges.md). A bare word in a recipe is the kind.

    vlm and published_parity ask a vision-language model: a local Hugging Face directory (`path`), or an
    OpenAI-compatible endpoint (`url` and `model`). The endpoint's key comes from the environment only.
    """

    bare: ClassVar[str] = "kind"

    kind: Literal["keyword", "world", "vlm", "published_parity"]
    name: str | None = None  # in metrics.json; default: the kind
    phrases: Literal["ours", "published"] | None = None  # keyword only (see data/refusals.json); default: ours
    path: str | None = None
    dtype: Literal["fp32", "bf16"] = "bf16"
    batch_size: int = 8
    url: str | None = None  # up to the version, such as http://localhost:8000/v1
    model: str | None = None  # its name at the endpoint
    key_env: str | None = None  # NAME of the environment variable that holds the key; null sends none
    json_mode: bool = True  # ask the endpoint for a JSON object; false for servers that know no response_format
    concurrency: int = 8  # requests at a time
    timeout: float = 60.0  # seconds for one request, from its start to its last byte
    retries: int = 5  # of a request that timed out, was rate-limited or broke; then it counts as failed
    backoff: float = 1.0  # seconds before the first retry; doubles each time, Retry-After is honoured
    prompts: str | None = None  # published_parity only: JSON file with another wording

    def __post_init__(self) -> None:
        _require(self, ("batch_size", "concurrency"), "a whole number above 0", lambda x: x >= 1)
        _require(self, ("timeout",), "a number above 0", lambda x: 0 < x < math.inf)
        _require(self, ("retries", "backoff"), "a number of at least 0", lambda x: 0 <= x < math.inf)
        _require(self, ("name",), "letters, digits, - and _", lambda x: bool(re.fullmatch(r"[\w-]+", x)))
        asks = self.kind in ("vlm", "published_parity")
        for name, kinds in (
            *((name, ("vlm", "published_parity")) for name in ("path", "url", "model", "key_env")),
            ("phrases", ("keyword",)),
            ("prompts", ("published_parity",)),
        ):
            if getattr(self, name) is not None and self.kind not in kinds:
                raise ConfigError(f"{name}: belongs to kind {' or '.join(kinds)}, with {self.kind} leave it out")
        if asks and (self.path is None) == (self.url is None):
            raise ConfigError(f"path: kind {self.kind} needs either path (a local model) or url (an endpoint)")
        if self.url is not None:
            self._check_endpoint(self.url)
        if self.kind == "keyword":
            object.__setattr__(self, "phrases", self.phrases or "ours")
        published = "_published" if self.phrases == "published" else ""
        object.__setattr__(self, "name", self.name or self.kind + published)

    def _check_endpoint(self, url: str) -> None:
        """No message repeats a value here: somebody may have written a key into the wrong field."""
        parts = urlsplit(url)
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


@dataclass(frozen=True)
class GenerationConfig:
    """Decoding is greedy; an answer ends with the end token or after `max_new_tokens`."""

    max_new_tokens: int = 256
    batch_size: int = 16

    def __post_init__(self) -> None:
        _require(self, ("max_new_tokens", "batch_size"), "a whole number above 0", lambda x: x >= 1)


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
    robustness: dict[str, Any] | None = None  # `mirage eval CONFIG robustness` (see `robustness.run.RobustnessConfig`)
