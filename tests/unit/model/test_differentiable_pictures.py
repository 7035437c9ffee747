"""A differentiable preprocessing gives the tower what the family's own processor does, or is refused by name."""

from pathlib import Path

import numpy as np
import pytest
import torch
from families import models
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from mirage_dist.evals.models.hf import encoder
from mirage_dist.model.families import configs, pixels, processors
from mirage_dist.schema import ConfigError, TemplateConfig

REPRODUCED = {"llava_llama", "llava_mistral", "llava_qwen2", "gemma3", "paligemma_templated"}
PICTURED = sorted(name for name in models.FAMILIES if not name.endswith("_text") and name != "paligemma")
SIZES = [(32, 32), (31, 33), (64, 96), (333, 222), (222, 700), (900, 130), (1, 7), (1100, 1101)]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """(family, aspect) -> its encoder, made once."""
    made, folders = {}, {}

    def get(name: str, aspect: str = "auto"):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            models.write_files(name, folders[name])
        if (name, aspect) not in made:
            folder: Path = folders[name]
            template = TemplateConfig(image_aspect=aspect)
            made[name, aspect] = encoder(processors.load(folder), template, configs.load(folder))
        return made[name, aspect]

    return get


def noise(size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)


def tensor(bytes_HWC):
    return torch.from_numpy(bytes_HWC.copy()).permute(2, 0, 1)[None].float()


@pytest.mark.parametrize(
    ("name", "aspect"), [*((name, "auto") for name in PICTURED), ("llava_llama", "processor"), ("llava_qwen2", "pad")]
)
def test_what_reaches_the_tower_equals_the_familys_own_or_the_family_is_refused(encoders, tmp_path, name, aspect):
    """Through the encoder, from the file: what a model under test gets of an uploaded picture."""
    own = encoders(name, aspect)
    if name not in REPRODUCED:
        kind = type(own.processor.image_processor).__name__
        with pytest.raises(ConfigError, match=f"{kind} cannot be written as a differentiable function"):
            pixels.Preprocessing(own.pictured.framing).check()
        return
    made = pixels.Preprocessing(own.pictured.framing)
    made.check()
    for size in SIZES:
        file = tmp_path / f"{size}.png"
        Image.fromarray(noise(size)).save(file)
        expected = own.picture(str(file))["pixel_values"]
        torch.testing.assert_close(made(tensor(noise(size))), expected, rtol=0, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.tuples(*[st.integers(1, 130)] * 4), st.sampled_from(sorted(pixels.FILTERS)), st.integers(0, 9))
@example((2, 3, 1, 1), 3, 1)  # where both orders of resizing have the same bytes of many a picture
@example((2, 2, 1, 1), 2, 4)
def test_resizing_has_pils_bytes(sizes, resample, seed):
    width, height, across, down = sizes
    bytes_HWC = noise((width, height), seed)
    expected = np.asarray(Image.fromarray(bytes_HWC).resize((across, down), resample))

    class Resizing:
        size, do_resize = {"height": down, "width": across}, True

    Resizing.resample = resample
    made = pixels.Preprocessing(plain_framing(Resizing()))(tensor(bytes_HWC))
    assert torch.equal(made[0].permute(1, 2, 0), torch.from_numpy(expected.astype(np.float32)))


def plain_framing(images):
    """A framing that leaves every picture as it is."""

    class Plain:
        colour = (0, 0, 0)

        def __init__(self) -> None:
            self.images = images

        def size(self, size):
            return size

    return Plain()


@pytest.mark.parametrize("size", [(48, 40), (20, 70), (32, 32)])
def test_the_gradient_is_that_of_the_steps_without_their_rounding(encoders, size):
    """Of the mean over many pictures, whose roundings average out, central differences show the same slope."""
    made = pixels.Preprocessing(encoders("llava_llama").pictured.framing)
    generator = torch.Generator().manual_seed(0)
    base = torch.randint(60, 190, (1, 3, size[1], size[0]), generator=generator).float()
    weight = torch.randn(made(base).shape, generator=generator)
    leaf = base.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((made(leaf) * weight).sum(), leaf)
    direction = torch.randint(0, 2, base.shape, generator=generator).float() * 2 - 1
    slopes = []
    for step in range(8, 40):
        high, low = ((made(base + sign * step * direction) * weight).sum() for sign in (1, -1))
        slopes.append(float(high - low) / (2 * step))
    assert np.mean(slopes) == pytest.approx(float((gradient * direction).sum()), rel=0.05, abs=0.5)


def test_an_unknown_step_and_a_size_that_cannot_be_followed_are_refused(encoders):
    framing = encoders("llava_llama").pictured.framing
    scaling = plain_framing(framing.images)
    scaling.size = lambda size: (50, 50)
    with pytest.raises(ConfigError, match="of 90x40 pixels is scaled before CLIPImageProcessor"):
        pixels.Preprocessing(scaling).axes((90, 40))

    class Sharpening:
        do_resize, do_rescale, do_normalize = False, True, False
        rescale_factor, image_mean, image_std, resample = 1 / 255, None, None, None

        def __call__(self, images, return_tensors):
            values = np.stack([np.asarray(image, dtype=np.float32).transpose(2, 0, 1) for image in images])
            return {"pixel_values": torch.from_numpy(values / 255 + (values > 128) * 0.001)}

    class Own(Sharpening):
        pass

    framing = type(framing)(type("P", (), {"image_processor": Own()})(), "processor")
    with pytest.raises(ConfigError, match=r"Own cannot be written .* differs by 0\.001 from its settings' steps"):
        pixels.Preprocessing(framing).check()
