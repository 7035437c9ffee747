"""Models that answer: the engines for the model under test, and chat models that judge or reword.

A new engine is one file with a subclass of `base.Generator` and one line in BACKENDS. A recipe may also name one from
outside the package: `generation.backend: my_lab.engines:Mine`.
"""

from __future__ import annotations

from mirage_dist.evals.models.base import Generator
from mirage_dist.registry import Registry

BACKENDS = Registry(
    "generation backend",
    "backend",
    {
        "hf": "mirage_dist.evals.models.hf:HuggingFace",
        "vllm": "mirage_dist.evals.models.vllm:VLLM",
    },
    base=Generator,
)


def backend(name: str) -> type[Generator]:
    """The class that `generation.backend` names; loads no weights.

    Raises ConfigError for an unknown name, a module that cannot be imported, and a class that is no Generator.
    """
    return BACKENDS.load(name, "the recipe", "generation.backend")
