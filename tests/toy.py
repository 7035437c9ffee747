"""A small embedded world and an untrained model, for runs that take seconds."""

from pathlib import Path
from typing import ClassVar

from mirage_dist.data import formats, sources
from mirage_dist.data.formats.samples import write_samples
from mirage_dist.embedded import model as embedded_model
from mirage_dist.embedded import world as embedded_world
from mirage_dist.schema import WorldConfig


class Toy:
    """world/, model/, forget.jsonl (true codes) and retain.jsonl under one folder."""

    sizes: ClassVar = {"base_samples": 100, "safety_samples": 24, "general_samples": 24, "eval_samples": 8}

    def __init__(self, root: Path) -> None:
        self.root = root
        embedded_world.make(WorldConfig(dir=str(root / "world"), seed=21, **self.sizes))
        embedded_model.make(root / "model", seed=21)
        base = sources.read(formats.source("llava", str(root / "world/base.json"), str(root / "world"))).samples
        write_samples(root / "forget.jsonl", base[:20])
        write_samples(root / "retain.jsonl", base[20:50])

    def overrides(self, recipe: str, run: Path) -> list[str]:
        overrides = [f"run.dir={run}", f"model.path={self.root}/model", "world=null", "seed=21"]
        overrides.append("monitor.print_every=100")
        if recipe == "sft":
            return [*overrides, f"data.streams.train=[{{format: samples, path: {self.root}/retain.jsonl}}]"]
        streams = (f"data.streams.{n}=[{{format: samples, path: {self.root}/{n}.jsonl}}]" for n in ("forget", "retain"))
        return [*overrides, *streams]
