"""Several W4A8 linears that read one x, in one op: one quantization, one down-projection, products side by side.

    codes, a = quantize_activation(x)          h = x [D_1; D_2; ...]^T
    y_i      = a_m s_in (codes . I_i^T)  +  h_i U_i^T  +  bias_i                     as `w4a8_linear` without smoothing

A product of 4608 x 3072 outputs fills an H100 3.3 times: launched one after the other, q, k and v leave it idle a sixth of the
time. Here each goes to a stream of its own, and the programs of the next one start where those of the last have ended. Results
do not depend on that. Not differentiable: training keeps one op per layer (`w4a8_linear`).
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from loragraft.kernels.act_quant import quantize_activation
from loragraft.kernels.hopper_gemm import hopper_gemm, hopper_gemm_runs
from loragraft.kernels.layout import rank_product, uses_triton
from loragraft.kernels.w4a8_linear import w4a8_product


@torch.library.custom_op("loragraft::w4a8_group", mutates_args=())
def _w4a8_group(
    x_MK: Tensor, qweights: Sequence[Tensor], row_scales: Sequence[Tensor], group_words: Sequence[Tensor],
    downs: Sequence[Tensor], ups: Sequence[Tensor], biases: Sequence[Tensor | None], hadamard: bool,
) -> list[Tensor]:  # fmt: skip
    codes_MK, scale_M1 = quantize_activation(x_MK, None, hadamard, bits=8)
    h_MR = rank_product(x_MK, torch.cat([down.to(x_MK.dtype) for down in downs]).T)
    # rows of h_i that do not start at multiples of 16 bytes could not be moved by TMA
    parts = [
        part if part.storage_offset() % 8 == 0 else part.clone() for part in h_MR.split([d.shape[0] for d in downs], 1)
    ]
    layers = list(zip(qweights, row_scales, group_words, parts, [up.to(x_MK.dtype) for up in ups], biases, strict=True))
    if not uses_triton(x_MK) or not all(hopper_gemm_runs(codes_MK, x_MK.dtype, up) for *_, up, _ in layers):
        return [w4a8_product(codes_MK, scale_M1, *layer) for layer in layers]
    main = torch.cuda.current_stream(x_MK.device)
    # Allocated here: what another stream allocates returns to that stream's part of the memory.
    ys = [x_MK.new_empty((x_MK.shape[0], weight.shape[0])) for weight in qweights]
    ready = main.record_event()
    for (weight, s_N, words, h, up, bias), y_MN, stream in zip(
        layers, ys, (main, *side_streams(x_MK.device)), strict=False
    ):
        stream.wait_event(ready)
        with torch.cuda.stream(stream):
            hopper_gemm(codes_MK, scale_M1, weight, words, s_N, h, up, bias, out=y_MN)
        main.wait_event(stream.record_event())
    return ys


@_w4a8_group.register_fake
def _(x_MK, qweights, row_scales, group_words, downs, ups, biases, hadamard):
    return [x_MK.new_empty((x_MK.shape[0], weight.shape[0])) for weight in qweights]


MOST = 4
"""Layers of one group; each but the first has a stream."""


@cache
def side_streams(device: torch.device) -> tuple[torch.cuda.Stream, ...]:
    """Streams for what can run beside the current one, inside of an op."""
    return tuple(torch.cuda.Stream(device) for _ in range(MOST - 1))


def w4a8_group(
    x: Tensor, qweights: Sequence[Tensor], row_scales: Sequence[Tensor], group_words: Sequence[Tensor],
    downs: Sequence[Tensor], ups: Sequence[Tensor], biases: Sequence[Tensor | None], *, hadamard: bool,
) -> list[Tensor]:  # fmt: skip
    """x [..., K] -> one y_i [..., N_i] per layer; the arguments are those of `w4a8_linear`, one per layer.

    Raises ValueError for more than `MOST` layers.
    """
    if len(qweights) > MOST:
        raise ValueError(f"w4a8_group: {len(qweights)} layers, must be at most {MOST}")
    x_MK = x.reshape(-1, x.shape[-1]).contiguous()
    ys = _w4a8_group(x_MK, qweights, row_scales, group_words, downs, ups, biases, hadamard)
    return [y_MN.view(*x.shape[:-1], -1) for y_MN in ys]
