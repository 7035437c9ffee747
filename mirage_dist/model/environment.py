"""What decides a model's outputs besides its files: the class that prepares its pictures, and library versions."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from mirage_dist.data.pictures import REVISION


@dataclass(frozen=True)
class Environment:
    """image_processor: the class that turns pictures into tensors, None for a processor that takes no pictures.

    Which class it is depends on the machine: transformers takes its torchvision classes where torchvision is installed
    and its PIL classes otherwise, and the two resize differently.
    libraries: versions of the libraries that compute the outputs, by distribution name, and under `pictures` the
    revision of `data.pictures`.
    """

    image_processor: str | None
    libraries: dict[str, str]


def of(processor: Any) -> Environment:
    """The environment in which this process runs a model with this processor, or with this tokenizer."""
    libraries, images = ["torch", "transformers"], getattr(processor, "image_processor", None)
    if images is not None:
        libraries.append("pillow")  # decodes every picture
        if any(base.__name__ == "TorchvisionBackend" for base in type(images).__mro__):
            libraries.append("torchvision")
    versions = {name: version(name) for name in libraries} | ({} if images is None else {"pictures": REVISION})
    return Environment(images and type(images).__name__, versions)
