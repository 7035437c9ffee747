"""Weights are whole: every parameter of a model comes from its files, or is tied to one that does.

`check` needs the headers of the safetensors files alone. It has transformers load tensors without memory, so that
renamed and fused weights are matched by the same code that loads them.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mirage_dist.model import directory
from mirage_dist.model.families import roles
from mirage_dist.schema import ConfigError

# Names in safetensors headers, and the bits of one element. What torch has no dtype for cannot be loaded.
DTYPES = {
    "F64": (torch.float64, 64),
    "F32": (torch.float32, 32),
    "F16": (torch.float16, 16),
    "BF16": (torch.bfloat16, 16),
    "F8_E4M3": (torch.float8_e4m3fn, 8),
    "F8_E5M2": (torch.float8_e5m2, 8),
    "I64": (torch.int64, 64),
    "I32": (torch.int32, 32),
    "I16": (torch.int16, 16),
    "I8": (torch.int8, 8),
    "U64": (torch.uint64, 64),
    "U32": (torch.uint32, 32),
    "U16": (torch.uint16, 16),
    "U8": (torch.uint8, 8),
    "BOOL": (torch.bool, 8),
}
WHOLE_NUMBERS = ("F64", "F32", "F16", "BF16")  # dtypes whose values are a weight; others need a scale beside them
LONGEST_HEADER = 100_000_000  # bytes; safetensors itself reads no longer one
AGAIN = "copy or download the model again"


class Header(NamedTuple):
    """One tensor in a file: dtype as safetensors names it, and shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def check(folder: Path, config: Any) -> None:
    """Check that the files in a directory give this configuration's model every weight; reads headers only.

    config: of the model to load, perhaps with fewer layers than the files hold. A quantised checkpoint's files are
    checked, its weights' names are not: they depend on the quantiser. Raises ConfigError for damaged files, and for
    weights that are missing, have another shape, or a dtype that is no weight's.
    """
    headers = read_headers(folder, getattr(type(config), "extra_files", ()))
    if getattr(config, "quantization_config", None) is not None:
        return
    model, info = _rehearsed(config, headers)
    _check_matched(folder, headers, model, info)
    scaled = {name for name, header in headers.items() if header.dtype not in WHOLE_NUMBERS}
    if not scaled:
        return
    model, info = _rehearsed(config, {name: h for name, h in headers.items() if name not in scaled})
    parameters = dict(model.named_parameters())
    wrong = sorted(n for n in info["missing_keys"] if n in parameters and parameters[n].is_floating_point())
    if wrong:
        header = headers.get(_on_disk(wrong[0], scaled) or min(scaled))
        assert header is not None
        raise ConfigError(
            f"{header.file}: {_listing(wrong)} {'are' if len(wrong) > 1 else 'is'} {header.dtype} there, but a weight "
            f"is one of {', '.join(WHOLE_NUMBERS)}; a quantised checkpoint needs its quantization_config in "
            "config.json. Give the unquantised model"
        )


def load(kind: Any, folder: Path, **options: Any) -> Any:
    """`kind.from_pretrained(folder, …)` from safetensors, after which every weight came from the files and is finite.

    kind: a class of transformers. Under ZeRO-3 every rank calls this. Raises ConfigError when the model cannot be
    loaded, or weights are missing, have another shape, or hold a NaN or an infinity.
    """
    from safetensors import SafetensorError

    try:
        model, info = kind.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True, **options
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ConfigError(f"model.path={folder}: cannot be loaded: {error}") from error
    except RuntimeError as error:
        if not str(error).startswith(("Error(s) in loading", "You set `ignore_mism", "We encountered some issues")):
            raise
        raise ConfigError(f"model.path={folder}: its weights do not fit its config.json: {error}") from error
    if info["missing_keys"] or info["mismatched_keys"] or info["error_msgs"]:
        _check_matched(folder, read_headers(folder), model, info)
        raise ConfigError(f"model.path={folder}: its weights cannot be loaded: {'; '.join(info['error_msgs'])}")
    check_finite(folder, model)
    return model


# ------------------------------------------------------------------------------------------------- files


def read_headers(folder: Path, extra: Sequence[str] = ()) -> dict[str, Header]:
    """The tensors in the files that transformers loads, by their name on disk.

    extra: further files that a model's class loads where they exist. Raises ConfigError for a damaged file, a tensor
    that two files hold, and one that the index promises and its file lacks.
    """
    files = directory.weight_files(folder)
    files |= {folder / name: [] for name in extra if (folder / name).exists() and folder / name not in files}
    headers: dict[str, Header] = {}
    for file, promised in files.items():
        own = _header(file)
        lacking = [name for name in promised if name not in own]
        if lacking:
            raise ConfigError(f"{file}: lacks {_listing(lacking)}, which {directory.INDEX} places there; {AGAIN}")
        for name, header in own.items():
            if name in headers:
                raise ConfigError(
                    f"{file}: holds {name}, and so does {headers[name].file.name}; only one can be loaded. {AGAIN}"
                )
            headers[name] = header
    return headers


def _header(file: Path) -> dict[str, Header]:
    """The tensors of one file. Layout: https://github.com/huggingface/safetensors, section "Format"."""
    size = file.stat().st_size
    with file.open("rb") as handle:
        first = handle.read(8)
        if first + handle.read(len(directory.POINTER) - 8) == directory.POINTER:
            raise ConfigError(f"{file}: a Git-LFS pointer, not the weights themselves; run `git lfs pull`")
        length = int.from_bytes(first, "little")
        if len(first) < 8 or length > LONGEST_HEADER:
            raise ConfigError(f"{file}: no safetensors file (its header would have {length} bytes); {AGAIN}")
        handle.seek(8)
        text = handle.read(length)
    if len(text) < length:
        raise ConfigError(f"{file}: cut off within its header: {size} bytes of at least {8 + length}; {AGAIN}")
    try:
        content = json.loads(text)
        tensors = {name: _entry(file, name, value) for name, value in content.items() if name != "__metadata__"}
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise ConfigError(f"{file}: no safetensors file (its header cannot be read: {error}); {AGAIN}") from error
    place = 0  # in the data, which follow the header without gaps
    for name, (header, begin, stop) in sorted(tensors.items(), key=lambda item: item[1][1:]):
        bits = math.prod(header.shape) * DTYPES[header.dtype][1]
        if begin != place or bits != 8 * (stop - begin):
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
    if dtype not in DTYPES:
        raise ConfigError(f"{file}: {name} has dtype {dtype}, which cannot be loaded; known: {', '.join(DTYPES)}")
    return Header(file, dtype, shape), begin, stop


# ------------------------------------------------------------------------------------------------- names and shapes


def _rehearsed(config: Any, headers: Mapping[str, Header]) -> tuple[Any, dict[str, Any]]:
    """The model without memory, and transformers' report on loading it from tensors of these names and shapes."""
    with torch.device("meta"):
        empty: Any = roles.auto_class(config).from_config(config)
    tensors = {
        name: torch.empty(header.shape, dtype=DTYPES[header.dtype][0], device="meta")
        for name, header in headers.items()
    }
    with _silent():
        try:
            return type(empty).from_pretrained(
                None,
                config=config,
                state_dict=tensors,
                dtype=torch.float32,
                device_map="meta",
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except RuntimeError:  # parts of a fused weight do not fit together
            missing = _missing_parts(empty, headers, empty.state_dict())
            return empty, {"missing_keys": missing, "mismatched_keys": (), "unexpected_keys": ()}


def _missing_parts(model: Any, headers: Mapping[str, Header], weights: Mapping[str, Any]) -> list[str]:
    """Names on disk that the files lack of weights that a model keeps fused, such as those of one expert of several.

    weights: some of the model's, by name. Only names that differ in nothing but numbers from one in the files count.
    """
    from transformers.core_model_loading import revert_weight_conversion

    present = {_unnumbered(name) for name in headers}
    expected = revert_weight_conversion(model, dict(weights))
    return [name for name in expected if name not in headers and _unnumbered(name) in present]


def _unnumbered(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "#", name)


def _check_matched(folder: Path, headers: Mapping[str, Header], model: Any, info: Mapping[str, Any]) -> None:
    """Raise ConfigError for missing weights and other shapes in transformers' report on loading `model`."""
    missing = sorted(info["missing_keys"], key=_numbers_last)
    weights = model.state_dict()
    for name, shape, wanted in sorted(info["mismatched_keys"]):
        if parts := _missing_parts(model, headers, {name: weights[name]}):
            missing += parts
            continue
        place = _on_disk(name, headers)
        file = headers[place].file if place is not None else folder
        empty = "is empty, " if 0 in shape else ""
        raise ConfigError(
            f"{file}: {place or name} {empty}has shape {tuple(shape)}, but config.json describes a model whose {name} "
            f"has shape {tuple(wanted)}; weights and config.json are of different models, or one was changed. Give "
            "the files of one model"
        )
    if not missing:
        return
    count = f"{len(missing)} weights" if len(missing) > 1 else "a weight"
    error = (
        f"model.path={folder}: {count} of {type(model).__name__} {'are' if len(missing) > 1 else 'is'} in none of its "
        f"files, and would start from random values: {_listing(missing)}. "
    )
    similar = _similar(missing, headers, weights, info["unexpected_keys"])
    if similar:
        error += (
            f"The files hold {_listing(similar)}, which the model does not have: if these are the same weights under "
            "other names, rename them, or give a checkpoint in transformers' format (the hub's -hf conversions)"
        )
    else:
        error += "Give a directory with all weights (copy or download the model again, or save the whole model)"
    raise ConfigError(error)


def _similar(
    missing: Sequence[str], headers: Mapping[str, Header], weights: Mapping[str, Any], unexpected: Sequence[str]
) -> list[str]:
    """Names of unknown weights in the files that resemble the first missing ones: by shape if possible, and by name."""
    known = {_unnumbered(name) for name in weights}  # a model of fewer layers has no later ones
    places = {name: _on_disk(name, headers) or name for name in unexpected if _unnumbered(name) not in known}
    shapes = {name: headers[place].shape for name, place in places.items() if place in headers}
    similar: list[str] = []
    for name in missing[:3]:
        shape = tuple(weights[name].shape) if name in weights else None
        alike = [other for other in places if shapes.get(other) == shape] or list(places)
        similar += [places[other] for other in difflib.get_close_matches(name, alike, n=1, cutoff=0.3)]
    return list(dict.fromkeys(similar))


def _on_disk(name: str, headers: Iterable[str]) -> str | None:
    """The name in the files that shares the longest end with a model's name, two parts at least."""
    own = name.split(".")[::-1]

    def shared(other: str) -> int:
        pairs = zip(own, other.split(".")[::-1], strict=False)
        return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(own), other.count(".") + 1))

    best = max(headers, key=shared, default=None)
    return best if best is not None and shared(best) >= min(2, len(own)) else None


def _numbers_last(name: str) -> tuple[bool, str]:
    """Sorts weights that occur once, such as a projector's, before those of numbered layers."""
    return _unnumbered(name) != name, name


def _listing(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


@contextmanager
def _silent() -> Iterator[None]:
    """Without transformers' own table of what was missing, and its progress bar."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


# ------------------------------------------------------------------------------------------------- values


def check_finite(folder: Path, model: Any) -> None:
    """Raise ConfigError when a parameter, as loaded from `folder`, holds a NaN or an infinity.

    Under ZeRO-3 every rank counts in its own partition, all agree, and every rank has to call this.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.is_floating_point() and not p.is_meta]
    counts = torch.tensor([_non_finite(_own(p)) for _, p in named])
    if any(hasattr(p, "ds_tensor") for _, p in named):
        import torch.distributed as dist

        counts = counts.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(counts)
    bad = {name: count for (name, _), count in zip(named, counts.tolist(), strict=True) if count}
    if bad:
        values = [f"{name} ({count} of its values)" for name, count in bad.items()]
        raise ConfigError(
            f"{_origin(folder, list(bad))}: NaN or infinity in {_listing(values)}; the file is damaged, or the run "
            "that wrote it had diverged. Give another checkpoint"
        )


def _own(parameter: Any) -> torch.Tensor:
    """The values of a parameter in this process: all of them, or its partition without the padding at its end."""
    if not hasattr(parameter, "ds_tensor"):
        return parameter.detach()
    partition, rank = parameter.ds_tensor, torch.distributed.get_rank(parameter.ds_process_group)
    return partition[: max(0, min(partition.numel(), parameter.ds_numel - rank * partition.numel()))]


def _non_finite(values: torch.Tensor) -> int:
    if values.numel() == 0:
        return 0
    # One pass without a temporary of the same size: a NaN is the minimum and the maximum.
    low, high = torch.aminmax(values)
    if math.isfinite(low) and math.isfinite(high):
        return 0
    return int(values.numel() - torch.isfinite(values).sum())


def _origin(folder: Path, names: Sequence[str]) -> Path:
    """The file that holds the first tensor with a NaN or an infinity; the directory when none does."""
    from safetensors import safe_open

    headers = read_headers(folder)
    likely = [place for name in names if (place := _on_disk(name, headers)) is not None]
    for name in dict.fromkeys([*likely, *headers]):
        with safe_open(headers[name].file, framework="pt") as tensors:
            values = tensors.get_tensor(name)
        if values.is_floating_point() and _non_finite(values.float()):
            return headers[name].file
    return folder
