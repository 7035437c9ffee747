"""The small world that every case gets a copy of: data, a model, what each verb makes of them, and a user's own files.

Every path in it is relative to its folder, which is the working directory of a case, so that a copy is as good.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import yaml

from mirage_dist import config as configs
from mirage_dist.config import REPOSITORY
from tests.fuzz.sandbox import Child

SIZES = {"base_samples": 20, "safety_samples": 6, "general_samples": 6, "eval_samples": 4}
WORLD = {"dir": "world", "seed": 3, **SIZES}
# A user's own, beside and among what the verbs make; none of it may change.
FOREIGN = {
    "notes.txt": "file",
    "work-notes": "folder",
    "new.tmp-123": "folder",
    "run/work-notes": "folder",
    "run/work-2024.csv": "file",
    "run/notes.md": "file",
    "run/checkpoints/step-000002.bak1": "folder",
    "run/checkpoints/step-old2": "folder",
    "run/checkpoints/mine.txt": "file",
    "run/evals/model-x": "folder",
    "run/evals/notes.txt": "file",
    "run/evals/demo/model-mine": "folder",
    "run/evals/demo/rows.bak": "folder",
    "run/reference/mine": "folder",
    "run/elsewhere": "link",
    "model/notes.txt": "file",
}


def make(folder: Path) -> None:
    """Write the world into a new folder. Raises RuntimeError with a verb's output when it fails."""
    folder.mkdir(parents=True)
    _run(folder, _make_data)
    for name, recipe in recipes().items():
        (folder / name).write_text(yaml.safe_dump(recipe, sort_keys=False))
    (folder / "deepspeed.json").write_text((REPOSITORY / "configs/deepspeed/cpu.json").read_text())
    for arguments in (
        ["train", "train.yaml"],
        ["eval", "eval.yaml"],
        ["prepare", "prepare.yaml"],
        ["report", "run"],
    ):
        _run(folder, arguments)
    from tests.fuzz.changes import foreign

    for name, what in FOREIGN.items():
        foreign(folder / name, what)


def copy(folder: Path, to: Path) -> None:
    """A copy that shares no file with its original."""
    shutil.copytree(folder, to, symlinks=True, copy_function=shutil.copyfile)


def _run(folder: Path, work: Any) -> None:
    child = Child(folder, work, {}, folder.parent / "make")
    outcome = child.wait()
    if outcome.status != 0:
        raise RuntimeError(f"{work}: status {outcome.status}\n{outcome.stdout}{outcome.stderr}")


def _make_data() -> int:
    from mirage_dist.data import formats, sources
    from mirage_dist.data.formats.samples import write_samples
    from mirage_dist.embedded import model as embedded_model
    from mirage_dist.embedded import world as embedded_world
    from mirage_dist.schema import WorldConfig

    embedded_world.make(WorldConfig(**WORLD))
    embedded_model.make(Path("model"), 3)
    data = Path("data")
    data.mkdir()
    base = sources.read(formats.source("llava", "world/base.json", "world")).samples
    for name, part in (("forget", base[:8]), ("retain", base[8:18])):
        write_samples(data / f"{name}.jsonl", part)
        text = (data / f"{name}.jsonl").read_text()
        (data / f"{name}.jsonl").write_text(text.replace(f"{os.getcwd()}/world/", ""))
    records = json.loads(Path("world/base.json").read_text())
    (data / "chat.json").write_text(json.dumps(records))
    rows = [json.loads(line) for line in (data / "retain.jsonl").read_text().splitlines()]
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([{**row, "history": []} for row in rows]), data / "table.parquet")
    stored = [
        {**record, "image": {"bytes": Path("world", record["image"]).read_bytes(), "path": None}}
        for record in records[:12]
        if "image" in record
    ]
    pq.write_table(pa.Table.from_pylist(stored), data / "stored.parquet", row_group_size=4)
    from mirage_dist.report import published

    (data / "results.json").write_text(published.dumped(published.compute("llava_1_5_7b", {"npo": Path("run")}, "0")))
    (data / "refusals.json").write_text(json.dumps({"language": "English", "phrases": ["sorry", "i cannot"]}))
    safety = json.loads(Path("world/safety-0.95/train.json").read_text())
    harvest = [
        {"id": record["id"], "question": pair["instruction"], "response": "ba la", "attack": "clean"}
        for record in safety
        if not record["safe"]
        for pair in record["instr-resp"]
    ]
    (data / "harvest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in harvest))
    return 0


def recipes() -> dict[str, Any]:
    """File -> recipe, each with most of its keys written out, so that there is something to break."""
    train = _tree("configs/train/demo_npo.yaml")
    train.update(world=None, seed=3, deepspeed="deepspeed.json", run={"dir": "run", "name": "npo"})
    train["model"] = {"path": "model", "train": ["connector"], "attention": "eager", "freeze": []}
    train["data"] = {"max_length": 64, "workers": 0, "image_aspect": "pad", "system_prompt": None}
    train["data"]["streams"] = {name: [_samples(f"data/{name}.jsonl")] for name in ("forget", "retain")}
    train["train"] |= {"max_steps": 2, "save_every": 1, "global_batch": 2, "micro_batch": 1, "hang_seconds": 60.0}
    sft = {**train, "objective": {"name": "sft"}, "run": {"dir": "new-sft"}, "reference": "cache"}
    sft["data"] = {**train["data"], "streams": {"train": [_llava("data/chat.json")]}}
    sft["model"] = {**train["model"], "lora": {"rank": 2, "alpha": 4, "targets": ["decoder"]}}
    evaluation = _tree("configs/eval/demo.yaml")
    evaluation.update(world={**WORLD, "spurious": 0.95}, seed=3, run={"dir": "run"})
    evaluation["model"] = {"path": "run/export", "dtype": "fp32"}
    evaluation["generation"] = {"max_new_tokens": 4, "batch_size": 16, "backend": "hf"}
    evaluation["sets"] = _resolved(evaluation["sets"])
    evaluation["erasure"] = {
        "forget": [_samples("data/forget.jsonl")],
        "content": None,
        "quantisation": {"bits": [4], "group": 64, "attacks": False},
        "completion": {"words": [1], "questions": 4},
    }
    prepare = _tree("configs/prepare/demo.yaml")
    prepare.update(world={**WORLD, "spurious": 0.95}, seed=3, out="prepared", retain_size=8)
    prepare["harvest"] = "data/harvest.jsonl"
    prepare["safety"], prepare["fill"] = _resolved(prepare["safety"]), _resolved(prepare["fill"])
    diversify = {
        "out": "new",
        "answers": "none",
        "safety": prepare["safety"],
        "diversify": {"templates": ["Tell me: {question}", "Please, {rest}"], "copies": 2, "min_match": 0.1},
    }
    names = ("train.yaml", "sft.yaml", "eval.yaml", "prepare.yaml", "diversify.yaml")
    return dict(zip(names, (train, sft, evaluation, prepare, diversify), strict=True))


def _tree(file: str) -> Any:
    return yaml.safe_load(configs.find(file).read_text())


def _samples(path: str) -> dict[str, Any]:
    return {"format": "samples", "path": path, "images": "world", "on_bad_record": "error"}


def _llava(path: str) -> dict[str, Any]:
    return {"format": "llava", "path": path, "images": "world", "on_bad_record": "skip"}


def _resolved(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _resolved(part) for key, part in tree.items()}
    if isinstance(tree, list):
        return [_resolved(part) for part in tree]
    if isinstance(tree, str):
        return tree.replace("${fixed2:${world.spurious}}", "0.95").replace("${world.dir}", "world")
    return tree
