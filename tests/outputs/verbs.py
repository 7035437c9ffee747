"""The verbs that write, each as a command with an output path, and what of the output must be the same each time."""

from __future__ import annotations

import io
import json
import os
import resource
import subprocess
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import forkserver
from places import tree
from toy import Toy

from mirage_dist import cli

LIMITED = """
import resource, sys
from mirage_dist import cli
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(cli.main(sys.argv[2:]))
"""
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Done:
    status: int
    output: str
    errors: str


@dataclass(frozen=True)
class Verb:
    """words: the command line for an output path. result: what of the output two runs have in common.

    resumed: the output is a run directory, in which a failed start leaves what the next one goes on with.
    apart: the verb ends its process, or starts others.
    """

    name: str
    words: Callable[[Path], list[str]]
    result: Callable[[Path], object]
    resumed: bool = False
    apart: bool = False

    def start(self, out: Path, bytes_a_file: int | None = None) -> subprocess.Popen:
        limit = [] if bytes_a_file is None else ["-c", LIMITED, str(bytes_a_file)]
        command = [forkserver.python(), *(limit or ["-m", "mirage_dist.cli"]), *self.words(out)]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, env={**os.environ, **ENVIRONMENT}, text=True, **pipes)

    def run(self, out: Path, bytes_a_file: int | None = None) -> Done:
        """To its end, in this process where that is possible. bytes_a_file: none may become longer."""
        if self.apart:
            return done(self.start(out, bytes_a_file))
        return run_here(self.words(out), bytes_a_file)


def run_here(words: list[str], bytes_a_file: int | None = None) -> Done:
    """A command, to its end, in this process."""
    output, errors = io.StringIO(), io.StringIO()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with redirect_stdout(output), redirect_stderr(errors):
        if bytes_a_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_a_file, before[1]))
        try:
            status = cli.main(words)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return Done(status, output.getvalue(), errors.getvalue())


TESTS = ("relearning", "quantisation", "probe", "universal", "forgetting", "attribution")  # of erasure, all but one


def done(process: subprocess.Popen) -> Done:
    output, errors = process.communicate(timeout=300)
    return Done(process.returncode, output, errors)


def verbs(toy: Toy, run: Path) -> dict[str, Verb]:
    """run: the directory of a finished training run, with an evaluation that has ended."""
    sizes = {"base_samples": 100, "safety_samples": 24, "general_samples": 24, "eval_samples": 8}
    world = ["seed=21", f"world.dir={toy.root}/world", *(f"world.{name}={n}" for name, n in sizes.items())]
    suite = [*world, f"model.path={toy.root}/model", "generation.max_new_tokens=4", "generation.batch_size=16"]
    diversified = "configs/prepare/demo_diversified.yaml"
    forget = f"[{{format: samples, path: {toy.root}/forget.jsonl}}]"
    tests = [f"erasure.{name}=null" for name in TESTS]
    tests += [f"erasure.forget={forget}", "erasure.content=null", "erasure.completion.words=[1]"]
    tests += ["erasure.completion.questions=4"]

    def train(out: Path) -> list[str]:
        own = ["train.max_steps=2", "train.global_batch=4", "train.micro_batch=4", "run.name=one"]
        return ["train", "configs/train/demo_sft.yaml", *toy.overrides("sft", out), *own]

    def evaluation(out: Path) -> list[str]:
        return ["eval", "configs/eval/demo.yaml", f"run.dir={out}", *suite]

    return {
        verb.name: verb
        for verb in (
            Verb("prepare", lambda out: ["prepare", diversified, f"out={out}", *world], tree),
            Verb("audit", lambda out: ["audit", f"{toy.root}/world/safety-0.95/train.json", "--out", str(out)], tree),
            Verb("train", train, weights, resumed=True, apart=True),
            Verb("eval", evaluation, figures, resumed=True),
            Verb("eval --workers", lambda out: [*evaluation(out), "--workers", "2"], figures, True, True),
            Verb(
                "erasure",
                lambda out: ["erasure", *evaluation(out)[1:], *tests],
                lambda out: (figures(out), content(out / "evals/demo/erasure.json", without="seconds")),
                resumed=True,
                apart=True,
            ),
            Verb("report", lambda out: ["report", str(run), "--out", str(out)], tree),
            Verb("export", lambda out: ["export", str(run), str(out)], tree),
        )
    }


def weights(out: Path) -> Mapping[str, str]:
    """All files of the export but its card, which names the run."""
    return {name: held for name, held in tree(out / "export").items() if name != "README.md"}


def figures(out: Path) -> Mapping[str, object]:
    return content(out / "evals/demo/metrics.json", without="seal")


def content(file: Path, without: str) -> Mapping[str, object]:
    return {key: value for key, value in json.loads(file.read_text()).items() if key not in (without, "seal")}
