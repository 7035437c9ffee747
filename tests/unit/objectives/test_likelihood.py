"""SFT, gradient ascent and gradient difference against token means written out, and their invariance."""

import pytest
import torch

from mirage_dist.config import ConfigError
from mirage_dist.objectives.base import View, make


def total(terms, counts):
    return sum(t.weight * t.sum / counts[t.count] for t in terms)


def view(logp):
    return View(sequences=1, logp_N=logp, segment_N=torch.zeros(len(logp), dtype=torch.int64))


def test_values_and_gradients_are_those_of_the_token_means():
    forget, retain = (torch.randn(n, dtype=torch.float64, requires_grad=True) for n in (5, 3))
    counts = {"forget.tokens": 5, "retain.tokens": 3}
    loss = total(
        make({"name": "graddiff", "retain_weight": 2.0})({"forget": view(forget), "retain": view(retain)}), counts
    )
    torch.testing.assert_close(loss, forget.mean() - 2 * retain.mean())
    loss.backward()
    torch.testing.assert_close(forget.grad, torch.full_like(forget, 1 / 5))
    torch.testing.assert_close(retain.grad, torch.full_like(retain, -2 / 3))


@pytest.mark.parametrize(("name", "stream", "sign"), [("sft", "train", -1), ("ga", "forget", 1)])
def test_micro_batches_add_up_to_the_whole(name, stream, sign):
    logp, counts = torch.randn(9, dtype=torch.float64), {f"{stream}.tokens": 9}
    parts = sum(total(make({"name": name})({stream: view(part)}), counts) for part in (logp[:2], logp[2:]))
    torch.testing.assert_close(parts, sign * logp.mean())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "graddif"}, "graddiff"),
        ({"name": "graddiff", "retain_weigth": 1.0}, "retain_weight"),
        ({"name": "graddiff", "retain_weight": -1.0}, ">= 0"),
    ],
)
def test_a_wrong_option_is_named(options, words):
    with pytest.raises(ConfigError, match=words):
        make(options)
