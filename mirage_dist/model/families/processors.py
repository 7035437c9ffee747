"""Loading a processor (or a text-only model's tokenizer): one place for training, evaluation, judges and engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mirage_dist.schema import ConfigError


def load(folder: Path) -> Any:
    """The processor of a model directory, or the tokenizer of a text-only model.

    Raises ConfigError when it cannot be loaded.
    """
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"model.path={folder}: its processor cannot be loaded: {error}") from error
