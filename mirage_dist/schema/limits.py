"""Limits of what this package reads and does: one table, which docs/limits.md repeats.

Input that is larger is refused by name before memory or time is spent on it. Ranges of a recipe's numbers stand at
their fields (see `numbers`), which take their largest values from here.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass


@dataclass(frozen=True)
class Limit:
    """One limit. name: what is limited. reason: why there is one, and why this value. key: what raises it, if any."""

    name: str
    value: int
    unit: str
    reason: str
    key: str = ""

    def __str__(self) -> str:
        """The value for a message: `64 MiB`, `1,000 levels`."""
        if self.unit == "bytes" and self.value % 1024 == 0:
            shift, unit = (20, "MiB") if self.value % (1 << 20) == 0 else (10, "KiB")
            return f"{self.value >> shift} {unit}"
        return f"{self.value:,} {self.unit}".rstrip()


# What is read.
LINE = Limit("input line", 1 << 26, "bytes", "one record is held in memory whole; also a record of a JSON list")
VALUE_FILE = Limit(
    "JSON file", 1 << 26, "bytes", "a file that is one JSON value (phrases, prompts, DeepSpeed) is held whole"
)
ANNOTATIONS = Limit("file of annotations", 1 << 30, "bytes", "a benchmark's own answers, held whole; VQAv2 has 170 MB")
LABELS = Limit("file of labels", 1 << 29, "bytes", "of an embedded world; it is hashed and held whole")
NESTING = Limit("nesting", 100, "levels", "of JSON and tables; deeper input overflows the stack of some reader")
RECIPE_NESTING = Limit("recipe nesting", 32, "levels", "of YAML, aliases expanded; OmegaConf recurses")
RECIPE_FILE = Limit("recipe file", 1 << 18, "bytes", "YAML is parsed at about 100 KiB a second")
RECIPE_VALUES = Limit("recipe values", 20_000, "values", "aliases expanded: a few lines of YAML can hold billions")
INCLUDES = Limit("included files", 64, "files", "a recipe and all that it includes, each time it is included")
OVERRIDE_KEY = Limit("override key", 300, "characters", "the longest key of any recipe is about 100")
DIGITS = Limit("digits of a number", 300, "digits", "Python refuses to print numbers of more than 4300")
PIXELS = Limit(
    "picture",
    64_000_000,
    "pixels",
    "decoding takes up to 12 bytes a pixel",
    "a source's `max_pixels`, up to the picture ceiling",
)
CEILING = Limit("picture ceiling", 178_956_970, "pixels", "PIL decodes nothing larger")
ROW_GROUP = Limit("pictures of a Parquet row group", 1 << 30, "bytes", "read together, for one of them")
NGRAMS = Limit("audit n-grams", 32, "words", "every question is counted once for each length")

FIELD = Limit("table field", csv.field_size_limit(), "characters", "of CSV and TSV; Python's reader takes no more")

# What a recipe asks for.
COUNT = Limit("count", 1_000_000_000, "", "steps, samples and tokens; plans and progress are held as 64-bit numbers")
EPOCHS = Limit("epochs", 1_000_000, "epochs", "with `steps` it bounds the length of a run")
STEPS = Limit("steps", 1_000_000_000, "steps", "`max_steps`, or what `epochs` come to")
BATCH = Limit("batch", 1_000_000, "rows", "the indices of a global batch are held in memory on every rank")
DRAWN = Limit("embedded world", 1_000_000, "samples of a kind", "a picture is drawn for each, and written to a file")
TOKENS = Limit("sample length", 10_000_000, "tokens", "positions of models are below it")
MAGNITUDE = Limit("real number", 1_000_000, "", "rates, weights and coefficients; products stay far within float32")
RANKS = Limit("ranks", 1_000_000, "processes", "GPUs of the largest clusters are an order of magnitude fewer")
LOCAL = Limit("workers", 1024, "processes or requests", "each takes memory, descriptors and a connection")
POINTS = Limit("sweep points", 10_000, "points", "each is a training; a grid of a few keys multiplies to billions")
REPEATS = Limit("repeats", 1000, "times", "rewrites, attempts, retries and copies multiply the work")
SECONDS = Limit("seconds", 30 * 86_400, "seconds", "30 days: timers and collectives count milliseconds in 64 bits")
SEED = Limit("seed", (1 << 63) - 1, "", "generators of PyTorch and NumPy take as much")

# What a model's config asks for, before anything of that size is built.
LAYERS = Limit("model layers", 4096, "layers", "a module is built for each; the deepest released models have about 130")
WIDTH = Limit("model width", 1 << 20, "units", "hidden and intermediate sizes of released models are below 2^18")
VOCABULARY = Limit("model vocabulary", 1 << 24, "tokens", "vocabularies of released models are below 2^19")

LIMITS = tuple(limit for limit in vars().copy().values() if isinstance(limit, Limit))
