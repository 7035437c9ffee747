"""The steering error: formula, gradient, masked rows, and memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mirage_dist.kernels.steer import steer_mse

INDEX = torch.tensor([7, 0, 4, 3])
TOLERANCES = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 5e-3}
WEIGHT = torch.tensor([1.0, 0.5, 0.0, 2.0])


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def formula(act, target, index, weight, coef):
    rows = act.flatten(0, 1)[index]
    return coef * sum(w * (row - t).square().mean() for w, row, t in zip(weight, rows, target, strict=True))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-6), (torch.bfloat16, 5e-3)]
)
@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("indexed", [False, True])
def test_the_formula_and_its_gradient(dtype, tolerance, reference, indexed):
    index, weight = (INDEX, WEIGHT) if indexed else (torch.arange(8), draw(8, seed=3).abs().float())
    act = draw(2, 4, 600, dtype=dtype).requires_grad_()
    target = draw(*([len(index)] if reference else []), 600, seed=1, dtype=dtype)
    loss = steer_mse(act, target, index if indexed else None, weight, 0.7)
    exact = act.detach().double().requires_grad_()
    oracle = formula(exact, target.double().expand(len(index), 600), index, weight.double(), 0.7)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert (loss.double() - oracle).abs() <= tolerance * oracle
    (mine,), (theirs,) = torch.autograd.grad(3 * loss, act), torch.autograd.grad(3 * oracle, exact)
    assert mine.dtype == dtype
    assert (mine.double() - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("indexed", [False, True])
def test_gradient_equals_finite_differences(indexed):
    act, target = draw(2, 4, 3).requires_grad_(), draw(3, seed=1)
    index, weight = (INDEX, WEIGHT) if indexed else (None, draw(8, seed=3).abs())
    assert torch.autograd.gradcheck(lambda x: steer_mse(x, target, index, weight, torch.tensor(0.7)), (act,))


def test_masked_rows_and_rows_left_out_are_neither_read_nor_moved():
    act = draw(2, 4, 5, dtype=torch.float32)
    act.flatten(0, 1)[[4, 1]] = torch.nan  # weight 0, and not in the index
    act.requires_grad_()
    loss = steer_mse(act, draw(5, seed=1, dtype=torch.float32), INDEX, WEIGHT)
    (grad,) = torch.autograd.grad(loss, act)
    assert torch.isfinite(loss)
    moved = grad.flatten(0, 1).abs().sum(1) > 0
    assert moved.nonzero().flatten().tolist() == [0, 3, 7]


def test_no_rows_give_a_zero_that_reaches_the_activations():
    act = draw(2, 4, 5).requires_grad_()
    loss = steer_mse(act, draw(5), torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, act)[0].any()


def test_activations_may_be_any_view_and_the_same_backward_twice_is_bitwise_equal():
    act = draw(4, 2, 5, dtype=torch.float32).transpose(0, 1).requires_grad_()
    target = draw(4, 5, seed=1, dtype=torch.float32)
    loss = steer_mse(act, target, INDEX, WEIGHT)
    scale = torch.tensor(0.3)
    whole = steer_mse(act.detach().contiguous().requires_grad_(), target, INDEX, WEIGHT)
    assert torch.equal(loss, whole)
    first, again = (torch.autograd.grad(loss, act, scale, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again)


def test_the_gradient_is_the_only_tensor_of_the_activations_size():
    class Sizes(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.large = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.untyped_storage().nbytes() >= act.nbytes:
                self.large.add(result.untyped_storage().data_ptr())
            return result

    act = draw(8, 512, 512, dtype=torch.float32).requires_grad_()
    with Sizes() as sizes:
        (grad,) = torch.autograd.grad(steer_mse(act, draw(512, dtype=torch.float32), None, torch.ones(8 * 512)), act)
    assert sizes.large <= {act.data_ptr(), grad.data_ptr()}


@pytest.mark.parametrize("target", [torch.zeros(4), torch.zeros(3, 5), torch.zeros(2, 4, 5)])
def test_shapes_that_do_not_fit_are_named(target):
    with pytest.raises(ValueError, match=r"4 rows of 5 hidden units.*target"):
        steer_mse(torch.zeros(2, 4, 5), target, INDEX, WEIGHT)
