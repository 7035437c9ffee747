"""What this rank keeps of the trained parameters: its fragments of master weights and moments, under ZeRO-2 and ZeRO-3.

DeepSpeed's own checkpoints load on the world size and stage that wrote them. A fragment knows its parameter and its
place in it, so it loads anywhere. Reads the internals of the one DeepSpeed release that pyproject.toml pins.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mirage_dist.model.shards import MOMENTS, PARAM, Fragment, Shards


def fragments(engine: Any) -> list[Fragment]:
    """This rank's fragments of everything that trains, as views: writing to them changes the training state.

    Parameters of which this rank holds nothing are left out; names are those of the Hugging Face model.
    """
    optimizer = engine.optimizer
    _ensure_moments(optimizer)
    trained = ((name, p) for name, p in engine.module.hf.named_parameters() if p.requires_grad)
    place = _place_stage3 if engine.zero_optimization_stage() == 3 else _place_stage2
    found = (place(optimizer, name, parameter) for name, parameter in trained)
    return [fragment for fragment in found if fragment is not None]


def _place_stage3(optimizer: Any, name: str, parameter: Any) -> Fragment | None:
    """Stage 3 cuts every parameter into as many equal parts as there are ranks; the last ones may be padding."""
    group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = size * optimizer._get_param_partition_rank(parameter)
    held = min(size, parameter.ds_numel - start)
    if held <= 0:
        return None
    flat = optimizer.fp32_partitioned_groups_flat[group]
    state = {PARAM: flat, **optimizer.optimizer.state[flat]}
    tensors = {key: state[key].detach().narrow(0, offset, held) for key in (PARAM, *MOMENTS)}
    return Fragment(name, tuple(parameter.ds_shape), start, tensors)


def _place_stage2(optimizer: Any, name: str, parameter: Any) -> Fragment | None:
    """Stage 2 cuts one flat buffer of all parameters; a parameter may lie on several ranks, or whole on another."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    keys: dict[str, str | None] = {PARAM: None, **dict(zip(MOMENTS, MOMENTS, strict=True))}
    tensors = {key: mapping.get_hp_fragment(state).detach() for key, state in keys.items()}
    return Fragment(name, tuple(parameter.shape), mapping.lp_fragment_address.start, tensors)


def steps_taken(engine: Any) -> float:
    """How many steps AdamW has applied; skipped ones do not count. Equal for all parameters."""
    return max((float(state["step"]) for state in engine.optimizer.optimizer.state.values() if state), default=0.0)


def load(engine: Any, shards: Shards, steps: float) -> None:
    """Put parameters and moments back, from shards of any world size and stage; every rank calls this.

    Raises RunError when the shards do not hold an element that this rank needs.
    """
    optimizer = engine.optimizer
    stage3 = engine.zero_optimization_stage() == 3
    if stage3:
        optimizer.checkpoint_event_prologue()  # partitions the small parameters that are kept whole
    for fragment in fragments(engine):
        for key, tensor in fragment.tensors.items():
            tensor.copy_(shards.read(key, fragment.name, fragment.start, tensor.numel()))
    for state in optimizer.optimizer.state.values():
        state["step"].fill_(steps)
    if stage3:
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()
    else:
        optimizer.update_lp_params()


def _ensure_moments(optimizer: Any) -> None:
    """AdamW makes its state in its first step; a checkpoint may come before that, or be loaded then."""
    stage3 = hasattr(optimizer, "fp32_partitioned_groups_flat")
    groups = optimizer.fp32_partitioned_groups_flat if stage3 else optimizer.single_partition_of_fp32_groups
    adamw = optimizer.optimizer
    for flat in groups:
        if not adamw.state[flat]:
            # A fused step reads its count on the device.
            device = flat.device if adamw.defaults["fused"] else "cpu"
            step = torch.zeros((), dtype=torch.float32, device=device)
            adamw.state[flat] = {"step": step, **{key: torch.zeros_like(flat) for key in MOMENTS}}
    if not stage3:
        optimizer._lazy_init_hp_params_optimizer_state()


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
    """A copy of the fragments in host memory, and the buffer that holds it, to be handed in again next time.

    For a thread beside the training: on a GPU it copies in a stream of its own, as soon as `after` (see `moment`) is
    reached. The first copy pays for the memory's pages; pinned memory lets a GPU copy at the bus's full speed.
    """
    size = sum(tensor.numel() for f in held for tensor in f.tensors.values())
    if buffer is None or len(buffer) != size:
        buffer = torch.empty(size, dtype=torch.float32, pin_memory=after is not None)
    if after is None or not held:
        return _copies(held, buffer), buffer
    device = held[0].tensors[PARAM].device
    stream = torch.cuda.Stream(device if device.type == "cuda" else None)
    with torch.cuda.stream(stream):
        stream.wait_event(after)
        copies = _copies(held, buffer)
        stream.synchronize()
    return copies, buffer


def _copies(held: list[Fragment], buffer: Tensor) -> list[Fragment]:
    copies, end = [], 0
    for f in held:
        tensors = {}
        for key, tensor in f.tensors.items():
            tensors[key] = buffer[end : end + tensor.numel()].copy_(tensor, non_blocking=True)
            end += tensor.numel()
        copies.append(Fragment(f.name, f.shape, f.start, tensors))
    return copies
