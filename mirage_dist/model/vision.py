"""Pictures with cached features: the output of a frozen vision tower is a constant, so it need not run again.

The features are the input of the projector, which may train. Shapes: I pictures, P tokens per picture, F features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mirage_dist.schema import ConfigError

FEATURES = "vision_features"  # the input that replaces `pixel_values`
SUPPORTED = "LlavaForConditionalGeneration"


def check(base: Any) -> None:
    """Raise ConfigError unless a picture's features are a constant of fixed size that `entered` can insert.

    base: the Hugging Face model, with adapters and requires_grad as in training; it may be on the meta device.
    """
    kind, vision = type(base).__name__, getattr(base.config, "vision_config", None)
    if kind != SUPPORTED or vision is None or vision.model_type == "pixtral":
        model = f"{kind} with {vision.model_type}" if kind == SUPPORTED and vision is not None else kind
        raise ConfigError(f"data.cache_vision: {model} is not supported, only {SUPPORTED} with pictures of fixed size")
    trained = [name for name, p in base.model.vision_tower.named_parameters() if p.requires_grad]
    if trained:
        raise ConfigError(
            f"data.cache_vision: the vision tower trains ({trained[0]} and {len(trained) - 1} more), its features "
            "change; put '*vision_tower*' into model.freeze and out of model.lora, or take data.cache_vision out"
        )
    drawn = [name for name, value in vision.to_dict().items() if "dropout" in name and value]
    if drawn:
        raise ConfigError(f"data.cache_vision: the vision tower has {drawn[0]}, its features are drawn anew each time")


def features(backbone: Any, pixel_values: Tensor) -> Tensor:
    """The projector's input for these pictures: (I, P, F), in the model's dtype.

    The model selects layers and positions itself; a hook on the projector reads the result.
    """
    inputs_IPF: list[Tensor] = []

    def keep(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        inputs_IPF.append(inputs[0])

    handle = backbone.multi_modal_projector.register_forward_pre_hook(keep)
    try:
        backbone.get_image_features(pixel_values=pixel_values)
    finally:
        handle.remove()
    return inputs_IPF[0]


def entered(backbone: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The backbone's keyword arguments, with cached features projected into the token embeddings if `inputs` has them.

    Every module is called as a module, so that ZeRO-3's hooks gather its parameters.
    """
    if FEATURES not in inputs:
        return dict(inputs)
    rest = {name: tensor for name, tensor in inputs.items() if name not in (FEATURES, "input_ids")}
    embeds_BSD = backbone.get_input_embeddings()(inputs["input_ids"])
    pictures_IPD = backbone.multi_modal_projector(inputs[FEATURES]).to(embeds_BSD.dtype)
    shown_BS = inputs["input_ids"] == backbone.config.image_token_id
    return {**rest, "inputs_embeds": embeds_BSD.masked_scatter(shown_BS.unsqueeze(2), pictures_IPD)}
