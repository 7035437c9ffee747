"""KL and logits of the loss head, and the identity between selected rows and a whole batch's cross entropy."""

import pytest
import torch
import torch.nn.functional as F

from mirage_dist.data.encoding.collate import IGNORE
from mirage_dist.kernels.logprob import linear_logits, linear_token_kl, linear_token_logps

# dtype -> largest absolute error of a value, relative error of a gradient
TOLERANCES = {torch.float64: (1e-12, 1e-12), torch.float32: (2e-5, 5e-6), torch.bfloat16: (1e-4, 5e-3)}


def case(rows, dtype=torch.float64, hidden=6, vocabulary=11, seed=0):
    """Hidden rows, weight and bias as leaves, and reference logits."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    leaves = [x.to(dtype).requires_grad_() for x in (draw(rows, hidden), draw(vocabulary, hidden), draw(vocabulary))]
    return leaves, draw(rows, vocabulary).to(torch.promote_types(dtype, torch.float32))


def plain_logits(leaves, softcap):
    """The logits by their definition in float64, and the copies of the leaves that they depend on."""
    exact = [x.detach().double().requires_grad_() for x in leaves]
    logits = exact[0] @ exact[1].T + exact[2]
    return exact, logits if softcap is None else softcap * torch.tanh(logits / softcap)


def close(mine, oracle, tolerance):
    assert all((a.double() - b).norm() <= tolerance * b.norm() for a, b in zip(mine, oracle, strict=True))


def test_selected_rows_give_the_shifted_cross_entropy_of_the_whole_batch():
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(3, 9, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(11, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(11, (3, 9), generator=generator)
    labels[:, :4], labels[1] = IGNORE, IGNORE
    # The hidden state at position t predicts the token at t + 1.
    row, position = (labels[:, 1:] != IGNORE).nonzero(as_tuple=True)
    logp = linear_token_logps(hidden[row, position], weight, labels[row, position + 1])
    logits = (hidden @ weight.T)[:, :-1].flatten(0, 1)
    whole = F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum", ignore_index=IGNORE)
    torch.testing.assert_close(-logp.sum(), whole)
    assert row.tolist() == [0] * 5 + [2] * 5


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_logits_are_the_formula_with_its_gradient(dtype, softcap):
    leaves, reference = case(40, dtype, hidden=64, vocabulary=997)
    logits = linear_logits(*leaves[:2], bias=leaves[2], softcap=softcap)
    exact, oracle = plain_logits(leaves, softcap)
    value, gradient = TOLERANCES[dtype]
    assert logits.dtype == torch.promote_types(dtype, torch.float32)
    assert (logits - oracle).abs().max() < value
    grads = torch.autograd.grad(logits, leaves, reference)
    assert [x.dtype for x in grads] == [dtype] * 3
    close(grads, torch.autograd.grad(oracle, exact, reference.double()), gradient)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_kl_is_the_definition_with_its_gradient(dtype, softcap):
    leaves, reference = case(40, dtype, hidden=64, vocabulary=997)
    kl = linear_token_kl(*leaves[:2], reference, bias=leaves[2], softcap=softcap)
    exact, logits = plain_logits(leaves, softcap)
    p, q = reference.double().softmax(-1), logits.softmax(-1)
    oracle = (p * (p.log() - q.log())).sum(-1)
    value, gradient = TOLERANCES[dtype]
    assert (kl - oracle).abs().max() < value
    close(torch.autograd.grad(kl.sum(), leaves), torch.autograd.grad(oracle.sum(), exact), gradient)


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradients_of_kl_equal_finite_differences(rows, softcap):
    leaves, reference = case(rows)

    def kl(hidden, weight, bias):
        return linear_token_kl(hidden, weight, reference, bias=bias, softcap=softcap)

    assert torch.autograd.gradcheck(kl, leaves)


def test_kl_vanishes_with_its_gradient_at_the_reference():
    (hidden, weight, _), _ = case(5)
    same = linear_token_kl(hidden, weight, linear_logits(hidden, weight))
    same.sum().backward()
    assert same.abs().max() < 1e-12
    assert hidden.grad is not None
    assert hidden.grad.abs().max() < 1e-12


def test_a_frozen_weight_gets_no_gradient_and_changes_no_value_of_kl():
    leaves, reference = case(5)
    results = []
    for trains in (True, False):
        hidden, weight, bias = (x.detach().requires_grad_(trains) for x in leaves)
        hidden.requires_grad_()
        kl = linear_token_kl(hidden, weight, reference, bias=bias)
        kl.sum().backward()
        results.append((kl.detach(), hidden.grad))
        assert trains == (weight.grad is not None) == (bias.grad is not None)
    torch.testing.assert_close(*results, rtol=0, atol=0)
