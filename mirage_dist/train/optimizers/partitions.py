"""Which elements of the trained parameters this rank updates, under ZeRO-2 and ZeRO-3.

DeepSpeed joins parts of many parameters into flat float32 tensors ("flats"), the master copy on which its optimizer
works. Reads the internals of the one DeepSpeed release that pyproject.toml pins.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Slice:
    """Elements [start, start + count) of the parameter `name`, which are [offset, offset + count) of `flat` (n,).

    Elements of a parameter are in row-major order. A parameter of which this rank holds nothing has count 0. flat is
    the same object for all slices in it, and every rank has the same parameters, in the same order, in its flat of the
    same number. group: the number of the parameter group.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    count: int
    flat: Tensor
    offset: int
    group: int

    def of(self, tensor: Tensor) -> Tensor:
        """This slice of the flat, or of a state tensor of its shape, as a view: (count,)."""
        return tensor.detach().narrow(0, self.offset, self.count)


def slices(engine: Any) -> list[Slice]:
    """This rank's slice of each parameter that trains, in the model's order; names are the Hugging Face model's."""
    cut = _stage3 if engine.zero_optimization_stage() == 3 else _stage2
    trained = ((name, p) for name, p in engine.module.hf.named_parameters() if p.requires_grad)
    names = {id(parameter): name for name, parameter in trained}
    order = {name: number for number, name in enumerate(names.values())}
    return sorted(cut(engine.optimizer, names), key=lambda piece: order[piece.name])


def _stage3(optimizer: Any, names: dict[int, str]) -> Iterator[Slice]:
    """Stage 3 cuts every parameter into as many equal parts as there are ranks; the last ones may be padding."""
    for number, parameters in enumerate(optimizer.fp16_groups):
        flat, group = optimizer.fp32_partitioned_groups_flat[number], optimizer.sub_group_to_group_id[number]
        for parameter in parameters:
            _, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = size * optimizer._get_param_partition_rank(parameter)
            count = max(0, min(size, parameter.ds_numel - start))
            shape = tuple(parameter.ds_shape)
            yield Slice(names[id(parameter)], shape, start if count else 0, count, flat, offset, group)


def _stage2(optimizer: Any, names: dict[int, str]) -> Iterator[Slice]:
    """Stage 2 cuts one flat buffer of a group's parameters; one may be on several ranks, or whole on another."""
    for group, parameters in enumerate(optimizer.bit16_groups):
        flat = optimizer.single_partition_of_fp32_groups[group]
        for parameter in parameters:
            mapping, name, shape = parameter._hp_mapping, names[id(parameter)], tuple(parameter.shape)
            if mapping is None:
                yield Slice(name, shape, 0, 0, flat, 0, group)
            else:
                own, part = mapping.hp_fragment_address, mapping.lp_fragment_address
                yield Slice(name, shape, part.start, own.numel, flat, own.start, group)


class Restoring:
    """A block that writes to the flats: what trains is the same as the master copy afterwards. Every rank enters it."""

    def __init__(self, engine: Any) -> None:
        self.optimizer, self.stage3 = engine.optimizer, engine.zero_optimization_stage() == 3

    def __enter__(self) -> None:
        if self.stage3:
            self.optimizer.checkpoint_event_prologue()  # partitions the small parameters that are kept whole

    def __exit__(self, failure: Any, *_: object) -> None:
        if failure is not None:
            return
        if not self.stage3:
            self.optimizer.update_lp_params()
            return
        for group in range(len(self.optimizer.fp16_groups)):
            self.optimizer._reassign_or_swap_out_partitioned_parameters(group)
        self.optimizer.checkpoint_event_epilogue()
