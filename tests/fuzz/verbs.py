"""Each verb on the small world: its command line, what it reads, what it may change, and what it makes."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Kind of mutation -> patterns of the files that it breaks.
PICTURES = ("world/images/*.png",)
MODEL = ("model/*.json", "model/*.jinja", "model/*.safetensors")
TESTED = ("run/export/*.json", "run/export/*.jinja", "run/export/*.safetensors", "run/export/*.md")
RUN = ("run/*.json", "run/*.jsonl", "run/*.yaml", "run/checkpoints/*", "run/checkpoints/step-00000?/*")
CACHE = ("run/reference/*/*",)
SUITE = ("run/evals/demo/*", "run/evals/demo/*/*")
STREAMS = ("data/forget.jsonl", "data/retain.jsonl")
QUESTIONS = ("world/*.json", "world/labels.jsonl", "world/attacks/*.json")
PREPARED = ("prepared/*",)


@dataclass(frozen=True)
class Verb:
    """arguments: the command line after the verb's name in `words`. last: overrides that bound the work, at the end.

    data, state, model: what it reads, by kind. owned: the folders in which it may change files of its own. made: a file
    that exists when the status is 0. result: what of it no damage to state may change, None where it was not made.
    """

    words: tuple[str, ...]
    recipe: str | None = None
    last: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    state: tuple[str, ...] = ()
    model: tuple[str, ...] = ()
    pictures: tuple[str, ...] = ()
    owned: tuple[str, ...] = ()
    made: str | None = None
    result: Callable[[Path], Any] | None = None
    places: tuple[str, ...] = ()  # where it writes
    weight: int = 4  # share of the cases


def rates(file: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        content = json.loads((folder / file).read_text())
        return {name: judge["sets"] for name, judge in content["judges"].items()}

    return read


def summary(folder: Path) -> Any:
    content = json.loads((folder / "new/summary.json").read_text())
    return {name: content.get(name) for name in ("entries", "runs", "suite")}


def weights(file: str) -> Callable[[Path], Any]:
    """The tensors of a safetensors file, by their bytes."""

    def read(folder: Path) -> Any:
        data = (folder / file).read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        return hashlib.sha256(data[8 + size :]).hexdigest()

    return read


def sets(folder: str) -> Callable[[Path], Any]:
    def read(root: Path) -> Any:
        return {file.name: len(file.read_text().splitlines()) for file in sorted((root / folder).glob("*.jsonl"))}

    return read


BOUND = ("train.max_steps=2", "data.workers=0", "monitor.wandb=off", "monitor.tensorboard=false")
SHORT = ("generation.max_new_tokens=4",)
VERBS: dict[str, Verb] = {
    "config": Verb(("config", "train.yaml"), "train.yaml", weight=3),
    "config-get": Verb(("config", "eval.yaml", "--get", "run.dir", "--override", "sets"), "eval.yaml", weight=2),
    "prepare": Verb(
        ("prepare", "prepare.yaml", "out=new"),
        "prepare.yaml",
        data=("world/safety-0.95/train.json", "world/general.json", "data/harvest.jsonl", "world/world.json"),
        pictures=PICTURES,
        owned=("new",),
        places=("new",),
        made="new/prepare.json",
    ),
    "prepare-again": Verb(
        ("prepare", "prepare.yaml"),
        "prepare.yaml",
        data=("world/safety-0.95/train.json", "world/world.json"),
        state=PREPARED,
        owned=("prepared",),
        made="prepared/prepare.json",
        result=sets("prepared"),
        weight=3,
    ),
    "prepare-diversify": Verb(
        ("prepare", "diversify.yaml"),
        "diversify.yaml",
        data=("world/safety-0.95/train.json",),
        pictures=PICTURES,
        owned=("new",),
        places=("new",),
        made="new/prepare.json",
        weight=3,
    ),
    "prepare-check": Verb(("prepare", "prepare.yaml", "--check"), "prepare.yaml", weight=2),
    "audit": Verb(
        ("audit", "data/chat.json", "data/retain.jsonl", "--refusals", "data/refusals.json", "--out", "new"),
        data=("data/chat.json", "data/retain.jsonl", "data/refusals.json"),
        owned=("new",),
        places=("new",),
        weight=4,
    ),
    "audit-table": Verb(
        ("audit", "data/table.parquet", "--ngrams", "2", "--length", "--response-kind", "label"),
        data=("data/table.parquet",),
        weight=3,
    ),
    "train-check-recipe": Verb(
        ("train", "train.yaml", "--check-recipe", "--ranks", "2"), "train.yaml", data=("deepspeed.json",)
    ),
    "train-check": Verb(
        ("train", "train.yaml", "--check"),
        "train.yaml",
        data=(*STREAMS, "deepspeed.json"),
        model=("model/*.json", "model/*.jinja"),
        pictures=PICTURES,
        weight=5,
    ),
    "plan": Verb(
        ("plan", "sft.yaml", "--ranks", "2"),
        "sft.yaml",
        data=("data/chat.json", "deepspeed.json"),
        model=MODEL,
        pictures=PICTURES,
        weight=4,
    ),
    "plan-stored": Verb(
        ("plan", "sft.yaml", "--ranks", "2", "data.streams.train=[{format: llava, path: data/stored.parquet}]"),
        data=("data/stored.parquet",),
        weight=3,
    ),
    "compare": Verb(("report", "--compare", "data/results.json"), data=("data/results.json",), weight=2),
    "train-again": Verb(
        ("train", "train.yaml"),
        "train.yaml",
        BOUND,
        state=(*RUN, *CACHE),
        data=STREAMS,
        owned=("run",),
        made="run/export/model.safetensors",
        result=weights("run/export/model.safetensors"),
        weight=3,
    ),
    "train-new": Verb(
        ("train", "sft.yaml", "run.dir=new"),
        "sft.yaml",
        BOUND,
        data=("data/chat.json", "deepspeed.json"),
        model=MODEL,
        pictures=PICTURES,
        owned=("new", "new-sft"),
        places=("new",),
        made="new/export/model.safetensors",
        weight=2,
    ),
    "eval": Verb(
        ("eval", "eval.yaml"),
        "eval.yaml",
        SHORT,
        data=QUESTIONS,
        state=SUITE,
        model=TESTED,
        pictures=PICTURES,
        owned=("run/evals", "new"),
        made="run/evals/demo/metrics.json",
        result=rates("run/evals/demo/metrics.json"),
        weight=7,
    ),
    "eval-new": Verb(
        ("eval", "eval.yaml", "run.dir=new", "suite=fresh", "model.path=model"),
        "eval.yaml",
        SHORT,
        data=QUESTIONS,
        model=MODEL,
        pictures=PICTURES,
        owned=("new",),
        places=("new",),
        made="new/evals/fresh/metrics.json",
        weight=3,
    ),
    "eval-check": Verb(("eval", "eval.yaml", "--check"), "eval.yaml", weight=3),
    "eval-status": Verb(("eval", "eval.yaml", "--status"), "eval.yaml", state=SUITE, weight=4),
    "erasure": Verb(
        ("erasure", "eval.yaml"),
        "eval.yaml",
        (*SHORT, "erasure.relearning=null"),
        state=SUITE,
        data=("data/forget.jsonl",),
        model=TESTED,
        owned=("run/evals",),
        made="run/evals/demo/erasure.json",
        weight=2,
    ),
    "report": Verb(
        ("report", "run", "--out", "new", "--outputs"),
        state=(*SUITE, "run/config.yaml", "run/manifest.json"),
        pictures=PICTURES,
        owned=("new",),
        places=("new",),
        made="new/index.html",
        result=summary,
        weight=6,
    ),
    "export": Verb(
        ("export", "run", "new"),
        state=RUN,
        model=MODEL,
        owned=("new",),
        places=("new",),
        made="new/model.safetensors",
        result=weights("new/model.safetensors"),
        weight=5,
    ),
    # Only what ends early: the place is never one where the demo could be made.
    "demo": Verb(("demo", "--out", "notes.txt/demo"), weight=2),
}
