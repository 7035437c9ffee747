"""The model under test: what identifies it, and a directory to load it from."""

from __future__ import annotations

import hashlib
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mirage_dist import config as configs
from mirage_dist import signals
from mirage_dist.data.encoding.conversation import tokenizer_of
from mirage_dist.evals.sharing.claims import Claims
from mirage_dist.model import export
from mirage_dist.model.shards import step_of
from mirage_dist.schema import ConfigError, EvalModelConfig, RunError, TrainRecipe
from mirage_dist.signals import StopRequested

POLL_SECONDS = 0.5
State = list[tuple[str, int, int, int]]


@dataclass(frozen=True)
class Subject:
    """model: as the recipe says, the step filled in. trained_in: the run whose checkpoint or export it is, if any.

    folder: of its files, or of the checkpoint. model_hash: of its weights, configs and templates, names included, or of
    the checkpoint's manifest, which has the hashes of all that is in it. state: of the files when they were hashed.
    """

    model: EvalModelConfig
    trained_in: Path | None
    folder: Path
    model_hash: str
    template_hash: str
    state: State
    sees: bool  # pictures; a text-only model does not

    def check_unchanged(self) -> None:
        """Raise RunError when the model's files are no longer those that were hashed."""
        if self.model.run is not None:
            return  # a checkpoint has its hashes in it, and they are compared when it is exported
        if self.state != _state(self.folder) and self.model_hash != _files_hash(self.folder):
            raise RunError(
                f"{self.folder}: the model changed while it was evaluated; the answers on disk are under the hash of "
                "the one that was there before. Put that one back, or choose another `suite` name"
            )

    def loadable(self, suite: Path, claims: Claims) -> EvalModelConfig:
        """The model to load; a checkpoint is exported into `suite` by one worker for all (see `discard`)."""
        if self.model.run is None:
            return replace(self.model, path=str(self.folder))
        out = suite / f"model-{self.model_hash[:12]}"
        while not out.is_dir():
            if name := signals.received():
                raise StopRequested(f"stopped by {name} before the first answer")
            if claim := claims.take("export"):
                try:
                    self._export(out, suite / f"export-{claims.token}.tmp")
                finally:
                    claims.release(claim)
            else:
                time.sleep(POLL_SECONDS)
        return replace(self.model, path=str(out), run=None, step=None)

    def _export(self, out: Path, workspace: Path) -> None:
        if out.is_dir():  # made between the look and the claim
            return
        workspace.mkdir()
        try:
            export.export(Path(str(self.model.run)), out, self.model.step, workspace)
        finally:
            shutil.rmtree(workspace, ignore_errors=True)

    def discard(self, suite: Path) -> None:
        """Remove what was exported for the evaluation, and what killed workers left of it."""
        for folder in [*suite.glob("model-*"), *suite.glob("export-*.tmp")]:
            shutil.rmtree(folder, ignore_errors=True)


def find(model: EvalModelConfig, run: Path) -> Subject:
    """Hash the model; loads no weights. `run`: the directory that is evaluated, which may have trained it.

    Raises ConfigError when there is no such model or checkpoint, or the model has no chat template.
    """
    if model.run is not None:
        return _checkpoint(model, Path(model.run))
    folder = _folder(str(model.path))
    state = _state(folder)
    if not any(name.endswith(".safetensors") for name, *_ in state):
        raise ConfigError(
            f"model.path={model.path}: no *.safetensors here; give a Hugging Face model directory, such as a "
            "run's export/ (`mirage export` writes one)"
        )
    trained_in = run if run in Path(str(model.path)).parents else None
    template, sees = _template(folder)
    return Subject(model, trained_in, folder, _files_hash(folder), template, state, sees)


def _checkpoint(model: EvalModelConfig, run: Path) -> Subject:
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"model.run={run}: no config.yaml here; expected the directory of a training run")
    base = configs.load(run / "config.yaml", [], TrainRecipe).model.path
    checkpoint = export.chosen(run / "checkpoints", model.step)
    manifest = hashlib.sha256((checkpoint / "manifest.json").read_bytes()).hexdigest()
    exact = replace(model, step=step_of(checkpoint))
    template, sees = _template(_folder(base))
    return Subject(exact, run, checkpoint, manifest, template, [], sees)


def _folder(path: str) -> Path:
    """A directory as given, or the snapshot of a hub name in the cache."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(path, local_files_only=True))
    except (OSError, HFValidationError) as error:
        raise ConfigError(f"model.path={path}: neither a directory nor in the model cache (hf download)") from error


def _files(folder: Path) -> list[Path]:
    return sorted(f for pattern in ("*.safetensors", "*.json", "*.jinja") for f in folder.glob(pattern))


def _state(folder: Path) -> State:
    """What changes when a file is written anew; looking at it costs nothing."""
    return [(f.name, s.st_size, s.st_mtime_ns, s.st_ino) for f in _files(folder) for s in [f.stat()]]


def _files_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in _files(folder):
        with file.open("rb") as handle:
            digest.update(file.name.encode() + b"\0" + hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()


def _template(folder: Path) -> tuple[str, bool]:
    """SHA-256 of the chat template that the processor of this directory applies, and whether it takes pictures."""
    from transformers import AutoProcessor

    try:
        processor: Any = AutoProcessor.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path={folder}: its processor cannot be loaded: {error}") from error
    tokenizer = tokenizer_of(processor)
    template = processor.chat_template or tokenizer.chat_template
    if not template:
        raise ConfigError(f"model.path={folder}: the processor has no chat template")
    return hashlib.sha256(str(template).encode()).hexdigest(), tokenizer is not processor
