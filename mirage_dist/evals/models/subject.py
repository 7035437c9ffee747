"""The model under test: what identifies it, and a directory to load it from."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mirage_dist import disk, runs, signals
from mirage_dist.data.encoding.conversation import tokenizer_of
from mirage_dist.data.encoding.framing import Aspect
from mirage_dist.data.encoding.pictured import aspect_of
from mirage_dist.disk import hashes
from mirage_dist.evals.sharing.claims import Claims
from mirage_dist.model import directory, environment, export, weights
from mirage_dist.model.environment import Environment
from mirage_dist.model.families import configs as families
from mirage_dist.model.families import processors
from mirage_dist.model.shards import step_of
from mirage_dist.schema import ConfigError, EvalModelConfig
from mirage_dist.signals import StopRequested

POLL_SECONDS = 0.5
EXPORTS = "exported"  # the folder in a suite of a checkpoint's export


@dataclass(frozen=True)
class Subject:
    """The model under test.

    model: as in the recipe, with the step filled in. trained_in: the run whose checkpoint or export it is, if any.
    folder: the model directory, or the checkpoint's. model_hash: of the files that decide the model (see
    `model.directory`), or of the checkpoint's manifest, which has the hashes of all of its files. template_hash: of the
    chat template. aspect: what `template.image_aspect: auto` comes to. hashed: the files that are loaded, of a
    checkpoint those of its base model's processor. processing: the directory of its processor, for a checkpoint that of
    the base model.
    """

    model: EvalModelConfig
    trained_in: Path | None
    folder: Path
    model_hash: str
    template_hash: str
    environment: Environment
    aspect: Aspect
    hashed: directory.Hashed
    processing: Path

    @property
    def text_only(self) -> bool:
        return self.environment.image_processor is None

    def check_unchanged(self) -> None:
        """Raise RunError when the model's files are no longer those that were hashed."""
        # Exporting a checkpoint compares its own files, and its base model's, with the hashes in its manifest.
        self.hashed.check_unchanged(
            "the answers on disk belong to the former model's hash. Put the former model back, or choose another "
            "`suite` name"
        )

    def loadable(self, suite: Path, claims: Claims) -> EvalModelConfig:
        """The model to load. A checkpoint is exported into `suite` by one worker for all others (see `discard`)."""
        if self.model.run is None:
            return replace(self.model, path=str(self.folder))
        out = suite / EXPORTS / f"model-{self.model_hash[:12]}"
        while not out.is_dir():
            if name := signals.received():
                raise StopRequested(f"stopped by {name} before the first answer")
            if claim := claims.take("export"):
                try:
                    self._export(out)
                finally:
                    claims.release(claim)
            else:
                time.sleep(POLL_SECONDS)
        return replace(self.model, path=str(out), run=None, step=None)

    def _export(self, out: Path) -> None:
        if not out.is_dir():  # another worker may have exported it between the look and the claim
            export.export(Path(str(self.model.run)), disk.own(out.parent) / out.name, self.model.step)

    def discard(self, suite: Path) -> None:
        """Remove the export of a checkpoint, and unfinished exports of killed workers."""
        disk.remove_own(suite / EXPORTS)


def trained_in(model: EvalModelConfig, run: Path) -> Path | None:
    """The run whose checkpoint or export this model is, if it is one's. run: the evaluated run's directory."""
    if model.run is not None:
        return Path(model.run)
    return run if model.path is not None and run in Path(model.path).parents else None


def untemplated(folder: Path) -> directory.Hashed:
    """The files of a model that takes texts as they are; it needs no chat template. Raises ConfigError as `find`."""
    before = directory.state(folder)
    check(folder)
    return directory.hashed(folder, before)


def check(folder: Path) -> Any:
    """The processor of a model directory, after a check of all of its files but the weights' values.

    Raises ConfigError when the directory is an adapter or no model, lacks a weight, or its processor cannot be loaded.
    """
    directory.check(str(folder))
    weights.check(folder, families.load(folder))
    return processors.load(folder)


def find(model: EvalModelConfig, run: Path) -> Subject:
    """Hash the model; loads no weights. run: the evaluated run's directory, which may have trained the model.

    Raises ConfigError for an endpoint, when the model or checkpoint does not exist, the directory is a peft adapter
    without its base model, a weight is missing from its safetensors files, or the model has no chat template.
    """
    if model.url is not None:
        raise ConfigError(
            f"model.url names an endpoint ({model.model}), whose weights nobody can read here; give the model's "
            "directory as model.path"
        )
    if model.run is not None:
        return _checkpoint(model, Path(model.run))
    folder = directory.resolve(str(model.path))
    before = directory.state(folder)
    directory.check(str(model.path))
    weights.check(folder, families.load(folder))
    processing = _processing(folder)
    hashed = directory.hashed(folder, before)
    return Subject(model, trained_in(model, run), folder, hashed.digest, *processing, hashed, folder)


def _checkpoint(model: EvalModelConfig, run: Path) -> Subject:
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"model.run={run}: no config.yaml here; expected the directory of a training run")
    base = runs.recipe(run).model.path
    # The worker that exports the checkpoint reads all of it (see `export.export`); to name it, what is known is enough.
    checkpoint = export.chosen(run / "checkpoints", model.step, hashes.sha256)
    exact = replace(model, step=step_of(checkpoint))
    manifest_hash = disk.sha256(checkpoint / "manifest.json")
    folder = directory.resolve(base)
    before = directory.state(folder)
    processing = _processing(folder)
    hashed = directory.hashed(folder, before, weights=False)
    return Subject(exact, run, checkpoint, manifest_hash, *processing, hashed, folder)


def _processing(folder: Path) -> tuple[str, Environment, Aspect]:
    """SHA-256 of the chat template that the processor of this directory applies, and what else decides its inputs:
    its environment, and how pictures reach it by default.
    """
    processor = processors.load(folder)
    tokenizer = tokenizer_of(processor)
    template = processor.chat_template or tokenizer.chat_template
    if not template:
        raise ConfigError(f"model.path={folder}: the processor has no chat template")
    return disk.sha256_text(str(template)), environment.of(processor), aspect_of(processor, "auto")
