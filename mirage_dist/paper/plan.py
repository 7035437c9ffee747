"""What the chain will take: which links run side by side, GPU-hours and disk, before anything is submitted.

Estimates, from the recipes and the counts of the catalogue alone; each constant names its source. `mirage plan`
computes the memory of one training.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mirage_dist.data.published.catalogue import DATASETS
from mirage_dist.paper import chain
from mirage_dist.paper.chain import Link
from mirage_dist.paper.recipe import PaperRecipe
from mirage_dist.schema import EvalRecipe, TrainRecipe

PARAMETERS = 7.06e9  # of LLaVA-1.5-7B: Vicuna-7B and the connector; the vision tower adds 0.3e9
TOKENS = 700  # of a row: 576 of the picture, and question and answer
PEAK = 989e12  # bf16 operations a second of one H100 SXM, dense (NVIDIA's data sheet)
SHARE = 0.4  # of the peak that training reaches (between published figures of ZeRO-3 runs at this size)
BANDWIDTH = 3.35e12  # bytes a second of one H100 SXM's memory (NVIDIA's data sheet)
DECODING = 0.3  # of the bandwidth that decoding with padding reaches
GIB = 1 << 30


@dataclass(frozen=True)
class Cost:
    """GPU-hours, and bytes on disk when the link has ended. basis: what it was computed from, in words."""

    hours: float
    disk: float
    basis: str


def cost(link: Link) -> Cost:
    """The estimate for one link."""
    recipe = link.load()
    if isinstance(recipe, TrainRecipe):
        return _training(recipe)
    if isinstance(recipe, EvalRecipe):
        return _evaluation(recipe)
    return Cost(0.0, 0.0, "reads files only")


def _training(recipe: TrainRecipe) -> Cost:
    """6 operations a parameter and token (Kaplan et al., 2020), 8 where activations are computed again."""
    streams = len(recipe.data.streams)
    rows = [sum(_count(source.path) or 0 for source in sources) for sources in recipe.data.streams.values()]
    known = recipe.train.max_steps
    steps = known or int(recipe.train.epochs * (rows[0] or 2000) / recipe.train.global_batch)
    tokens = steps * recipe.train.global_batch * streams * TOKENS
    each = (8 if recipe.model.gradient_checkpointing else 6) + (2 if recipe.objective["name"] != "sft" else 0)
    hours = tokens * each * PARAMETERS / (PEAK * SHARE) / 3600
    kept = recipe.train.keep_last or 1
    trained = 0.1 if recipe.model.lora is not None else 1.0
    disk = PARAMETERS * 2 + kept * trained * PARAMETERS * 14  # bf16 weights, fp32 master and two moments
    return Cost(hours, disk, f"{steps} steps of {recipe.train.global_batch} rows of {streams} streams")


def _evaluation(recipe: EvalRecipe) -> Cost:
    """A token of a batch reads all weights once; every answer is as long as it may be."""
    questions = 0
    for own in recipe.sets.values():
        shots = 1 + sum(int(attack.get("shots", 1)) for attack in own.attacks.values())
        questions += shots * sum(_count(source.path, getattr(source, "split", None)) or 1000 for source in own.sources)
    batches = questions / recipe.generation.batch_size
    seconds = batches * recipe.generation.max_new_tokens * PARAMETERS * 2 / (BANDWIDTH * DECODING)
    basis = f"{questions:,} answers of up to {recipe.generation.max_new_tokens} tokens"
    return Cost(seconds / 3600, questions * 2000.0, basis)


def _count(path: str, split: str | None = None) -> int | None:
    """Records, or pairs of a split, of a file of the catalogue."""
    name = path.removeprefix("data/")
    for dataset in DATASETS.values():
        for file in dataset.files:
            if file.path == name:
                return file.counts.get(str(split), file.records)
    return None


def text(recipe: PaperRecipe) -> str:
    """The chain by levels, each link with its estimate, and the sums."""
    return "\n".join(_lines(recipe))


def _lines(recipe: PaperRecipe) -> Iterator[str]:
    links = chain.links(recipe)
    width = max(len(link.name) for link in links)
    total, disk = 0.0, 0.0
    yield f"{'link':<{width}}  {'H100 hours':>10}  {'disk':>9}  what it does"
    for number, level in enumerate(chain.levels(links), start=1):
        yield f"level {number}: {len(level)} side by side"
        for link in level:
            own = cost(link)
            total, disk = total + own.hours, disk + own.disk
            yield f"{link.name:<{width}}  {own.hours:>10.1f}  {own.disk / GIB:>5.0f} GiB  {link.recipe}: {own.basis}"
    note = "estimates for LLaVA-1.5-7B on H100 GPUs; mirage_dist/paper/plan.py has the constants"
    yield f"{'sum':<{width}}  {total:>10.1f}  {disk / GIB:>5.0f} GiB  {note}"
