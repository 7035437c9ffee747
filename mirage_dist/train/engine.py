"""The DeepSpeed engine and its configuration, and the schedule of the learning rate."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime import compiler
from deepspeed.utils import groups
from torch.distributed import distributed_c10d

from mirage_dist.config import find
from mirage_dist.data import records
from mirage_dist.model import load
from mirage_dist.model.families import attention, packing, roles
from mirage_dist.model.families.attention import Heads
from mirage_dist.progress import log
from mirage_dist.ranks import COLLECTIVE_GRACE, Group
from mirage_dist.schema import ConfigError, TrainConfig, TrainRecipe
from mirage_dist.schema.names import shown
from mirage_dist.train.checkpoints.fragments import check_state
from mirage_dist.train.optimizers import base as optimizers
from mirage_dist.train.optimizers.groups import split
from mirage_dist.train.optimizers.partitions import slices
from mirage_dist.train.optimizers.whole import WholeParameters
from mirage_dist.train.planning import sharding

# The recipe decides these; in the JSON they would be a second truth.
OURS = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch",
    "gradient_clipping": "train.clip",
    "optimizer": "train.optimizer, train.lr, train.weight_decay",
    "scheduler": "train.schedule",
    "bf16": "train.dtype",
    "fp16": "train.dtype",
}


# What DeepSpeed offers and this project does not, with the reason.
NOT_OFFERED = {
    "sequence_parallel_size": "sequence parallelism does not keep packed rows apart, and cuts through the sums of "
    "NPO (docs/cluster.md)",
}
NVME = {
    "offload_optimizer": "between two steps DeepSpeed has the state in swap files, where no checkpoint finds it",
    "offload_param": "a checkpoint has never been restored into its swap files here, and it frees 2 of the 14 bytes a "
    "parameter that offloading takes in host memory",
}


def deepspeed_config(recipe: TrainRecipe, world_size: int, streams: int, node: int | None = None) -> dict[str, Any]:
    """The DeepSpeed JSON that the recipe names, completed. Touches no device.

    recipe: with `train.micro_batch` as a number. node: the ranks of a node, where that is known. Raises ConfigError
    when the JSON is no object, sets what the recipe decides, does not suit the recipe's optimizer, the nodes or this
    project, or when the batch does not divide evenly.
    """
    file = find(recipe.deepspeed)
    config = records.value(file)
    if not isinstance(config, dict):
        raise ConfigError(f"{file}: expected a JSON object")
    for key, ours in OURS.items():
        if key in config:
            raise ConfigError(f"{file}: {key!r} is decided by the recipe ({ours}); remove it")
    for key, why in NOT_OFFERED.items():
        if key in config:
            raise ConfigError(f"{file}: {key!r} is not offered: {why}; remove it")
    zero = _section(config, "zero_optimization", file)
    stage = zero.get("stage")
    if stage not in (2, 3):
        raise ConfigError(f"{file}: zero_optimization.stage={stage!r}; allowed: 2, 3")
    for key in ("offload_optimizer", "offload_param"):
        device = _section(zero, key, file).get("device", "none")
        if device == "nvme":
            raise ConfigError(
                f"{file}: zero_optimization.{key}.device='nvme' is not offered: {NVME[key]} (docs/cluster.md); take "
                "cpu with more memory or nodes, or model.lora"
            )
        if device not in ("none", "cpu"):
            raise ConfigError(f"{file}: zero_optimization.{key}.device={device!r}; allowed: none, cpu")
    optimizers.make(recipe.train.optimizer).check(zero)
    if sharding.KEY in zero:
        zero = {**zero, sharding.KEY: sharding.secondary(zero, world_size, node, file)}
    train = recipe.train
    if train.global_batch % (train.rows * world_size):
        raise ConfigError(
            f"train.global_batch={train.global_batch}: must be a multiple of train.micro_batch × world size "
            f"({train.rows} × {world_size}); {_ways_out(train.global_batch, train.rows, world_size)}"
        )
    accumulation = train.global_batch // (train.rows * world_size)
    return {
        **config,
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": train.rows * streams,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": train.clip,
        "bf16": {"enabled": train.dtype == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def _section(config: Mapping[str, Any], key: str, file: Path) -> dict[str, Any]:
    if not isinstance(section := config.get(key, {}), dict):
        raise ConfigError(f"{file}: {key!r} is {shown(section)}; expected a JSON object")
    return section


def _ways_out(rows: int, micro_batch: int, ranks: int) -> str:
    """What to change so that `rows` of each stream divide evenly: the nearest values that fit, in words."""
    ways = []
    if fewer := [n for n in range(1, ranks) if rows % (micro_batch * n) == 0]:
        ways.append(f"{fewer[-1]} process{'es' if fewer[-1] > 1 else ''} in place of {ranks}")
    if smaller := [n for n in range(1, micro_batch) if rows % (n * ranks) == 0]:
        ways.append(f"train.micro_batch={smaller[-1]}")
    of_each = micro_batch * ranks
    nearest = dict.fromkeys(n for n in (rows // of_each * of_each, -(-rows // of_each) * of_each) if n)
    ways.append(" or ".join(f"train.global_batch={n}" for n in nearest))
    if micro_batch > 1 and rows < ranks:
        ways.append(f"train.micro_batch=1 with train.global_batch={ranks}")
    return f"take {', or '.join(ways)} (another global batch is another run: its learning rate may have to change)"


def build(recipe: TrainRecipe, config: dict[str, Any], group: Group, depth: int | None = None) -> Any:
    """The policy's engine, of `depth` decoder layers or all.

    `optimizers.groups.set_rates` sets the rates before every step.
    """
    policy = _loaded(recipe, config, depth)
    options = optimizers.make(recipe.train.optimizer)
    trained = split(policy, recipe.train)
    optimizer = options.make(trained) if options.elementwise else WholeParameters(trained, options.make)
    engine = _initialize(model=policy, optimizer=optimizer, config=config)
    _wait_as_long(recipe.train.hang_seconds)
    if isinstance(optimizer, WholeParameters):
        optimizer.attach(slices(engine), group)
    _check_once(optimizer)
    # A loaded model is in evaluation mode, and DeepSpeed's wrapper does not pass its own mode on: without this,
    # gradient checkpointing would silently do nothing.
    engine.train()
    return engine


def _wait_as_long(hang_seconds: float) -> None:
    """Give DeepSpeed's own process groups the timeout of ours.

    It makes them with PyTorch's default, which is ten minutes for NCCL: a collective there would end a run before the
    watchdog, which knows the missing rank.
    """
    timeout = timedelta(seconds=hang_seconds + COLLECTIVE_GRACE)
    made: list[Any] = [groups._get_data_parallel_group(), groups._get_zero_param_intra_parallel_group()]
    for own in filter(None, made):
        distributed_c10d._set_pg_timeout(timeout, own)


def _loaded(recipe: TrainRecipe, config: Mapping[str, Any], depth: int | None, frozen: bool = False) -> Any:
    """The model as a run computes it: with repeatable gradients; packed sequences each by itself, where possible."""
    policy = load.policy(recipe.model, recipe.train.dtype, config, depth, frozen)
    gpu, text, dtype = torch.cuda.is_available(), roles.decoder(policy.backbone).config, load.DTYPES[recipe.train.dtype]
    if gpu:
        _make_repeatable(text, dtype)
    if recipe.data.packing is True:
        packing.attend_apart(policy.backbone)
        why = packing.costly(policy.base.config, text._attn_implementation, dtype) if gpu and not frozen else None
        if why is not None:
            log.warning(f"data.packing: {why}; data.packing=auto pads such rows in a new run")
    return policy


def _make_repeatable(text: Any, dtype: torch.dtype) -> None:
    """Make gradients of attention repeatable where this GPU can, and warn where not. text: the decoder's config."""
    if (fault := attention.gradient_fault(Heads.of(text), dtype)) is None:
        attention.make_repeatable()
    else:
        log.warning(
            f"gradients of attention are not repeatable on this GPU ({fault}): a run that is stopped and resumed does "
            "not end with the same bits as one that never stopped; `mirage doctor` tests the GPU"
        )


def _check_once(optimizer: torch.optim.Optimizer) -> None:
    """After the first step, check that checkpoints can hold the optimizer's state; a later save would lose the run."""

    def check(*_: Any) -> None:
        handle.remove()
        check_state(optimizer)

    handle = optimizer.register_step_post_hook(check)


def build_reference(recipe: TrainRecipe, config: dict[str, Any], depth: int | None = None) -> Any:
    """A frozen engine of the base weights, of `depth` decoder layers or all, sharded as the policy is."""
    policy = _loaded(recipe, config, depth, frozen=True)
    # Without an optimizer only stage 3 has anything to shard; DeepSpeed refuses the others.
    names = ("train_micro_batch_size_per_gpu", "bf16", "steps_per_print")
    own = {name: config[name] for name in names}
    if config["zero_optimization"]["stage"] == 3:
        own["zero_optimization"] = config["zero_optimization"]
    return _initialize(model=policy, config=own)


def _initialize(**options: Any) -> Any:
    """A DeepSpeed engine in the process group that there is, without the seconds that its own Muon costs.

    To see whether the optimizer is its Muon, DeepSpeed imports that, which decorates functions with torch.compile and
    so loads the whole compiler (1.5 s of a start of 10 s). Its Muon is never used here, so that module is imported
    with the stand-in that DeepSpeed has for a torch without a compiler.
    """
    compile_decorator = compiler.compile
    compiler.compile = lambda: compiler.dummy_decorator
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        compiler.compile = compile_decorator
    engine, *_ = deepspeed.initialize(**options, dist_init_required=False)
    return engine


def learning_rate(train: TrainConfig, step: int, steps: int) -> float:
    """The rate of step `step` (from 0) of `steps`: linear warm-up, plateau, then the schedule's fall to min_lr.

    Warm-up takes `warmup` of the steps; the fall takes the last `decay` of the rest. With `schedule_steps` both are
    those of a longer run, of which this one is the beginning.
    """
    steps = train.schedule_steps or steps
    warm = math.ceil(train.warmup * steps)
    if step < warm:
        return train.lr * (step if train.warmup_from_zero else step + 1) / warm
    falling = train.decay * (steps - warm)
    passed = (step - (steps - falling)) / falling if falling > 0 else -1.0
    if train.schedule == "constant" or passed <= 0:
        return train.lr
    left = 0.5 * (1 + math.cos(math.pi * passed)) if train.schedule == "cosine" else 1 - passed
    return train.lr * (train.min_lr + (1 - train.min_lr) * left)
