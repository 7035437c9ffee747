"""The probe reads a planted attribute and nothing else; its regression is at the minimum of its loss."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mirage_dist.data.sample import Sample
from mirage_dist.erasure import setting as parts
from mirage_dist.erasure.probe import Probe, regression
from mirage_dist.schema import ConfigError

CLASSES, WIDTH = 4, 32
NAMES = [f"class {k}" for k in range(CLASSES)]


def labelled(pictures: int, each: int = 2) -> tuple[list[Sample], list[str]]:
    """Several questions about each picture, which decides the label."""
    numbers = [(picture, question) for picture in range(pictures) for question in range(each)]
    samples = [Sample(f"{p}-{q}", f"{p}.png", "tell", "", False, "", "test") for p, q in numbers]
    return samples, [NAMES[p % CLASSES] for p, _ in numbers]


def planted(labels: list[str], strength: float, seed: int) -> torch.Tensor:
    """Noise, along one direction of which each class is moved."""
    generator = torch.Generator().manual_seed(seed)
    direction_KD = torch.randn(CLASSES, WIDTH, generator=generator)
    noise_ND = torch.randn(len(labels), WIDTH, generator=generator)
    return noise_ND + strength * direction_KD[[NAMES.index(label) for label in labels]]


def probed(strength: float, seed: int, test_share: float = 0.3):
    samples, labels = labelled(200)
    x_ND = planted(labels, strength, seed)
    border = round((1 - test_share) * len(samples))
    read = {"last": x_ND[None], "image": None}
    groups = [parts.group(sample) for sample in samples]
    return Probe().probed(labels, groups, read, range(border), range(border, len(samples)))


@settings(max_examples=10)
@given(seed=st.integers(0, 1000))
def test_a_planted_attribute_is_read_and_shuffled_labels_give_chance(seed):
    (place,) = probed(2.0, seed)["places"]["last"]
    assert place["accuracy"]["rate"] > 0.95
    low, high = place["shuffled"]["ci95"]
    assert place["shuffled"]["rate"] < 0.5
    assert low - 0.1 < 1 / CLASSES < high + 0.1


@settings(max_examples=10)
@given(seed=st.integers(0, 1000))
def test_nothing_planted_gives_chance(seed):
    result = probed(0.0, seed)
    low, high = result["places"]["last"][0]["accuracy"]["ci95"]
    assert low - 0.1 < 1 / CLASSES < high + 0.1
    assert result["majority"]["n"] == result["tested"] == 120
    assert result["majority"]["questions"] == 60  # two questions about one picture are not two trials


def test_the_regression_is_at_its_minimum():
    """Oracle: there the gradient of the mean cross entropy is −l2 · W, whatever solver found it."""
    _, labels = labelled(60)
    x_ND, y_N = planted(labels, 0.3, 3), torch.tensor([NAMES.index(label) for label in labels])
    fitted = regression(x_ND, y_N, CLASSES, 0.05)
    z_ND = (x_ND - x_ND.mean(0)) / x_ND.std(0)
    wrong_NK = fitted.scores(x_ND).softmax(1) - torch.nn.functional.one_hot(y_N, CLASSES)
    gradient_DK = z_ND.T @ wrong_NK / len(y_N) + 0.05 * fitted.weight_DK
    assert gradient_DK.abs().max() < 1e-3
    assert wrong_NK.mean(0).abs().max() < 1e-3


def test_classes_that_are_too_small_are_left_out_and_counted():
    _, labels = labelled(100)
    labels = ["rare" if i < 8 else label for i, label in enumerate(labels)]
    read = {"last": planted([NAMES[0]] * len(labels), 0.0, 1)[None], "image": None}
    result = Probe().probed(labels, labels, read, range(150), range(150, 200))
    assert "rare" not in result["classes"]
    assert result["left_out"] == 8
    with pytest.raises(ConfigError, match="needs two"):
        Probe(least=1000).probed(labels, labels, read, range(150), range(150, 200))


@given(seed=st.integers(0, 1000))
def test_an_order_by_hash_depends_on_names_and_seed_only(seed):
    names = [f"{i}.png" for i in range(40)]
    assert parts.order(names, seed) == parts.order(names[::-1] + names, seed)
    assert parts.order(names, seed) != parts.order(names, seed + 1)
