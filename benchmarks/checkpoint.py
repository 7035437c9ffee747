"""What saving costs the training step: in the background against waiting for the disk, in one run.

    python benchmarks/checkpoint.py --ranks 2 --parameters 60e6

The same ZeRO-3 engine steps on; every few steps a checkpoint is saved, by turns in one way and the other. Two figures
for each: the stall, how long the calls that save, wait for the copy and commit hold the step up; and the whole cost,
by how much the steps from one save to its commit take longer than undisturbed ones (in the background the copy and the
disk's work compete with training for the cores; on a GPU training leaves them idle).
Writes benchmarks/results/checkpoint.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import common

ROUNDS, BETWEEN = 5, 6  # saves of each kind; steps between two saves
TARGET = 0.10


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--parameters", type=float, default=60e6)
    parser.add_argument("--out", type=Path, help="a folder on the disk to measure; default: the temporary one")
    parsed = parser.parse_args()
    if "RANK" in os.environ:
        return rank(int(parsed.parameters), parsed.out)
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Without the folder that it was given.
    arguments = ["--ranks", str(parsed.ranks), "--parameters", f"{parsed.parameters:g}"]
    result = common.record(device, ("torch", "deepspeed"), arguments, threads=1)
    with tempfile.TemporaryDirectory(dir=parsed.out) as folder:
        command = [sys.executable, __file__, "--parameters", str(parsed.parameters), "--out", folder]
        ranks = common.start_ranks(command, parsed.ranks)
        statuses = [process.wait() for process in ranks]
        if any(statuses):
            raise SystemExit("a rank failed (see above)")
        figures = json.loads((Path(folder) / "figures.json").read_text())
    result |= {"ranks": parsed.ranks, **figures}
    print(table(result))
    stall = result["stall_seconds"]
    share = stall["background"] / stall["waiting"]
    what = f"the stall in the background is at most {TARGET:.0%} of the stall of waiting (is {share:.1%})"
    result["targets"] = common.say_targets([(what, share <= TARGET)])
    common.write("checkpoint", result)


def rank(parameters: int, folder: Path) -> None:
    import torch

    from mirage_dist import ranks
    from mirage_dist.schema import TrainConfig
    from mirage_dist.train.checkpoints.commit import Saver

    group = ranks.start()
    engine = build(parameters, group)
    workspace = folder / "work"
    workspace.mkdir(exist_ok=True)
    savers = {
        way: Saver(
            folder / way,
            workspace,
            TrainConfig(lr=1e-5, global_batch=1, micro_batch=1, save_in_background=way == "background", keep_last=1),
            group,
        )
        for way in ("background", "waiting")
    }
    inputs = torch.randn(8, engine.module.hf.width, device=group.device)

    def step(saver: Saver | None = None) -> float:
        """The seconds that the step waited for a copy and for a commit, if there was one."""
        engine.backward(engine(inputs).square().mean())
        start = time.perf_counter()
        if saver is not None:
            saver.before_update()
        waited = time.perf_counter() - start
        engine.step()
        if group.device.type == "cuda":
            torch.cuda.synchronize()
        written = bool(ranks.gather(group, [saver is None or saver.written], "written").all())
        start = time.perf_counter()
        if saver is not None:
            saver.step_ended(written)
        return waited + time.perf_counter() - start

    def seconds_of_a_step() -> float:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    for _ in range(BETWEEN):
        step()
    plain = median(seconds_of_a_step() for _ in range(3 * BETWEEN))
    stalls: dict[str, list[float]] = {way: [] for way in savers}
    costs: dict[str, list[float]] = {way: [] for way in savers}
    number = 0
    for _ in range(ROUNDS + 1):
        for way, saver in savers.items():
            number += 1
            start = time.perf_counter()
            saver.save(engine, {"step": number}, {})
            stall, steps = time.perf_counter() - start, 0
            while steps < BETWEEN or not ranks.gather(group, [saver.committed], "committed").all():
                stall += step(saver)
                steps += 1
            stalls[way].append(stall)
            costs[way].append(time.perf_counter() - start - steps * plain)
    if group.main:
        figures: dict[str, Any] = {
            "parameters": sum(p.ds_numel for p in engine.module.parameters()),
            "checkpoint_mib": sum(f.stat().st_size for f in (folder / "waiting").rglob("rank-*")) / 2**20,
            "step_seconds": plain,
            # The first of each kind pays for the host copy's memory pages and for cold caches; it is kept apart.
            "first_stall_seconds": {way: values[0] for way, values in stalls.items()},
            "stall_seconds": {way: median(values[1:]) for way, values in stalls.items()},
            "cost_seconds": {way: median(values[1:]) for way, values in costs.items()},
        }
        (folder / "figures.json").write_text(json.dumps(figures))
    for way, saver in savers.items():
        saver.close()
        if group.main:
            shutil.rmtree(folder / way)
    ranks.barrier(group, "end")
    ranks.exit_well()


def build(parameters: int, group: Any) -> Any:
    """A ZeRO-3 engine on square linear layers with so many parameters in all."""
    import deepspeed
    import torch
    from torch import nn

    width = 1024
    layers = max(1, round(parameters / width**2))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hf: Any = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
            self.hf.width = width

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.hf(x)

    module = Model()
    parameters_of_all = {"params": list(module.parameters()), "match": None, "peak": 1e-5, "share": 1.0}
    optimizer = torch.optim.AdamW([parameters_of_all], 1e-5, fused=group.device.type == "cuda")
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)
    return engine


def table(result: dict[str, Any]) -> str:
    stall, first, cost = (result[f"{kind}_seconds"] for kind in ("stall", "first_stall", "cost"))
    rows = [[way, *(f"{figures[way]:.3f} s" for figures in (stall, first, cost))] for way in stall]
    return (
        f"{result['parameters'] / 1e6:.0f} M parameters, {result['checkpoint_mib']:.0f} MiB a checkpoint, "
        f"{result['ranks']} ranks, {result['step_seconds'] * 1e3:.0f} ms a step\n\n"
        + common.markdown(["", "stall", "first stall", "whole cost"], rows)
        + f"\n\nof the whole cost {cost['background'] / cost['waiting']:.0%}\n"
    )


if __name__ == "__main__":
    main()
