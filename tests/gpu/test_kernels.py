"""The kernels on a GPU: float64's numbers within tolerance, the same bits twice, and the memory that they promise."""

import pytest
import torch

from mirage_dist.kernels.logprob import linear_ce, linear_npo, linear_token_logps
from mirage_dist.kernels.steer import steer_mse

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
TOLERANCES = {torch.float32: (2e-5, 5e-6), torch.bfloat16: (1e-4, 5e-3)}
ROWS, HIDDEN, VOCABULARY, SEQUENCES = 640, 256, 32_003, 8
SEGMENT = torch.arange(ROWS) // (ROWS // SEQUENCES)


def case(dtype, frozen=False):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, HIDDEN, generator=generator) for n in (ROWS, VOCABULARY))
    labels = torch.randint(VOCABULARY, (ROWS,), generator=generator).cuda()
    weight = weight.mul(HIDDEN**-0.5).to("cuda", dtype).requires_grad_(not frozen)
    return [hidden.to("cuda", dtype).requires_grad_(), weight], labels


def check(dtype, value, found, exact, oracle):
    assert (value - exact).abs().max() < TOLERANCES[dtype][0] * max(1, exact.abs().max() / 32)
    for mine, theirs in zip(found, oracle, strict=True):
        assert (mine.double() - theirs).norm() / theirs.norm() < TOLERANCES[dtype][1]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("mode", "workspace_mb"), [("auto", 512), ("cached", 512), ("recompute", 8)])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_token_log_probabilities(dtype, mode, workspace_mb, frozen, softcap):
    leaves, labels = case(dtype, frozen)
    upstream = torch.randn(ROWS, device="cuda")

    def run(leaves):
        logp = linear_token_logps(*leaves, labels, softcap=softcap, mode=mode, workspace_mb=workspace_mb)
        return logp, *torch.autograd.grad((logp * upstream).sum(), [x for x in leaves if x.requires_grad])

    first, again = run(leaves), run(leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    exact, *oracle = run([x.detach().double().requires_grad_(x.requires_grad) for x in leaves])
    check(dtype, first[0], first[1:], exact, oracle)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("workspace_mb", [8, 2048])
def test_losses_with_the_gradient_in_forward(dtype, workspace_mb):
    leaves, labels = case(dtype)
    segment, ref = SEGMENT.cuda(), torch.full((SEQUENCES,), -800.0, device="cuda")

    def run(leaves):
        ce = linear_ce(*leaves, labels, ROWS, workspace_mb=workspace_mb)
        npo, _ = linear_npo(*leaves, labels, segment, ref, 0.01, "seq_sum", workspace_mb=workspace_mb)
        return ce + npo, *torch.autograd.grad(ce + npo, leaves)

    first, again = run(leaves), run(leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    value, *oracle = run([x.detach().double().requires_grad_() for x in leaves])
    check(dtype, first[0], first[1:], value, oracle)


def test_recomputing_takes_the_workspace_and_the_gradients():
    leaves, labels = case(torch.bfloat16)
    torch.autograd.grad(linear_token_logps(*leaves, labels, mode="recompute", workspace_mb=8).sum(), leaves)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    logp = linear_token_logps(*leaves, labels, mode="recompute", workspace_mb=8)
    torch.autograd.grad(logp.sum(), leaves)
    extra = torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in leaves)
    assert extra < 16 << 20  # of 78 MiB that the logits take


def test_nothing_waits_for_the_device():
    leaves, labels = case(torch.bfloat16)
    segment, ref = SEGMENT.cuda(), torch.full((SEQUENCES,), -800.0, device="cuda")
    weights, target = torch.ones(ROWS, device="cuda"), torch.zeros(HIDDEN, device="cuda")
    lengths = [ROWS // SEQUENCES] * SEQUENCES

    def step():
        loss = linear_token_logps(*leaves, labels).sum() + linear_ce(*leaves, labels, ROWS)
        loss = loss + linear_npo(*leaves, labels, segment, ref, 0.1, "seq_sum", lengths=lengths)[0]
        (loss + steer_mse(leaves[0], target, None, weights)).backward()

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("indexed", [False, True])
def test_steering_error(dtype, indexed):
    generator = torch.Generator().manual_seed(0)
    act = torch.randn(4, 160, 4100, generator=generator).to("cuda", dtype).requires_grad_()
    index = torch.randperm(640, generator=generator)[:300].cuda() if indexed else None
    rows = 300 if indexed else 640
    target, weight = torch.randn(rows, 4100, device="cuda"), torch.rand(rows, device="cuda").round()
    loss = steer_mse(act, target, index, weight, 0.5)
    exact = act.detach().double().requires_grad_()
    oracle = steer_mse(exact, target.double(), index, weight, 0.5)
    (mine,), (theirs,) = torch.autograd.grad(3 * loss, act), torch.autograd.grad(3 * oracle, exact)
    assert (loss - oracle).abs() < 5e-6 * oracle
    assert (mine.double() - theirs).norm() < TOLERANCES[dtype][1] * theirs.norm()
