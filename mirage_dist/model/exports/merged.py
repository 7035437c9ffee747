"""The weights of a trained model as safetensors files, tensor by tensor, so that every rank can write some of them.

What did not train is in the base model's files, under the names that the export gives it. What trained is in the
checkpoint's shards, and a layer with adapters is merged as peft merges it. So a rank holds one tensor at a time, and
nothing of what others write. Names, shapes and dtypes are those of the model as transformers loads it, without memory.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from torch import Tensor

from mirage_dist import disk
from mirage_dist.disk.headers import header
from mirage_dist.model import directory, load, weights
from mirage_dist.model.adapters.files import NAME, PREFIX
from mirage_dist.model.directory import Header
from mirage_dist.model.families import configs, roles
from mirage_dist.model.policy import HeadedModel
from mirage_dist.model.shards import DTYPES, Shards
from mirage_dist.ranks import Group
from mirage_dist.schema import ConfigError, ModelConfig

# Bytes of a file: as transformers cut models for years, and less where more ranks can write, but no crumbs.
LARGEST, SMALLEST = 5 * 10**9, 10**9
SUMS = "SHA256SUMS"  # of the files of weights, as `sha256sum -c` reads them


@dataclass(frozen=True)
class Merged:
    """What the files of a trained model hold.

    tensors: by their names on disk, without memory. parameters: of those that are not the base's: name -> parameter of
    the model. policy: as it trained, without memory. saved: the model that transformers would save, without memory.
    """

    tensors: dict[str, Tensor]
    parameters: dict[str, str]
    policy: HeadedModel
    saved: Any
    headers: dict[str, Header]

    def values(self, names: Sequence[str], shards: Shards) -> Iterator[Tensor]:
        """Tensors as they are written, on the CPU, in this order. names: on disk."""
        parameter, parts = "", dict[str, Tensor]()
        for name in names:
            if (own := self.parameters.get(name)) is None:
                yield _in_file(self.headers[name], name).to(self.tensors[name].dtype)
                continue
            if own != parameter:  # of one stack of experts many tensors are made, one after the other
                value = self._trained(own, name, shards).to(self.tensors[name].dtype)
                parameter, parts = own, _reverted(self.saved, {own: value})
            yield parts[name].contiguous()

    def _trained(self, parameter: str, name: str, shards: Shards) -> Tensor:
        layer = parameter.removesuffix(".weight")
        own = [f"{PREFIX}{layer}.base_layer.weight", PREFIX + parameter, parameter]
        whole = next((shards.whole(n) for n in own if n in shards.shapes), None)
        if f"{PREFIX}{layer}.lora_A{NAME}.weight" not in shards.shapes:
            assert whole is not None
            return whole
        base = _in_file(self.headers[name], name) if whole is None else whole
        return self._with_adapters(layer, base.to(self.tensors[name].dtype), shards)

    def _with_adapters(self, layer: str, base: Tensor, shards: Shards) -> Tensor:
        """A layer's weight after peft has merged its adapter into it."""
        module: Any = copy.deepcopy(self.policy.hf.get_submodule(PREFIX + layer)).to_empty(device="cpu")
        module.base_layer.weight.data = base
        for kind in ("lora_A", "lora_B"):
            weight = shards.whole(f"{PREFIX}{layer}.{kind}{NAME}.weight")
            getattr(module, kind)[NAME.removeprefix(".")].weight.data = weight
        module.merge()
        return module.base_layer.weight.data


def planned(model: ModelConfig, dtype: str, depth: int | None, shards: Shards) -> Merged | None:
    """What the files will hold; None where a tensor on disk is not made of one parameter, as in some mixtures of
    experts: such a model can only be saved whole.

    depth: as in `load.policy`. Raises ConfigError when the checkpoint
    does not belong to this model.
    """
    policy = load.weightless(model, None, dtype)
    if depth is not None:
        for parameter in policy.unused(depth):
            parameter.requires_grad_(False)
    expected = {name for name, p in policy.hf.named_parameters() if p.requires_grad}
    check_trained(shards.folder, expected, trained := shards.shapes)
    folder, config = directory.resolve(model.path), load.configuration(model)
    if getattr(config, "quantization_config", None) is not None:
        return None
    headers = directory.headers(folder)
    saved = _without_memory(folder, config, headers, load.DTYPES[dtype])
    state = _state(saved)
    kept = {id(p): name for name in state if (p := _parameter(saved, name)) is not None}
    changed = {kept[id(saved.get_parameter(name))] for name in map(_in_model, trained)}
    adapters = any(".lora_" in name for name in trained)
    tensors, parameters = _reverted(saved, state), dict[str, str]()
    for name in sorted(changed):
        own = _alone(saved, name, state[name])
        if not own or any(n not in tensors or _kind(t) != _kind(tensors[n]) for n, t in own.items()):
            return None
        if adapters and not all(n in headers and tensor is state[name] for n, tensor in own.items()):
            return None  # the base's weight would have to be converted before an adapter is merged into it
        parameters |= dict.fromkeys(own, name)
    if any(n not in headers or headers[n].shape != tuple(t.shape) for n, t in tensors.items() if n not in parameters):
        return None
    return Merged(tensors, parameters, policy, saved, headers)


def check_trained(checkpoint: Path, expected: Collection[str], trained: Collection[str]) -> None:
    """Raise ConfigError unless a checkpoint holds just what trains of a model."""
    missing = [name for name in expected if name not in trained]
    unknown = [name for name in trained if name not in expected]
    if missing or unknown:
        difference = f"missing {sorted(missing)[:3]}, unknown {sorted(unknown)[:3]}"
        raise ConfigError(f"{checkpoint}: does not belong to this model: {difference}")


def _in_model(name: str) -> str:
    """The model's own name of a trained parameter, of the layer that it is merged into for an adapter's."""
    name = name.removeprefix(PREFIX).replace(".base_layer.", ".")
    return f"{name.split('.lora_')[0]}.weight" if ".lora_" in name else name


def _without_memory(folder: Path, config: Any, headers: Mapping[str, Header], dtype: torch.dtype) -> Any:
    """The model as transformers loads it from its files, without memory: it has its dtypes and the names on disk."""
    with torch.device("meta"):
        empty: Any = roles.auto_class(config).from_config(config)
    tensors = {n: torch.empty(h.shape, dtype=weights.DTYPES[h.dtype], device="meta") for n, h in headers.items()}
    with weights.silent():
        model = type(empty).from_pretrained(None, config=config, state_dict=tensors, dtype=dtype, device_map="meta")
    if model.can_generate() and (generation := configs.generation(folder)) is not None:
        model.generation_config = generation
    return model


def _state(model: Any) -> dict[str, Tensor]:
    """What transformers saves of a model, by the model's names."""
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    ignored = set(model._keys_to_ignore_on_save or ())
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in ignored}
    return remove_tied_weights_from_state_dict(state, model)


def _reverted(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a model by their names on disk, and converted as they lie there."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, state)


def _alone(model: Any, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """What becomes of one parameter on disk; nothing where it lies there together with others."""
    try:
        return _reverted(model, {name: tensor})
    except Exception:  # of any kind: a conversion that needs the other tensors too
        return {}


def _parameter(model: Any, name: str) -> Any:
    """A parameter by its name; None for a buffer."""
    try:
        return model.get_parameter(name)
    except AttributeError:
        return None


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.dtype


def _in_file(where: Header, name: str) -> Tensor:
    with safe_open(where.file, framework="pt") as tensors:
        return tensors.get_tensor(name)


# -------------------------------------------------------------------------------------------------------- writing


@dataclass(frozen=True)
class Files:
    """How tensors are cut into files. tensors: file -> names. total: bytes of all."""

    tensors: dict[str, list[str]]
    total: int

    @classmethod
    def of(cls, merged: Merged, ranks: int) -> Files:
        total = sum(tensor.nbytes for tensor in merged.tensors.values())
        split = split_torch_state_dict_into_shards(
            merged.tensors,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max(SMALLEST, min(LARGEST, total // ranks)),
        )
        return cls(split.filename_to_tensors, total)

    def of_rank(self, rank: int, ranks: int) -> list[str]:
        """The files that a rank writes: neighbours in the list are written on nodes far apart."""
        return [file for number, file in enumerate(self.tensors) if number * ranks // len(self.tensors) == rank]


def write(folder: Path, merged: Merged, files: Files, shards: Shards, group: Group) -> dict[str, dict[str, Any]]:
    """Write this rank's files, synced; returns their sizes and SHA-256. Raises OSError."""
    written = {}
    for file in files.of_rank(group.rank, group.size):
        names = sorted(files.tensors[file], key=lambda name: -merged.tensors[name].itemsize)
        content = _content(merged, names, shards)
        written[file] = asdict(disk.write(folder / file, content, workspace=folder))
    return written


def _content(merged: Merged, names: list[str], shards: Shards) -> Iterator[bytes | memoryview]:
    entries = {n: (DTYPES[t.dtype], t.shape, t.nbytes) for n in names for t in [merged.tensors[n]]}
    yield header(entries, {"format": "pt"})
    for tensor in merged.values(names, shards):
        value = tensor.reshape(-1)
        yield value.view(torch.uint8).numpy().data if value.numel() else b""


def describe(folder: Path, merged: Merged) -> None:
    """Write what `save_pretrained` writes beside the weights."""
    model = merged.saved
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def index(folder: Path, merged: Merged, files: Files, written: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the index, where there are several files, and their SHA-256."""
    if len(files.tensors) > 1:
        content = {
            "metadata": {"total_parameters": merged.saved.num_parameters(), "total_size": files.total},
            "weight_map": {name: file for file, names in files.tensors.items() for name in names},
        }
        (folder / directory.INDEX).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    (folder / SUMS).write_text("".join(f"{written[file]['sha256']}  {file}\n" for file in sorted(written)))


def sums(folder: Path) -> None:
    """Write the SHA-256 of files of weights that a library wrote."""
    files = sorted(folder.glob(directory.WEIGHTS))
    (folder / SUMS).write_text("".join(f"{disk.sha256(file)}  {file.name}\n" for file in files))


def changed(folder: Path) -> str | None:
    """The first file of weights that is not what SHA256SUMS says, or that it does not list; None where all are."""
    try:
        lines = (folder / SUMS).read_text().splitlines()
        listed = {name: own for own, name in (line.split("  ", 1) for line in lines)}
    except (OSError, ValueError):
        return SUMS
    names = {file.name for file in folder.glob(directory.WEIGHTS)} | listed.keys()
    return next(
        (n for n in sorted(names) if not (folder / n).is_file() or disk.sha256(folder / n) != listed.get(n)), None
    )
