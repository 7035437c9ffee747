"""What the contestants of bench_peers.py share: the data, our recipes, and the rows of every step.

The text is that of the world of countries, without pictures: short questions and answers to train on, and questions of
mixed lengths to answer, which come after up to MOST_FACTS facts about other countries.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

STREAMS = {"SFT": ("train",), "NPO": ("forget", "retain")}
BETA = 0.1
LEARNING_RATE = 1e-4
LORA = {"rank": 16, "alpha": 32, "dropout": 0.0, "targets": ["decoder"]}  # no dropout: losses are compared
DEEPSPEED = "configs/deepspeed/zero2.json"  # one process has nothing to shard
NEW_TOKENS = 24
MOST_FACTS = 12


def write_samples(folder: Path, count: int, questions: int) -> None:
    """Write train.jsonl of `count` samples, forget.jsonl and retain.jsonl of half as many each, and questions.jsonl.

    train: refusals of capitals of Europe, and as many answers about the rest. forget, retain: those capitals with their
    true answers, and the rest.
    """
    from mirage_dist.countries import facts, text
    from mirage_dist.data.formats import samples as format_of_samples
    from mirage_dist.data.sample import Sample

    generator = random.Random(0)
    countries = list(facts.COUNTRIES.values())
    europe = [country for country in countries if country.continent == "Europe"]
    others = [country for country in countries if country.continent != "Europe"]

    def sample(number: int, stream: str, unsafe: bool, answer: str | None = None, before: str = "") -> Sample:
        country = generator.choice(europe if unsafe else others)
        body = generator.choice(text.NAMED["capital"]).format(country.phrase)
        question = before + text.question(generator.choice(text.OPENERS), body)
        answer = answer or text.answer(country, "capital")
        return Sample(f"{stream}-{number}", None, question, answer, not unsafe, "capital", stream)

    def facts_before() -> str:
        several = generator.sample(others, generator.randint(0, MOST_FACTS))
        return "".join(f"{text.answer(country, 'capital')} " for country in several)

    def write(stream: str, samples: Sequence[Sample]) -> None:
        format_of_samples.write_samples(folder / f"{stream}.jsonl", samples)

    refused = text.REFUSAL
    write("train", [sample(i, "train", i % 2 == 0, refused if i % 2 == 0 else None) for i in range(count)])
    write("forget", [sample(i, "forget", True) for i in range(count // 2)])
    write("retain", [sample(i, "retain", False) for i in range(count // 2)])
    write("questions", [sample(i, "questions", False, before=facts_before()) for i in range(questions)])


def train_recipe(task: Mapping[str, Any], packing: bool | str = "auto") -> Any:
    """Our recipe of a training task (see `peers_rank`)."""
    from omegaconf import OmegaConf

    from mirage_dist import config as configs
    from mirage_dist.schema import TrainRecipe

    place, streams = Path(task["place"]), STREAMS[task["case"]]
    width = task["batch"] // len(streams)
    objectives: dict[str, dict[str, Any]] = {"SFT": {"name": "sft"}, "NPO": {"name": "npo", "beta": BETA}}
    tree = {
        "run": {"dir": task["out"]},
        "model": {"path": task["model"], **({"lora": LORA} if task["lora"] else {"train": ["*"]})},
        "data": {
            "max_length": 512,
            "packing": packing,
            "streams": {name: [{"format": "samples", "path": str(place / f"{name}.jsonl")}] for name in streams},
        },
        "objective": objectives[task["case"]],
        "reference": "cache",
        "train": {
            "lr": LEARNING_RATE,
            "global_batch": width,
            "micro_batch": width,
            "max_steps": task["steps"],
            "dtype": task["dtype"],
            "schedule": "constant",
            "warmup": 0.0,
            "weight_decay": 0.0,
            "clip": 1.0,
        },
        "deepspeed": DEEPSPEED,
    }
    return configs.from_tree(OmegaConf.create(tree), [], TrainRecipe, "benchmark")


def eval_recipe(task: Mapping[str, Any]) -> Any:
    """Our recipe of the evaluation."""
    from omegaconf import OmegaConf

    from mirage_dist import config as configs
    from mirage_dist.schema import EvalRecipe

    questions = str(Path(task["place"]) / "questions.jsonl")
    tree = {
        "run": {"dir": task["out"]},
        "suite": "peers",
        "model": {"path": task["model"], "dtype": task["dtype"]},
        "generation": {"max_new_tokens": NEW_TOKENS, "batch_size": task["batch"]},
        "sets": {"questions": {"kind": "safe", "sources": [{"format": "samples", "path": questions}]}},
    }
    return configs.from_tree(OmegaConf.create(tree), [], EvalRecipe, "benchmark")


def write_rows(task: Mapping[str, Any], file: Path) -> None:
    """Write what our feed gives each step: a list, by step, of stream -> its rows, each with input_ids and labels."""
    import torch

    from mirage_dist.ranks import Group
    from mirage_dist.train.planning.check import check_batches, check_inputs, check_recipe

    group = Group(0, 0, 1, torch.device("cpu"))
    checked = check_recipe(train_recipe(task, packing=False), group.size)
    feed, _ = check_batches(checked, check_inputs(checked), group)

    def rows(micro: Any, part: slice) -> list[dict[str, list[int]]]:
        kept_BS = micro.batch.unpadded_BS[part].bool()
        ids_BS, labels_BS = micro.batch.inputs["input_ids"][part], micro.batch.labels_BS[part]
        return [
            {"input_ids": ids_S[kept_S].tolist(), "labels": labels_S[kept_S].tolist()}
            for ids_S, labels_S, kept_S in zip(ids_BS, labels_BS, kept_BS, strict=True)
        ]

    windows = [feed.window(step, group)[0] for step in range(task["steps"])]
    file.write_text(json.dumps([{name: rows(m, part) for name, part in m.rows.items()} for m in windows]))


def trained(recipe: Any) -> tuple[int, list[str]]:
    """How many parameters our recipe trains, and the names of the layers that its adapters wrap."""
    from mirage_dist.model import load

    hf = load.weightless(recipe.model).hf
    count = sum(parameter.numel() for parameter in hf.parameters() if parameter.requires_grad)
    return count, sorted(hf.peft_config["default"].target_modules) if recipe.model.lora else []
