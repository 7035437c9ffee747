"""The torch loss head: gradients by finite differences, the oracle's values, and the edge cases."""

import pytest
import torch
import torch.nn.functional as F

from mirage_dist.kernels.logprob import linear_logits, linear_token_kl, linear_token_logps, select_response


def case(rows, dtype=torch.float64, hidden=6, vocabulary=11, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    labels = torch.randint(vocabulary, (rows,), generator=generator)
    return draw(rows, hidden), draw(vocabulary, hidden), draw(vocabulary), labels


@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradients_equal_finite_differences(rows, softcap):
    hidden, weight, bias, labels = case(rows)
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_token_logps(h, w, labels, bias=b, softcap=softcap).sum(), (hidden, weight, bias)
    )


def test_selected_rows_give_the_shifted_cross_entropy_of_the_whole_batch():
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(3, 9, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(11, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(11, (3, 9), generator=generator)
    labels[:, :4], labels[1] = -100, -100
    rows, kept, segment = select_response(hidden, labels)
    whole = F.cross_entropy((hidden @ weight.T)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(-linear_token_logps(rows, weight, kept).sum(), whole)
    assert segment.tolist() == [0] * 5 + [2] * 5


def test_a_batch_without_response_still_reaches_hidden_and_weight():
    hidden = torch.randn(2, 5, 4, requires_grad=True)
    weight = torch.randn(7, 4, requires_grad=True)
    rows, kept, _ = select_response(hidden, torch.full((2, 5), -100))
    linear_token_logps(rows, weight, kept).sum().backward()
    assert hidden.grad is not None
    assert not hidden.grad.any()
    assert weight.grad is not None
    assert not weight.grad.any()


@pytest.mark.parametrize(("dtype", "log_prob", "gradient"), [(torch.float32, 2e-5, 5e-6), (torch.bfloat16, 1e-4, 5e-3)])
def test_precision_against_float64(dtype, log_prob, gradient):
    hidden, weight, _, labels = case(40, dtype, hidden=64, vocabulary=997)
    exact_h, exact_w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    got, exact = linear_token_logps(hidden, weight, labels), linear_token_logps(exact_h, exact_w, labels)
    got.sum().backward()
    exact.sum().backward()
    assert (got - exact).abs().max() < log_prob
    for mine, oracle in ((hidden.grad, exact_h.grad), (weight.grad, exact_w.grad)):
        assert mine is not None
        assert oracle is not None
        assert (mine.double() - oracle).norm() / oracle.norm() < gradient


def test_the_same_backward_twice_is_bitwise_equal():
    def gradient():
        hidden, weight, _, labels = case(33, torch.float32, 16, 101)
        return torch.autograd.grad(linear_token_logps(hidden, weight, labels).sum(), (hidden, weight))

    assert all(torch.equal(a, b) for a, b in zip(gradient(), gradient(), strict=True))


def test_kl_is_the_definition_and_vanishes_with_its_gradient_at_the_reference():
    hidden, weight, _, _ = case(5)
    reference = linear_logits(hidden + 0.3, weight).detach()
    p, q = reference.softmax(-1), linear_logits(hidden, weight).softmax(-1)
    torch.testing.assert_close(linear_token_kl(hidden, weight, reference), (p * (p / q).log()).sum(-1))
    same = linear_token_kl(hidden, weight, linear_logits(hidden, weight))
    same.sum().backward()
    assert same.abs().max() < 1e-12
    assert hidden.grad is not None
    assert hidden.grad.abs().max() < 1e-12
