"""The Triton kernels in Triton's interpreter against float64; `test_triton.py` runs this file with TRITON_INTERPRET=1.

The interpreter takes milliseconds for a tile of any size, runs serially, so that races stay hidden, and truncates
float32 to bfloat16.
"""

import pytest
import torch

from mirage_dist.kernels import triton_rows, triton_steer
from mirage_dist.kernels.backend import uses_triton
from mirage_dist.kernels.logprob import linear_token_logps
from mirage_dist.kernels.rows import dlogits, lse_update, scale_
from mirage_dist.kernels.softmax import Softmax
from mirage_dist.kernels.steer import steer_mse

FORMS = [(False, None), (True, None), (True, 5.0)]
# Several tiles, the last one partial; less than one tile.
COLUMNS = [triton_rows.TILE + 900, 333]


def draw(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def case(rows, columns, bias):
    z = draw(rows, columns, scale=3.0)
    labels = torch.randint(columns, (rows,), generator=torch.Generator().manual_seed(1))
    z[0, labels[0]] = z[0].logsumexp(0) + 4.6  # p = 0.99
    return z, labels, draw(columns, seed=2) if bias else None


def logps(z, labels, bias, softcap):
    z = z if bias is None else z + bias
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    return z.gather(1, labels[:, None]).squeeze(1) - z.logsumexp(1), z.logsumexp(1)


def halves(z, bias):
    """Two chunks of the columns as strided views, with their first column and bias."""
    middle = z.shape[1] // 2
    for start, stop in ((0, middle), (middle, z.shape[1])):
        yield z[:, start:stop], start, None if bias is None else bias[start:stop]


def test_these_tests_run_triton():
    assert uses_triton(torch.zeros(1))
    assert not uses_triton(torch.zeros(1, dtype=torch.float64))


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize(("bias", "softcap"), FORMS)
def test_statistics_and_gradient_of_the_logits(columns, bias, softcap):
    exact, labels, bias_C = case(3, columns, bias)
    upstream = draw(3, seed=3)
    exact.requires_grad_()
    logp, lse = logps(exact, labels, bias_C, softcap)
    (oracle,) = torch.autograd.grad((upstream * logp).sum(), exact)

    z, bias_C = exact.detach().float(), None if bias_C is None else bias_C.float()
    softmax = Softmax.empty(3, like=z)
    for chunk, start, part in halves(z, bias_C):
        lse_update(chunk, softmax, labels, start, part, softcap)
    assert (softmax.logp() - logp).abs().max() < 2e-5
    assert (softmax.max_N + softmax.sum_N.log() - lse).abs().max() < 2e-5
    for chunk, start, part in halves(z, bias_C):
        dlogits(chunk, softmax, labels, start, part, softcap, upstream.float(), torch.float32)
    assert (z - oracle).norm() / oracle.norm() < 5e-6


@pytest.mark.parametrize("columns", COLUMNS)
def test_a_bfloat16_gradient_fits_in_the_logits_own_bytes(columns):
    exact, labels, _ = case(3, columns, False)
    z, upstream = exact.float(), torch.tensor([1.0, -0.5, 2.0])
    softmax = Softmax.empty(3, like=z)
    lse_update(z, softmax, labels, 0, None, None)
    wide = dlogits(z.clone(), softmax, labels, 0, None, None, upstream, torch.float32)
    room = torch.empty(3, columns + 64)[:, :columns].copy_(z)
    narrow = dlogits(room, softmax, labels, 0, None, None, upstream, torch.bfloat16)
    assert narrow.untyped_storage().data_ptr() == room.untyped_storage().data_ptr()
    assert narrow.stride() == (2 * (columns + 64), 1)
    torch.testing.assert_close(narrow.float(), wide, rtol=2**-7, atol=0)


def test_a_scale_of_one_touches_nothing_and_another_multiplies():
    for dtype in (torch.float32, torch.bfloat16):
        x = draw(3, 5000).to(dtype)
        before = x.clone()
        assert torch.equal(scale_(x, torch.tensor(1.0)), before)
        assert torch.equal(scale_(x, torch.tensor(-0.5)), -0.5 * before)


@pytest.mark.parametrize("workspace_mb", [512, 0])
@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("softcap", [None, 8.0])
def test_token_log_probabilities_and_their_gradients(workspace_mb, trains, softcap):
    hidden, weight, bias = draw(5, 16), draw(700, 16, seed=1), draw(700, seed=2)
    labels, upstream = torch.tensor([0, 699, 5, 350, 64]), draw(5, seed=3)
    results = {}
    for dtype in (torch.float64, torch.float32):
        tensors = [x.to(dtype).requires_grad_(n == 0 or trains) for n, x in enumerate((hidden, weight, bias))]
        logp = linear_token_logps(*tensors[:2], labels, bias=tensors[2], softcap=softcap, workspace_mb=workspace_mb)
        leaves = [x for x in tensors if x.requires_grad]
        results[dtype] = (logp, *torch.autograd.grad(logp, leaves, upstream.to(dtype)))
    for mine, oracle in zip(results[torch.float32], results[torch.float64], strict=True):
        assert (mine - oracle).norm() / oracle.norm() < 5e-6


@pytest.mark.parametrize("width", [triton_steer.TILE + 100, 48])
@pytest.mark.parametrize("reference", [False, True])
def test_steering_error_and_gradient(width, reference):
    weight = torch.tensor([1.0, 0.0, 0.25, 2.0, 0.0, 1.0])
    act, target = draw(2, 3, width), draw(*([6] if reference else []), width, seed=1)
    act.view(6, width)[1] = torch.inf  # a row of weight 0
    results = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        leaf = act.to(dtype).requires_grad_()
        loss = steer_mse(leaf, target.to(dtype), weight)
        results[dtype] = (loss, *torch.autograd.grad(2 * loss, leaf))
    oracle = results[torch.float64]
    for dtype, tolerance in ((torch.float32, 5e-6), (torch.bfloat16, 1e-2)):
        for mine, exact in zip(results[dtype], oracle, strict=True):
            assert (mine.double() - exact).norm() / exact.norm() < tolerance
