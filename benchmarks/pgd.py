"""Measure attacks on pixels: many questions at once with early stop, against one question after another.

    python benchmarks/pgd.py [--model DIR --world DIR] [--questions 64] [--steps 20]

DIR is a trained model of the embedded world and that world (runs/demo/sft/export, runs/demo/world). Without them an
untrained model and a small world are made. Three ways to search the same questions, each with its own steps and starts:
the usual loop (one question, every step, the whole Hugging Face model), one question at a time with early stop, and
batches with early stop. Loading is not timed. Writes benchmarks/results/pgd.json.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import torch

from mirage_dist.data import formats, sources
from mirage_dist.data.encoding.collate import IGNORE
from mirage_dist.data.sample import Sample
from mirage_dist.embedded import model as embedded_model
from mirage_dist.embedded import world as embedded_world
from mirage_dist.evals.attacks.pixels import search
from mirage_dist.evals.attacks.pixels.victim import Victim
from mirage_dist.evals.models.hf import HuggingFace
from mirage_dist.schema import EvalModelConfig, GenerationConfig, TemplateConfig
from mirage_dist.schema.data import WorldConfig

TARGET, EPSILON, STEP = "sure , the code is", 32, 4.0
BATCH = 32
SPEEDUP = 5.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--world", type=Path)
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    given = ["--model DIR --world DIR"] if parsed.model and parsed.world else []
    arguments = [*given, f"--questions {parsed.questions} --steps {parsed.steps}"]
    head = common.record("cpu", ["torch", "transformers", "pillow"], arguments, threads=1)
    with tempfile.TemporaryDirectory() as folder:
        model, world = parsed.model or Path(folder) / "model", parsed.world or Path(folder) / "world"
        if parsed.model is None:
            embedded_model.make(model, seed=0)
        if parsed.world is None:
            embedded_world.make(WorldConfig(dir=str(world), seed=0, base_samples=100, eval_samples=parsed.questions))
        measured = measure(model, world, parsed.questions, parsed.steps)
    speedup = measured["batches_speedup"]
    judged = [(f"batches with early stop, {speedup:.1f} × the usual loop (at least {SPEEDUP:g})", speedup >= SPEEDUP)]
    result = {**head, **common.load("load_after"), "trained": parsed.model is not None, **measured}
    common.write("pgd", {**result, "targets": common.say_targets(judged)})


def measure(model: Path, world: Path, questions: int, steps: int) -> dict[str, Any]:
    """Seconds and gradient steps of the three ways, and what they reached."""
    source = formats.source("vlguard", str(world / "test.json"), images=str(world), split="unsafes")
    samples = sources.read(source).samples[:questions]
    generator = HuggingFace(
        EvalModelConfig(path=str(model), dtype="fp32"), TemplateConfig(), GenerationConfig(batch_size=BATCH)
    )
    victim = Victim(generator, "pgd")
    generator.model.requires_grad_(False)
    usual(generator, victim, samples[:1], steps)  # warm
    loop, loop_loss = timed(lambda: usual(generator, victim, samples, steps))
    budget = search.Budget(EPSILON, STEP, steps, restarts=1)
    victim.rows.count = 1
    single, alone = timed(lambda: searched(victim, samples, budget))
    victim.rows.count = BATCH
    batches, together = timed(lambda: searched(victim, samples, budget))
    return {
        "questions": len(samples),
        "steps": steps,
        "loop_seconds": loop,
        "single_seconds": single,
        "batches_seconds": batches,
        "single_speedup": loop / single,
        "batches_speedup": loop / batches,
        "steps_taken": sum(result.steps for result in together),
        "reached": sum(result.reached for result in together),
        "reached_alone": sum(result.reached for result in alone),
        "loss": sum(result.loss for result in together) / len(samples),
        "loop_loss": loop_loss,
    }


def timed(work: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    made = work()
    return time.perf_counter() - start, made


def searched(victim: Victim, samples: Sequence[Sample], budget: search.Budget) -> list[search.Result]:
    shown = (search.Search(victim.shown(sample, TARGET), budget, sample.id) for sample in samples)
    return [result for _, result in search.searched(victim, shown)]


def usual(generator: HuggingFace, victim: Victim, samples: Sequence[Sample], steps: int) -> float:
    """PGD as papers' code has it: a question, all steps, `loss.backward()` through the model's own loss; the mean of
    the questions' lowest losses.
    """
    lowest = []
    for sample in samples:
        shown = victim.shown(sample, TARGET)
        batch = generator.encoder.encode([shown.sample])
        labels_BS = batch.labels_BS.clone()
        labels_BS[labels_BS == generator.tokenizer.eos_token_id] = IGNORE
        clean = shown.picture_CHW
        start = torch.rand(clean.shape, generator=search.generator(f"{sample.id} 0")) * 2 - 1
        moved, best = (clean + start * EPSILON).clamp(0, 255), float("inf")
        for _ in range(steps + 1):
            leaf = moved.round()[None].requires_grad_()
            inputs = {**batch.inputs, "pixel_values": victim.preprocessing(leaf)}
            loss = generator.model(**inputs, labels=labels_BS).loss
            loss.backward()
            assert leaf.grad is not None
            best = min(best, float(loss.detach()))
            moved = (moved - STEP * leaf.grad[0].sign()).clamp(clean - EPSILON, clean + EPSILON).clamp(0, 255)
        lowest.append(best)
    return sum(lowest) / len(lowest)


if __name__ == "__main__":
    main()
