"""The cases of bench_loss_head.py, their batches, and the loss heads that it compares."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from common import MIB
from torch import Tensor

from mirage_dist.kernels.logprob import linear_ce, linear_npo, linear_token_logps


@dataclass(frozen=True)
class Case:
    name: str
    rows: int  # M
    wanted: int  # N
    vocabulary: int
    hidden: int
    dtype: torch.dtype
    small_mb: int  # the workspace of the versions that save memory

    @property
    def title(self) -> str:
        share = f"{100 * self.wanted / self.rows:.0f} %"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.name}: M={self.rows}, N={self.wanted} ({share}), V={self.vocabulary}, D={self.hidden}, {dtype}"


CASES = {
    "cpu": [
        Case("response", 2048, 184, 32_000, 512, torch.float32, 12),
        Case("all", 2048, 2048, 32_000, 512, torch.float32, 64),
    ],
    "cuda": [
        Case("llava", 10_816, 960, 32_000, 4096, torch.bfloat16, 64),
        Case("llava_152k", 10_816, 960, 151_936, 4096, torch.bfloat16, 64),
        Case("all_32k", 16_384, 16_384, 32_000, 4096, torch.bfloat16, 512),
        Case("all_4k_128k", 4096, 4096, 128_256, 4096, torch.bfloat16, 512),
        Case("all_128k", 16_384, 16_384, 128_256, 4096, torch.bfloat16, 512),
        Case("all_152k", 16_384, 16_384, 151_936, 4096, torch.bfloat16, 512),
    ],
}
SEQUENCES = 16  # a batch's, for NPO


class Missing(Exception):
    """A version that cannot run here."""


class Batch:
    """Random hidden states, weight and labels; never zeros, which a GPU multiplies faster than numbers."""

    def __init__(self, case: Case, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.case = case

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.hidden = draw(case.rows, case.hidden).to(device, case.dtype).requires_grad_()
        weight = draw(case.vocabulary, case.hidden) * case.hidden**-0.5
        self.weight = weight.to(device, case.dtype).requires_grad_()
        index = torch.randperm(case.rows, generator=generator)[: case.wanted].sort().values
        labels = torch.full((case.rows,), -100)
        labels[index] = torch.randint(case.vocabulary, (case.wanted,), generator=generator)
        self.index, self.labels = index.to(device), labels.to(device)
        self.lengths = [len(part) for part in torch.arange(case.wanted).chunk(SEQUENCES)]
        self.segment = torch.repeat_interleave(torch.arange(len(self.lengths)), torch.tensor(self.lengths)).to(device)
        self.ref = torch.tensor(self.lengths, device=device) * -12.0  # near an untrained model's

    def selected(self) -> tuple[Tensor, Tensor]:
        return self.hidden.index_select(0, self.index), self.labels.index_select(0, self.index)

    @property
    def gradient_bytes(self) -> int:
        return sum(x.nbytes for x in (self.hidden, self.weight) if x.requires_grad)

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None


Loss = Callable[[], Tensor]


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """What a Hugging Face model does: logits in the model's dtype, then float32."""
    return F.cross_entropy((hidden @ weight.T).float(), labels)


def peer(batch: Batch, module: str, package: str) -> Any:
    if batch.hidden.device.type != "cuda":
        raise Missing(f"{package} has no CPU backend")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Missing(f"{package} is not installed ({error})") from error


def liger(batch: Batch, selected: bool) -> Loss:
    module = peer(batch, "liger_kernel.transformers.fused_linear_cross_entropy", "liger-kernel")
    loss = module.LigerFusedLinearCrossEntropyLoss()
    rows = batch.selected if selected else lambda: (batch.hidden, batch.labels)

    def run() -> Tensor:
        hidden, labels = rows()
        return loss(batch.weight, hidden, labels)

    return run


def cce(batch: Batch, **options: Any) -> Loss:
    module = peer(batch, "cut_cross_entropy", "cut-cross-entropy")
    return lambda: module.linear_cross_entropy(batch.hidden, batch.weight, batch.labels, **options)


def compiled(batch: Batch, selected: bool) -> Loss:
    function = torch.compile(eager)
    rows = batch.selected if selected else lambda: (batch.hidden, batch.labels)

    def run() -> Tensor:
        hidden, labels = rows()
        return function(hidden, batch.weight, labels)

    return run


def plain(batch: Batch, selected: bool) -> Loss:
    rows = batch.selected if selected else lambda: (batch.hidden, batch.labels)

    def run() -> Tensor:
        hidden, labels = rows()
        return eager(hidden, batch.weight, labels)

    return run


def our_ce(batch: Batch, **options: Any) -> Loss:
    def run() -> Tensor:
        hidden, labels = batch.selected()
        return linear_ce(hidden, batch.weight, labels, batch.case.wanted, **options)

    return run


def our_logps(batch: Batch, frozen: bool = False, **options: Any) -> Loss:
    weight = batch.weight.detach() if frozen else batch.weight

    def run() -> Tensor:
        hidden, labels = batch.selected()
        return -linear_token_logps(hidden, weight, labels, **options).mean()

    return run


def our_npo(batch: Batch, **options: Any) -> Loss:
    def run() -> Tensor:
        hidden, labels = batch.selected()
        about = (batch.segment, batch.ref, 0.1, "seq_sum")
        return linear_npo(hidden, batch.weight, labels, *about, lengths=batch.lengths, **options)[0]

    return run


@dataclass(frozen=True)
class Version:
    name: str
    make: Callable[[Batch], Loss]
    products: int = 3  # matrix products of its floor
    checked: bool = True  # its loss is the mean cross entropy, so its gradients can be compared


def versions(case: Case) -> list[Version]:
    small, whole = case.small_mb, case.wanted * case.vocabulary * 4 // MIB + 1
    found = [
        Version("eager", lambda b: plain(b, False)),
        Version("eager, selected", lambda b: plain(b, True)),
        Version("torch.compile", lambda b: compiled(b, False)),
        Version("torch.compile, selected", lambda b: compiled(b, True)),
        Version("Liger", lambda b: liger(b, False)),
        Version("Liger, selected", lambda b: liger(b, True)),
        Version("CCE", lambda b: cce(b)),
        Version("CCE, no filter", lambda b: cce(b, filter_eps=None)),
        Version("linear_ce", lambda b: our_ce(b)),
        Version(f"linear_ce, {small} MiB", lambda b: our_ce(b, workspace_mb=small)),
        Version("linear_token_logps, cached", lambda b: our_logps(b, mode="cached")),
        Version(
            f"linear_token_logps, recompute, {small} MiB",
            lambda b: our_logps(b, mode="recompute", workspace_mb=small),
            4,
        ),
        Version("linear_token_logps, recompute", lambda b: our_logps(b, mode="recompute", workspace_mb=2048), 4),
        Version("linear_token_logps, frozen weight", lambda b: our_logps(b, frozen=True), 2),
        Version("linear_npo", lambda b: our_npo(b), checked=False),
    ]
    # Keeping 10 GiB of logits is no use that anyone would make of it.
    return [v for v in found if whole <= 4096 or "cached" not in v.name]
