"""The steering error: formula, gradient, masked rows, and memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mirage_dist.kernels.steer import steer_mse

TOLERANCES = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 5e-3}
WEIGHT = torch.tensor([1.0, 0.0, 0.5, 2.0, 0.0, 1.0, 0.25, 3.0])


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def formula(act, target, weight):
    rows = zip(weight, act.flatten(0, 1), target, strict=True)
    return sum(w * (row - t).square().mean() for w, row, t in rows)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES.items())
@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_the_formula_and_its_gradient(dtype, tolerance, reference, masked):
    weight = WEIGHT if masked else draw(8, seed=3).abs().float()
    act = draw(2, 4, 600, dtype=dtype).requires_grad_()
    target = draw(*([8] if reference else []), 600, seed=1, dtype=dtype)
    loss = steer_mse(act, target, weight)
    exact = act.detach().double().requires_grad_()
    oracle = formula(exact, target.double().expand(8, 600), weight.double())
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert (loss.double() - oracle).abs() <= tolerance * oracle
    (mine,), (theirs,) = torch.autograd.grad(3 * loss, act), torch.autograd.grad(3 * oracle, exact)
    assert mine.dtype == dtype
    assert (mine.double() - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("reference", [False, True])
def test_gradient_equals_finite_differences(reference):
    act, target = draw(2, 4, 3).requires_grad_(), draw(*([8] if reference else []), 3, seed=1)
    assert torch.autograd.gradcheck(lambda x: steer_mse(x, target, WEIGHT.double()), (act,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_weight_0_are_neither_read_nor_moved(dtype):
    act = draw(2, 4, 5, dtype=dtype)
    act.flatten(0, 1)[[4, 1]] = torch.tensor([torch.nan, torch.inf], dtype=dtype)[:, None]
    act.requires_grad_()
    loss = steer_mse(act, draw(5, seed=1, dtype=dtype), WEIGHT)
    (grad,) = torch.autograd.grad(loss, act)
    assert torch.isfinite(loss)
    moved = grad.flatten(0, 1).abs().sum(1) > 0
    assert moved.nonzero().flatten().tolist() == [0, 2, 3, 5, 6, 7]


def test_no_rows_give_a_zero_that_reaches_the_activations():
    act = draw(2, 0, 5).requires_grad_()
    loss = steer_mse(act, draw(5), torch.zeros(0))
    assert loss.item() == 0
    assert torch.autograd.grad(loss, act)[0].shape == act.shape


def test_activations_may_be_any_view_and_the_same_backward_twice_is_bitwise_equal():
    act = draw(4, 2, 5, dtype=torch.float32).transpose(0, 1).requires_grad_()
    target = draw(8, 5, seed=1, dtype=torch.float32)
    loss = steer_mse(act, target, WEIGHT)
    scale = torch.tensor(0.3)
    whole = steer_mse(act.detach().contiguous().requires_grad_(), target, WEIGHT)
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
        (grad,) = torch.autograd.grad(steer_mse(act, draw(512, dtype=torch.float32), torch.ones(8 * 512)), act)
    assert sizes.large <= {act.data_ptr(), grad.data_ptr()}


@pytest.mark.parametrize("target", [torch.zeros(4), torch.zeros(3, 5), torch.zeros(2, 4, 5)])
def test_shapes_that_do_not_fit_are_named(target):
    with pytest.raises(ValueError, match=r"8 rows of 5 hidden units.*target"):
        steer_mse(torch.zeros(2, 4, 5), target, WEIGHT)
