"""Cross entropy and NPO on top of the token log-probabilities, as the objectives compose them, against float64."""

import pytest
import torch
import torch.nn.functional as F

from mirage_dist.kernels.logprob import linear_token_logps

LENGTHS = (4, 1, 7, 2)  # response tokens of each sequence
SEGMENT = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))
# MiB: all logits kept; 64 columns (one row with a frozen weight) at a time.
WORKSPACES = [2048, 0]
TOLERANCES = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 5e-3}
LOSSES = ["ce", "seq_sum", "seq_mean", "batch_mean"]
BETAS = [0.1, 0.9]


def case(dtype=torch.float64, rows=14, hidden=6, vocabulary=131, trains=True):
    """Hidden rows, weight and bias, labels, and reference log-probabilities of the sequences."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors = [x.to(dtype) for x in (draw(rows, hidden), draw(vocabulary, hidden), draw(vocabulary))]
    for tensor, needs_grad in zip(tensors, (True, trains, trains), strict=True):
        tensor.requires_grad_(needs_grad)
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    return tensors, labels, draw(4) - 5 * torch.tensor(LENGTHS)


def composed(logp, ref, loss, beta=0.4):
    """Mean cross entropy, or NPO (Zhang et al., 2024, eq. 3) over sums, means or one mean of log-probabilities."""
    if loss == "ce":
        return -logp.sum() / 29
    segment, lengths, ref = SEGMENT[: len(logp)], torch.tensor(LENGTHS), ref.to(logp.dtype)
    if loss == "batch_mean":
        margin = (logp.sum() - ref.sum()) / len(SEGMENT)
    else:
        margin = torch.zeros(4, dtype=logp.dtype).index_add(0, segment, logp) - ref
        margin = margin / lengths if loss == "seq_mean" else margin
    return 2 / beta * F.softplus(beta * margin).mean()


def formula(tensors, labels, ref, loss, softcap, beta):
    """The same loss in float64 with every sequence's sum and −log σ written out, and the copies that it depends on."""
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]
    logits = exact[0] @ exact[1].T + exact[2]
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logp = -F.cross_entropy(logits, labels, reduction="none")
    if loss == "ce":
        return exact, -logp.sum() / 29
    if loss == "batch_mean":
        return exact, -2 / beta * F.logsigmoid(-beta * (logp.mean() - ref.sum() / len(logp)))
    parts = []
    for i, length in enumerate(LENGTHS):
        margin = logp[i == SEGMENT].sum() - ref[i]
        margin = margin / length if loss == "seq_mean" else margin
        parts.append(-2 / beta * F.logsigmoid(-beta * margin))
    return exact, sum(parts) / len(parts)


def close(mine, oracle, tolerance):
    assert all((a.double() - b).norm() <= tolerance * b.norm() for a, b in zip(mine, oracle, strict=True))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("workspace_mb", WORKSPACES)
@pytest.mark.parametrize(("loss", "beta"), [("ce", 0.0), *((name, b) for name in LOSSES[1:] for b in BETAS)])
@pytest.mark.parametrize(("softcap", "trains"), [(None, True), (4.0, True), (4.0, False)])
def test_a_loss_is_the_formula_with_its_gradient(dtype, workspace_mb, loss, beta, softcap, trains):
    tensors, labels, ref = case(dtype, trains=trains)
    logp = linear_token_logps(*tensors[:2], labels, bias=tensors[2], softcap=softcap, workspace_mb=workspace_mb)
    value = composed(logp, ref, loss, beta)
    exact, oracle = formula(tensors, labels, ref, loss, softcap, beta)
    close([value], [oracle], TOLERANCES[torch.float32 if dtype == torch.bfloat16 else dtype])
    leaves, exact = ([x for x in some if x.requires_grad] for some in (tensors, exact))
    close(torch.autograd.grad(3 * value, leaves), torch.autograd.grad(3 * oracle, exact), TOLERANCES[dtype])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_backward_twice_is_bitwise_equal(loss, dtype):
    tensors, labels, ref = case(dtype)

    def value():
        return composed(linear_token_logps(*tensors[:2], labels, workspace_mb=0), ref, loss)

    first, scale = value(), torch.tensor(0.7)
    runs = [torch.autograd.grad(x, tensors[:2], scale, retain_graph=True) for x in (first, first, value())]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("loss", ["ce", "seq_sum", "seq_mean"])
def test_no_rows_give_a_finite_loss_and_a_zero_gradient_that_reaches_hidden_and_weight(loss):
    tensors, labels, ref = case(rows=0)
    value = composed(linear_token_logps(*tensors[:2], labels), ref, loss)
    assert torch.isfinite(value)
    assert not any(x.any() for x in torch.autograd.grad(value, tensors[:2]))
