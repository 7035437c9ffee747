"""What a start reads of checkpoints, caches and models, before and after: opens, bytes and seconds of one rank.

    python benchmarks/storage.py

One rank of 512 repeats its file operations of a resume, on a checkpoint of 512 shards and 900 parameters under ZeRO-3
with AdamW's state, each parameter tiny: the headers are as large as a 7B model's. "Before" is the same checkpoint
without its index, which is read as every checkpoint was until there were indices. Then the reference cache of a million
samples, in the parts that 512 ranks wrote each for itself, and as one file; and the hash of a model directory. Opens
are counted by the kernel (inotify). The page cache is warm: the disk's own time comes on top.
Writes benchmarks/results/storage.json.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import common

RANKS, PARAMETERS, KEYS = 512, 900, ("param", "exp_avg", "exp_avg_sq")
ELEMENTS = 16  # of each parameter on each rank
SAMPLES, TOKENS = 1_000_000, 60
BATCHES, WIDTH = 16, 2  # of a part, and samples of a batch
NEEDED = 2048  # samples that one rank's first 100 steps ask for


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--out", type=Path, help="a folder on the disk to measure; default: the temporary one")
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parsed = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # where the opens are counted
    result = common.record("cpu", ("torch", "safetensors", "numpy"), ["--samples", str(parsed.samples)], threads=1)
    with tempfile.TemporaryDirectory(dir=parsed.out) as folder:
        result["resume"] = resume(Path(folder) / "checkpoint")
        result["reference"] = reference(Path(folder) / "reference", parsed.samples)
        result["hash"] = hashed(Path(folder))
    print(table(result))
    opens = result["resume"]["after"]["opens"]
    judged = [(f"a rank's opens on resume at 512 ranks are at most 8 (are {opens})", opens <= 8)]
    result["targets"] = common.say_targets(judged)
    common.write("storage", result)


def counted(folder: Path, work: Callable[[], object]) -> dict[str, Any]:
    """Opens in a folder, and elapsed and processor time, of one call."""
    from opens import Opens

    start, busy = time.perf_counter(), time.process_time()
    with Opens(folder) as opens:
        work()
    return {"opens": opens.count, "s": time.perf_counter() - start, "cpu_s": time.process_time() - busy}


# ----------------------------------------------------------------------------------------------------- resume


def resume(folder: Path) -> dict[str, Any]:
    import torch
    from safetensors.torch import load_file, save_file

    from mirage_dist import disk, state
    from mirage_dist.model import shards
    from mirage_dist.model.shards import Fragment, Layout, Shards, damage

    folder.mkdir()
    names = [f"model.language_model.layers.{n}.self_attn.q_proj.weight" for n in range(PARAMETERS)]
    values = torch.arange(float(ELEMENTS))
    files, layouts = {}, []
    for rank in range(RANKS):
        held = [Fragment(key, n, (ELEMENTS * RANKS,), rank * ELEMENTS, values) for n in names for key in KEYS]
        scalars = {name: {"step": {"float32": 100.0}} for name in names}
        file = f"rank-{rank:05d}-of-{RANKS:05d}.safetensors"
        files[file] = asdict(shards.write(folder / file, held, scalars))
        layouts.append(Layout.of(held, scalars))
    save_file({"vector": torch.ones(16)}, folder / "objective.safetensors")
    text = shards.index(sorted(files), shards.placed(own.tensors for own in layouts), [own.scalars for own in layouts])
    files[shards.INDEX] = asdict(disk.write(folder / shards.INDEX, text, workspace=folder))
    objective = folder / "objective.safetensors"
    files[objective.name] = {"bytes": objective.stat().st_size, "sha256": disk.sha256(objective)}
    headers = {name: int.from_bytes((folder / name).read_bytes()[:8], "little") for name in files if "rank" in name}

    def start(rank: int, ranks: int) -> Callable[[], None]:
        def work() -> None:
            assert damage(folder, rank, ranks) is None
            with Shards(folder) as checkpoint:
                each = ELEMENTS * RANKS // ranks
                for name in names:
                    for key in KEYS:
                        checkpoint.read(key, name, rank * each, each)
            load_file(objective)

        return work

    figures: dict[str, Any] = {"index_bytes": len(text), "ranks": RANKS}
    for title, without in (("before", [shards.INDEX]), ("after", [])):
        own = {name: written for name, written in files.items() if name not in without}
        (folder / shards.MANIFEST).write_text(state.sealed("checkpoint", {"step": 1, "files": own}))
        figures[title] = counted(folder, start(200, RANKS))
        opened = set(headers) if without else {f"rank-00200-of-{RANKS:05d}.safetensors"}
        figures[title]["header_bytes"] = sum(headers[name] for name in opened)
    for ranks in (8, 64, 256):
        figures[f"into {ranks}"] = counted(folder, start(ranks // 2, ranks))
    return figures


# ----------------------------------------------------------------------------------------- the reference cache


def reference(folder: Path, samples: int) -> dict[str, Any]:
    import numpy as np
    import torch

    from mirage_dist.model.reference import LogProbs
    from mirage_dist.train.caches import flat
    from mirage_dist.train.caches.reference import Cached

    folder.mkdir()
    # Each part of one rank takes the same time to read: so many are measured as make the measurement short.
    of_a_part, parts = BATCHES * WIDTH, -(-samples // (BATCHES * WIDTH))
    measured = min(parts, 2048)
    for part in range(measured):
        cache = LogProbs()
        first = part * of_a_part
        cache.table.update({("forget", n): torch.full((TOKENS,), float(n)) for n in range(first, first + of_a_part)})
        with (folder / f"{part}.npz").open("wb") as handle:
            cache.save(handle)
    everything = LogProbs()

    def before() -> None:
        for part in range(measured):
            everything.load(folder / f"{part}.npz")

    old = counted(folder, before)
    arrays = {
        "forget/starts": np.arange(samples + 1, dtype=np.int64) * TOKENS,
        "forget/values": np.repeat(np.arange(samples, dtype=np.float32), TOKENS),
    }
    merging = time.perf_counter()
    flat.write(folder / "logps.safetensors", arrays, "log-probabilities", folder)
    merging = time.perf_counter() - merging
    chosen = np.random.default_rng(0).integers(0, samples, NEEDED).tolist()
    figures: dict[str, Any] = {
        "samples": samples,
        "parts": parts,
        "measured_parts": measured,
        "before": {name: value * parts / measured for name, value in old.items()},
        "write_s": merging,
        "bytes": (folder / "logps.safetensors").stat().st_size,
        "new_parts": -(-samples // (of_a_part * RANKS)),
    }

    for ranks in (8, RANKS):

        def after(ranks: int = ranks) -> None:
            file = flat.Flat(folder / "logps.safetensors")
            assert file.damage(3, ranks) is None
            assert len(Cached(file).rows([("forget", n) for n in chosen], torch.device("cpu"))) == NEEDED * TOKENS

        figures[f"after, {ranks} ranks"] = counted(folder, after)
    return figures


def hashed(folder: Path) -> dict[str, Any]:
    from mirage_dist.disk import hashes

    os.environ[hashes.PLACE] = str(folder / "cache")
    model = folder / "model"
    model.mkdir()
    block = os.urandom(1 << 20)
    for number in range(2):
        with (model / f"model-{number}.safetensors").open("wb") as handle:
            for _ in range(512):
                handle.write(block)
    files = sorted(model.iterdir())
    time.sleep(hashes.SETTLED_SECONDS)
    figures = {title: counted(model, lambda: hashes.sha256s(files)) for title in ("first", "later")}
    return {"bytes": sum(file.stat().st_size for file in files), **figures}


def table(result: dict[str, Any]) -> str:
    resumed, cache, model = result["resume"], result["reference"], result["hash"]

    def row(title: str, own: dict[str, Any], *more: str) -> list[str]:
        return [title, f"{own['opens']:,.0f}", *more, f"{own['s']:.3f}", f"{own['cpu_s']:.3f}"]

    rows = [
        row(f"512 → 512 ranks, {title}", resumed[title], f"{resumed[title]['header_bytes'] / 1e6:.2f}")
        for title in ("before", "after")
    ]
    rows += [row(f"512 → {n} ranks, after", resumed[f"into {n}"], "") for n in (256, 64, 8)]
    caches = [row(f"{cache['parts']:,} parts (of {cache['measured_parts']:,})", cache["before"])]
    caches += [row(f"one file, {n} ranks", cache[f"after, {n} ranks"]) for n in (8, RANKS)]
    hashing = [row(f"{model['bytes'] / 2**30:.0f} GiB, {title}", model[title]) for title in ("first", "later")]
    return "\n\n".join(
        [
            f"index: {resumed['index_bytes'] / 1e3:.0f} kB",
            common.markdown(["resume", "opens", "MB of headers", "s", "processor s"], rows),
            f"computed in {cache['new_parts']} parts; {cache['bytes'] / 1e6:.0f} MB, {cache['write_s']:.2f} s to write",
            common.markdown(["reference cache, 1 rank", "opens", "s", "processor s"], caches),
            common.markdown(["model hash", "opens", "s", "processor s"], hashing),
        ]
    )


if __name__ == "__main__":
    main()
