"""SFT, gradient ascent and gradient difference against token means written out, and their invariance."""

import pytest
import torch

from mirage_dist.objectives.base import View, make
from mirage_dist.schema import ConfigError


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
def test_the_gradient_of_the_logits_is_that_of_the_cross_entropy(name, stream, sign):
    """d(−mean log softmax(z)[y])/dz = (softmax(z) − onehot(y)) / N; gradient ascent turns it round."""
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([3, 0, 6, 2, 2])
    logp = logits.log_softmax(-1).gather(1, labels[:, None]).squeeze(1)
    loss = total(make({"name": name})({stream: view(logp)}), {f"{stream}.tokens": 5})
    loss.backward()
    probabilities = logits.detach().exp() / logits.detach().exp().sum(-1, keepdim=True)
    expected = (probabilities - torch.nn.functional.one_hot(labels, 7)) / 5
    torch.testing.assert_close(logits.grad, -sign * expected)


@pytest.mark.parametrize(("name", "stream", "sign"), [("sft", "train", -1), ("ga", "forget", 1)])
def test_micro_batches_add_up_to_the_whole(name, stream, sign):
    logp, counts = torch.randn(9, dtype=torch.float64, requires_grad=True), {f"{stream}.tokens": 9}
    parts = sum(total(make({"name": name})({stream: view(part)}), counts) for part in (logp[:2], logp[2:]))
    torch.testing.assert_close(parts, sign * logp.mean())
    parts.backward()
    torch.testing.assert_close(logp.grad, torch.full_like(logp, sign / 9))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "graddif"}, "graddiff"),
        ({"name": "graddiff", "retain_weigth": 1.0}, "retain_weight"),
        ({"name": "graddiff", "retain_weight": -1.0}, "at least 0"),
    ],
)
def test_a_wrong_option_is_named(options, words):
    with pytest.raises(ConfigError, match=words):
        make(options)
