"""FP8 and INT8 in rows: one float32 scale per row of the weight and per token, so that a product is rescaled once, at its end.

    scale = max|row| / limit,   code = round(row / scale)          y_mn = x_scale_m w_scale_n sum_k x_code_mk w_code_nk

limit: 448 for E4M3 (Micikevicius et al., "FP8 formats for deep learning", arXiv:2209.05433), 127 for INT8 (Dettmers et al.,
"LLM.int8()", arXiv:2208.07339, vector-wise, without outlier columns). Rounding is to nearest, ties to even. A row of zeros has
scale 1. E4M3 codes are stored as their bytes (uint8).
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

E4M3_MAX, INT8_MAX = 448.0, 127.0
INT_MM_ROWS, INT_MM_COLUMNS = 32, 8
"""torch._int_mm on a GPU wants more than 16 rows, and K and N divisible by 8."""


def to_e4m3(values: Tensor) -> Tensor:
    """float32 -> float8_e4m3fn: to nearest, values beyond 448 become 448 (torch's own cast makes NaN of them)."""
    return values.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def row_codes(matrix: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[M, K] -> (codes [M, K] in float8_e4m3fn or int8, scale [M, 1] float32)."""
    limit = E4M3_MAX if dtype == torch.float8_e4m3fn else INT8_MAX
    wide = matrix.float()
    scale = wide.abs().amax(dim=1, keepdim=True) / limit
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    scaled = wide / scale
    return (to_e4m3(scaled) if dtype == torch.float8_e4m3fn else scaled.round().to(dtype)), scale


def round_rows(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """What a product of codes sees of [M, K], in its own dtype."""
    codes, scale = row_codes(matrix, dtype)
    return (codes.float() * scale).to(matrix.dtype)


def encode_rows(weight_NK: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """`qweight` [N, K] (E4M3 as uint8, or int8) and `row_scale` [N] float32."""
    codes, scale = row_codes(weight_NK, dtype)
    return {"qweight": codes.view(torch.uint8) if dtype == torch.float8_e4m3fn else codes, "row_scale": scale[:, 0]}


def decode_rows(tensors: dict[str, Tensor]) -> Tensor:
    """[N, K] in float32."""
    codes = tensors["qweight"]
    wide = codes.view(torch.float8_e4m3fn) if codes.dtype == torch.uint8 else codes
    return wide.float() * tensors["row_scale"][:, None]


def scaled_product(x_MK: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """y [M, N] in bfloat16 by torch._scaled_mm: E4M3 tensor cores, x quantized per token. K and N divisible by 16."""
    codes, scale = row_codes(x_MK, torch.float8_e4m3fn)
    weight = tensors["qweight"].view(torch.float8_e4m3fn)
    return torch._scaled_mm(
        codes, weight.T, scale_a=scale, scale_b=tensors["row_scale"][None], out_dtype=torch.bfloat16, use_fast_accum=True
    )  # fmt: skip


def integer_product(x_MK: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """y [M, N] in float32 by torch._int_mm: INT32 sums of INT8 codes, x quantized per token; few rows are padded."""
    codes, scale = row_codes(x_MK, torch.int8)
    rows = x_MK.shape[0]
    if rows < INT_MM_ROWS:
        codes = pad(codes, (0, 0, 0, INT_MM_ROWS - rows))
    sums = torch._int_mm(codes, tensors["qweight"].T)[:rows]
    return sums * scale * tensors["row_scale"]
