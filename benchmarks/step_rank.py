"""The versions of a step that bench_step.py compares, and the rank that runs one.

python benchmarks/step_rank.py TASK     # started by bench_step.py; TASK is JSON, see `rank`
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
from common import MIB, SIZES, Size

BETA = 0.1
WORKERS = 4  # that make batches ahead for a rank with a GPU; a CPU makes them between the steps, as part of their time
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


@dataclass(frozen=True)
class Version:
    """One implementation of the step of a case. plain: a function of published.py, None for ours.

    twin: our version with the same loss. opponent: our version to compare with, where that is another one.
    single: measured on one rank only. cached: the vision tower's features come from data.cache_vision, which is filled
    before the first step, once a run, and is not timed.
    """

    name: str
    objective: Mapping[str, Any]
    plain: str | None = None
    twin: str | None = None
    opponent: str | None = None
    reference: str = "cache"
    train: Sequence[str] = ("decoder", "connector")
    single: bool = False
    cached: bool = False

    @property
    def against(self) -> str:
        return self.opponent or self.twin or self.name


def cases(size: Size, lora: bool) -> dict[str, list[Version]]:
    """The cases, each with its versions in the order of the table."""
    sft = {"name": "sft"}
    formula = {"name": "npo", "beta": BETA}
    published = {"name": "npo", "beta": BETA, "reduction": "batch_mean", "ce_weight": 1.0}
    rmu = {"name": "rmu", "layer": size.tap, "coeff": 10.0, "retain_weight": 1.0, "ce_weight": 0.0}
    down = [f"decoder.layers.{i}.mlp.down_proj.weight" for i in range(max(0, size.tap - 2), size.tap + 1)]
    frozen = "adapters_off" if lora else "engine"

    def steering(train: Sequence[str], single: bool = False) -> list[Version]:
        return [
            Version("ours", rmu, reference=frozen, train=train, single=single),
            Version("plain, 3 hooked forwards", rmu, "rmu", "ours", reference=frozen, train=train, single=single),
            Version("ours, cached tower", rmu, twin="ours", reference=frozen, train=train, single=True, cached=True),
        ]

    versions = {
        "SFT": [Version("ours", sft), Version("plain, full logits", sft, "sft", "ours")],
        "NPO": [
            Version("ours", formula),
            Version("plain, 3 forwards", formula, "npo_formula", "ours"),
            Version("plain, 5 forwards", published, "npo_five", "ours, loss of the 5", "ours", single=True),
            Version("ours, loss of the 5", published, single=True),
        ],
        "RMU": steering(down),
    }
    if not lora:  # with adapters the patterns of model.train are not used, and the two cases would be the same run
        versions["RMU, projector too"] = steering([*down, "connector"], single=True)
    return versions


def recipe_of(version: Version, task: Mapping[str, Any], ranks: int, workers: int) -> Any:
    from omegaconf import OmegaConf

    from mirage_dist import config as configs
    from mirage_dist.objectives.base import make
    from mirage_dist.schema import TrainRecipe

    streams = make(version.objective).needs.streams
    size, place, micro = SIZES[task["size"]], Path(task["place"]), task["batch"]
    model: dict[str, Any] = {"path": str(place / "model"), "train": list(version.train)}
    model["gradient_checkpointing"] = size.name == "7b"
    if task["lora"]:
        model["lora"] = {"dropout": 0.0}  # so that losses can be compared
    tree = {
        "run": {"dir": task["out"]},
        "model": model,
        "data": {
            "max_length": size.tokens,
            "workers": workers,
            "cache_vision": version.cached,
            "streams": {name: [{"format": "samples", "path": str(place / f"{name}.jsonl")}] for name in streams},
        },
        "objective": dict(version.objective),
        "reference": version.reference,
        "train": {
            "lr": 1e-5,
            "global_batch": micro * ranks,
            "micro_batch": micro,
            "max_steps": 1000,
            "dtype": size.dtype,
            "schedule": "constant",
            "warmup": 0.0,
        },
        "deepspeed": task["deepspeed"],
    }
    return configs.from_tree(OmegaConf.create(tree), [], TrainRecipe, "benchmark")


Step = Callable[[int], tuple[float, int]]  # number, in order from 0 -> loss, tokens of this rank


def ours(recipe: Any, group: Any) -> Step:
    """The step of `mirage train`."""
    from mirage_dist.train.caches import vision
    from mirage_dist.train.run import reference_of

    run = our_run(recipe, group)
    if recipe.data.cache_vision:
        run.feed.encoder.recall(vision.fill(run))
    return our_step(run, reference_of(run))


def our_run(recipe: Any, group: Any) -> Any:
    """What `mirage train` makes before its first step (`train.context.Run`), apart from the reference."""
    import torch

    from mirage_dist.liveness import Owner
    from mirage_dist.model import load
    from mirage_dist.train import engine as engines
    from mirage_dist.train.context import Run
    from mirage_dist.train.lease import Lease
    from mirage_dist.train.planning.check import check_batches, check_inputs, check_recipe

    checked = check_recipe(recipe, group.size)
    objective, needs = checked.objective, checked.needs
    feed, _ = check_batches(checked, check_inputs(checked), group)
    recipe = feed.recipe  # with what `auto` comes to
    torch.manual_seed(recipe.seed)
    engine = engines.build(recipe, checked.deepspeed, group, needs.depth)
    objective.start(engine.module.hidden_size, recipe.seed)
    lease = Lease(Path(recipe.run.dir), Owner("benchmark"))
    lease.workspace.mkdir(parents=True, exist_ok=True)
    manifest = {"base_hash": load.base_hash(recipe.model.path)}
    return Run(recipe, group, objective, feed, engine, checked.deepspeed, manifest, lease)


def our_step(run: Any, reference: Any) -> Step:
    """The step of a run, with the reference that its recipe names, in order from step 0."""
    from mirage_dist.train.loop import Loop

    loop, group = Loop(run, reference), run.group
    windows = run.feed.windows(range(run.feed.steps), group)

    def step(number: int) -> tuple[float, int]:
        record = loop.step(number, next(windows))[0]
        return record["loss"], record["tokens"] // group.size

    return step


def plain(recipe: Any, group: Any, algorithm: str) -> Step:
    """A published algorithm on engines around the Hugging Face model itself."""
    import deepspeed
    import published
    import torch

    from mirage_dist.model import load
    from mirage_dist.train.feed import Feed
    from mirage_dist.train.planning.check import check_inputs, check_recipe

    checked = check_recipe(recipe, group.size)
    objective, config = checked.objective, checked.deepspeed
    feed = Feed(recipe, objective.needs, check_inputs(checked), load.processor(recipe.model))
    hf = load.policy(recipe.model, recipe.train.dtype, config).hf
    optimizer = torch.optim.AdamW(
        [p for p in hf.parameters() if p.requires_grad], recipe.train.lr, weight_decay=0.0, fused=True
    )
    policy, *_ = deepspeed.initialize(model=hf, optimizer=optimizer, config=config, dist_init_required=False)
    policy.train()
    models = [policy]
    if algorithm != "sft":
        frozen = load.policy(recipe.model, recipe.train.dtype, config, frozen=True).hf
        own = {k: config[k] for k in ("train_micro_batch_size_per_gpu", "bf16", "steps_per_print")}
        if config["zero_optimization"]["stage"] == 3:  # without an optimizer the other stages have nothing to shard
            own["zero_optimization"] = config["zero_optimization"]
        reference, *_ = deepspeed.initialize(model=frozen, config=own, dist_init_required=False)
        reference.eval()
        models.append(reference)
    options: dict[str, Any] = {"beta": BETA} if algorithm.startswith("npo") else {}
    if algorithm == "rmu":
        text = hf.config.text_config
        objective.start(text.hidden_size, recipe.seed)
        options = {"layer": recipe.objective["layer"], "control_D": objective.state_dict()["control_D"]}

    windows = feed.windows(range(feed.steps), group)

    def step(_number: int) -> tuple[float, int]:
        micro = next(windows)[0].to(group.device)
        parts = [published.rows(micro, stream) for stream in objective.needs.streams]
        loss = getattr(published, algorithm)(*models, *parts, **options)
        policy.backward(loss)
        policy.step()
        return loss.item(), int(micro.batch.inputs["attention_mask"].sum())

    return step


def rank(task: Mapping[str, Any]) -> None:
    """Load, then step when requested (see `common.answers`).

    task: the `version`'s fields, `size`, `lora`, `batch` (samples of a stream), `deepspeed` (a JSON file), `place`
    (the folder of model and data) and `out` (a new folder, the run's).
    """
    keep_blocks(MIB)
    import torch

    from mirage_dist import ranks
    from mirage_dist.train.measures import usage

    group = ranks.start()
    version = Version(**task["version"])
    recipe = recipe_of(version, task, group.size, 0 if cpu(group) else WORKERS)
    state: dict[str, Any] = {"number": 0, "before": resident("VmRSS") if cpu(group) else 0}

    def step() -> dict[str, Any]:
        start, worked = time.perf_counter(), time.process_time()
        loss, tokens = state["step"](state["number"])
        if not cpu(group):
            torch.cuda.synchronize()
        spent = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - worked}
        state["number"] += 1
        return {**spent, "loss": loss, "tokens": tokens}

    def memory() -> dict[str, Any]:
        keep_blocks(32 * MIB)
        peak = resident("VmHWM") - state["before"] if cpu(group) else usage.highest(group.device)[0]
        return {"peak_mib": peak / MIB}

    def load() -> dict[str, Any]:
        state["step"] = ours(recipe, group) if version.plain is None else plain(recipe, group, version.plain)
        return {}

    def profile() -> dict[str, Any]:
        return {"table": common.profile(step, "cpu" if cpu(group) else "cuda", rows=20)}

    def answer(word: str) -> dict[str, Any]:
        try:
            return {"load": load, "step": step, "memory": memory, "profile": profile}[word]()
        except torch.cuda.OutOfMemoryError:
            return {"out_of_memory": True}

    common.answers(answer)


def cpu(group: Any) -> bool:
    return group.device.type == "cpu"


def keep_blocks(below: int) -> None:
    """Make malloc return freed blocks of at least `below` bytes to the system at once.

    Otherwise a process on a CPU keeps some 900 MiB of unused memory; but new pages cost time. malloc's own adjustment
    ends at 32 MiB.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, below)
    libc.mallopt(M_TRIM_THRESHOLD, 2 * below)


def resident(name: str) -> int:
    """Resident bytes of this process: `VmRSS` for now, `VmHWM` for the maximum so far."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    rank(json.loads(sys.argv[1]))
