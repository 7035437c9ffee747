"""Cross entropy and NPO with their gradient formed in forward: the formulas, in every cut, and the same bits twice."""

import pytest
import torch
import torch.nn.functional as F

from mirage_dist.kernels import passes
from mirage_dist.kernels.logprob import linear_ce, linear_npo, linear_token_logps

LENGTHS = (4, 1, 7, 2)
SEGMENT = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))
REDUCTIONS = ["seq_sum", "seq_mean", "batch_mean"]
# 0 MiB is one row, or one sequence, at a time.
WORKSPACES = [0, 2048]
TOLERANCES = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 5e-3}


def case(dtype=torch.float64, rows=14, hidden=6, vocabulary=131, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    leaves = [x.to(dtype).requires_grad_() for x in (draw(rows, hidden), draw(vocabulary, hidden), draw(vocabulary))]
    return leaves, torch.randint(vocabulary, (rows,), generator=generator), draw(4) - 5 * torch.tensor(LENGTHS)


def exact(leaves, labels, softcap):
    leaves = [x.detach().double().requires_grad_() for x in leaves]
    logits = leaves[0] @ leaves[1].T + leaves[2]
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return leaves, -F.cross_entropy(logits, labels, reduction="none")


def npo_formula(logp, ref, beta, reduction):
    if reduction == "batch_mean":
        return -2 / beta * F.logsigmoid(-beta * (logp.mean() - ref.sum() / len(logp)))
    parts = []
    for i, length in enumerate(LENGTHS):
        margin = logp[i == SEGMENT].sum() - ref[i]
        margin = margin / length if reduction == "seq_mean" else margin
        parts.append(-2 / beta * F.logsigmoid(-beta * margin))
    return sum(parts) / len(parts)


def close(found, oracle, dtype):
    for mine, theirs in zip(found, oracle, strict=True):
        assert (mine.double() - theirs).norm() <= TOLERANCES[dtype] * theirs.norm()


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("workspace_mb", WORKSPACES)
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_cross_entropy_is_the_formula_with_its_gradient(dtype, workspace_mb, softcap):
    leaves, labels, _ = case(dtype)
    labels[3] = -100
    loss = linear_ce(*leaves[:2], labels, 29, bias=leaves[2], softcap=softcap, workspace_mb=workspace_mb)
    doubles, logp = exact(leaves, labels, softcap)
    close([loss], [-logp.sum() / 29], torch.float32 if dtype == torch.bfloat16 else dtype)
    close(torch.autograd.grad(3 * loss, leaves), torch.autograd.grad(-3 * logp.sum() / 29, doubles), dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("workspace_mb", WORKSPACES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("beta", [0.1, 0.9])
def test_npo_is_the_formula_with_its_gradient(dtype, workspace_mb, reduction, beta):
    leaves, labels, ref = case(dtype)
    loss, seq_logp = linear_npo(
        *leaves[:2], labels, SEGMENT, ref, beta, reduction, bias=leaves[2], softcap=4.0, workspace_mb=workspace_mb
    )
    doubles, logp = exact(leaves, labels, 4.0)
    oracle = npo_formula(logp, ref, beta, reduction)
    sums = torch.stack([logp[i == SEGMENT].sum() for i in range(4)])
    close([loss, seq_logp], [oracle, sums.detach()], torch.float32 if dtype == torch.bfloat16 else dtype)
    assert not seq_logp.requires_grad
    close(torch.autograd.grad(3 * loss, leaves), torch.autograd.grad(3 * oracle, doubles), dtype)


@pytest.mark.parametrize("workspace_mb", WORKSPACES)
@pytest.mark.parametrize("reduction", ["ce", *REDUCTIONS])
def test_gradients_equal_finite_differences(workspace_mb, reduction):
    leaves, labels, ref = case(hidden=3, vocabulary=17)

    def loss(hidden, weight, bias):
        options = {"bias": bias, "softcap": 3.0, "workspace_mb": workspace_mb}
        if reduction == "ce":
            return linear_ce(hidden, weight, labels, torch.tensor(7.0), **options)
        return linear_npo(hidden, weight, labels, SEGMENT, ref, 0.4, reduction, **options)[0]

    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("reduction", ["ce", *REDUCTIONS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_backward_twice_is_bitwise_equal(reduction, dtype):
    leaves, labels, ref = case(dtype)

    def loss():
        if reduction == "ce":
            return linear_ce(*leaves[:2], labels, 7, workspace_mb=0)
        return linear_npo(*leaves[:2], labels, SEGMENT, ref.float(), 0.4, reduction, workspace_mb=0)[0]

    first = loss()
    scale = torch.tensor(0.7)
    runs = [torch.autograd.grad(x, leaves[:2], scale, retain_graph=True) for x in (first, first, loss())]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("frozen", [False, True])
def test_without_a_gradient_or_a_trained_weight_the_numbers_are_the_same(frozen):
    leaves, labels, ref = case()
    told = [linear_ce(*leaves[:2], labels, 7), *linear_npo(*leaves[:2], labels, SEGMENT, ref, 0.4, "seq_sum")]
    hidden = leaves[0].detach().requires_grad_(frozen)
    weight = leaves[1].detach()
    again = [linear_ce(hidden, weight, labels, 7), *linear_npo(hidden, weight, labels, SEGMENT, ref, 0.4, "seq_sum")]
    torch.testing.assert_close(again, [x.detach() for x in told] if not frozen else told)
    if frozen:
        mine, oracle = (torch.autograd.grad(x[0] + x[1], h) for x, h in ((again, hidden), (told, leaves[0])))
        torch.testing.assert_close(mine, oracle)
    else:
        assert not any(x.requires_grad for x in again)


def test_npo_agrees_with_the_log_probabilities_that_objectives_use():
    leaves, labels, ref = case()
    logp = linear_token_logps(*leaves[:2], labels)
    sums = torch.zeros(4, dtype=torch.float64).index_add(0, SEGMENT, logp)
    loss, seq_logp = linear_npo(*leaves[:2], labels, SEGMENT, ref, 0.4, "seq_sum", lengths=LENGTHS)
    torch.testing.assert_close(seq_logp, sums.detach())
    torch.testing.assert_close(loss, 2 / 0.4 * F.softplus(0.4 * (sums - ref)).mean())


def test_no_rows_give_a_zero_that_reaches_hidden_and_weight():
    leaves, labels, ref = case(rows=0)
    ce = linear_ce(*leaves[:2], labels, 7)
    npo, seq_logp = linear_npo(*leaves[:2], labels, SEGMENT[:0], ref[:0], 0.4, "seq_sum")
    assert ce.item() == npo.item() == 0
    assert seq_logp.shape == (0,)
    for loss in (ce, npo):
        assert not any(x.any() for x in torch.autograd.grad(loss, leaves[:2]))


@pytest.mark.parametrize(
    ("segment", "reduction", "words"),
    [
        (SEGMENT.clamp(max=2), "seq_sum", "needs a response token"),
        (SEGMENT.flip(0), "seq_sum", "batch order"),
        (SEGMENT, "sum", "batch_mean"),
    ],
)
def test_what_cannot_be_a_batch_is_refused(segment, reduction, words):
    leaves, labels, ref = case()
    with pytest.raises(ValueError, match=words):
        linear_npo(*leaves[:2], labels, segment, ref, 0.4, reduction)


def test_sequences_are_never_cut():
    assert passes.cut_between(LENGTHS, 5) == [slice(0, 5), slice(5, 12), slice(12, 14)]
    assert passes.cut_between(LENGTHS, 9) == [slice(0, 5), slice(5, 14)]
    assert passes.cut_between(LENGTHS, 1) == [slice(0, 4), slice(4, 5), slice(5, 12), slice(12, 14)]
    assert passes.cut_between((), 5) == []
