"""Every way to the token log-probabilities gives the same numbers, in bounded memory, and the same bits twice."""

import pytest
import torch

from mirage_dist.kernels import passes, projection
from mirage_dist.kernels.logprob import linear_ce, linear_token_logps

# A workspace of 0 MiB is one chunk of 64 columns, or one row, at a time.
WAYS = [("auto", 512), ("cached", 512), ("recompute", 512), ("recompute", 0)]
TOLERANCES = {torch.float32: (2e-5, 5e-6), torch.bfloat16: (1e-4, 5e-3)}


def case(rows, dtype=torch.float64, hidden=32, vocabulary=997, seed=0):
    """Hidden rows, weight and bias as leaves, labels, upstream gradients. 997 is no multiple of any tile."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    leaves = [x.to(dtype).requires_grad_() for x in (draw(rows, hidden), draw(vocabulary, hidden), draw(vocabulary))]
    return leaves, torch.randint(vocabulary, (rows,), generator=generator), draw(rows), draw(rows)


def confident(weight, labels):
    """Hidden rows that give their labels a probability of about 0.99, by bisection of their length."""
    rows = weight.detach()[labels].double()
    rows = rows / rows.square().sum(1, keepdim=True)
    low, high = torch.zeros(len(rows), 1), torch.full((len(rows), 1), 64.0)
    for _ in range(50):
        middle = (low + high) / 2
        p = linear_token_logps(rows * middle, weight.detach().double(), labels).exp()[:, None]
        low, high = torch.where(p < 0.99, middle, low), torch.where(p < 0.99, high, middle)
    return (rows * low).to(weight.dtype).requires_grad_()


def plain(leaves, labels, softcap=None):
    """Log-probabilities and log-sum-exps by their definition, in float64, on leaves of their own."""
    exact = [x.detach().double().requires_grad_() for x in leaves]
    logits = exact[0] @ exact[1].T
    logits = logits + exact[2] if len(exact) == 3 else logits
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    lse = logits.logsumexp(1)
    return exact, logits.gather(1, labels[:, None]).squeeze(1) - lse, lse


def error(mine, oracle):
    return (mine.double() - oracle).norm() / oracle.norm()


@pytest.mark.parametrize(("mode", "workspace_mb"), WAYS)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_values_and_gradients_against_float64(mode, workspace_mb, dtype, softcap):
    leaves, labels, g, e = case(23, dtype)
    logp, lse = linear_token_logps(
        *leaves[:2], labels, bias=leaves[2], softcap=softcap, mode=mode, workspace_mb=workspace_mb, return_lse=True
    )
    exact, exact_logp, exact_lse = plain(leaves, labels, softcap)
    value, gradient = TOLERANCES[dtype]
    assert logp.dtype == lse.dtype == torch.float32
    assert max((logp - exact_logp).abs().max(), (lse - exact_lse).abs().max()) < value
    found = torch.autograd.grad((g.float() * logp + e.float() * lse).sum(), leaves)
    oracle = torch.autograd.grad((g * exact_logp + e * exact_lse).sum(), exact)
    assert [x.dtype for x in found] == [dtype] * 3
    assert max(error(*pair) for pair in zip(found, oracle, strict=True)) < gradient


@pytest.mark.parametrize(("mode", "workspace_mb"), WAYS)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_a_label_of_probability_99_percent_keeps_its_digits(mode, workspace_mb, dtype):
    (_, weight, _), labels, g, _ = case(23, dtype)
    leaves = [confident(weight, labels), weight]
    logp = linear_token_logps(*leaves, labels, mode=mode, workspace_mb=workspace_mb)
    exact, exact_logp, _ = plain(leaves, labels)
    value, gradient = TOLERANCES[dtype]
    assert (exact_logp.exp() - 0.99).abs().max() < 0.01
    assert (logp - exact_logp).abs().max() < value
    found = torch.autograd.grad((g.float() * logp).sum(), leaves)
    oracle = torch.autograd.grad((g * exact_logp).sum(), exact)
    assert max(error(*pair) for pair in zip(found, oracle, strict=True)) < gradient


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize(("mode", "workspace_mb"), WAYS)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradients_equal_finite_differences(rows, mode, workspace_mb, softcap):
    leaves, labels, g, e = case(rows, hidden=4, vocabulary=131)

    def loss(hidden, weight, bias):
        logp, lse = linear_token_logps(
            hidden, weight, labels, bias=bias, softcap=softcap, mode=mode, workspace_mb=workspace_mb, return_lse=True
        )
        return (g * logp).sum() + (e * lse.sin()).sum()

    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("workspace_mb", [512, 0])
def test_a_frozen_head_gives_the_hidden_gradient_of_a_trained_one_and_keeps_no_logits(workspace_mb):
    (hidden, weight, bias), labels, g, _ = case(23)
    told = []
    for trains in (True, False):
        weight, bias = (x.detach().requires_grad_(trains) for x in (weight, bias))
        logp = linear_token_logps(hidden, weight, labels, bias=bias, softcap=4.0, workspace_mb=workspace_mb)
        told.append((logp, *torch.autograd.grad((g * logp).sum(), hidden, retain_graph=True)))
    torch.testing.assert_close(told[1], told[0])
    kept = [x for x in logp.grad_fn.saved_tensors if x is not None]
    assert [x.shape for x in kept] == [hidden.shape]


@pytest.mark.parametrize(("mode", "workspace_mb"), WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_backward_twice_is_bitwise_equal(mode, workspace_mb, dtype):
    def loss(leaves):
        return (linear_token_logps(*leaves[:2], labels, mode=mode, workspace_mb=workspace_mb) * g.float()).sum()

    leaves, labels, g, _ = case(33, dtype)
    first = loss(leaves)
    # Through the same graph (the first backward uses the kept logits up), and through another.
    runs = [torch.autograd.grad(x, leaves[:2], retain_graph=True) for x in (first, first, loss(leaves))]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize(("mode", "workspace_mb"), WAYS)
def test_ignored_rows_are_zero_and_wrong_labels_an_error(mode, workspace_mb):
    leaves, labels, _, _ = case(6)
    labels[[1, 4]] = -100
    logp = linear_token_logps(*leaves[:2], labels, mode=mode, workspace_mb=workspace_mb)
    assert logp[[1, 4]].tolist() == [0, 0]
    found = torch.autograd.grad(logp.sum(), leaves[:2])
    keep = labels != -100
    kept = linear_token_logps(leaves[0][keep], leaves[1], labels[keep])
    torch.testing.assert_close(found, torch.autograd.grad(kept.sum(), leaves[:2]))
    all_ignored = linear_token_logps(*leaves[:2], torch.full_like(labels, -100), mode=mode, workspace_mb=workspace_mb)
    assert not any(x.any() for x in torch.autograd.grad(all_ignored.sum(), leaves[:2]))
    with pytest.raises(ValueError, match="label 997"):
        linear_token_logps(*leaves[:2], torch.full_like(labels, 997), mode=mode)


@pytest.mark.parametrize("train", [False, True])
def test_no_rows_still_reach_hidden_and_weight(train):
    leaves, labels, _, _ = case(0)
    leaves[1] = leaves[1].detach().requires_grad_(train)
    linear_token_logps(*leaves[:2], labels).sum().backward()
    assert leaves[0].grad is not None
    assert train == (leaves[1].grad is not None and not leaves[1].grad.any())


def test_a_mode_that_is_none_is_named():
    leaves, labels, _, _ = case(2)
    with pytest.raises(ValueError, match="recompute"):
        linear_token_logps(*leaves[:2], labels, mode="chunked")  # type: ignore[call-overload]


def test_autocast_does_not_reach_the_products():
    leaves, labels, _, _ = case(9, torch.float32)
    told = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logp = linear_token_logps(*leaves[:2], labels)
            told.append((logp, *torch.autograd.grad(logp.sum(), leaves[:2])))
    assert all(torch.equal(a, b) for a, b in zip(*told, strict=True))


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The size in bytes of the largest tensor that any operation makes."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputing_makes_no_tensor_larger_than_workspace_or_gradient(dtype, monkeypatch):
    """64 rows of 40 000 logits are 10 MiB; nor is there a float32 copy of a bfloat16 weight."""
    monkeypatch.setattr(projection, "_CONVERTED", 1 << 20)
    leaves, labels, _, _ = case(64, dtype, hidden=16, vocabulary=40_000)
    leaves = [x.detach() for x in leaves[:2]]  # the mode below sees the functions' own operations, not autograd's
    about = projection.Projection(*leaves, None, None)
    rows = leaves[0].to(about.row_dtype)
    wanted = passes.Wanted(True, True, True)
    with Largest() as largest:
        room = about.workspace(64, passes.columns_that_fit(about, 64, 2))
        softmax = passes.statistics(about, rows, labels, room)
        passes.gradients(about, rows, labels, softmax, torch.ones(64), None, room, False, wanted)
    assert largest.bytes <= max(2 << 20, leaves[1].nbytes)


@pytest.fixture
def emulated(monkeypatch):
    """The bfloat16 products of CUDA on the CPU: the same operands, the same views, the same roundings."""

    def widening_mm(a, b, out=None):
        assert a.dtype == b.dtype == torch.bfloat16
        product = a.float() @ b.float()
        return product if out is None else out.copy_(product)

    monkeypatch.setattr(projection, "widening_mm", widening_mm)
    monkeypatch.setattr(projection, "multiplies_in_16_bits", lambda h, w: h.dtype == w.dtype == torch.bfloat16)


@pytest.mark.parametrize(("mode", "workspace_mb"), WAYS)
def test_products_of_16_bit_operands_stay_within_tolerance(emulated, mode, workspace_mb):
    leaves, labels, g, e = case(70, torch.bfloat16)
    logp, lse = linear_token_logps(
        *leaves[:2], labels, bias=leaves[2], mode=mode, workspace_mb=workspace_mb, return_lse=True
    )
    exact, exact_logp, exact_lse = plain(leaves, labels)
    assert max((logp - exact_logp).abs().max(), (lse - exact_lse).abs().max()) < 1e-4
    found = torch.autograd.grad((g.float() * logp + e.float() * lse).sum(), leaves)
    oracle = torch.autograd.grad((g * exact_logp + e * exact_lse).sum(), exact)
    assert max(error(*pair) for pair in zip(found, oracle, strict=True)) < 5e-3


@pytest.mark.parametrize("workspace_mb", [0, 512])
def test_a_16_bit_weight_gradient_is_not_rounded_away_by_many_parts(emulated, workspace_mb):
    leaves, labels, _, _ = case(70, torch.bfloat16)
    loss = linear_ce(*leaves[:2], labels, 70, bias=leaves[2], workspace_mb=workspace_mb)
    exact, exact_logp, _ = plain(leaves, labels)
    found = torch.autograd.grad(0.3 * loss, leaves)
    oracle = torch.autograd.grad(-0.3 * exact_logp.mean(), exact)
    assert max(error(*pair) for pair in zip(found, oracle, strict=True)) < 5e-3
