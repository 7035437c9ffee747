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

from mirage_dist.data.encoding.collate import IGNORE
from mirage_dist.kernels.logprob import WORKSPACE_MB, linear_token_logps

SEQUENCES = 16  # of a batch, for NPO
BETA = 0.1


@dataclass(frozen=True)
class Case:
    """M rows of hidden states, of which N predict a response token."""

    name: str
    rows: int  # M
    labelled: int  # N
    vocabulary: int
    hidden: int
    dtype: torch.dtype
    small_mb: int  # workspace of the versions that save memory

    @property
    def title(self) -> str:
        share = f"{100 * self.labelled / self.rows:.0f} %"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.name}: M={self.rows}, N={self.labelled} ({share}), V={self.vocabulary}, D={self.hidden}, {dtype}"

    @property
    def logits_mb(self) -> int:
        """MiB of the float32 logits of the labelled rows, rounded up."""
        return self.labelled * self.vocabulary * 4 // MIB + 1


CASES = {
    "cpu": [
        Case("response", 2048, 184, 32_000, 512, torch.float32, 12),
        Case("all", 512, 512, 32_000, 512, torch.float32, 16),
    ],
    "cuda": [
        Case("llava", 10_816, 960, 32_000, 4096, torch.bfloat16, 64),
        Case("llava_152k", 10_816, 960, 151_936, 4096, torch.bfloat16, 64),
        Case("all_32k", 16_384, 16_384, 32_000, 4096, torch.bfloat16, 256),
        Case("all_4k_128k", 4096, 4096, 128_256, 4096, torch.bfloat16, 256),
        Case("all_128k", 16_384, 16_384, 128_256, 4096, torch.bfloat16, 256),
        Case("all_152k", 16_384, 16_384, 151_936, 4096, torch.bfloat16, 256),
    ],
}


class Missing(Exception):
    """A version that cannot run here."""


class Batch:
    """Random hidden states, weight and labels; never zeros, which a GPU multiplies faster than other numbers."""

    def __init__(self, case: Case, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.case = case

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.hidden = draw(case.rows, case.hidden).to(device, case.dtype).requires_grad_()
        weight = draw(case.vocabulary, case.hidden) * case.hidden**-0.5
        self.weight = weight.to(device, case.dtype).requires_grad_()
        index = torch.randperm(case.rows, generator=generator)[: case.labelled].sort().values
        labels = torch.full((case.rows,), IGNORE)
        labels[index] = torch.randint(case.vocabulary, (case.labelled,), generator=generator)
        self.index, self.labels = index.to(device), labels.to(device)
        lengths = torch.tensor([len(part) for part in torch.arange(case.labelled).chunk(SEQUENCES)])
        self.segment = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(device)
        self.ref = lengths.to(device) * -12.0  # near an untrained model's

    def selected(self) -> tuple[Tensor, Tensor]:
        """The labelled rows and their labels."""
        return self.hidden.index_select(0, self.index), self.labels.index_select(0, self.index)

    @property
    def gradient_bytes(self) -> int:
        return sum(x.nbytes for x in (self.hidden, self.weight) if x.requires_grad)

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None


def mean_ce(logp_N: Tensor, batch: Batch) -> Tensor:
    """Cross entropy, the mean over labelled rows."""
    return -logp_N.mean()


def npo(logp_N: Tensor, batch: Batch) -> Tensor:
    """NPO's forget loss (Zhang et al., 2024, eq. 3): mean over sequences of 2/β · softplus(β (logp − reference))."""
    sequence_B = torch.zeros_like(batch.ref).index_add(0, batch.segment, logp_N)
    return 2 / BETA * F.softplus(BETA * (sequence_B - batch.ref)).mean()


LOSSES: dict[str, Callable[[Tensor, Batch], Tensor]] = {"CE": mean_ce, "NPO": npo}
Step = Callable[[], Tensor]  # one forward; its result has the graph for backward


def eager_ce(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """What a Hugging Face model does: logits of every row in the model's dtype, then float32."""
    return F.cross_entropy((hidden @ weight.T).float(), labels, ignore_index=IGNORE)


def rows_of(batch: Batch, selected: bool) -> tuple[Tensor, Tensor]:
    """The rows that a head gets, with their labels: the labelled ones, or all."""
    return batch.selected() if selected else (batch.hidden, batch.labels)


def plain_ce(batch: Batch, selected: bool, compiled: bool = False) -> Step:
    function = torch.compile(eager_ce) if compiled else eager_ce

    def run() -> Tensor:
        hidden, labels = rows_of(batch, selected)
        return function(hidden, batch.weight, labels)

    return run


def plain_npo(batch: Batch, selected: bool) -> Step:
    def run() -> Tensor:
        hidden, labels = rows_of(batch, selected)
        logits = (hidden @ batch.weight.T).float()
        logp = -F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
        return npo(logp if selected else logp.index_select(0, batch.index), batch)

    return run


def peer(batch: Batch, module: str, package: str) -> Any:
    """A package to compare with. Raises Missing when it cannot run here."""
    if batch.hidden.device.type != "cuda":
        raise Missing(f"{package} has no CPU backend")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Missing(f"{package} is not installed ({error})") from error


def liger(batch: Batch, selected: bool) -> Step:
    module = peer(batch, "liger_kernel.transformers.fused_linear_cross_entropy", "liger-kernel")
    loss = module.LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE)

    def run() -> Tensor:
        hidden, labels = rows_of(batch, selected)
        return loss(batch.weight, hidden, labels)

    return run


def cce(batch: Batch, **options: Any) -> Step:
    module = peer(batch, "cut_cross_entropy", "cut-cross-entropy")
    return lambda: module.linear_cross_entropy(batch.hidden, batch.weight, batch.labels, ignore_index=IGNORE, **options)


def ours(batch: Batch, loss: str, workspace_mb: int | None = None, frozen: bool = False) -> Step:
    """What a training step calls: rows selected, `linear_token_logps`, and the loss on top."""
    weight = batch.weight.detach() if frozen else batch.weight

    def run() -> Tensor:
        hidden, labels = batch.selected()
        return LOSSES[loss](linear_token_logps(hidden, weight, labels, workspace_mb=workspace_mb), batch)

    return run


@dataclass(frozen=True)
class Version:
    name: str
    loss: str
    make: Callable[[Batch], Step]
    products: int = 3  # matrix products of its floor
    exact: bool = True  # value and gradients must be the reference's
    frozen: bool = False  # the weight gets no gradient

    @property
    def baseline(self) -> str:
        """The version that its time is compared with."""
        return f"eager {self.loss}"


def versions(case: Case, device: str) -> list[Version]:
    """Every version of a case, the baseline of each loss before its rivals."""
    usual = WORKSPACE_MB[device]

    def our_version(loss: str, workspace_mb: int, note: str = "") -> Version:
        products = 3 if case.logits_mb <= workspace_mb else 4
        name = f"linear_token_logps {loss}{note}"
        return Version(name, loss, lambda batch: ours(batch, loss, workspace_mb), products)

    small = f", {case.small_mb} MiB"
    listed = [
        Version("eager CE", "CE", lambda b: plain_ce(b, False)),
        Version("eager CE, selected", "CE", lambda b: plain_ce(b, True)),
        Version("torch.compile CE", "CE", lambda b: plain_ce(b, False, compiled=True)),
        Version("torch.compile CE, selected", "CE", lambda b: plain_ce(b, True, compiled=True)),
        Version("Liger CE", "CE", lambda b: liger(b, False)),
        Version("Liger CE, selected", "CE", lambda b: liger(b, True)),
        Version("CCE", "CE", lambda b: cce(b), exact=False),  # its default filter drops small gradients
        Version("CCE, no filter", "CE", lambda b: cce(b, filter_eps=None)),
        our_version("CE", usual),
        our_version("CE", case.small_mb, small),
    ]
    if usual < case.logits_mb <= 4096:  # a larger workspace than that would not be used in practice
        listed.append(our_version("CE", case.logits_mb, f", {case.logits_mb} MiB"))
    frozen = Version(
        "linear_token_logps CE, frozen weight", "CE", lambda b: ours(b, "CE", frozen=True), products=2, frozen=True
    )
    listed += [
        frozen,
        Version("eager NPO", "NPO", lambda b: plain_npo(b, False)),
        Version("eager NPO, selected", "NPO", lambda b: plain_npo(b, True)),
        our_version("NPO", usual),
        our_version("NPO", case.small_mb, small),
    ]
    return [v for v in listed if case.labelled < case.rows or "selected" not in v.name]
