"""GPTQ (Frantar et al., arXiv:2210.17323): codes that answer for each other's rounding, with the scales left as they are.

For a residual R [N, K] and the inputs x' [S, K] that meet it, the codes minimise |x' R^T - x' deq(q)^T| greedily:

    Hessian = x'^T x' + damp mean(diag) I,      U = chol(Hessian^-1)^T (upper)
    per column k:  q_k = round(R_k),  e = (R_k - deq(q_k)) / U_kk,  R_j -= e U_kj  for every later j

Columns go by falling diagonal of the Hessian ("act order"), which costs nothing here because the group scales are frozen: they
are those of plain rounding, as stored. Updates are lazy, in blocks of 128 columns. Damping as in DeepCompressor: 0.01, ten times
more where the factorisation fails.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from loragraft.quantization.settings import QuantSettings
from loragraft.quantization.weight_quant import ROW_LIMIT, RoundedWeight

DAMPING, MOST_DAMPING = 0.01, 1.0
BLOCK = 128
HELD_OUT = 4
"""One calibration row in four judges the codes and is kept from the Hessian: on its own rows GPTQ always looks better."""

Column = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""(values [N], column) -> (codes [N], what they stand for [N])."""


def gptq_codes(target_NK: Tensor, inputs_SK: Tensor, rounded: RoundedWeight, settings: QuantSettings) -> RoundedWeight:
    """`rounded` (plain rounding of `target_NK`) with GPTQ's codes for inputs x' [S, K]; scales and padding unchanged.

    Raises ValueError if the Hessian cannot be factored even with `MOST_DAMPING`.
    """
    K = target_NK.shape[1]
    factor, order = _factor(inputs_SK)
    column = _column_rounding(rounded, settings)
    left = target_NK[:, order]
    columns = order.tolist()
    codes, dense = rounded.codes_NK.clone(), rounded.dense_NK.clone()
    for start in range(0, K, BLOCK):
        stop = min(start + BLOCK, K)
        block = left[:, start:stop]
        errors = torch.zeros_like(block)
        for k in range(start, stop):
            i = k - start
            codes_N, dense_N = column(block[:, i], columns[k])
            codes[:, columns[k]], dense[:, columns[k]] = codes_N.to(codes.dtype), dense_N
            errors[:, i] = (block[:, i] - dense_N) / factor[k, k]
            block[:, i + 1 :] -= errors[:, i, None] * factor[k, k + 1 : stop]
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    return replace(rounded, codes_NK=codes, dense_NK=dense)


def _factor(inputs_SK: Tensor) -> tuple[Tensor, Tensor]:
    """(U [K, K] float32, upper, of the inverse damped Hessian in falling order of its diagonal; that order [K])."""
    # float64: float32 loses the small eigenvalues of inputs with loud channels, and the inverse lives on those. One K x K
    # matrix takes 1.9 GB at K = 15360, so each is dropped as soon as the next one stands.
    wide = inputs_SK.double()
    order = wide.square().sum(0).argsort(descending=True, stable=True)
    wide = wide[:, order]
    damping = DAMPING
    while damping <= MOST_DAMPING:
        matrix = wide.T @ wide
        matrix.diagonal().add_(damping * matrix.diagonal().mean().clamp(min=1e-30))
        matrix, failed = torch.linalg.cholesky_ex(matrix)
        if not failed:
            matrix = torch.cholesky_inverse(matrix)
            matrix, failed = torch.linalg.cholesky_ex(matrix, upper=True)
            if not failed:
                return matrix.float(), order
        damping *= 10
    raise ValueError(f"GPTQ: the Hessian of {inputs_SK.shape[0]} rows cannot be factored; are the inputs finite?")


def _column_rounding(rounded: RoundedWeight, settings: QuantSettings) -> Column:
    """Rounding of one column with the stored scales, in the formulas of `weight_quant`."""
    scales, group = rounded.scales, settings.group_size

    def progressive(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
        row = scales["row_scale"]
        scale, zero = (scales[name][k // group].float() for name in ("group_scale", "group_zero"))
        first = (values / row).clamp(-ROW_LIMIT, ROW_LIMIT)  # beyond it the code would leave INT8
        codes = ((first / scale).round() + zero).clamp(0, 15)
        return codes, (codes - zero) * scale * row

    def symmetric(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
        scale = scales["wscale"][k // group].float()
        codes = (values / scale).round().clamp(-7, 7)
        return codes, codes * scale

    def affine(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
        scale, zero = scales["wscale"][k // group].float(), scales["wzero"][k // group].float()
        codes = ((values - zero) / scale).round().clamp(0, 15)
        return codes, codes * scale + zero

    return {"w4a8": progressive, "w4a4": symmetric, "w4a16": affine}[settings.numerics]
