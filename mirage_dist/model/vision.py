"""A frozen vision tower runs once for each picture: what it computes is recorded, and replayed in later forwards.

What is recorded are the inputs of the modules that connect the tower to the decoder (a projector, Qwen-VL's mergers
inside the tower), as far as they are constants; those modules may train. In a replay the tower's layers pass on their
input, and the connectors get the recorded inputs instead of theirs. So everything else in the model's own forward stays
as it is: which layers it selects, how it cuts, orders and merges what the connectors make, and which modules it calls.

Shapes: I pictures; the rest is the family's own.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from mirage_dist.model.families import roles
from mirage_dist.schema import ConfigError

FEATURES = "vision_features"  # the key, in the inputs of a forward, of what is replayed (see `replayed`)
PIXELS = "pixel_"  # how the names of the inputs begin that the tower reads


def is_pixels(name: str) -> bool:
    """Whether an input is for the tower alone; the others, such as grids and sizes, also place its features."""
    return name.startswith(PIXELS)


def tolerance(dtype: torch.dtype) -> float:
    """How far hidden states of live and replayed pictures may differ, as a share of their size: by rounding alone."""
    return 1e-4 if dtype.itemsize >= 4 else 3e-2


def joint(pictures: Sequence[Tensor]) -> Tensor:
    """One input of the model for several pictures: one after the other, filled with zeros where one is smaller."""
    longest = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in pictures), strict=True)]
    whole = pictures[0].new_zeros([sum(len(tensor) for tensor in pictures), *longest])
    start = 0
    for tensor in pictures:
        whole[(slice(start, start + len(tensor)), *(slice(size) for size in tensor.shape[1:]))] = tensor
        start += len(tensor)
    return whole


def replayed(features: Sequence[Mapping[str, Tensor]], shapes: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Any]:
    """The inputs that stand for pictures whose features are known.

    features: of each picture, connector -> its input. shapes: of each picture, those of the inputs that `is_pixels`.
    """
    return {
        FEATURES: {
            "features": {name: [one[name] for one in features] for name in features[0]},
            "shapes": {name: [one[name] for one in shapes] for name in shapes[0]},
        }
    }


def repeated(inputs: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The inputs of one row, `count` times."""
    made: dict[str, Any] = {name: torch.cat([value] * count) for name, value in inputs.items() if name != FEATURES}
    if FEATURES in inputs:
        kinds = inputs[FEATURES].items()
        made[FEATURES] = {kind: {name: values * count for name, values in of.items()} for kind, of in kinds}
    return made


def check(base: Any) -> None:
    """Raise ConfigError unless what the tower computes for a picture is a constant that can be replayed.

    base: the Hugging Face model, with adapters and requires_grad as in training; it may be on the meta device.
    """
    kind, tower = base.config.model_type, roles.encoder(base, "image")
    if tower is None:
        raise ConfigError(f"data.cache_vision: {kind} has no vision tower; take data.cache_vision out")
    parts = roles.Parts(base)
    trained = [name for name, p in base.named_parameters() if p.requires_grad and parts.role_of[name] == "vision"]
    if trained:
        raise ConfigError(
            f"data.cache_vision: the vision tower trains ({trained[0]} and {len(trained) - 1} more), its features "
            "change; put vision into model.freeze and out of model.lora, or take data.cache_vision out"
        )
    settings = tower.config.to_dict() if hasattr(tower, "config") else {}
    drawn = [n for n, value in settings.items() if ("dropout" in n or "drop_path" in n) and value]
    if drawn:
        raise ConfigError(f"data.cache_vision: the vision tower has {drawn[0]}, its features are drawn anew each time")
    ends = Tower(base)
    missing = [
        what
        for what, exists in (
            ("module between tower and decoder", ends.connectors),
            ("list of layers in its vision tower", ends.layers),
            ("forward of its own for pictures (get_image_features)", hasattr(ends.backbone, "get_image_features")),
        )
        if not exists
    ]
    if missing:
        raise ConfigError(f"data.cache_vision: {kind} has no {missing[0]}; take data.cache_vision out")


def elements(base: Any, picture: Mapping[str, Tensor], tokens: int) -> int:
    """The number of elements that are recorded of a picture, computed without weights.

    base: on the meta device. tokens: that stand for the picture. Where the tower's code needs values, an estimate by
    the width of each connector's first linear layer.
    """
    tower = Tower(base)
    try:
        seen = tower.inputs({name: tensor.to("meta") for name, tensor in picture.items()})
        return sum(tensor.numel() for tensor in seen.values())
    except Exception:  # of any kind: a tower that reads its picture's grid, in a family's own code
        linear = [[m for m in c.modules() if isinstance(m, nn.Linear)] for c in tower.connectors.values()]
        return sum(layers[0].in_features * tokens for layers in linear if layers)


class Tower:
    """The vision tower of a model, and where it ends.

    connectors: the largest modules of the connector, by name. layers: the tower's, without those that hold a connector.
    """

    def __init__(self, base: Any) -> None:
        self.backbone = base.base_model
        parts, tower = roles.Parts(base), roles.encoder(base, "image")
        role_of = {id(p): parts.role_of[name] for name, p in base.named_parameters()}

        def roles_of(module: nn.Module) -> set[str]:
            return {role_of[id(p)] for p in module.parameters()}

        self.connectors: dict[str, nn.Module] = {}
        for name, module in base.named_modules():
            callable_itself = not isinstance(module, nn.ModuleList | nn.ModuleDict)
            inside = any(name.startswith(f"{other}.") for other in self.connectors)
            if callable_itself and not inside and roles_of(module) == {"connector"}:
                self.connectors[name] = module
        lists = [m for m in ([] if tower is None else tower.modules()) if isinstance(m, nn.ModuleList)]
        self.layers = [layer for layers in lists for layer in layers if roles_of(layer) == {"vision"}]

    def recorded(self, inputs: Mapping[str, Any], names: Sequence[str] = ()) -> dict[str, Tensor]:
        """What these pictures' features are made of: connector -> its input.

        names: the connectors. Without any they are found: those whose input does not depend on another connector, which
        a second forward with other outputs of the connectors shows.
        """
        if names:
            return self.inputs(inputs, names)
        plain, moved = (self.inputs(inputs, moved=moved) for moved in (False, True))
        return {name: tensor for name, tensor in plain.items() if torch.equal(tensor, moved[name])}

    def inputs(self, inputs: Mapping[str, Any], names: Sequence[str] = (), moved: bool = False) -> dict[str, Tensor]:
        """Inputs of the connectors that run for these pictures. moved: change their outputs on the way."""
        seen: dict[str, Tensor] = {}

        def keep(name: str, _module: nn.Module, positional: Any, arguments: dict[str, Any]) -> None:
            tensor = _tensors(positional, arguments)[0]
            if name in seen:
                raise ConfigError(f"data.cache_vision: {name} runs several times for one picture; take it out")
            seen[name] = tensor.detach()

        def move(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            return tree_map(lambda value: value * 2 if isinstance(value, Tensor) else value, output)

        handles = []
        for name in names or self.connectors:
            module = self.connectors[name]
            handles.append(module.register_forward_pre_hook(partial(keep, name), with_kwargs=True))
            if moved:
                handles.append(module.register_forward_hook(move))
        known = inspect.signature(self.backbone.get_image_features).parameters
        try:
            self.backbone.get_image_features(**{name: value for name, value in inputs.items() if name in known})
        finally:
            for handle in handles:
                handle.remove()
        return seen

    @contextmanager
    def replaying(self, inputs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The inputs of the backbone's forward in the block, which runs no layer of the tower if they hold FEATURES.

        The modules are called as modules, so that ZeRO-3's hooks gather the parameters of those that run.
        """
        if FEATURES not in inputs:
            yield dict(inputs)
            return
        given = {name: value for name, value in inputs.items() if name != FEATURES}
        known, device = inputs[FEATURES], inputs["input_ids"].device
        for name, shapes in known["shapes"].items():
            # Not zero, by which some families know padding.
            given[name] = joint([torch.ones(shape, device=device) for shape in shapes])
        handles = [
            self.connectors[name].register_forward_pre_hook(partial(_enter, name, tensors), with_kwargs=True)
            for name, tensors in known["features"].items()
        ]
        own = [layer.__dict__.get("forward") for layer in self.layers]
        for layer in self.layers:
            layer.forward = _pass_on
        try:
            yield given
        finally:
            for layer, forward in zip(self.layers, own, strict=True):
                if forward is None:
                    del layer.forward
                else:
                    layer.forward = forward
            for handle in handles:
                handle.remove()


def _pass_on(*positional: Any, **arguments: Any) -> Any:
    return _tensors(positional, arguments)[0]


def _enter(
    name: str, pictures: Sequence[Tensor], _module: nn.Module, positional: tuple[Any, ...], arguments: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A connector's arguments with the recorded pictures, joined along the dimension that gives the expected shape."""
    own = _tensors(positional, arguments)[0]
    for dimension in range(own.ndim):
        shape = list(pictures[0].shape)
        shape[dimension] = sum(tensor.shape[dimension] for tensor in pictures)
        if shape == list(own.shape):
            break
    else:
        raise ConfigError(
            f"data.cache_vision: {name} takes {tuple(own.shape)} for pictures of {[tuple(t.shape) for t in pictures]}; "
            "take data.cache_vision out"
        )
    whole = torch.cat(list(pictures), dimension).to(own.dtype)
    return (
        tuple(whole if value is own else value for value in positional),
        {argument: whole if value is own else value for argument, value in arguments.items()},
    )


def _tensors(positional: Any, arguments: Mapping[str, Any]) -> list[Tensor]:
    """The arguments that are tensors of real numbers."""
    values = itertools.chain(positional, arguments.values())
    return [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]
