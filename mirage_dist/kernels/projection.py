"""The matrix products of a loss head and their precision.

bfloat16 on CUDA: 16-bit operands, float32 logits (`out_dtype`), float32 sums for the hidden gradient, and a weight
gradient rounded once, by the product that computes it. Everything else: operands in float32 (float64 for float64), with
a 16-bit weight converted a block of rows at a time, so that no float32 copy of the whole weight exists.

Shapes: N rows, D hidden size, V vocabulary, C columns of a chunk of it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CONVERTED_BYTES = 32 << 20  # of the weight, or of its gradient, that exist in the wider dtype at a time


def widening_mm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Product of two bfloat16 matrices in float32; CUDA only."""
    if out is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)


def multiplies_in_16_bits(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the products take 16-bit operands: both matrices in bfloat16 on CUDA."""
    return hidden.is_cuda and hidden.dtype == weight.dtype == torch.bfloat16


def slices(length: int, size: int) -> list[slice]:
    """Consecutive slices of at most `size` that cover 0 … length."""
    return [slice(first, min(first + size, length)) for first in range(0, length, size)]


def without_autocast(tensor: Tensor) -> torch.autocast:
    """Context without autocast on the tensor's device: autocast would make float32 products 16-bit ones."""
    return torch.autocast(tensor.device.type, enabled=False)


class Projection:
    """An output projection: weight (V, D) with an optional bias (V,) and soft cap, applied to hidden rows (N, D).

    logit_dtype: dtype of logits and statistics. row_dtype: dtype of hidden rows as operands and of the logits'
    gradient; callers convert hidden rows to it once.
    """

    def __init__(self, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, softcap: float | None) -> None:
        self.weight_VD, self.softcap = weight_VD, softcap
        self.narrow = multiplies_in_16_bits(hidden_ND, weight_VD)
        wide = torch.promote_types(torch.promote_types(hidden_ND.dtype, weight_VD.dtype), torch.float32)
        self.logit_dtype = wide
        self.row_dtype = torch.bfloat16 if self.narrow else wide
        self.bias_V = None if bias_V is None else bias_V.detach().to(wide)

    def workspace(self, rows: int, columns: int) -> Tensor:
        """An uninitialised buffer for (rows, columns) logits; rows start at multiples of 256 bytes, which the matrix
        products prefer.
        """
        padded = -(-columns // 64) * 64
        return self.weight_VD.new_empty((rows, padded), dtype=self.logit_dtype)[:, :columns]

    def bias(self, columns: slice) -> Tensor | None:
        """The bias of these columns in `logit_dtype`, None without one."""
        return None if self.bias_V is None else self.bias_V[columns]

    def logits_(self, out_NC: Tensor, hidden_ND: Tensor, start: int) -> Tensor:
        """Write H Wᵀ to `out_NC` for the vocabulary entries from `start` on: raw products, no bias and no soft cap."""
        if self.narrow:
            return widening_mm(hidden_ND, self.weight_VD[start : start + out_NC.shape[1]].T, out=out_NC)
        for part, weight_CD in self._operands(start, out_NC.shape[1]):
            torch.mm(hidden_ND, weight_CD.T, out=out_NC[:, part])
        return out_NC

    def add_hidden_grad_(self, out_ND: Tensor, dz_NC: Tensor, start: int, first: bool) -> None:
        """out += dz W in `logit_dtype`; with `first`, out = dz W, whatever `out_ND` held."""
        if self.narrow:
            product_ND = widening_mm(dz_NC, self.weight_VD[start : start + dz_NC.shape[1]], out_ND if first else None)
            if not first:
                out_ND += product_ND
            return
        for part, weight_CD in self._operands(start, dz_NC.shape[1]):
            out_ND.addmm_(dz_NC[:, part], weight_CD, beta=0 if first and part.start == 0 else 1)

    def weight_grad_(self, out_CD: Tensor, dz_NC: Tensor, hidden_ND: Tensor) -> None:
        """Write dzᵀ H to `out_CD`, rounded once to its dtype."""
        if out_CD.dtype == dz_NC.dtype:
            out_CD.addmm_(dz_NC.T, hidden_ND, beta=0)
            return
        multiply = widening_mm if self.narrow else torch.mm
        for part in slices(dz_NC.shape[1], self._converted_rows):
            out_CD[part] = multiply(dz_NC[:, part].T, hidden_ND)

    @property
    def _converted_rows(self) -> int:
        """Rows of the weight that fit CONVERTED_BYTES in the wider dtype, at least 64."""
        return max(64, CONVERTED_BYTES // (self.weight_VD.shape[1] * self.logit_dtype.itemsize))

    def _operands(self, start: int, columns: int) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the chunk's columns with the weight's rows for them in `row_dtype`: one slice where the weight has
        that dtype, otherwise blocks that are converted one at a time.
        """
        for part in slices(columns, columns if self.weight_VD.dtype == self.row_dtype else self._converted_rows):
            yield part, self.weight_VD[start + part.start : start + part.stop].to(self.row_dtype)
