"""A model directory, for training and evaluation alike: the files that decide the model, their tensors and hash."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Any, NamedTuple

from mirage_dist import disk
from mirage_dist.config import suggestion
from mirage_dist.disk import hashes
from mirage_dist.model.families import configs
from mirage_dist.schema import ConfigError, RunError

WEIGHTS = "*.safetensors"  # weights in other formats are never loaded
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
WEIGHT_NAMES = (".safetensors", ".safetensors.index.json")  # how the name of what is loaded ends
# Configurations of model, generation, tokenizer and processor (*.json), chat templates, and tokenizer vocabularies.
DECIDING = (WEIGHTS, "*.json", "*.jinja", "additional_chat_templates/*.jinja", "*.model", "*.spm", "*.tiktoken")
VOCABULARIES = ("merges.txt", "vocab.txt", "dict.txt", "bpe.codes", "prophetnet.tokenizer")
# A processor's further tokenizers lie in folders of their attributes' names (InstructBLIP's qformer_tokenizer/).
MORE_TOKENIZERS = "*tokenizer*/*"
# Files among these that saving a model writes: they change with the weights. The others belong to its processor.
OF_THE_MODEL = ("config.json", "generation_config.json", "adapter_config.json")
TERMS = ("LICEN[CS]E*", "NOTICE*", "USE_POLICY*", "README.md")  # go with the weights wherever these are copied to
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model*.safetensors"
POINTER = b"version https://git-lfs"  # a Git-LFS pointer's first bytes
# Bytes of one number, by the dtype's name in safetensors headers. torch has no dtype for others.
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "BOOL": 1}
SIZES |= {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1}
LONGEST_HEADER = 100_000_000  # bytes; safetensors itself reads no longer one
AGAIN = "copy or download the model again"
State = list[tuple[str, int, int, int, int]]  # path, size, times of modification and change in ns, inode of each file


class Header(NamedTuple):
    """One tensor in a file: dtype as safetensors names it, and shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def resolve(path: str) -> Path:
    """The model directory: `path` itself where it is a directory, else the snapshot of that hub name in the cache.

    Raises ConfigError when there is neither.
    """
    try:
        present, file = Path(path).is_dir(), Path(path).is_file()
    except (OSError, ValueError) as error:  # no permission, a name that is too long
        raise ConfigError(f"model.path={path[:200]}: cannot be read: {error}") from error
    if present:
        return Path(path)
    if file:
        raise ConfigError(f"model.path={path}: this is a file; give the Hugging Face model directory that holds it")
    if _looks_local(path):
        raise ConfigError(
            f"model.path={path}: looks like a local path but does not exist (the working directory is {Path.cwd()}); "
            f"{_beside(path)}give an existing model directory, or a hub name such as llava-hf/llava-1.5-7b-hf"
        )
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(path, local_files_only=True))
    except HFValidationError as error:
        raise ConfigError(f"model.path={path}: neither a directory nor a valid hub name: {error}") from error
    except OSError as error:
        raise ConfigError(
            f"model.path={path}: no such directory (the working directory is {Path.cwd()}), and no hub model of this "
            f"name in the cache {constants.HF_HUB_CACHE}; {_beside(path)}nothing is downloaded during a run, so a hub "
            f"model comes first: hf download {path}"
        ) from error


def _beside(path: str) -> str:
    """`did you mean …?` for a path that resembles a directory beside it, or one with models below this one."""
    parent = Path(path).expanduser().parent
    try:
        near = [str(p) for p in sorted(parent.iterdir()) if p.is_dir()] if parent.is_dir() else []
    except OSError:
        near = []
    close = suggestion(str(parent / Path(path).name), near, cutoff=0.75)
    return f"{close} Otherwise " if close else ""


def _looks_local(path: str) -> bool:
    """Whether a path that does not exist cannot be a hub name (NAME or OWNER/NAME), or starts in an existing folder."""
    parts = Path(path).parts
    return (
        path.startswith((".", "/", "~"))
        or path.endswith("/")
        or "\\" in path
        or len(parts) > 2
        or (len(parts) == 2 and Path(parts[0]).is_dir())
    )


def check(path: str, weights: bool = True) -> Path:
    """The directory that `path` names, after a check that a model can be made from it.

    weights: whether its weights must be present; without them a configuration is enough. Raises ConfigError when the
    directory does not exist, holds a peft adapter, has no *.safetensors, or no readable config.json, and for a file
    that is empty, a dangling link, or a Git-LFS pointer.
    """
    folder = resolve(path)
    _refuse_adapters(path, folder)
    for file in files(folder):
        _check_content(file)
    if weights:
        require_weights(folder)
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"model.path={path}: no readable config.json in {folder}; give a Hugging Face model directory"
        )
    configs.read(folder / "config.json")
    return folder


def _refuse_adapters(path: str, folder: Path) -> None:
    if not (folder / ADAPTER_CONFIG).is_file():
        return
    if _whole_weights(folder) and (folder / "config.json").is_file():
        raise ConfigError(
            f"model.path={path}: a whole model and a peft adapter ({ADAPTER_CONFIG}) in one directory; transformers "
            "would load both. Move the adapter's files to another directory, or merge it into the model"
        )
    raise ConfigError(
        f"model.path={path}: a peft adapter without its base model; merge it first: "
        "PeftModel.from_pretrained(BASE, ADAPTER).merge_and_unload().save_pretrained(OUT), copy the processor's "
        "files to OUT, and give OUT (an adapter trained by mirage is merged by `mirage export RUN OUT`)"
    )


def _check_content(file: Path) -> None:
    try:
        if not S_ISREG(file.stat().st_mode):  # reading a pipe would never end
            raise ConfigError(f"{file}: no regular file; {AGAIN}")
        with file.open("rb") as handle:
            start = handle.read(len(POINTER))
    except FileNotFoundError as error:  # only a link can be listed and not exist
        raise ConfigError(f"{file}: a link to a file that does not exist ({os.readlink(file)}); {AGAIN}") from error
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from error
    if not start:
        raise ConfigError(f"{file}: an empty file; {AGAIN}")
    if start == POINTER:
        raise ConfigError(
            f"{file}: a Git-LFS pointer, not the file itself; run `git lfs pull` in the cloned repository, or download "
            "the model with `hf download`"
        )


def require_weights(folder: Path) -> None:
    """Raise ConfigError unless the directory has a model's weights, as safetensors."""
    if not has_weights(folder):
        raise ConfigError(
            f"model.path={folder}: no *.safetensors here (weights in other formats are never loaded); give a Hugging "
            "Face model directory, such as a run's export/ (`mirage export` writes one)"
        )


def has_weights(folder: Path) -> bool:
    """Whether the directory holds any of a model's weights; `weight_files` says whether transformers finds them."""
    return bool(_whole_weights(folder)) or (folder / INDEX).exists()


def weight_files(folder: Path) -> dict[Path, list[str]]:
    """The files that transformers loads this model's weights from, each with the tensors that the index promises.

    Without an index nothing is promised: one list, empty. Raises ConfigError when there are no such files, or the index
    names a file that is missing or lies elsewhere.
    """
    name = configs.read(folder / "config.json").get("transformers_weights")
    if name is None:
        name = WHOLE if (folder / WHOLE).exists() else INDEX
    elif not isinstance(name, str) or Path(name).name != name or not name.endswith(WEIGHT_NAMES):
        raise ConfigError(
            f"{folder / 'config.json'}: transformers_weights={name!r} is no name of a file beside it that ends in "
            f"{' or '.join(WEIGHT_NAMES)}; take it out, and name the weights {WHOLE}"
        )
    file = folder / name
    if not file.exists():
        present = ", ".join(sorted(f.name for f in _whole_weights(folder))[:3]) or "none"
        raise ConfigError(
            f"model.path={folder}: neither {WHOLE} nor {INDEX} (*.safetensors here: {present}); transformers finds "
            "weights by these names only. Download the whole repository, or give the model's transformers format"
        )
    return _shards(file) if name.endswith(".json") else {file: []}


def _shards(index: Path) -> dict[Path, list[str]]:
    _check_content(index)
    content = configs.read(index)
    places = content.get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise ConfigError(f"{index}: expected `weight_map`, an object of tensor names and the files that hold them")
    if not isinstance(content.get("metadata"), dict):
        raise ConfigError(f'{index}: transformers requires an object `metadata` here; add "metadata": {{}}')
    shards: dict[Path, list[str]] = {}
    for tensor, name in places.items():
        if Path(name).name != name:
            raise ConfigError(f"{index}: {tensor} lies in {name!r}; a shard must lie in the model directory itself")
        if not name.endswith(WEIGHT_NAMES[0]):
            raise ConfigError(
                f"{index}: {tensor} lies in {name!r}; only *.safetensors are loaded (convert the weights)"
            )
        shards.setdefault(index.parent / name, []).append(tensor)
    missing = sorted(file.name for file in shards if not file.exists())
    if missing:
        raise ConfigError(
            f"{index}: names {len(missing)} of {len(shards)} files that do not exist here: {', '.join(missing[:3])}; "
            "copy or download the model again"
        )
    return dict(sorted(shards.items()))


def headers(folder: Path, extra: Sequence[str] = ()) -> dict[str, Header]:
    """The tensors in the files that transformers loads, by their name on disk.

    extra: further files that a model's class loads where they exist. Raises ConfigError for a damaged file, a tensor
    that two files hold, and one that the index promises and its file lacks.
    """
    files = weight_files(folder)
    files |= {folder / name: [] for name in extra if (folder / name).exists() and folder / name not in files}
    tensors: dict[str, Header] = {}
    for file, promised in files.items():
        own = _header(file)
        lacking = [name for name in promised if name not in own]
        if lacking:
            raise ConfigError(f"{file}: lacks {lacking[0]}, which {INDEX} places there; {AGAIN}")
        for name, header in own.items():
            if name in tensors:
                raise ConfigError(
                    f"{file}: holds {name}, and so does {tensors[name].file.name}; only one can be loaded. {AGAIN}"
                )
            tensors[name] = header
    return tensors


def _header(file: Path) -> dict[str, Header]:
    """The tensors of one file. Layout: https://github.com/huggingface/safetensors, section "Format"."""
    _check_content(file)
    size = file.stat().st_size
    with file.open("rb") as handle:
        first = handle.read(8)
        length = int.from_bytes(first, "little")
        if len(first) < 8 or length > LONGEST_HEADER:
            raise ConfigError(f"{file}: no safetensors file (its header would have {length} bytes); {AGAIN}")
        text = handle.read(length)
    if len(text) < length:
        raise ConfigError(f"{file}: cut off within its header: {size} bytes of at least {8 + length}; {AGAIN}")
    try:
        content = json.loads(text)
        tensors = {name: _entry(file, name, value) for name, value in content.items() if name != "__metadata__"}
    except ConfigError:
        raise
    except (ValueError, AttributeError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise ConfigError(f"{file}: no safetensors file (its header cannot be read: {error}); {AGAIN}") from error
    place = 0  # in the data, which follow the header without gaps
    for name, (header, begin, stop) in sorted(tensors.items(), key=lambda item: item[1][1:]):
        length_of = math.prod(header.shape) * SIZES[header.dtype]
        if begin != place or length_of != stop - begin:
            raise ConfigError(
                f"{file}: its header places {name}, {header.dtype} of shape {header.shape}, at bytes {begin} to "
                f"{stop}, which do not fit; {AGAIN}"
            )
        place = stop
    end = 8 + length + place
    if size < end:
        raise ConfigError(f"{file}: cut off: {size} bytes, but its header describes {end}; {AGAIN}")
    if size > end:
        raise ConfigError(f"{file}: {size} bytes, but its header describes only {end}; {AGAIN}")
    return {name: header for name, (header, _, _) in tensors.items()}


def _entry(file: Path, name: str, value: Mapping[str, Any]) -> tuple[Header, int, int]:
    """A tensor of a header and its place in the file's data, in bytes."""
    dtype, shape, (begin, stop) = value["dtype"], tuple(map(int, value["shape"])), map(int, value["data_offsets"])
    if min(*shape, begin, 0) < 0:
        raise ValueError(f"{name} has shape {shape} at byte {begin}")
    if dtype not in SIZES:
        raise ConfigError(f"{file}: {name} has dtype {dtype}, which cannot be loaded; known: {', '.join(SIZES)}")
    return Header(file, dtype, shape), begin, stop


def files(folder: Path) -> list[Path]:
    """The files that decide what a model answers: weights, configurations, tokenizer, processor, chat templates."""
    chosen = {file for pattern in DECIDING for file in folder.glob(pattern)}
    chosen |= {file for file in folder.glob(MORE_TOKENIZERS) if _is_of_a_tokenizer(file.name)}
    return sorted(chosen | {folder / name for name in VOCABULARIES if (folder / name).is_file()})


def _is_of_a_tokenizer(name: str) -> bool:
    return name in VOCABULARIES or name.endswith((".json", ".model", ".spm", ".tiktoken", ".jinja"))


def copy_processing(folder: Path, out: Path) -> None:
    """Copy the files of processor, tokenizer and chat templates from a model directory to `out`, as they are."""
    for file in processing_files(folder):
        target = out / file.relative_to(folder)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)


def processing_files(folder: Path) -> list[Path]:
    """The files of processor, tokenizer and chat templates, among `files`."""
    return [
        file
        for file in files(folder)
        if not (file.match(WEIGHTS) or file.name in OF_THE_MODEL or file.name.endswith(".index.json"))
    ]


def state(folder: Path) -> State:
    """A cheap fingerprint of `files`, which changes when one of them is written again, replaced or removed.

    Links are followed, as in hub snapshots. Raises ConfigError when a file disappears meanwhile.
    """
    try:
        return [
            (str(f.relative_to(folder)), s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino)
            for f in files(folder)
            for s in [f.stat()]
        ]
    except OSError as error:
        raise ConfigError(f"{error.filename}: cannot be read: {error.strerror}; {AGAIN}") from error


def model_hash(folder: Path) -> str:
    """SHA-256 over the names and contents of `files`, which are read unless their hashes are known (`disk.hashes`).

    Raises ConfigError when there are no weights among them.
    """
    require_weights(folder)
    return _digest(folder, files(folder))


def processing_hash(folder: Path) -> str:
    """SHA-256 over the names and contents of `processing_files`."""
    return _digest(folder, processing_files(folder))


def _digest(folder: Path, chosen: Sequence[Path]) -> str:
    try:
        known = hashes.sha256s(chosen)
        return disk.sha256_files(chosen, folder, lambda file: known[str(file)])
    except OSError as error:
        raise ConfigError(f"{error.filename}: cannot be read: {error.strerror}; {AGAIN}") from error


@dataclass(frozen=True)
class Hashed:
    """A model directory when it was hashed.

    state: of its files, before anything was read of them. digest: of all files, or of those of the processor alone.
    """

    folder: Path
    state: State
    digest: str
    weights: bool = True

    def check_unchanged(self, consequence: str) -> None:
        """Raise RunError, which ends with `consequence`, when the files are no longer those that were hashed.

        Contents are read again only where a size, a time or an inode differs.
        """
        if self.state == state(self.folder):
            return
        if self.digest != (model_hash if self.weights else processing_hash)(self.folder):
            raise RunError(f"{self.folder}: the model's files changed since they were hashed; {consequence}")


def hashed(folder: Path, before: State, weights: bool = True) -> Hashed:
    """Hash a model directory of which something was read already.

    before: its `state` before that. weights: whether its weights count. Raises RunError when the files changed
    meanwhile, since what was read is then not what was hashed.
    """
    digest = (model_hash if weights else processing_hash)(folder)
    if before != state(folder):
        raise RunError(f"{folder}: the model's files changed while they were read; start again when they are whole")
    return Hashed(folder, before, digest, weights)


def _whole_weights(folder: Path) -> list[Path]:
    return [file for file in folder.glob(WEIGHTS) if not file.match(ADAPTER_WEIGHTS)]
