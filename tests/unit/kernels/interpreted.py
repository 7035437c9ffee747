"""The Triton kernels in Triton's interpreter against float64; `test_triton.py` runs this file with TRITON_INTERPRET=1.

The interpreter takes milliseconds a tile whatever the tile's size, runs serially, so that races do not show, and
truncates float32 to bfloat16.
"""

import pytest
import torch

from mirage_dist.kernels import triton_rows, triton_steer
from mirage_dist.kernels.backend import uses_triton
from mirage_dist.kernels.logprob import linear_ce, linear_npo, linear_token_logps
from mirage_dist.kernels.rows import Softmax, dlogits, lse_update, scale_
from mirage_dist.kernels.steer import steer_mse

FORMS = [(False, None), (True, None), (True, 5.0)]
# Several tiles, the last one partial; less than one tile.
COLUMNS = [triton_rows._BLOCK + 900, 333]


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


def test_what_is_tested_is_triton():
    assert uses_triton(torch.zeros(1))
    assert not uses_triton(torch.zeros(1, dtype=torch.float64))


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize(("bias", "softcap"), FORMS)
def test_statistics_and_gradient_of_the_logits(columns, bias, softcap):
    exact, labels, bias_C = case(3, columns, bias)
    g, e = draw(3, seed=3), draw(3, seed=4)
    exact.requires_grad_()
    logp, lse = logps(exact, labels, bias_C, softcap)
    (oracle,) = torch.autograd.grad((g * logp + e * lse).sum(), exact)

    z, bias_C = exact.detach().float(), None if bias_C is None else bias_C.float()
    softmax = Softmax.start(3, like=z)
    for chunk, start, part in halves(z, bias_C):
        lse_update(chunk, softmax, labels, start, part, softcap)
    assert (softmax.logp(labels) - logp).abs().max() < 2e-5
    assert (softmax.lse_N - lse).abs().max() < 2e-5
    for chunk, start, part in halves(z, bias_C):
        dlogits(chunk, softmax, labels, start, part, softcap, g.float(), e.float(), torch.float32)
    assert (z - oracle).norm() / oracle.norm() < 5e-6


@pytest.mark.parametrize("columns", COLUMNS)
def test_a_bfloat16_gradient_fits_in_the_logits_own_bytes(columns):
    exact, labels, _ = case(3, columns, False)
    z, g = exact.float(), torch.tensor([1.0, -0.5, 2.0])
    softmax = Softmax.start(3, like=z)
    lse_update(z, softmax, labels, 0, None, None)
    wide = dlogits(z.clone(), softmax, labels, 0, None, None, g, None, torch.float32)
    room = torch.empty(3, columns + 64)[:, :columns].copy_(z)
    narrow = dlogits(room, softmax, labels, 0, None, None, g, None, torch.bfloat16)
    assert narrow.untyped_storage().data_ptr() == room.untyped_storage().data_ptr()
    assert narrow.stride() == (2 * (columns + 64), 1)
    torch.testing.assert_close(narrow.float(), wide, rtol=2**-7, atol=0)


def test_a_scale_of_one_touches_nothing_and_another_multiplies():
    for dtype in (torch.float32, torch.bfloat16):
        x = draw(3, 5000).to(dtype)
        before = x.clone()
        assert torch.equal(scale_(x, torch.tensor(1.0)), before)
        assert torch.equal(scale_(x, torch.tensor(-0.5)), -0.5 * before)


@pytest.mark.parametrize("mode", ["auto", "cached", "recompute"])
def test_token_log_probabilities_and_their_gradients(mode):
    hidden, weight, bias = draw(5, 16), draw(700, 16, seed=1), draw(700, seed=2)
    labels, upstream = torch.tensor([0, 699, -100, 350, 64]), draw(5, seed=3)
    told = {}
    for dtype in (torch.float64, torch.float32):
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight, bias)]
        logp, lse = linear_token_logps(
            *leaves[:2], labels, bias=leaves[2], softcap=8.0, mode=mode, workspace_mb=0, return_lse=True
        )
        loss = (logp * upstream.to(dtype)).sum() + lse.sum()
        told[dtype] = (logp, lse, *torch.autograd.grad(loss, leaves))
    for mine, oracle in zip(told[torch.float32], told[torch.float64], strict=True):
        assert (mine - oracle).norm() / oracle.norm() < 5e-6


def test_losses_with_the_gradient_in_forward():
    hidden, weight = draw(6, 16), draw(700, 16, seed=1)
    labels, segment = torch.tensor([0, 699, 5, 350, 64, 7]), torch.tensor([0, 0, 0, 1, 2, 2])
    told = {}
    for dtype in (torch.float64, torch.float32):
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        ce = linear_ce(*leaves, labels, 11, workspace_mb=0)
        npo, seq_logp = linear_npo(*leaves, labels, segment, torch.tensor([-9.0, -3.0, -8.0]), 0.3, workspace_mb=0)
        told[dtype] = (ce, npo, seq_logp, *torch.autograd.grad(3 * ce + npo, leaves))
    for mine, oracle in zip(told[torch.float32], told[torch.float64], strict=True):
        assert (mine - oracle).norm() / oracle.norm() < 5e-6


@pytest.mark.parametrize("width", [triton_steer._BLOCK + 100, 48])
@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("indexed", [False, True])
def test_steering_error_and_gradient(width, reference, indexed):
    index = torch.tensor([5, 0, 3]) if indexed else None
    rows = 3 if indexed else 6
    weight = torch.tensor([1.0, 0.0, 0.25, 2.0, 0.0, 1.0])[:rows]
    act, target = draw(2, 3, width), draw(*([rows] if reference else []), width, seed=1)
    act.view(6, width)[0 if indexed else 1] = torch.inf  # the row of weight 0
    told = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        leaf = act.to(dtype).requires_grad_()
        loss = steer_mse(leaf, target.to(dtype), index, weight, 0.7)
        told[dtype] = (loss, *torch.autograd.grad(2 * loss, leaf))
    oracle = told[torch.float64]
    for dtype, tolerance in ((torch.float32, 5e-6), (torch.bfloat16, 1e-2)):
        for mine, exact in zip(told[dtype], oracle, strict=True):
            assert (mine.double() - exact).norm() / exact.norm() < tolerance
