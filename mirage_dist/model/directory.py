"""What a model directory is, for training and evaluation alike: which files decide the model, and their hash."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from mirage_dist import disk
from mirage_dist.schema import ConfigError

WEIGHTS = "*.safetensors"  # weights in other formats are never loaded
# Configurations of model, generation, tokenizer and processor (*.json), chat templates, and tokenizer vocabularies.
DECIDING = (WEIGHTS, "*.json", "*.jinja", "additional_chat_templates/*.jinja", "*.model", "*.tiktoken")
VOCABULARIES = ("merges.txt", "vocab.txt")
# Files among these that saving a model writes: they change with the weights. The others belong to its processor.
OF_THE_MODEL = ("config.json", "generation_config.json", "adapter_config.json")
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model*.safetensors"
State = list[tuple[str, int, int, int]]  # name, size, modification time in ns and inode of each file


def resolve(path: str) -> Path:
    """The model directory: `path` itself where it is a directory, else the snapshot of that hub name in the cache.

    Raises ConfigError when there is neither.
    """
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(path, local_files_only=True))
    except (OSError, HFValidationError) as error:
        raise ConfigError(
            f"model.path={path}: neither a directory with a config.json nor a model in the cache; give a Hugging Face "
            f"model directory, or download the model first (hf download {path})"
        ) from error


def check(path: str, weights: bool = True) -> Path:
    """The directory that `path` names, after a check that a model can be made from it.

    weights: whether its weights must be present; without them a configuration is enough. Raises ConfigError when the
    directory does not exist, holds an adapter without its base model, has no *.safetensors, or no readable config.json.
    """
    folder = resolve(path)
    config = folder / "config.json"
    if (folder / ADAPTER_CONFIG).is_file() and not (_whole_weights(folder) and config.is_file()):
        raise ConfigError(
            f"model.path={path}: a peft adapter without its base model; merge it first: "
            "PeftModel.from_pretrained(BASE, ADAPTER).merge_and_unload().save_pretrained(OUT), copy the processor's "
            "files to OUT, and give OUT (an adapter trained by mirage is merged by `mirage export RUN OUT`)"
        )
    if weights:
        require_weights(folder)
    try:
        json.loads(config.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"model.path={path}: no readable config.json in {folder}; give a Hugging Face model directory"
        ) from error
    except ValueError as error:
        raise ConfigError(f"{config}: not JSON: {error}") from error
    return folder


def require_weights(folder: Path) -> None:
    """Raise ConfigError unless the directory has a model's weights, as safetensors."""
    if not _whole_weights(folder):
        raise ConfigError(
            f"model.path={folder}: no *.safetensors here (weights in other formats are never loaded); give a Hugging "
            "Face model directory, such as a run's export/ (`mirage export` writes one)"
        )


def files(folder: Path) -> list[Path]:
    """The files that decide what a model answers: weights, configurations, tokenizer, processor, chat templates."""
    chosen = {file for pattern in DECIDING for file in folder.glob(pattern)}
    return sorted(chosen | {folder / name for name in VOCABULARIES if (folder / name).is_file()})


def copy_processing(folder: Path, out: Path) -> None:
    """Copy the files of processor, tokenizer and chat templates from a model directory to `out`, as they are."""
    for file in files(folder):
        if file.match(WEIGHTS) or file.name in OF_THE_MODEL or file.name.endswith(".index.json"):
            continue
        target = out / file.relative_to(folder)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)


def state(folder: Path) -> State:
    """A cheap fingerprint of `files`, which changes when one of them is written again."""
    return [(f.name, s.st_size, s.st_mtime_ns, s.st_ino) for f in files(folder) for s in [f.stat()]]


def model_hash(folder: Path) -> str:
    """SHA-256 over the names and contents of `files`. Raises ConfigError when there are no weights among them."""
    require_weights(folder)
    return disk.sha256_files(files(folder))


def _whole_weights(folder: Path) -> list[Path]:
    return [file for file in folder.glob(WEIGHTS) if not file.match(ADAPTER_WEIGHTS)]
