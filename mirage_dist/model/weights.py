"""Weights are whole: every parameter of a model comes from its files, or is tied to one that does.

`check` needs the headers of the safetensors files alone. It has transformers load tensors without memory, so that
renamed and fused weights are matched by the same code that loads them.
"""

from __future__ import annotations

import difflib
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mirage_dist.model import directory
from mirage_dist.model.directory import Header
from mirage_dist.model.families import configs, roles
from mirage_dist.progress import log
from mirage_dist.schema import ConfigError, RunError

# Names in safetensors headers. Numbers of other dtypes are no weights, or need a scale beside them.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
LAYERS = ("num_hidden_layers", "depth")
WEIGHTS = ("F64", "F32", "F16", "BF16")
# What transformers raises for files that are no whole model, or have values of another kind than it expects.
LOADING = (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, ImportError, RecursionError)
OTHER_MODEL = "weights and config.json are of different models, or one of them was changed. Give the files of one model"


def check(folder: Path, config: Any) -> None:
    """Check that the files in a directory give this configuration's model every weight; reads headers only.

    config: of the model to load, perhaps with fewer layers than the files hold. A quantised checkpoint's files are
    checked, its weights' names are not: they depend on the quantiser. Raises ConfigError for damaged files, and for
    weights that are missing, have another shape, or a dtype that is no weight's.
    """
    configs.generation(folder)
    headers = directory.headers(folder, getattr(type(config), "extra_files", ()))
    if getattr(config, "quantization_config", None) is not None:
        return
    _check_layers(folder, config, headers)
    model, info = _rehearsed(folder, config, headers)
    _check_matched(folder, headers, model, info)
    if unused := _unknown(info["unexpected_keys"], model.state_dict()):
        log.info(f"model.path={folder}: the model has no place for {_listing(unused)}: not loaded")
    scaled = {name for name, header in headers.items() if header.dtype not in WEIGHTS}
    if not scaled:
        return
    model, info = _rehearsed(folder, config, {name: h for name, h in headers.items() if name not in scaled})
    parameters = dict(model.named_parameters())
    wrong = sorted(n for n in info["missing_keys"] if n in parameters and parameters[n].is_floating_point())
    if wrong:
        header = headers.get(_on_disk(wrong[0], scaled) or min(scaled))
        assert header is not None
        raise ConfigError(
            f"{header.file}: {_listing(wrong)} {'are' if len(wrong) > 1 else 'is'} {header.dtype} there, but a weight "
            f"is one of {', '.join(WEIGHTS)}; a quantised checkpoint needs its quantization_config in "
            "config.json. Give the unquantised model"
        )


def load(kind: Any, folder: Path, **options: Any) -> Any:
    """`kind.from_pretrained(folder, …)` from safetensors, after which every weight came from the files and is finite.

    kind: a class of transformers. Under ZeRO-3 every rank calls this. Raises ConfigError when the model cannot be
    loaded, or weights are missing, have another shape, or hold a NaN or an infinity; RunError when its files change
    meanwhile.
    """
    from safetensors import SafetensorError

    configs.generation(folder)
    before = directory.state(folder)
    try:
        with _without_report():
            model, info = kind.from_pretrained(
                folder, use_safetensors=True, local_files_only=True, output_loading_info=True, **options
            )
    except (*LOADING, SafetensorError) as error:
        raise ConfigError(f"model.path={folder}: cannot be loaded: {configs.brief(error)}") from error
    except RuntimeError as error:
        if not str(error).startswith(("Error(s) in loading", "You set `ignore_mism", "We encountered some issues")):
            raise
        raise ConfigError(f"model.path={folder}: its weights do not fit its config.json: {error}") from error
    if info["missing_keys"] or info["mismatched_keys"] or info["error_msgs"]:
        _check_matched(folder, directory.headers(folder), model, info)
        raise ConfigError(f"model.path={folder}: its weights cannot be loaded: {'; '.join(info['error_msgs'])}")
    check_finite(folder, model)
    if before != directory.state(folder):
        raise RunError(f"{folder}: the model's files changed while they were loaded; start again with whole files")
    return model


# ------------------------------------------------------------------------------------------------- names and shapes


def _check_layers(folder: Path, config: Any, headers: Mapping[str, Header]) -> None:
    """Raise ConfigError for more layers than there are tensors: such a model need not be built to be refused."""
    for _, name, value in configs.sizes(config):
        number = max(value, default=0) if isinstance(value, (list, tuple)) else value
        if name in LAYERS and number > len(headers):
            raise ConfigError(
                f"{folder / 'config.json'}: describes {number} layers, but the files hold {len(headers)} tensors; "
                f"{OTHER_MODEL}"
            )


def _rehearsed(folder: Path, config: Any, headers: Mapping[str, Header]) -> tuple[Any, dict[str, Any]]:
    """The model without memory, and transformers' report on loading it from tensors of these names and shapes."""
    try:
        with torch.device("meta"):
            empty: Any = roles.auto_class(config).from_config(config)
    except Exception as error:  # of any kind: a family's own code, with values that it did not foresee
        raise ConfigError(
            f"{folder / 'config.json'}: no model can be made of it: {configs.brief(error)}; {OTHER_MODEL}"
        ) from error
    with silent():
        try:
            tensors = {n: torch.empty(h.shape, dtype=DTYPES[h.dtype], device="meta") for n, h in headers.items()}
            return type(empty).from_pretrained(
                None,
                config=config,
                state_dict=tensors,
                dtype=torch.float32,
                device_map="meta",
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except configs.FAULTS:  # the parts of a fused weight do not fit together
            parts = _parts(empty, headers, empty.state_dict())
    lacking = [name for name in parts if name not in headers]
    differing = [(n, headers[n].shape, s) for n, s in parts.items() if n in headers and headers[n].shape != s]
    return empty, {"missing_keys": lacking, "mismatched_keys": differing, "unexpected_keys": (), "error_msgs": ()}


def _parts(model: Any, headers: Mapping[str, Header], weights: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names on disk, and shapes, of tensors that a model fuses into `weights`, such as those of several experts.

    Only names that differ in nothing but numbers from one in the files: other names may be spelt in another way there.
    """
    from transformers.core_model_loading import revert_weight_conversion

    present = {_unnumbered(name) for name in headers}
    tensors = revert_weight_conversion(model, dict(weights))
    return {name: tuple(tensor.shape) for name, tensor in tensors.items() if _unnumbered(name) in present}


def _unnumbered(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "#", name)


def _check_matched(folder: Path, headers: Mapping[str, Header], model: Any, info: Mapping[str, Any]) -> None:
    """Raise ConfigError for missing weights and other shapes in transformers' report on loading `model`."""
    weights, tied = model.state_dict(), getattr(model, "all_tied_weights_keys", {})
    missing = [name for name in info["missing_keys"] if tied.get(name) not in info["missing_keys"]]
    missing.sort(key=_numbers_last)
    differing = sorted(info["mismatched_keys"], key=lambda entry: _numbers_last(entry[0]))
    fused = _parts(model, headers, {name: weights[name] for name, *_ in differing if name in weights})
    if lacking := [part for part in fused if part not in headers]:
        missing += lacking  # of one expert of several, for example
    elif differing:
        name, shape, wanted = differing[0][0], *map(tuple, differing[0][1:])
        place = _on_disk(name, headers)
        more = f" (so it is with {len(differing) - 1} more weights)" if len(differing) > 1 else ""
        raise ConfigError(
            f"{headers[place].file if place else folder}: {place or name} has shape {shape}"
            f"{', no value at all' if 0 in shape else ''}, but in the model of config.json {wanted}{more}; "
            f"{OTHER_MODEL}"
        )
    if not missing:
        return
    shown = [_as_saved(model, weights, name) for name in missing[:3]] + missing[3:]
    count = f"{len(missing)} weights" if len(missing) > 1 else "a weight"
    error = (
        f"model.path={folder}: {count} of {type(model).__name__} {'are' if len(missing) > 1 else 'is'} in none of its "
        f"files, and would start from random values: {_listing(shown)}. "
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


def _as_saved(model: Any, weights: Mapping[str, Any], name: str) -> str:
    """The name that transformers writes to disk for a weight, and the model's own where that is another."""
    from transformers.core_model_loading import revert_weight_conversion

    saved = list(revert_weight_conversion(model, {name: weights[name]})) if name in weights else [name]
    return f"{saved[0]} ({name} in the model)" if len(saved) == 1 and saved[0] != name else name


def _similar(
    missing: Sequence[str], headers: Mapping[str, Header], weights: Mapping[str, Any], unexpected: Sequence[str]
) -> list[str]:
    """Names of unknown weights in the files that resemble the first missing ones: by shape if possible, and by name."""
    places = {name: _on_disk(name, headers) or name for name in _unknown(unexpected, weights)}
    shapes = {name: headers[place].shape for name, place in places.items() if place in headers}
    similar: list[str] = []
    for name in missing[:3]:
        shape = tuple(weights[name].shape) if name in weights else None
        alike = [other for other in places if shapes.get(other) == shape] or list(places)
        similar += [places[other] for other in difflib.get_close_matches(name, alike, n=1, cutoff=0.3)]
    return list(dict.fromkeys(similar))


def _unknown(unexpected: Iterable[str], weights: Iterable[str]) -> list[str]:
    """What a model does not know, without the later layers of one that loads the first few only."""
    known = {_unnumbered(name) for name in weights}
    return sorted(name for name in unexpected if _unnumbered(name) not in known)


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
def silent() -> Iterator[None]:
    """Without warnings and progress bars of transformers."""
    from transformers.utils import logging as bars

    logger, shown = logging.getLogger("transformers"), bars.is_progress_bar_enabled()
    level = logger.level
    logger.setLevel(logging.ERROR)
    bars.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if shown:
            bars.enable_progress_bar()


@contextmanager
def _without_report() -> Iterator[None]:
    """Without transformers' table of missing and unknown weights: the first are an error here, the others a line."""
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(_is_no_report)
    try:
        yield
    finally:
        logger.removeFilter(_is_no_report)


def _is_no_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()


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

    headers = directory.headers(folder)
    likely = [place for name in names if (place := _on_disk(name, headers)) is not None]
    for name in dict.fromkeys([*likely, *headers]):
        with safe_open(headers[name].file, framework="pt") as tensors:
            values = tensors.get_tensor(name)
        if values.is_floating_point() and _non_finite(values.float()):
            return headers[name].file
    return folder
