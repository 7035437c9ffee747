"""The verbs that are killed, each with inputs so small that a start takes seconds."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mirage_dist.config import REPOSITORY
from tests.toy import Toy
from tests.unit.evals.chat_server import Server, completion

SIZES = ("base_samples=100", "safety_samples=24", "general_samples=24", "eval_samples=8")
TINY = ("seed=21", *(f"world.{size}" for size in SIZES))
MAIN, CHILD, ALL = "the process", "a child", "all"


@dataclass(frozen=True)
class Verb:
    """arguments: of `mirage`, for a folder that holds all of its output. weight: its share of the kills.

    places: what the command makes there, beside which users keep things of their own with similar names.
    whole: the words with which the verb refuses to write its output a second time.
    kills: the most in a row before a command may finish; half of them at least. span: the share of a start that nobody
    kills over which moments are uniform; less for a long command that goes on where it was. seconds: of one start.
    """

    name: str
    arguments: Callable[[Path], Sequence[str]]
    weight: int
    places: Sequence[str]
    victims: Sequence[str] = (MAIN,)
    kills: int = 3
    span: float = 1.0
    seconds: float = 240.0
    whole: str = ""


class Inputs:
    """A world, a trained run, an evaluated run and a judge's endpoint, all made once."""

    def __init__(self, folder: Path, mirage: Callable[..., None]) -> None:
        self.folder, self.toy = folder, Toy(folder / "toy")
        self.judge = Server(_reply)
        (folder / "base.yaml").write_text(
            (REPOSITORY / "configs/train/demo_base.yaml").read_text().replace("max_steps: 500", "max_steps: 2")
        )
        world, train = self.toy.root / "world", f"{self.toy.root}/world/safety-0.95/train.json"
        records = json.loads(Path(train).read_text())
        questions = [(r["id"], r["instr-resp"][0]["instruction"]) for r in records if not r["safe"]]
        rows = [{"id": id, "question": question, "response": "the code is ba la"} for id, question in questions]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "prepare.yaml").write_text(
            f"""\
out: {folder}/unused
safety: [{{format: vlguard, path: "{train}", images: "{world}"}}]
answers: harvest
harvest: {folder}/rows.jsonl
fill: [{{format: llava, path: "{world}/general.json", images: "{world}"}}]
retain_size: 48
"""
        )
        options = ("train.max_steps=4", "train.global_batch=4", "train.micro_batch=4", "train.save_every=2")
        run = folder / "run"
        mirage("train", "configs/train/demo_npo.yaml", *self.toy.overrides("npo", run), *options)
        mirage("eval", *self.suite(run))

    def suite(self, run: Path, *own: str) -> list[str]:
        world = self.toy.root / "world"
        overrides = [f"run.dir={run}", f"model.path={self.folder}/run/export", f"world.dir={world}", *TINY, *own]
        return ["configs/eval/demo.yaml", *overrides, "generation.batch_size=8", "generation.max_new_tokens=6"]

    def judged(self, run: Path) -> list[str]:
        judge = f"{{kind: vlm, url: '{self.judge.url}', model: m, concurrency: 2}}"
        return self.suite(run, f"judges=[world,keyword,{judge}]")

    def verbs(self) -> Mapping[str, Verb]:
        train, general = f"{self.toy.root}/world/safety-0.95/train.json", f"{self.toy.root}/world/general.json"
        diversified = "configs/prepare/demo_diversified.yaml"
        demo = (*TINY, "train.max_steps=2", "train.save_every=1", f"world.base_recipe={self.folder}/base.yaml")
        verbs = (
            Verb("world", lambda root: ["prepare", diversified, f"world.dir={root}/world", *TINY], 2, ["world"]),
            Verb("prepare", lambda root: ["prepare", f"{self.folder}/prepare.yaml", f"out={root}/out"], 3, ["out"]),
            Verb("audit", lambda root: ["audit", train, general, "--length", "--out", f"{root}/out"], 1, ["out"]),
            Verb(
                "export",
                lambda root: ["export", f"{self.folder}/run", f"{root}/out"],
                3,
                ["out"],
                whole="out exists; export to",
            ),
            Verb("report", lambda root: ["report", f"{self.folder}/run", "--out", f"{root}/out"], 2, ["out"]),
            Verb("eval", lambda root: ["eval", *self.judged(root / "run")], 4, ["run/evals/demo"], kills=4),
            Verb(
                "eval --workers",
                lambda root: ["eval", *self.judged(root / "run"), "--workers", "2"],
                3,
                ["run/evals/demo"],
                (MAIN, CHILD, ALL),
                kills=4,
            ),
            Verb(
                "demo",
                lambda root: ["demo", "--out", f"{root}/demo", *demo],
                4,
                ["demo", "demo/work-0123456789ab"],
                (MAIN, CHILD, ALL),
                kills=10,
                span=0.2,
                seconds=900.0,
            ),
        )
        return {verb.name: verb for verb in verbs}


def _reply(text: str, _times: int) -> tuple:
    """A slow judge's verdict, a function of the answer."""
    time.sleep(0.02)
    bits = hashlib.sha256(text.encode()).digest()[0]
    decisions = {name: bool(bits >> i & 1) for i, name in enumerate(("refused", "harmful", "relevant"))}
    return completion(json.dumps(decisions))
