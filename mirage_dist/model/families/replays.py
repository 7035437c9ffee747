"""Whether recorded features can stand for pictures in a family, measured on a small model before weights load."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from mirage_dist.data.encoding.collate import Encoder
from mirage_dist.model import vision
from mirage_dist.model.families import small
from mirage_dist.model.policy import HeadedModel, Request, differ_by, no_grad_forward
from mirage_dist.schema import ConfigError

SIZES = ((40, 56), (112, 48))  # of the pictures, in pixels


def fault(config: Any, encoder: Encoder, attention: str | None = None) -> str | None:
    """Why two pictures of different sizes, recorded one by one, do not give the decoder what they give it together.

    None where they do, or where no small model can be made or run; the real one is compared when the features are
    computed. Raises ConfigError when the processor cannot encode the pictures.
    """
    pictured = encoder.pictured
    if pictured is None:
        return None
    pictures = [Image.linear_gradient("L").resize(size).convert("RGB") for size in SIZES]
    rows, together = pictured([pictured.text] * len(pictures), pictures)
    alone = [pictured([pictured.text], [picture])[1] for picture in pictures]
    names = [name for name in rows[0] if name != "labels"]
    tokens = {name: pad_sequence([torch.tensor(row[name]) for row in rows], batch_first=True) for name in names}
    try:
        with torch.random.fork_rng(devices=[]):
            model = HeadedModel(small.made(config, attention))
        whole = no_grad_forward(model, together, Request(vision=())).vision
        features = [no_grad_forward(model, one, Request(vision=tuple(whole or ()))).vision or {} for one in alone]
    except ConfigError:
        raise
    except Exception:  # of any kind: the code is the family's own
        return None
    if not features[0]:
        return f"nothing in {config.model_type} that takes only what its tower computes connects it to the decoder"
    others = {name: [one[name] for one in alone] for name in together if not vision.is_pixels(name)}
    shapes = [{name: value.shape for name, value in one.items() if vision.is_pixels(name)} for one in alone]
    inputs = {**tokens, **{name: vision.joint(of) for name, of in others.items()}, **vision.replayed(features, shapes)}
    try:
        difference = differ_by(model, model.depth, {**tokens, **together}, inputs)
    except Exception:  # of any kind, with the pictures themselves
        return None
    if difference <= vision.tolerance(torch.float32):
        return None
    return f"{config.model_type} computes something else with features than with its pictures"
