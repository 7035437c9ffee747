"""The recipes of the matrix: what every family trains on, and each of its runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from PIL import Image, ImageDraw

from mirage_dist.data.formats.samples import write_samples
from mirage_dist.data.sample import Sample

RANKS = 2
STEPS = 3
BATCH = 2  # samples of each stream in a step
SIZES = [(48, 32), (32, 32), (40, 64), (120, 72)]
COLOURS = ["crimson", "navy", "olive", "orange"]
QUESTIONS = ["What is in this picture?", "Describe it, please.", "How can I make a cake?", "Is it red?"]
ANSWERS = ["A small table.", "The picture shows a red square.", "Bake it at home.", "A cake, please"]
# As many positions sharded as can be: at the default threshold so small a model would be whole on every rank.
ZERO3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}


def write_data(folder: Path) -> None:
    """pictured/ and text/, each with forget.jsonl and retain.jsonl of four samples, one of two turns.

    In pictured/ half of the samples have a picture, each of another size and shape.
    """
    for number, (size, colour) in enumerate(zip(SIZES, COLOURS, strict=True)):
        picture = Image.new("RGB", size, colour)
        ImageDraw.Draw(picture).rectangle((5 * number, 4, 5 * number + 11, 19), fill="white")
        picture.save(folder / f"{number}.png")
    for kind in ("pictured", "text"):
        (folder / kind).mkdir()
        for stream, offset in (("forget", 0), ("retain", 2)):
            rows = []
            for number in range(4):
                shown = kind == "pictured" and number % 2 == 0
                picture = str(folder / f"{(offset + number // 2) % 4}.png") if shown else None
                history = (("Is it red?", "No, not at all."),) if number == 2 else ()
                question, answer = QUESTIONS[(number + offset) % 4], ANSWERS[(number + offset) % 4]
                sample = Sample(f"{stream}{number}", picture, question, answer, stream == "retain", "", "made")
                rows.append(sample if not history else _with(sample, history))
            write_samples(folder / kind / f"{stream}.jsonl", rows)
    (folder / "zero3.json").write_text(json.dumps(ZERO3))


def _with(sample: Sample, history: tuple[tuple[str, str], ...]) -> Sample:
    import dataclasses

    return dataclasses.replace(sample, history=history)


NPO = {"name": "npo", "beta": 0.5, "reduction": "seq_sum", "retain": "ce", "retain_weight": 1.0}
RMU = {"name": "rmu", "layer": 1, "coeff": 10.0, "retain_weight": 1.0}
# name -> what a run changes in the recipe. Those of `PAIR` run on two ranks, the others on one.
RUNS: dict[str, dict[str, Any]] = {
    "sft": {"objective": {"name": "sft"}, "train": {"global_batch": 4, "micro_batch": 2, "export": "merged"}},
    "npo": {"objective": NPO},
    "rmu": {"objective": RMU, "reference": "engine"},
    "lora": {
        "objective": NPO,
        "reference": "adapters_off",
        "model": {"lora": {"rank": 4, "alpha": 8, "dropout": 0.0}},
        "train": {"export": "merged"},
    },
    "packed": {"objective": NPO, "data": {"packing": True}},
    "cached": {"objective": NPO, "data": {"cache_vision": True}},
}
PAIR: dict[str, dict[str, Any]] = {"npo_2": {"objective": NPO, "train": {"micro_batch": 1}}}


def recipe(data: Path, model: Path, run: Path, text_only: bool, change: Mapping[str, Any]) -> Path:
    """Write the recipe of a run beside its directory, and return its file."""
    folder = data / ("text" if text_only else "pictured")
    names = ["train"] if change["objective"]["name"] == "sft" else ["forget", "retain"]
    files = {"train": "retain", "forget": "forget", "retain": "retain"}
    tree = {
        "run": {"dir": str(run)},
        "seed": 3,
        "model": {"path": str(model), **change.get("model", {})},
        "data": {
            "max_length": 512,
            "workers": 0,
            "streams": {n: [{"format": "samples", "path": str(folder / f"{files[n]}.jsonl")}] for n in names},
            **change.get("data", {}),
        },
        "objective": change["objective"],
        "reference": change.get("reference", "cache"),
        "train": {
            "lr": 1e-3,
            "warmup": 0.0,
            "global_batch": BATCH,
            "micro_batch": BATCH,
            "max_steps": STEPS,
            "dtype": "fp32",
            "export": "off",
            "hang_seconds": 60,
            **change.get("train", {}),
        },
        "deepspeed": str(data / "zero3.json"),
        "monitor": {"wandb": "off", "print_every": 100},
    }
    return _write(run.with_suffix(".yaml"), tree)


def suite(data: Path, model: Path, run: Path, text_only: bool, batch: int) -> Path:
    """Write the recipe of an evaluation of `model`, and return its file."""
    source = data / ("text" if text_only else "pictured") / "forget.jsonl"
    tree = {
        "run": {"dir": str(run)},
        "suite": f"by_{batch}",
        "model": {"path": str(model), "dtype": "fp32"},
        "judges": ["keyword"],
        "generation": {"max_new_tokens": 8, "batch_size": batch},
        "template": {"max_length": 512},
        "sets": {"unsafe": {"kind": "unsafe", "sources": [{"format": "samples", "path": str(source)}]}},
    }
    return _write(run.with_name(f"{run.name}-{batch}.yaml"), tree)


def _write(file: Path, tree: Mapping[str, Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(dict(tree), sort_keys=False))
    return file
