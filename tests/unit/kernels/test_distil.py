"""The distilled cross entropy against PyTorch's own over whole logits in float64: values, gradients, memory."""

import pytest
import torch
import torch.nn.functional as F

from mirage_dist.kernels.distil import linear_distilled_ce
from mirage_dist.kernels.logprob import linear_logits, linear_token_kl

ROWS, HIDDEN, VOCABULARY = 9, 6, 331
TOLERANCES = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 5e-3}


def case(dtype=torch.float64, trains=True, rows=ROWS):
    generator = torch.Generator().manual_seed(0)
    shapes = (rows, HIDDEN), (VOCABULARY, HIDDEN), (VOCABULARY,)
    tensors = [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    for tensor, needs_grad in zip(tensors, (True, trains, trains), strict=True):
        tensor.requires_grad_(needs_grad)
    labels = torch.randint(VOCABULARY, (rows,), generator=generator)
    teacher = 3 * torch.randn(rows, VOCABULARY, generator=generator, dtype=torch.float64)
    return tensors, labels, teacher if dtype == torch.float64 else teacher.float()


def formula(tensors, labels, teacher, penalty, softcap):
    """`compute_undial_loss` of open-unlearning (src/trainer/utils.py) at its rows: CrossEntropyLoss to soft labels."""
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]
    logits = exact[0] @ exact[1].T + exact[2]
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    soft = (teacher.double() - penalty * F.one_hot(labels, VOCABULARY)).softmax(-1)
    return exact, F.cross_entropy(logits, soft, reduction="none")


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("workspace_mb", [512, 0])  # 0: 64 columns, or one row, at a time
@pytest.mark.parametrize(("softcap", "trains", "penalty"), [(None, True, 10.0), (4.0, True, 3.0), (4.0, False, 10.0)])
def test_it_is_the_cross_entropy_to_soft_labels_with_its_gradient(
    dtype, workspace_mb, softcap, trains, penalty, monkeypatch
):
    if not workspace_mb:
        monkeypatch.setattr("mirage_dist.kernels.passes.columns_that_fit", lambda *_: 64)
        monkeypatch.setattr("mirage_dist.kernels.passes.rows_that_fit", lambda *_: 1)
    tensors, labels, teacher = case(dtype, trains)
    mine = linear_distilled_ce(*tensors[:2], labels, teacher, penalty, bias=tensors[2], softcap=softcap)
    exact, oracle = formula(tensors, labels, teacher, penalty, softcap)
    value = TOLERANCES[torch.float32 if dtype == torch.bfloat16 else dtype]
    assert (mine.double() - oracle).norm() <= value * oracle.norm()
    weights = torch.linspace(-1, 2, ROWS, dtype=torch.float64)  # any upstream gradient
    leaves, exact = ([x for x in some if x.requires_grad] for some in (tensors, exact))
    grads = torch.autograd.grad((mine * weights.to(mine.dtype)).sum(), leaves, retain_graph=True)
    for own, theirs in zip(grads, torch.autograd.grad((oracle * weights).sum(), exact), strict=True):
        assert (own.double() - theirs).norm() <= TOLERANCES[dtype] * theirs.norm()
    again = torch.autograd.grad((mine * weights.to(mine.dtype)).sum(), leaves)
    assert all(torch.equal(one, other) for one, other in zip(grads, again, strict=True))


def test_without_a_penalty_it_is_the_kl_divergence_and_the_teachers_entropy():
    (hidden, weight, _), labels, teacher = case()
    mine = linear_distilled_ce(hidden, weight, labels, teacher, 0.0)
    entropy = -(teacher.softmax(-1) * teacher.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(mine, linear_token_kl(hidden, weight, teacher) + entropy)


def test_its_gradient_vanishes_where_the_policy_is_the_lowered_teacher():
    (hidden, weight, _), labels, _ = case()
    teacher = linear_logits(hidden, weight).detach() + 7 * F.one_hot(labels, VOCABULARY)
    (grad,) = torch.autograd.grad(linear_distilled_ce(hidden, weight, labels, teacher, 7.0).sum(), hidden)
    assert grad.abs().max() < 1e-12


@pytest.mark.parametrize("trains", [True, False])
def test_no_rows_still_take_part_in_backward(trains):
    tensors, labels, teacher = case(trains=trains, rows=0)
    loss = linear_distilled_ce(*tensors[:2], labels, teacher, 10.0, bias=tensors[2])
    for grad in torch.autograd.grad(loss.sum(), [t for t in tensors if t.requires_grad]):
        assert not grad.any()


@pytest.mark.parametrize("trains", [True, False])
def test_no_further_matrix_of_rows_by_vocabulary_is_kept_for_backward(trains):
    tensors, labels, teacher = case(trains=trains)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear_distilled_ce(*tensors[:2], labels, teacher, 10.0, bias=tensors[2])
    large = [t for t in kept if t.numel() >= teacher.numel()]
    assert all(t.data_ptr() == teacher.data_ptr() for t in large)
    assert len(large) == trains


def test_wrong_shapes_and_labels_are_errors():
    (hidden, weight, _), labels, teacher = case()
    with pytest.raises(ValueError, match=r"must be \(9, 331\), a row for each hidden row"):
        linear_distilled_ce(hidden, weight, labels, teacher[:-1], 1.0)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        linear_distilled_ce(hidden, weight, labels + VOCABULARY, teacher, 1.0)
