"""What this rank holds of the training state: fragments of master weights and of any optimizer's state.

DeepSpeed's own checkpoints load on the world size and the ZeRO stage that wrote them. A fragment carries its parameter
and its place in it, so it loads anywhere. Of an elementwise optimizer the state tensors have the shape of a flat (see
`train.optimizers.partitions`) and are cut as the parameters are; of others the state of a parameter is whole, on one
rank. State without dimensions is a scalar: {"float32": 5.0} is a tensor of that dtype, 5.0 a Python number.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mirage_dist.model.shards import DTYPES, PARAM, Fragment, Scalars, Shards
from mirage_dist.schema import RunError
from mirage_dist.train.optimizers.partitions import Restoring, Slice, slices
from mirage_dist.train.optimizers.whole import WholeParameters


def fragments(engine: Any) -> tuple[list[Fragment], Scalars]:
    """This rank's fragments of everything that trains, as views of the training state, and its scalars.

    Parameters of which this rank holds nothing are left out; names are those of the Hugging Face model. State that the
    optimizer has not made yet, before its first step, is left out too. Raises RunError for state that cannot be saved.
    """
    optimizer = engine.optimizer.optimizer
    held = [piece for piece in slices(engine) if piece.count]
    parts = [Fragment(PARAM, piece.name, piece.shape, piece.start, piece.of(piece.flat)) for piece in held]
    scalars: dict[str, dict[str, Any]] = {}
    if isinstance(optimizer, WholeParameters):
        for name, parameter in optimizer.own.items():
            tensors, scalars[name] = _parted(optimizer.state_of(parameter), f"state of {name}")
            parts += [Fragment(key, name, tuple(t.shape), 0, t.detach().reshape(-1)) for key, t in tensors.items()]
        return parts, scalars
    for piece in held:
        state = optimizer.state.get(piece.flat, {})
        tensors, scalars[piece.name] = _parted(state, f"state of {piece.name}", piece.flat.shape)
        parts += [Fragment(key, piece.name, piece.shape, piece.start, piece.of(t)) for key, t in tensors.items()]
    return parts, scalars


def check_state(optimizer: torch.optim.Optimizer) -> None:
    """Raise RunError when a checkpoint cannot hold the state that this optimizer has made."""
    whole = isinstance(optimizer, WholeParameters)
    inner = optimizer.inner if whole else optimizer
    for parameter, state in inner.state.items() if inner is not None else ():
        _parted(state, type(inner).__name__, None if whole else parameter.shape)


def _parted(
    state: Mapping[str, Any], owner: str, shape: torch.Size | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (of `shape`, if given) and scalars of one parameter's state."""
    tensors, scalars = {}, {}
    for key, value in state.items():
        if isinstance(value, Tensor) and value.dtype in DTYPES and "/" not in key:
            if value.dim() == 0:
                scalars[key] = {str(value.dtype).removeprefix("torch."): value.item()}
                continue
            if shape is not None and value.shape != shape:
                raise RunError(
                    f"{owner}: {key} has the shape {tuple(value.shape)} for a parameter of {tuple(shape)}; an "
                    "optimizer with such state is not elementwise: set `elementwise = False` in its class"
                )
            tensors[key] = value
        elif value is None or isinstance(value, bool | int | float | str):
            scalars[key] = value
        else:
            raise RunError(f"{owner}: {key} is a {type(value).__name__}, which a checkpoint cannot hold")
    return tensors, scalars


def load(engine: Any, shards: Shards) -> None:
    """Put parameters and the optimizer's state back, from shards of any world size and stage; every rank calls this.

    Raises RunError when the shards do not hold an element that this rank needs.
    """
    optimizer, pieces = engine.optimizer.optimizer, slices(engine)
    with Restoring(engine):
        for piece in pieces:
            piece.of(piece.flat).copy_(shards.read(PARAM, piece.name, piece.start, piece.count))
    if isinstance(optimizer, WholeParameters):
        for name, parameter in optimizer.own.items():
            tensors = {key: shards.whole(name, key).to(parameter.device) for key in shards.states(name)}
            optimizer.restore(parameter, tensors | _scalars(shards, name, parameter, False))
        return
    by_flat: dict[int, list[Slice]] = {}
    for piece in pieces:
        by_flat.setdefault(id(piece.flat), []).append(piece)
    for members in by_flat.values():
        flat, group = members[0].flat, optimizer.param_groups[members[0].group]
        state = {}
        for key in shards.states(members[0].name):
            parts = [(piece, shards.read(key, piece.name, piece.start, piece.count)) for piece in members]
            state[key] = torch.zeros_like(flat, dtype=parts[0][1].dtype, requires_grad=False)
            for piece, part in parts:
                piece.of(state[key]).copy_(part)
        on_device = bool(group.get("fused") or group.get("capturable"))  # as PyTorch's optimizers keep their counts
        state |= _scalars(shards, members[0].name, flat, on_device)
        if state:
            optimizer.state[flat] = state


def _scalars(shards: Shards, name: str, parameter: Tensor, on_device: bool) -> dict[str, Any]:
    """The scalars of a parameter's state; those that are tensors on the parameter's device or on the CPU."""

    def restored(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        [(dtype, number)] = value.items()
        return torch.tensor(number, dtype=getattr(torch, dtype), device=parameter.device if on_device else "cpu")

    return {key: restored(value) for key, value in shards.scalars.get(name, {}).items()}


def moment(device: torch.device) -> torch.cuda.Event | None:
    """This point of the GPU's work, for `snapshot` to wait for; None on a CPU, whose work is done when it returns."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record()
    return event


def snapshot(
    held: list[Fragment], buffer: Tensor | None, after: torch.cuda.Event | None
) -> tuple[list[Fragment], Tensor]:
    """A copy of the fragments in host memory, and the buffer of bytes that holds it, to be passed in again next time.

    For a thread beside the training: on a GPU it copies in a separate stream, as soon as `after` (see `moment`) is
    reached. The first copy pays for the memory's pages; pinned memory lets a GPU copy at the bus's full speed.
    """
    held = sorted(held, key=lambda f: -f.tensor.itemsize)  # every copy begins where its dtype may
    size = sum(f.tensor.nbytes for f in held)
    if buffer is None or len(buffer) != size:
        buffer = torch.empty(size, dtype=torch.uint8, pin_memory=after is not None)
    if after is None or not held:
        return _copies(held, buffer), buffer
    device = held[0].tensor.device
    stream = torch.cuda.Stream(device if device.type == "cuda" else None)
    with torch.cuda.stream(stream):
        stream.wait_event(after)
        copies = _copies(held, buffer)
        stream.synchronize()
    return copies, buffer


def _copies(held: list[Fragment], buffer: Tensor) -> list[Fragment]:
    copies, end = [], 0
    for f in held:
        start, end = end, end + f.tensor.nbytes
        copy = buffer[start:end].view(f.tensor.dtype).copy_(f.tensor, non_blocking=True)
        copies.append(Fragment(f.key, f.name, f.shape, f.start, copy))
    return copies
