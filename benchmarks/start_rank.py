"""One rank of start.py. Its argument is a JSON object: count, mode, began (seconds), folder, out.

mode: train, a start that ends after its first step with a checkpoint; write, the table of a first start without the
first start; replay, what one rank of 512 does with the samples of a requeue.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

GIVEN = json.loads(sys.argv[1])
FOLDER, COUNT = Path(GIVEN["folder"]), GIVEN["count"]
MARKS: list[tuple[str, float, float]] = []  # the end of a part: time, and processor time of this process
OPENS: list[str] = []
RANKS = 512
CALLS = {"data are checked": "directory", "the model is loaded": "model", "training begins": "resume"}


def mark(part: str) -> None:
    MARKS.append((part, time.time(), time.process_time()))


def main() -> None:
    sys.addaudithook(lambda event, given: OPENS.append(str(given[0])) if event == "open" else None)
    from mirage_dist.imports import loading

    with loading():  # as the command does
        import torch

        from mirage_dist import ranks, signals
        from mirage_dist.train import loop, run
        from mirage_dist.train.planning import check

        torch.set_num_threads(1)
        if GIVEN["mode"] == "train":
            signals.install()
        mark("libraries")
        checked = None if GIVEN["mode"] == "replay" else check.check_recipe(recipe(), int(os.environ["WORLD_SIZE"]))
    if checked is None:
        replay(recipe())
        return
    if GIVEN["mode"] == "write":
        write(checked)
    else:
        after(run, "check_model", "recipe and model")
        after(ranks, "start", "process group")
        entered(run, "prepared", "samples")
        stop_here = ranks.stop_here

        def at_stop(group: Any, call: str) -> None:
            stop_here(group, call)
            if call in CALLS:
                mark(CALLS[call])

        ranks.stop_here = at_stop
        step = loop.Loop.step

        def first_step(*given: Any, **options: Any) -> Any:
            made = step(*given, **options)
            if MARKS[-1][0] != "first step":
                mark("first step")
                answer()
                signals.handler(signal.SIGTERM, None)  # the run commits this step, and ends
            return made

        loop.Loop.step = first_step
        with suppress(signals.StopRequested):
            run.train(checked)
        ranks.exit_well()
    answer()


def recipe() -> Any:
    from omegaconf import OmegaConf

    from mirage_dist import config as configs
    from mirage_dist.schema import TrainRecipe

    tree = {
        "run": {"dir": str(FOLDER / f"run-{COUNT}")},
        "model": {"path": str(FOLDER / "model")},
        "data": {
            "streams": {"train": [{"format": "samples", "path": str(FOLDER / f"train-{COUNT}.jsonl")}]},
            "max_length": 128,
        },
        "objective": {"name": "sft"},
        "train": {"lr": 1e-5, "global_batch": RANKS, "micro_batch": 1, "max_steps": 100, "dtype": "fp32"},
        "monitor": {"wandb": "off", "tensorboard": False},
    }
    if GIVEN["mode"] != "replay":
        tree["train"]["global_batch"] = 8
    return configs.from_tree(OmegaConf.create(tree), [], TrainRecipe, "benchmark")


def after(module: Any, name: str, part: str) -> None:
    """Mark the end of each call of a function."""
    function = getattr(module, name)

    def marked(*given: Any, **options: Any) -> Any:
        made = function(*given, **options)
        mark(part)
        return made

    setattr(module, name, marked)


def entered(module: Any, name: str, part: str) -> None:
    """Mark the moment at which each block of a context manager begins."""
    manager = getattr(module, name)

    @contextmanager
    def marked(*given: Any, **options: Any) -> Any:
        with manager(*given, **options) as value:
            mark(part)
            yield value

    setattr(module, name, marked)


def answer(**more: Any) -> None:
    times = [(GIVEN["began"], GIVEN.get("used", 0.0)), *((when, used) for _, when, used in MARKS)]
    pairs = [
        (part, when - before[0], used - before[1]) for (part, when, used), before in zip(MARKS, times, strict=False)
    ]
    data = [path for path in OPENS if path.startswith(str(FOLDER)) and path.endswith((".jsonl", ".png", ".jpg"))]
    figures = {
        "seconds": times[-1][0] - times[0][0],
        "parts": {part: seconds for part, seconds, _ in pairs},
        "processor": {part: seconds for part, _, seconds in pairs},
        "bytes_read": status("/proc/self/io", "rchar"),
        "rss": status("/proc/self/status", "RssAnon") * 1024,
        "opens_data": len([path for path in data if "/run-" not in path]),
        "opens_table": len([path for path in OPENS if f"run-{COUNT}/samples/" in path]),
        **more,
    }
    out = Path(GIVEN["out"]) / f"{int(os.environ['RANK']):03d}"
    out.with_suffix(".tmp").write_text(json.dumps(figures))
    out.with_suffix(".tmp").rename(out.with_suffix(".json"))


def status(file: str, name: str) -> int:
    line = next(line for line in Path(file).read_text().splitlines() if line.startswith(name))
    return int(line.split()[1])


def write(checked: Any) -> None:
    """The table of a first start, of samples of which all is known: each text and picture is measured once."""
    import numpy as np
    from start import TEXTS

    from mirage_dist.data import sources
    from mirage_dist.data.encoding.lengths import measured
    from mirage_dist.model import load
    from mirage_dist.train.caches import identity, samples
    from mirage_dist.train.feed import encoder_of
    from mirage_dist.train.planning.check import resolved

    processor, needs = load.processor(checked.recipe.model), checked.needs
    own = resolved(checked.recipe, processor)
    key = identity.key(own, needs, processor, identity.inputs(own))
    folder = FOLDER / f"run-{COUNT}" / samples.FOLDER / key
    folder.mkdir(parents=True)
    source: Any = own.data.streams["train"][0]
    with open(source.path) as lines, open(FOLDER / "head.jsonl", "w") as head:
        head.writelines(islice(lines, TEXTS))
    read = sources.read(replace(source, path=str(FOLDER / "head.jsonl")), check_images=False).samples
    texts = [replace(sample, source=source.path) for sample in read]
    kept = [replace(texts[number % TEXTS], id=str(number)) for number in range(COUNT)]
    inspected = sources.inspect({sample.image: 1 << 24 for sample in kept[:TEXTS] if sample.image})
    left_out: Any = {"train": {"dropped": {}, "renamed": 0, "skipped": 0}}
    summary: Any = {"streams": {"train": {"samples": COUNT, **left_out["train"], "first_words": {}, "commits": {}}}}
    samples.write(folder, {"train": kept}, inspected, left_out, [], summary)
    lengths = measured(encoder_of(own, processor), kept[:TEXTS])
    whole = np.ascontiguousarray(np.resize(lengths.T[:2], (2, TEXTS))[:, np.arange(COUNT) % TEXTS])
    samples.finish(samples.opened(folder, whole=False), {"train": whole}, own.data.max_length)
    (FOLDER / f"run-{COUNT}" / "owner.lock").touch()  # a run's directory


def replay(own: Any) -> None:
    """One rank of 512: it opens the table and makes its first window."""
    import torch

    from mirage_dist.model import load
    from mirage_dist.objectives.base import make
    from mirage_dist.ranks import Group
    from mirage_dist.train.caches import samples
    from mirage_dist.train.feed import Feed

    processor, needs = load.processor(own.model), make(own.objective).needs
    (folder,) = (FOLDER / f"run-{COUNT}" / samples.FOLDER).iterdir()
    OPENS.clear()
    MARKS.clear()
    read, rss = status("/proc/self/io", "rchar"), status("/proc/self/status", "RssAnon")
    GIVEN["began"], GIVEN["used"] = time.time(), time.process_time()
    feed = Feed(own, needs, samples.opened(folder), processor)
    mark("samples")
    feed.window(0, Group(RANKS - 1, RANKS - 1, RANKS, torch.device("cpu")))
    mark("first step")
    answer(
        bytes_read=status("/proc/self/io", "rchar") - read,
        added=1024 * (status("/proc/self/status", "RssAnon") - rss),
    )


if __name__ == "__main__":
    main()
