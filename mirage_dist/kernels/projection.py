"""The matrix products of a loss head, and the precision they are made in.

bfloat16 on CUDA: 16-bit operands, float32 logits (`out_dtype`), float32 sums of the hidden gradient, and a weight
gradient rounded by the product that makes it. Everything else: operands in float32 (float64 for float64), the weight
converted a block of rows at a time, so that no float32 copy of the whole weight exists.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_CONVERTED = 32 << 20  # bytes of the weight, or of its gradient, in the wider dtype at a time


def widening_mm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Product of two bfloat16 matrices in float32; CUDA only."""
    if out is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)


def multiplies_in_16_bits(hidden: Tensor, weight: Tensor) -> bool:
    return hidden.is_cuda and hidden.dtype == weight.dtype == torch.bfloat16


def cut(length: int, size: int) -> list[slice]:
    """0 … length in slices of at most `size`."""
    return [slice(first, min(first + size, length)) for first in range(0, length, size)]


class Projection:
    """W (V, D) with an optional bias (V,) and soft cap, applied to rows (N, D).

    logit_dtype: of logits and statistics. row_dtype: of the rows as operands, and of the logits' gradient.
    """

    def __init__(self, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, softcap: float | None) -> None:
        self.weight_VD, self.softcap = weight_VD, softcap
        self.narrow = multiplies_in_16_bits(hidden_ND, weight_VD)
        wide = torch.promote_types(torch.promote_types(hidden_ND.dtype, weight_VD.dtype), torch.float32)
        self.logit_dtype = wide
        self.row_dtype = torch.bfloat16 if self.narrow else wide
        self.bias_V = None if bias_V is None else bias_V.detach().to(wide)

    def workspace(self, rows: int, columns: int) -> Tensor:
        """Room for (rows, columns) logits; rows start at multiples of 256 bytes, for the products' sake."""
        padded = -(-columns // 64) * 64
        return self.weight_VD.new_empty((rows, padded), dtype=self.logit_dtype)[:, :columns]

    def bias(self, columns: slice) -> Tensor | None:
        return None if self.bias_V is None else self.bias_V[columns]

    def logits_(self, out_NC: Tensor, hidden_ND: Tensor, start: int) -> Tensor:
        """Raw products with the weight's rows from `start` on, written to `out_NC`."""
        if self.narrow:
            return widening_mm(hidden_ND, self.weight_VD[start : start + out_NC.shape[1]].T, out=out_NC)
        for part, weight_CD in self._converted(start, out_NC.shape[1]):
            torch.mm(hidden_ND, weight_CD.T, out=out_NC[:, part])
        return out_NC

    def add_hidden_grad_(self, out_ND: Tensor, dz_NC: Tensor, start: int, first: bool) -> None:
        """out = dz W, or with `first` false out += dz W, in `logit_dtype`."""
        if self.narrow:
            product_ND = widening_mm(dz_NC, self.weight_VD[start : start + dz_NC.shape[1]], out_ND if first else None)
            if not first:
                out_ND += product_ND
            return
        for part, weight_CD in self._converted(start, dz_NC.shape[1]):
            out_ND.addmm_(dz_NC[:, part], weight_CD, beta=0 if first and part.start == 0 else 1)

    def add_weight_grad_(self, out_CD: Tensor, dz_NC: Tensor, hidden_ND: Tensor, first: bool) -> None:
        """out = dzᵀ H, or with `first` false out += dzᵀ H: rounded once a call, to the dtype of `out_CD`."""
        if out_CD.dtype == dz_NC.dtype:
            out_CD.addmm_(dz_NC.T, hidden_ND, beta=0 if first else 1)
            return
        multiply = widening_mm if self.narrow else torch.mm
        for part in cut(dz_NC.shape[1], self._converted_rows):
            product = multiply(dz_NC[:, part].T, hidden_ND)
            out_CD[part] = product if first else product.add_(out_CD[part])

    @property
    def _converted_rows(self) -> int:
        return max(64, _CONVERTED // (self.weight_VD.shape[1] * self.logit_dtype.itemsize))

    def _converted(self, start: int, columns: int) -> Iterator[tuple[slice, Tensor]]:
        """Columns and their rows of the weight as operands: all at once, or in pieces where they are converted."""
        for part in cut(columns, columns if self.weight_VD.dtype == self.row_dtype else self._converted_rows):
            yield part, self.weight_VD[start + part.start : start + part.stop].to(self.row_dtype)
