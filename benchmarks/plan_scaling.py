"""`mirage plan` of LLaVA-1.5-7B from 8 to 1024 GPUs: full NPO and NPO with adapters, as a table and a figure.

python benchmarks/plan_scaling.py [--gpu h100] [--figure docs/planning.png]

Nothing is measured here: every number is computed from the model's config.json and the hardware's data sheets.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import common

RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)
ROWS = 1024  # of each stream in a step
SAMPLES, TOKENS, RESPONSES = 100_000, (700.0, 1100), (60.0, 250)
# llava-hf/llava-1.5-7b-hf, config.json, with the sizes that it leaves to transformers' defaults
CONFIG: dict[str, Any] = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "image_token_index": 32000,
    "image_seq_length": 576,
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 768,
    },
    "text_config": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "vocab_size": 32064,
    },
}
LORA = ("model.lora.rank=128", "model.lora.alpha=256", "model.train=null")


def plans(gpu: str, folder: Path) -> dict[str, list[Any]]:
    """Training -> its plan for every number of RANKS."""
    from mirage_dist import config as configs
    from mirage_dist.schema import TrainRecipe
    from mirage_dist.train.planning import plan
    from mirage_dist.train.planning.costs.hardware import hardware
    from mirage_dist.train.planning.costs.lengths import Described

    (folder / "config.json").write_text(json.dumps(CONFIG))
    on, data = hardware(gpu), Described(SAMPLES, TOKENS, RESPONSES)
    own = [f"model.path={folder}", f"run.dir={folder}/run", f"train.global_batch={ROWS}", "train.epochs=1"]
    made = {}
    for name, more in (("full NPO", ()), ("NPO with LoRA", LORA)):
        made[name] = []
        for ranks in RANKS:
            micro = f"train.micro_batch={min(8, ROWS // ranks)}"
            words = [*own, micro, "data.packing=false", *more]
            recipe = configs.load("configs/train/npo.yaml", words, TrainRecipe)
            made[name].append(plan.plan(recipe, ranks, plan.cluster(on, ranks=ranks), data))
            print(f"{name}, {ranks} GPUs", file=sys.stderr, flush=True)
    return made


def table(made: dict[str, list[Any]]) -> str:
    from mirage_dist.train.planning import table as text

    head = [
        "training",
        "GPUs",
        "micro-batch",
        "GiB a GPU",
        "exchanged",
        "s a step",
        "with hpZ",
        "MFU",
        "run",
        "GPU-hours",
    ]
    rows = []
    for name, own in made.items():
        for one in own:
            hpz = one.stages.get("ZeRO-3, hpZ")
            rows.append([
                name,
                f"{one.cluster.ranks}",
                f"{one.case.at.micro_batch}",
                f"{one.peak.device / 2**30:.1f}",
                text.size(sum(transfer.volume for transfer in one.step.transfers)),
                f"{one.step.least:.2f} – {one.step.most:.2f}",
                "" if hpz is None else f"{hpz.least:.2f} – {hpz.most:.2f}",
                f"{one.step.mfu(one.cluster.ranks, one.cluster.on):.0%}",
                text.span(one.run.seconds),
                f"{one.gpu_hours:.0f}",
            ])  # fmt: skip
    return common.markdown(head, rows)


def figure(made: dict[str, list[Any]], file: Path, gpu: str) -> None:
    """Time of a step between its bounds, GPU-hours, and memory of a GPU, against the number of GPUs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shape, panels = plt.subplots(1, 3, figsize=(12, 3.9), layout="constrained")
    for (name, own), colour in zip(made.items(), ("#1f6f8b", "#c8553d"), strict=True):
        low, high = [one.step.least for one in own], [one.step.most for one in own]
        panels[0].fill_between(RANKS, low, high, color=colour, alpha=0.2, linewidth=0)
        panels[0].plot(RANKS, low, color=colour, marker="o", markersize=4, label=name)
        shared = [(n, one.stages["ZeRO-3, hpZ"]) for n, one in zip(RANKS, own, strict=True) if len(one.stages) > 2]
        panels[0].plot([n for n, _ in shared], [s.least for _, s in shared], color=colour, linestyle=":", linewidth=1.5)
        panels[1].plot(RANKS, [one.gpu_hours for one in own], color=colour, marker="o", markersize=4, label=name)
        held = [one.peak.device / 2**30 for one in own]
        panels[2].plot(RANKS, held, color=colour, marker="o", markersize=4, label=name)
    usable = next(iter(made.values()))[0].cluster.on.usable / 2**30
    panels[2].axhline(usable, color="#555555", linestyle="--", linewidth=1)
    panels[2].annotate(f"usable on one {gpu}", (RANKS[-1], usable), (0, 3), textcoords="offset points", ha="right")
    titles = ("Seconds a step", "GPU-hours of the run", "GiB of a GPU at the peak")
    for panel, title in zip(panels, titles, strict=True):
        panel.set_xscale("log", base=2)
        panel.set_xticks(RANKS, [str(n) for n in RANKS])
        panel.set_xlabel("GPUs, eight to a node")
        panel.set_title(title, fontsize=10, loc="left")
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="#dddddd", linewidth=0.6)
        panel.set_axisbelow(True)
    panels[0].set_yscale("log")
    panels[1].set_ylim(bottom=0)
    panels[2].set_ylim(bottom=0)
    panels[1].legend(frameon=False, fontsize=9)
    panels[0].annotate("line: communication hidden\nband: up to none hidden\ndotted: hpZ", (0.05, 0.06),
                       xycoords="axes fraction", fontsize=8, color="#444444")  # fmt: skip
    shape.suptitle(
        f"LLaVA-1.5-7B, ZeRO-3, {ROWS} rows of each stream a step, on {gpu}: computed, not measured", fontsize=11
    )
    shape.savefig(file, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gpu", default="h100", help="of the table of mirage plan; default: %(default)s")
    parser.add_argument("--figure", type=Path, help="draw it to this file")
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        made = plans(parsed.gpu, Path(folder))
    print(table(made))
    if parsed.figure is not None:
        figure(made, parsed.figure, parsed.gpu)


if __name__ == "__main__":
    main()
