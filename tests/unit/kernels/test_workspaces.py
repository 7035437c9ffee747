"""Token log-probabilities in every workspace: float64's within tolerance, in bounded memory, with repeatable bits."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mirage_dist.kernels import projection
from mirage_dist.kernels.logprob import linear_logits, linear_token_kl, linear_token_logps

# MiB. 512 keeps all logits until backward; 0 is 64 columns (one row with a frozen weight) at a time.
WORKSPACES = [512, 0]
# dtype -> largest absolute error of a value, relative error of a gradient
TOLERANCES = {torch.float32: (2e-5, 5e-6), torch.bfloat16: (1e-4, 5e-3)}
VOCABULARY = 997  # no multiple of any tile


def case(rows, dtype=torch.float64, hidden=32, vocabulary=VOCABULARY, trains=True, seed=0):
    """Hidden rows, weight and bias (leaves if `trains`, the rows in any case), labels, and upstream gradients."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors = [x.to(dtype) for x in (draw(rows, hidden), draw(vocabulary, hidden), draw(vocabulary))]
    for tensor, needs_grad in zip(tensors, (True, trains, trains), strict=True):
        tensor.requires_grad_(needs_grad)
    return tensors, torch.randint(vocabulary, (rows,), generator=generator), draw(rows)


def confident(weight, labels):
    """Hidden rows whose labels have a probability of about 0.99, by bisection over their length."""
    rows = weight.detach()[labels].double()
    rows = rows / rows.square().sum(1, keepdim=True)
    low, high = torch.zeros(len(rows), 1), torch.full((len(rows), 1), 64.0)
    for _ in range(50):
        middle = (low + high) / 2
        p = linear_token_logps(rows * middle, weight.detach().double(), labels).exp()[:, None]
        low, high = torch.where(p < 0.99, middle, low), torch.where(p < 0.99, high, middle)
    return (rows * low).to(weight.dtype).requires_grad_()


def plain(tensors, labels, softcap=None):
    """The log-probabilities by their definition in float64, and the copies of the tensors that they depend on."""
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]
    logits = exact[0] @ exact[1].T
    logits = logits + exact[2] if len(exact) == 3 else logits
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return exact, logits.log_softmax(1).gather(1, labels[:, None]).squeeze(1)


def gradients(value, upstream, tensors):
    return torch.autograd.grad(value, [x for x in tensors if x.requires_grad], upstream.to(value.dtype))


def largest_error(grads, oracle):
    pairs = zip(grads, oracle, strict=True)
    return max((mine.double() - exact).norm() / exact.norm() for mine, exact in pairs)


@pytest.mark.parametrize("workspace_mb", WORKSPACES)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("trains", [True, False])
def test_values_and_gradients_against_float64(workspace_mb, dtype, softcap, trains):
    tensors, labels, upstream = case(23, dtype, trains=trains)
    logp = linear_token_logps(*tensors[:2], labels, bias=tensors[2], softcap=softcap, workspace_mb=workspace_mb)
    exact, exact_logp = plain(tensors, labels, softcap)
    value, gradient = TOLERANCES[dtype]
    assert logp.dtype == torch.float32
    assert (logp - exact_logp).abs().max() < value
    grads = gradients(logp, upstream, tensors)
    assert [x.dtype for x in grads] == [dtype] * (3 if trains else 1)
    assert largest_error(grads, gradients(exact_logp, upstream, exact)) < gradient


@pytest.mark.parametrize("workspace_mb", WORKSPACES)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("trains", [True, False])
def test_a_label_of_probability_99_percent_keeps_its_digits(workspace_mb, dtype, trains):
    (_, weight, _), labels, upstream = case(23, dtype, trains=trains)
    tensors = [confident(weight, labels), weight]
    logp = linear_token_logps(*tensors, labels, workspace_mb=workspace_mb)
    exact, exact_logp = plain(tensors, labels)
    value, gradient = TOLERANCES[dtype]
    assert (exact_logp.exp() - 0.99).abs().max() < 0.01
    assert (logp - exact_logp).abs().max() < value
    grads = gradients(logp, upstream, tensors)
    assert largest_error(grads, gradients(exact_logp, upstream, exact)) < gradient


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("workspace_mb", WORKSPACES)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("trains", [True, False])
def test_gradients_equal_finite_differences(rows, workspace_mb, softcap, trains):
    tensors, labels, upstream = case(rows, hidden=4, vocabulary=131, trains=trains)

    def loss(hidden, weight, bias):
        logp = linear_token_logps(hidden, weight, labels, bias=bias, softcap=softcap, workspace_mb=workspace_mb)
        return (upstream * logp.sin()).sum()  # the upstream gradient of a row depends on its log-probability

    assert torch.autograd.gradcheck(loss, tensors)


@pytest.mark.parametrize("workspace_mb", WORKSPACES)
def test_a_frozen_head_gives_the_hidden_gradient_of_a_trained_one_and_keeps_no_logits(workspace_mb):
    (hidden, weight, bias), labels, upstream = case(23)
    results = []
    for trains in (True, False):
        weight, bias = (x.detach().requires_grad_(trains) for x in (weight, bias))
        logp = linear_token_logps(hidden, weight, labels, bias=bias, softcap=4.0, workspace_mb=workspace_mb)
        results.append((logp, *torch.autograd.grad((upstream * logp).sum(), hidden, retain_graph=True)))
    torch.testing.assert_close(results[1], results[0])
    kept = [x for x in logp.grad_fn.saved_tensors if x is not None]
    assert [x.shape for x in kept] == [hidden.shape]


@pytest.mark.parametrize("workspace_mb", WORKSPACES)
@pytest.mark.parametrize("trains", [True, False])
def test_without_gradients_the_values_are_the_same(workspace_mb, trains):
    tensors, labels, _ = case(23, trains=trains)
    logp = linear_token_logps(*tensors[:2], labels, bias=tensors[2], workspace_mb=workspace_mb)
    with torch.no_grad():
        again = linear_token_logps(*tensors[:2], labels, bias=tensors[2], workspace_mb=workspace_mb)
    assert logp.requires_grad
    assert not again.requires_grad
    torch.testing.assert_close(again, logp.detach())


@pytest.mark.parametrize("workspace_mb", WORKSPACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trains", [True, False])
def test_the_same_backward_twice_is_bitwise_equal(workspace_mb, dtype, trains):
    def logp():
        return linear_token_logps(*tensors[:2], labels, workspace_mb=workspace_mb)

    tensors, labels, upstream = case(33, dtype, trains=trains)
    leaves, upstream = [x for x in tensors[:2] if x.requires_grad], upstream.float()
    first = logp()
    # Twice through one graph, whose first backward overwrites the kept logits, and once through another.
    runs = [torch.autograd.grad(x, leaves, upstream, retain_graph=True) for x in (first, first, logp())]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("workspace_mb", WORKSPACES)
@pytest.mark.parametrize("label", [-100, -1, VOCABULARY])
@pytest.mark.parametrize("trains", [True, False])
def test_a_label_outside_the_vocabulary_is_an_error_that_names_it(workspace_mb, label, trains):
    tensors, labels, _ = case(6, trains=trains)
    labels[4] = label
    with pytest.raises(ValueError, match=f"label {label} of row 4 .* {VOCABULARY}"):
        linear_token_logps(*tensors[:2], labels, workspace_mb=workspace_mb)


@pytest.mark.parametrize("workspace_mb", WORKSPACES)
@pytest.mark.parametrize("trains", [True, False])
def test_a_label_outside_that_is_not_checked_shows_as_minus_infinity(workspace_mb, trains, monkeypatch):
    """As on a GPU, where checking would make the host wait; other rows are not affected."""
    tensors, labels, _ = case(6, trains=trains)
    exact = linear_token_logps(*tensors[:2], labels, workspace_mb=workspace_mb).detach()
    monkeypatch.setattr("mirage_dist.kernels.passes.check_labels", lambda labels_N, vocabulary: None)
    labels[4], exact[4] = VOCABULARY, -torch.inf
    logp = linear_token_logps(*tensors[:2], labels, workspace_mb=workspace_mb)
    torch.testing.assert_close(logp.detach(), exact)


@pytest.mark.parametrize("workspace_mb", WORKSPACES)
@pytest.mark.parametrize("trains", [True, False])
def test_no_rows_still_reach_hidden_and_weight(workspace_mb, trains):
    (hidden, weight, _), labels, _ = case(0, trains=trains)
    logp = linear_token_logps(hidden, weight, labels, workspace_mb=workspace_mb)
    assert logp.shape == (0,)
    logp.sum().backward()
    assert hidden.grad is not None
    assert trains == (weight.grad is not None and not weight.grad.any())


@pytest.mark.parametrize("trains", [True, False])
def test_autocast_does_not_reach_the_products(trains):
    tensors, labels, upstream = case(9, torch.float32, trains=trains)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logp = linear_token_logps(*tensors[:2], labels)
            logits = linear_logits(*tensors[:2])
            results.append((logp, logits, *gradients(logp, upstream, tensors[:2])))
            results[-1] += gradients(logits.logsumexp(1), upstream, tensors[:2])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


class Largest(TorchDispatchMode):
    """The size in bytes of the largest storage that any operation returns."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trains", [True, False])
def test_no_tensor_is_larger_than_workspace_or_weight(dtype, trains, monkeypatch):
    """64 rows of 40 000 logits are 10 MiB; a float32 copy of the bfloat16 weight would be twice the weight."""
    monkeypatch.setattr(projection, "CONVERTED_BYTES", 1 << 20)
    tensors, labels, upstream = case(64, dtype, hidden=32, vocabulary=40_000, trains=trains)
    with Largest() as largest:
        gradients(linear_token_logps(*tensors[:2], labels, workspace_mb=2), upstream, tensors[:2])
    assert largest.bytes <= max(2 << 20, tensors[1].nbytes)


@pytest.mark.parametrize("trains", [True, False])
def test_kl_and_logits_make_no_wide_copy_of_a_16_bit_weight(trains, monkeypatch):
    """3 rows of 40 000 logits are 0.5 MiB, the bfloat16 weight is 4.9 MiB."""
    monkeypatch.setattr(projection, "CONVERTED_BYTES", 1 << 20)
    tensors, _, upstream = case(3, torch.bfloat16, hidden=64, vocabulary=40_000, trains=trains)
    with Largest() as largest:
        reference = linear_logits(*(x.detach() for x in tensors[:2]))
        gradients(linear_token_kl(*tensors[:2], 1.1 * reference), upstream, tensors[:2])
    assert largest.bytes <= tensors[1].nbytes


@pytest.fixture
def emulated(monkeypatch):
    """The bfloat16 products of CUDA on the CPU: the same operands, the same views, the same roundings."""

    def widening_mm(a, b, out=None):
        assert a.dtype == b.dtype == torch.bfloat16
        product = a.float() @ b.float()
        return product if out is None else out.copy_(product)

    monkeypatch.setattr(projection, "widening_mm", widening_mm)
    monkeypatch.setattr(projection, "multiplies_in_16_bits", lambda h, w: h.dtype == w.dtype == torch.bfloat16)


@pytest.mark.parametrize("workspace_mb", WORKSPACES)
@pytest.mark.parametrize("trains", [True, False])
def test_products_of_16_bit_operands_stay_within_tolerance(emulated, workspace_mb, trains):
    tensors, labels, upstream = case(70, torch.bfloat16, trains=trains)
    logp = linear_token_logps(*tensors[:2], labels, bias=tensors[2], workspace_mb=workspace_mb)
    exact, exact_logp = plain(tensors, labels)
    assert (logp - exact_logp).abs().max() < 1e-4
    grads = gradients(logp, upstream, tensors)
    assert largest_error(grads, gradients(exact_logp, upstream, exact)) < 5e-3


def test_logits_from_16_bit_products_stay_within_tolerance(emulated):
    tensors, _, upstream = case(70, torch.bfloat16)
    upstream = upstream[:, None].expand(70, VOCABULARY)
    logits = linear_logits(*tensors[:2], bias=tensors[2])
    exact = [x.detach().double().requires_grad_() for x in tensors]
    oracle = exact[0] @ exact[1].T + exact[2]
    assert (logits - oracle).abs().max() < 1e-4
    grads = gradients(logits.sin(), upstream, tensors)
    assert largest_error(grads, gradients(oracle.sin(), upstream, exact)) < 5e-3
