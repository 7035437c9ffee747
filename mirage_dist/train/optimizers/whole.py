"""Whole parameters for an optimizer that is not elementwise, although ZeRO hands out flat pieces of many.

Each trained parameter has one rank that updates it, chosen so that all ranks have about equally many elements. In a
step every rank sends its pieces of values and gradients to these ranks, which update their parameters in their own
shapes and send the pieces back: two all-to-all exchanges for each flat, in which a rank sends and receives about three
float32 numbers for each element of its partition. The state of a parameter is whole, on the rank that updates it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mirage_dist.ranks import Group, everyones
from mirage_dist.train.optimizers.base import Groups
from mirage_dist.train.optimizers.partitions import Slice


def owners(sizes: Sequence[int], ranks: int) -> list[int]:
    """The rank that updates each parameter: the largest ones first, each to the rank with the fewest elements."""
    chosen, load = [0] * len(sizes), [0] * ranks
    for number in sorted(range(len(sizes)), key=lambda n: -sizes[n]):
        chosen[number] = load.index(min(load))
        load[chosen[number]] += sizes[number]
    return chosen


class WholeParameters(torch.optim.Optimizer):
    """What DeepSpeed sees in place of an optimizer that is not elementwise.

    groups: of the model's parameters, with their `names`. make: builds the optimizer of the whole parameters.
    `attach` has to be called after DeepSpeed is initialised and before the first step.
    """

    def __init__(self, groups: Groups, make: Callable[[Groups], torch.optim.Optimizer]) -> None:
        super().__init__(groups, {})
        self.groups, self.make = list(self.param_groups), make  # DeepSpeed swaps the list, and what `params` holds
        self.inner: torch.optim.Optimizer | None = None  # None where this rank updates nothing
        self.own: dict[str, nn.Parameter] = {}  # what this rank updates; values are present during `step` only
        self.members: dict[int, list[int]] = {}  # id of a flat -> numbers of its parameters
        self.slices: list[Slice] = []
        self.parts: list[list[tuple[int, int]]] = []  # by parameter and rank: (start, count)
        self.owners: list[int] = []  # by parameter

    def attach(self, slices: Sequence[Slice], group: Group) -> None:
        """Agree on who updates which parameter; every rank calls this."""
        self.slices, self.group = sorted(slices, key=lambda piece: piece.group), group
        slices = self.slices
        by_rank = everyones(group, [(piece.start, piece.count) for piece in slices])
        self.parts = [list(parts) for parts in zip(*by_rank, strict=True)]
        sizes = [math.prod(piece.shape) for piece in slices]
        self.owners = owners(sizes, group.size)
        for number, piece in enumerate(slices):
            self.members.setdefault(id(piece.flat), []).append(number)
        groups: Groups = [{**g, "params": [], "names": [], "number": n} for n, g in enumerate(self.groups)]
        for number, piece in enumerate(slices):
            if self.owners[number] == group.rank:
                parameter = nn.Parameter(self._placeholder(piece))
                self.own[piece.name] = parameter
                groups[piece.group]["params"].append(parameter)
                groups[piece.group]["names"].append(piece.name)
        if self.own:
            self.inner = self.make([g for g in groups if g["params"]])

    def state_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        """The state of a parameter in `own`."""
        assert self.inner is not None
        return self.inner.state.get(parameter, {})

    def restore(self, parameter: nn.Parameter, state: dict[str, Any]) -> None:
        """Put back what `state_of` gave."""
        assert self.inner is not None
        if state:
            self.inner.state[parameter] = state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every flat in the present groups that has a gradient; every rank calls this with the same ones."""
        for group in self.inner.param_groups if self.inner is not None else ():
            group["lr"] = self.groups[group["number"]]["lr"]
        for group in self.param_groups:
            for flat in group["params"]:
                if flat.grad is not None:
                    self._update(flat)

    def _update(self, flat: Tensor) -> None:
        numbers = self.members[id(flat)]
        by_owner = [[n for n in numbers if self.owners[n] == rank] for rank in range(self.group.size)]
        mine = by_owner[self.group.rank]
        pieces = [(self.slices[n].of(flat), self.slices[n].of(flat.grad)) for own in by_owner for n in own]  # type: ignore[arg-type]
        sent = [2 * sum(self.slices[n].count for n in own) for own in by_owner]
        received = [2 * sum(self.parts[n][rank][1] for n in mine) for rank in range(self.group.size)]
        incoming = self._exchange([part for piece in pieces for part in piece], sent, received, flat)
        wholes = {n: [torch.empty(math.prod(self.slices[n].shape), device=flat.device) for _ in range(2)] for n in mine}
        end = 0
        for rank in range(self.group.size):
            for n in mine:
                start, count = self.parts[n][rank]
                for whole in wholes[n]:
                    whole[start : start + count] = incoming[end : end + count]
                    end += count
        for n in mine:
            parameter = self.own[self.slices[n].name]
            parameter.data, parameter.grad = (whole.view(self.slices[n].shape) for whole in wholes[n])
        if mine and self.inner is not None:
            self.inner.step()
        updated = []
        for rank in range(self.group.size):
            for n in mine:
                start, count = self.parts[n][rank]
                updated.append(self.own[self.slices[n].name].data.reshape(-1)[start : start + count])
        halves = [size // 2 for size in received], [size // 2 for size in sent]
        incoming = self._exchange(updated, *halves, flat)
        end = 0
        for own in by_owner:
            for n in own:
                count = self.slices[n].count
                self.slices[n].of(flat).copy_(incoming[end : end + count])
                end += count
        for n in mine:
            parameter = self.own[self.slices[n].name]
            parameter.data, parameter.grad = self._placeholder(self.slices[n]), None

    def _exchange(self, pieces: list[Tensor], sent: list[int], received: list[int], flat: Tensor) -> Tensor:
        """What the other ranks send to this one, in the order of ranks; sent, received: elements by rank."""
        outgoing = torch.cat(pieces) if pieces else flat.new_empty(0)
        if self.group.size == 1:
            return outgoing
        incoming = flat.new_empty(sum(received))
        torch.distributed.all_to_all_single(incoming, outgoing, received, sent)
        return incoming

    @staticmethod
    def _placeholder(piece: Slice) -> Tensor:
        """A tensor of the parameter's shape that takes no memory."""
        return torch.zeros(1, device=piece.flat.device).expand(piece.shape)
