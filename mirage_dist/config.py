"""Recipes: YAML files merged with dot-list overrides, checked against frozen dataclasses.

OmegaConf reads, merges and interpolates; the dataclasses below are the schema. Every error names the
key, what was found and what is allowed. This module imports neither torch nor transformers, so that a
typo is reported in a fraction of a second.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

T = TypeVar("T")
# ${fixed2:0.5} is 0.50: how folders that are named by a number spell it.
OmegaConf.register_resolver("fixed2", lambda number: f"{number:.2f}", replace=True)
OmegaConf.register_resolver("add", lambda *numbers: sum(numbers), replace=True)
REPOSITORY = Path(__file__).resolve().parent.parent


class ConfigError(ValueError):
    """A recipe, an override or a data file does not say what it must; the message says where and what to do."""


class RunError(RuntimeError):
    """A run cannot go on, through no fault of its recipe; the message says what happened and what is left whole."""


def _require(config: Any, names: Sequence[str], expected: str, right: Callable[[Any], bool]) -> None:
    """Raise ConfigError for a field that is given and not right; the recipe's key is put before it by `load`."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not right(value):
            raise ConfigError(f"{name}={value!r}; expected {expected}")


# ----------------------------------------------------------------------------------------------- schema


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

    def __post_init__(self) -> None:
        _require(self, ("max_length",), "a number of tokens above 0", lambda x: x >= 1)


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
    save_in_background: bool = True  # a step waits for a copy to host memory only, not for the disk
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
    """The Hugging Face model directory that answers."""

    path: str
    dtype: Literal["fp32", "bf16"] = "bf16"


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
    judges: list[Literal["keyword", "world"]] = field(default_factory=lambda: ["keyword"])  # first: headline
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    template: TemplateConfig = field(default_factory=TemplateConfig)
    seed: int = 0  # of the run under test, for the record: greedy decoding draws nothing
    world: WorldConfig | None = None


# ------------------------------------------------------------------------------------- merge and validate


def load(path: str | Path, overrides: Sequence[str], schema: type[T]) -> T:
    """Read a YAML recipe, apply `key=value` overrides, check and freeze.

    Raises ConfigError for a file that is not there or not YAML, an override that is no `key=value`, an unknown
    key (naming the nearest right one) or a wrong value (naming what is allowed).
    """
    file = find(path)
    try:
        tree = OmegaConf.load(file)
    except Exception as error:
        raise ConfigError(f"{file}: not readable as YAML: {error}") from error
    return from_tree(tree, overrides, schema, str(file))


def from_tree(tree: Any, overrides: Sequence[str], schema: type[T], source: str) -> T:
    """`load` for a tree that is already in memory; `source` names it in errors."""
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"override {override!r}: expected key=value, such as train.lr=5e-7")
    try:
        for override in overrides:
            key, _, value = override.partition("=")
            # OmegaConf's own dot-list parser reads the value (numbers, null, lists), so 5e-7 is a float here.
            parsed = OmegaConf.select(OmegaConf.from_dotlist([f"value={value}"]), "value")
            OmegaConf.update(tree, key, parsed, merge=True)
        plain = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: {str(error).splitlines()[0]}") from error
    return _build(schema, plain, source, "")


def find(path: str | Path) -> Path:
    """A path as given, or relative to the repository (recipes name each other that way)."""
    for candidate in (Path(path), REPOSITORY / path):
        if candidate.is_file():
            return candidate
    raise ConfigError(f"{path}: no such file (looked here and in {REPOSITORY})")


def _build(schema: Any, value: Any, source: str, key: str) -> Any:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{source}: {key or 'the recipe'} must be a mapping, got {value!r}")
    hints = typing.get_type_hints(schema)
    fields = {f.name: f for f in dataclasses.fields(schema) if f.init}
    for name in value:
        if name not in fields:
            raise ConfigError(f"{source}: unknown key {_join(key, name)!r}; {_nearest(str(name), list(fields))}")
    given = {n: _check(hints[n], v, source, _join(key, n)) for n, v in value.items()}
    for name, spec in fields.items():
        no_default = spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING
        if name not in given and no_default:
            raise ConfigError(f"{source}: {_join(key, name)} is missing")
    try:
        return schema(**given)
    except ConfigError as error:
        raise ConfigError(f"{source}: {_join(key, str(error))}") from error


def _check(hint: Any, value: Any, source: str, key: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _check(next(a for a in args if a is not type(None)), value, source, key)
    if origin is Literal:
        # YAML reads a bare off/on as a boolean; as a choice it is the word.
        word = {False: "off", True: "on"}.get(value, value) if isinstance(value, bool) else value
        if word in args:
            return word
        raise ConfigError(f"{source}: {key}={value!r}; allowed: {', '.join(map(str, args))}")
    if origin is list:
        items = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        return [_check(args[0], item, source, f"{key}[{i}]") for i, item in enumerate(items)]
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{source}: {key} must be a mapping, got {value!r}")
        return {str(k): _check(args[1], v, source, _join(key, str(k))) for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, source, key)
    right = {
        int: isinstance(value, int) and not isinstance(value, bool),
        float: isinstance(value, (int, float)) and not isinstance(value, bool),
        bool: isinstance(value, bool),
        str: isinstance(value, (str, int, float)) and not isinstance(value, bool),
    }
    if not right[hint]:
        raise ConfigError(f"{source}: {key}={value!r}; expected {_PLAIN[hint]}")
    return hint(value)


_PLAIN = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def build(schema: type[T], options: Mapping[str, Any], source: str, key: str) -> T:
    """Check a mapping against any dataclass (objectives use it for their own options)."""
    return _build(schema, options, source, key)


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known)}"


def nearest(name: str, known: Sequence[str]) -> str:
    """`did you mean …?` for a name that is not in `known`, or the list of what is known."""
    return _nearest(name, known)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else str(name)


# ------------------------------------------------------------------------------------------ write and hash


def to_dict(config: Any) -> dict[str, Any]:
    """The recipe as plain containers, defaults filled in."""
    return dataclasses.asdict(config)


def write_yaml(config: Any, path: Path) -> None:
    """Write the resolved recipe; `load` reads it back to an equal one."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(to_dict(config))))


def config_hash(config: Any, ignore: Sequence[str] = ()) -> str:
    """SHA-256 of the resolved recipe without the dotted keys in `ignore`: equal recipes, equal hashes."""
    tree = to_dict(config) if dataclasses.is_dataclass(config) else json.loads(json.dumps(config))
    for dotted in ignore:
        *parents, last = dotted.split(".")
        node: Any = tree
        for parent in parents:
            node = (node or {}).get(parent)
        if node:
            node.pop(last, None)
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def differences(mine: Any, other: Any, key: str = "") -> list[str]:
    """The dotted keys in which two resolved recipes differ, as `key: mine, other` lines."""
    if isinstance(mine, Mapping) and isinstance(other, Mapping):
        names = sorted(set(mine) | set(other))
        return [d for n in names for d in differences(mine.get(n), other.get(n), _join(key, str(n)))]
    return [] if mine == other else [f"{key}: {mine!r} here, {other!r} there"]
