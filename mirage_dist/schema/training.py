"""Recipes of training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from mirage_dist.schema.choice import Choice
from mirage_dist.schema.data import DataConfig, RunConfig, WorldConfig
from mirage_dist.schema.errors import ConfigError, require
from mirage_dist.schema.names import Place
from mirage_dist.schema.numbers import (
    Batch,
    Count,
    Epochs,
    FromZero,
    PartShare,
    Positive,
    Seconds,
    Seed,
    Share,
    Steps,
    Weight,
    Width,
)


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (Hu et al., 2021) by peft, on linear layers.

    targets: roles, or shell globs over the layers' names or names relative to a role, such as `decoder.*.q_proj`. With
    adapters `model.train` and `model.freeze` are not used; `also_train` selects parameters that train whole.
    """

    rank: Width = 128  # of the adapters' matrices
    alpha: Count = 256  # the adapters' product is scaled by alpha / rank
    dropout: PartShare = 0.05  # before the adapters, in training
    targets: list[str] = field(default_factory=lambda: ["decoder"])  # its linear layers, without the LM head
    also_train: list[str] = field(default_factory=list)  # parameters that train whole, by role or glob
    load_in_4bit: bool = False  # QLoRA (Dettmers et al., 2023): the frozen base as 4-bit NF4, by bitsandbytes


@dataclass(frozen=True)
class ModelConfig:
    """Which weights, and which of them train: roles (decoder, head, connector, vision, audio), or shell globs over
    parameter names or names relative to a role, such as `decoder.layers.[567].mlp.down_proj.weight`.
    """

    path: Place  # a model directory or the name of one in the hub's cache
    # transformers' implementation; auto: flash_attention_2 on a GPU where flash-attn is installed, else sdpa
    attention: Literal["auto", "flash_attention_2", "sdpa", "eager"] = "auto"
    train: list[str] | None = None  # default: the decoder and the connector, never a vision tower
    freeze: list[str] = field(default_factory=list)  # wins over `train`
    lora: LoraConfig | None = None
    gradient_checkpointing: bool = False  # compute activations again in the backward pass: less memory, more time


@dataclass(frozen=True)
class GroupConfig:
    """Trained parameters with their own learning rate or weight decay; what is left out is as in `train`.

    match: roles, or shell globs as in `model.train`. The schedule scales `lr` as it scales `train.lr`.
    """

    match: list[str]
    lr: Positive | None = None  # their largest learning rate
    weight_decay: Weight | None = None  # theirs, decoupled

    def __post_init__(self) -> None:
        require(self, ("match",), "at least one pattern", lambda x: bool(x))


@dataclass(frozen=True)
class TrainConfig:
    """The optimizer and the batch. `global_batch` and `micro_batch` count rows of *each* stream."""

    renamed: ClassVar[dict[str, str]] = {"betas": "optimizer.betas"}

    lr: Positive  # the largest learning rate
    global_batch: Batch  # rows of one optimizer step over all GPUs
    # rows on one GPU at once; auto: as many as fit, for any number of ranks that divides global_batch
    micro_batch: Batch | Literal["auto"]
    max_steps: Steps | None = None  # default: `epochs` passes over `epoch_stream`
    epochs: Epochs = 1.0  # passes over `epoch_stream`, where max_steps is null
    epoch_stream: str | None = None  # default: the objective's first; at its end the others stop, or start again
    dtype: Literal["fp32", "bf16"] = "bf16"  # of weights and activations; the master copy is fp32
    # `name` and the fields of that optimizer's dataclass
    optimizer: Annotated[dict[str, Any], Choice("name")] = field(default_factory=lambda: {"name": "adamw"})
    weight_decay: Weight = 0.0  # decoupled
    groups: list[GroupConfig] = field(default_factory=list)  # the first entry that matches a parameter has it
    clip: Weight = 1.0  # global gradient norm; 0 is off
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # what happens in the last `decay` of the run
    warmup: Share = 0.03  # fraction of the steps
    warmup_from_zero: bool = (
        False  # step 0 has rate 0, as in transformers' schedules; else one step's share of the rise
    )
    schedule_steps: Steps | None = None  # warm-up and fall are those of a run of so many steps; default: of this run
    decay: Share = 1.0  # fraction of the steps after warm-up over which the rate falls; .1 is warm-up-stable-decay
    min_lr: Share = 0.0  # fraction of `lr` at the end
    save_every: Steps | None = None  # steps; the last step is always saved
    save_in_background: bool = True  # no step waits for the disk
    keep_last: Count | None = 3  # checkpoints; null keeps all
    keep_every: Steps | None = None  # and those whose step is a multiple of this
    # and the one with the least of this metric, such as loss, terms.retain_ce or validation.loss
    keep_best: str | None = None
    validate_every: Steps | None = None  # steps between two held-out losses, of data.streams.validation, and at the end
    max_restarts: Count = 3  # starts of one Slurm job in a row that make no new checkpoint; then it is stopped
    hang_seconds: Seconds = 1800.0  # a rank that does not move for so long ends the run, named
    dry_run: bool = False  # two steps of the longest samples, a save and a load; then a report, and nothing that stays
    nonfinite_patience: Count = 5  # stop after this many skipped steps in a row
    # write `export/` at the end: the whole model, with adapters merged; the adapter alone; both; or nothing
    export: Literal["merged", "adapter", "both", "off"] = "merged"

    @property
    def rows(self) -> int:
        """`micro_batch` as a number; of a resolved recipe (see `train.planning.check`), in which none is `auto`."""
        if self.micro_batch == "auto":
            raise TypeError("train.micro_batch=auto is no number yet: resolve the recipe first")
        return self.micro_batch


@dataclass(frozen=True)
class ProfileConfig:
    """Steps that PyTorch's profiler records, of some ranks: traces in RUN/profile, and the costliest operators."""

    first: Steps = 10  # from 1; a start that begins behind it records nothing
    steps: Count = 3  # how many steps are recorded
    ranks: list[FromZero] = field(default_factory=lambda: [0])  # whose steps are recorded


@dataclass(frozen=True)
class MonitorConfig:
    """`metrics.jsonl` is always written; W&B and TensorBoard only where `wandb` and `tensorboard` say so."""

    wandb: Literal["off", "online", "offline"] = "off"  # offline: into RUN/wandb, for `wandb sync`
    project: str = "mirage_dist"  # the project in W&B
    entity: str | None = None  # team or user of W&B; default: your own
    group: str | None = None  # of the W&B run, as `tags`, `job_type` and `notes` are
    tags: list[str] = field(default_factory=list)  # labels of the W&B run
    job_type: str | None = None  # label of the W&B run
    notes: str | None = None  # text of the W&B run
    tensorboard: bool = False  # event files in RUN/tensorboard
    print_every: Count = 10  # steps between lines where there is no terminal
    # deviations above the median of the last steps from which on a loss or gradient norm is reported; null: never
    spike: Positive | None = 10.0
    profile: ProfileConfig | None = None

    def __post_init__(self) -> None:
        require(self, ("tags",), "texts of 1 to 64 characters", lambda x: all(1 <= len(tag) <= 64 for tag in x))


@dataclass(frozen=True)
class TrainRecipe:
    """`mirage train`: everything that decides a training run."""

    run: RunConfig
    model: ModelConfig
    data: DataConfig
    objective: Annotated[dict[str, Any], Choice("name")]  # `name` and the fields of that objective's dataclass
    train: TrainConfig
    seed: Seed = 0  # of the order of samples and of every draw
    # the frozen model: its log-probabilities on disk, the policy without its adapters, or a second model in memory
    reference: Literal["cache", "adapters_off", "engine"] = "cache"
    deepspeed: Place = "configs/deepspeed/zero3.json"  # a DeepSpeed JSON file, which decides the ZeRO stage and offload
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    world: WorldConfig | None = None

    def __post_init__(self) -> None:
        check_form(self.model, self.train.export, f"train.export={self.train.export}")


def check_form(model: ModelConfig, form: str, key: str) -> None:
    """Raise ConfigError, which begins with `key`, when a model trained so cannot be exported in this form."""
    if form not in ("adapter", "both"):
        return
    if model.lora is None:
        raise ConfigError(f"{key}: there is no adapter without model.lora; export it merged")
    if model.lora.also_train:
        raise ConfigError(
            f"{key}: an adapter does not hold what model.lora.also_train={model.lora.also_train} trains whole; "
            "export it merged"
        )
