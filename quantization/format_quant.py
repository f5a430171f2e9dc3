"""A float weight into one of the `FORMATS`, with a 16-bit branch where the settings ask for one.

    L_i = SVD_R(W - deq(q_{i-1})),   q_i = round(W - L_i),   q_0 = 0

the alternation of `svdquant` without smoothing: the branch's factors are rounded to bfloat16 before the residual is formed, and
it stops at the first round whose weight error is larger. Nothing here needs data; statistics, where given, are what the report's
output error is measured on.
"""

import torch
from torch import Tensor

from loragraft.kernels.layout import relative_rms
from loragraft.quantization.calibrate import ActivationStats
from loragraft.quantization.formats import FORMATS, Format, Tensors
from loragraft.quantization.low_rank import low_rank
from loragraft.quantization.settings import LayerReport, QuantSettings

REPORT_ROWS = 256
"""N(0, 1) inputs that the error is measured on where there are no statistics."""


def quantize_to_format(
    weight_NK: Tensor, bias: Tensor | None, stats: ActivationStats | None, settings: QuantSettings, path: str
) -> tuple[Tensors, LayerReport]:
    """The tensors of a `QuantizedLinear` under their names, and the report. `weight_NK` is float32 and finite."""
    found = FORMATS[settings.numerics]
    tensors, down, up, rounds = _alternate(weight_NK, found, settings)
    rows = _rows(weight_NK, stats, settings.seed)
    dense = _decoded(found, tensors, weight_NK)
    target = rows @ weight_NK.T
    effective = dense + up.float() @ down.float()
    seen = rows if found.round_input is None else found.round_input(rows)
    output = seen @ dense.T + (rows @ down.float().T) @ up.float().T
    plain = dense if rounds == 0 else _decoded(found, found.encode(weight_NK), weight_NK)
    report = LayerReport(
        path=path,
        numerics=found.name,
        group_size=found.block,
        rank=len(down),
        smoothing="none",
        alpha=0.0,
        beta=0.0,
        hadamard=False,
        iterations=rounds,
        weight_error=relative_rms(effective, weight_NK),
        output_error=relative_rms(output, target),
        rtn_error=relative_rms(seen @ plain.T, target),
        inputs="normal" if stats is None else "measured",
    )
    tensors = tensors | {"lora_down": down, "lora_up": up}
    tensors |= {} if bias is None else {"bias": bias.detach().clone()}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}, report


def _alternate(weight_NK: Tensor, found: Format, settings: QuantSettings) -> tuple[Tensors, Tensor, Tensor, int]:
    """(codes and scales, down [R, K], up [N, R], rounds kept); without a branch nothing is repeated."""
    N, K = weight_NK.shape
    rank = min(settings.branch_rank, N, K)
    if rank == 0:
        empty = weight_NK.new_empty(0, dtype=torch.bfloat16)
        return found.encode(weight_NK), empty.view(0, K), empty.view(N, 0), 0
    best: tuple[Tensors, Tensor, Tensor, int] | None = None
    least, dense = float("inf"), torch.zeros_like(weight_NK)
    for iteration in range(1, settings.iterations + 1):
        left, right = low_rank(weight_NK - dense, rank, settings.seed)
        up, down = left.to(torch.bfloat16), right.to(torch.bfloat16)
        branch = up.float() @ down.float()
        tensors = found.encode(weight_NK - branch)
        dense = _decoded(found, tensors, weight_NK)
        error = relative_rms(dense + branch, weight_NK)
        if best is not None and error >= least:
            break
        best, least = (tensors, down, up, iteration), error
    assert best is not None  # at least one round
    return best


def _decoded(found: Format, tensors: Tensors, weight_NK: Tensor) -> Tensor:
    tables = {name: table.to(weight_NK.device) for name, table in found.tables.items()}
    return found.decode(tensors | tables, *weight_NK.shape)


def _rows(weight_NK: Tensor, stats: ActivationStats | None, seed: int) -> Tensor:
    if stats is not None:
        return stats.samples_SK.to(weight_NK)
    rows = torch.randn(REPORT_ROWS, weight_NK.shape[1], generator=torch.Generator().manual_seed(seed))
    return rows.to(weight_NK.device)
