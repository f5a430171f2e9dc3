"""What one op costs on a GPU, from its shapes: operations by the unit that does them, bytes moved, memory held while it runs.

    cost_of(func, args, kwargs, results) -> OpCost          aten ops by torch's own FLOP formulas, ours by those below
    workspace(func, args, results) -> bytes of what the op allocates and frees again

M tokens, N output and K input features (Kp padded to 128), R rank of branch and adapter together. An op of ours that no
formula covers is counted by its inputs and outputs and marked, so that a report can say so.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from loragraft.kernels.block_codes import blocks_of
from loragraft.kernels.row_product import count_blocks, split_rows
from loragraft.kernels.taps import Window, tap_columns
from loragraft.kernels.w4a16_skinny import fits
from loragraft.train.launches import launches_of

Unit = Literal[
    "int8", "gemm", "gemm32", "batched32", "attention", "attention_backward", "fast_attention", "fast_attention_backward", "conv",
    "depthwise", "depthwise_backward", "group_norm", "weight_only", "memory",
]  # fmt: skip
"""What bounds a piece of work: INT8 or 16-bit tensor cores, float32 products, large or in batches of small ones (linear attention),
attention by flash-2 or by what is faster (cuDNN forward, FlashAttention-4), convolutions, depthwise ones, W4A16 of many tokens, whose
kernel waits for one group of columns after the other, memory alone. group_norm
counts values, not operations: torch's kernel has one block for each group of a picture, so that most of the GPU waits."""
OURS = "loragraft::"
GRADIENTS = ("dgrad", "_dx", "gradients", "backward", "adamw8bit")
"""In the names of this project's ops that compute gradients or use them."""


@dataclass(frozen=True)
class Part:
    """A piece of an op that is one kernel, or nearly: `flops` on `unit` while `nbytes` pass through memory."""

    unit: Unit
    flops: int
    nbytes: int
    tiles: int = 0
    """Equal pieces of work that a multiprocessor takes one after the other; 0: so many that the last round does not count."""


@dataclass(frozen=True)
class OpCost:
    """One op at one set of shapes."""

    name: str
    parts: tuple[Part, ...]
    modelled: bool = True
    launches: float = 0.0
    """Kernels that it launches from Python, by the time that takes (`Launches.weight`); torch's are launched without it."""

    @property
    def custom(self) -> bool:
        """Whether a kernel of this project runs, launched from Python; `dry_` ops stand for torch's."""
        return self.name.startswith(OURS) and not self.name.startswith(f"{OURS}dry_")

    @property
    def forward(self) -> bool:
        """Whether it is `custom` and computes a layer, in a pass or again under checkpointing, rather than a gradient."""
        return self.custom and not any(word in self.name for word in GRADIENTS)

    @property
    def fusible(self) -> bool:
        """Whether a compiler joins it with its neighbours: an op of torch's that moves memory and multiplies nothing."""
        moves = (p.unit == "group_norm" or (p.unit == "memory" and not p.flops) for p in self.parts)
        return not self.custom and bool(self.parts) and all(moves)


def cost_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], results: Sequence[Tensor]) -> OpCost:
    """The cost of calling the op overload `func`."""
    name: str = func._schema.name
    if name.startswith(OURS):
        own = name.removeprefix(OURS)
        formula = _COSTS.get(own)
        parts = (formula or _elementwise)(args, results)
        launches = 0.0 if own.startswith("dry_") else launches_of(own, args).weight
        return OpCost(name, tuple(parts), modelled=formula is not None, launches=launches)
    short = name.removeprefix("aten::")
    if short in ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"):
        return OpCost(name, ())
    flops, unit = _aten_flops(func, short, args, kwargs, results)
    return OpCost(name, (Part(unit, flops, _bytes(args) + _bytes(kwargs) + _bytes(results)),))


def workspace(func: Any, args: tuple[Any, ...], results: Sequence[Tensor]) -> list[int]:
    """Sizes of what `func` allocates beside its results while it runs on a GPU."""
    name: str = func._schema.name
    if name.startswith(OURS):
        formula = _WORKSPACES.get(name.removeprefix(OURS))
    else:
        formula = _WORKSPACES.get(name.removeprefix("aten::"))
    return [] if formula is None else formula(args, results)


def _aten_flops(
    func: Any, short: str, args: tuple[Any, ...], kwargs: dict[str, Any], results: Sequence[Tensor]
) -> tuple[int, Unit]:
    if short == "_scaled_dot_product_flash_attention_for_cpu":
        return sdpa_flop_count(*(a.shape for a in args[:3])), "attention"
    if short == "_scaled_dot_product_flash_attention_for_cpu_backward":
        return sdpa_backward_flop_count(*(a.shape for a in args[:4])), "attention_backward"
    if short == "native_group_norm":
        return results[0].numel(), "group_norm"
    formula = flop_registry.get(func._overloadpacket)
    if formula is None:
        return 0, "memory"
    flops = int(formula(*args, **kwargs, out_val=results[0] if len(results) == 1 else tuple(results)))
    if "attention" in short:
        return flops, "attention_backward" if "backward" in short else "attention"
    if "conv" in short:
        backward = "backward" in short
        if args[2 if backward else 1].shape[1] > 1:
            return flops, "conv"
        return flops, "depthwise_backward" if backward else "depthwise"
    if results[0].dtype.itemsize == 2:
        return flops, "gemm"
    return flops, "batched32" if short in ("bmm", "baddbmm") else "gemm32"


def _bytes(tree: Any) -> int:
    """`nbytes_of` the tensors in `tree`, together."""
    return sum(nbytes_of(leaf) for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def nbytes_of(tensor: Tensor) -> int:
    """What an op that takes `tensor` moves at most: an expanded view has less in memory than it shows."""
    return int(min(tensor.numel() * tensor.dtype.itemsize, tensor.untyped_storage().nbytes()))


def _rank(*factors: Tensor | None) -> int:
    """Rows of [lora_down; adapter_down]."""
    return sum(factor.shape[0] for factor in factors if factor is not None)


def _w4a8(args: tuple[Any, ...], results: Sequence[Tensor]) -> list[Part]:
    """x is read once, quantized (unless it came with its codes) and multiplied with [D; A]; then codes times codes, the branch
    in the epilogue."""
    x, qweight = args[:2]
    (M, K), (N, R) = x.shape, (qweight.shape[0], _rank(args[5], args[8]))
    return [
        Part("memory", 2 * M * K * R, _bytes([x, *results[1:]])),
        Part("int8", 2 * M * N * K, _bytes([qweight, args[3], *results]), product_tiles(M, N)),
        Part("gemm", 2 * M * N * R, 0),
    ]


def product_tiles(M: int, N: int) -> int:
    """Of Hopper's INT8 product: 256 tokens by 128 outputs, half of it where tokens are few (`hopper_gemm.hopper_config`)."""
    return -(-M // (256 if M > 1024 else 128)) * -(-N // 128)


def _dequantizes(args: tuple[Any, ...]) -> bool:
    """Whether a `w4a8_dgrad` was given dy [U, B]."""
    return len(args) > 8 and args[8] is not None


def _w4a8_dgrad(args: tuple[Any, ...], results: Sequence[Tensor]) -> list[Part]:
    """dequantized (dy [U, B] is given): W_eff is written, then read by one product; int8: dy is quantized, the weight transposed."""
    dy, _, down, qweight = args[:4]
    (M, N), (R, K) = dy.shape, down.shape
    if _dequantizes(args):
        dense = N * K * dy.dtype.itemsize
        return [
            Part("memory", 2 * N * K * R, _bytes(qweight) + dense),
            Part("gemm", 2 * M * N * K, _bytes([dy, results[0]]) + dense),
        ]
    rank = Part("gemm", 2 * M * N * R, _bytes([dy, results[1]]))
    return [
        Part("memory", 0, _bytes([dy, qweight]) + M * N + N * K),
        Part("int8", 2 * M * N * K, M * N + N * K + _bytes(results[0]), product_tiles(M, K)),
        rank,
        Part("gemm", 2 * M * K * R, 0),
    ]


def _w4a4(args: tuple[Any, ...], results: Sequence[Tensor]) -> list[Part]:
    """x rounded to its groups and the weight, both written in 16 bits with the branch joined on, then one product."""
    x, qweight = args[:2]
    (M, K), (N, R) = x.shape, (qweight.shape[0], _rank(args[4], args[7]))
    joined, dense = M * (K + R) * x.dtype.itemsize, N * (K + R) * x.dtype.itemsize
    return [
        Part("gemm", 2 * M * K * R, _bytes([x, *results[1:]])),
        Part("memory", 0, _bytes([x, qweight]) + joined + dense),
        Part("gemm", 2 * M * N * (K + R), joined + dense + _bytes(results[0])),
    ]


def _w4a4_dgrad(args: tuple[Any, ...], results: Sequence[Tensor]) -> list[Part]:
    """As a dequantized W4A8 one; dy [U, B] is computed here too."""
    dy, up = args[:2]
    rank = Part("gemm", 2 * dy.numel() * up.shape[1], _bytes([dy, results[1]]))
    return [*_w4a8_dgrad((*args[:4], *(None,) * 4, results[1]), results), rank]


def _w4a16(args: tuple[Any, ...], results: Sequence[Tensor]) -> list[Part]:
    x, qweight = args[:2]
    (M, K), N, R = x.shape, qweight.shape[0], results[1].shape[1]
    moved = _bytes(args) + _bytes(results)
    if fits(x, qweight):
        return [Part("gemm", 2 * M * (N * K + R * (N + K)), moved)]
    return [Part("weight_only", 2 * M * N * K, moved, weight_only_tiles(M, N)), Part("gemm", 2 * M * R * (N + K), 0)]


def weight_only_tiles(M: int, N: int) -> int:
    """Of the kernel for many tokens: 64 of them by 64 outputs."""
    return -(-M // 64) * -(-N // 64)


def _w4a16_dx(args: tuple[Any, ...], results: Sequence[Tensor]) -> list[Part]:
    dy, _, down = args[:3]
    return [
        Part("gemm", 2 * dy.shape[0] * (dy.shape[1] + down.shape[0]) * down.shape[1], _bytes(args) + _bytes(results))
    ]


def _adapter_gradients(args: tuple[Any, ...], results: Sequence[Tensor]) -> list[Part]:
    """Both products, one launch; what they add up in parts stays in the cache."""
    g, x, scale, h, dy, smooth = args[:6]
    (M, r), columns = g.shape, x.shape[1] + dy.shape[1]
    return [Part("memory", 2 * M * r * columns, _bytes([g, x, scale, h, dy, smooth]) + _bytes(results))]


def _conv(args: tuple[Any, ...], results: Sequence[Tensor]) -> list[Part]:
    """x is read twice and quantized, once more if pixels' codes are kept; the branch is one product with all taps of [D; A],
    summed over taps, and in the epilogue of the convolution."""
    x, qweight = args[:2]
    window, (M, C), (P, N) = Window(*args[10]), x.shape, results[0].shape
    R, T = _rank(args[5], args[8]), window.taps
    product, codes = M * T * R * x.dtype.itemsize, _block_codes(window, C)
    kept = _bytes([x, *results[2:]]) if results[2].numel() else 0
    return [
        Part("memory", 0, 2 * _bytes(x) + codes + kept),
        Part("gemm", 2 * M * C * T * R, _bytes(x) + product),
        Part("memory", 0, product + _bytes(results[1])),
        Part("int8", 2 * P * N * T * C, codes + _bytes([qweight, *results[:2]]), product_tiles(P, N)),
        Part("gemm", 2 * P * N * R, 0),
    ]


def _block_codes(window: Window, channels: int) -> int:
    """Bytes of `block_codes` of an image."""
    return blocks_of(window).code_rows * tap_columns(channels)


def _conv_dgrad(args: tuple[Any, ...], results: Sequence[Tensor]) -> list[Part]:
    """W_eff is written, then read by cuDNN's transposed convolution."""
    dy, up, down, qweight = args[:4]
    (P, N), (R, K) = dy.shape, down.shape
    dense = N * K * dy.dtype.itemsize
    return [
        Part("memory", 2 * N * K * R, _bytes([qweight, up, down]) + dense),
        Part("conv", 2 * P * N * K, _bytes([dy, *results]) + dense),
    ]


def _conv_adapter_gradients(args: tuple[Any, ...], results: Sequence[Tensor]) -> list[Part]:
    """dy B for every tap, a product with x for each tap, and dB."""
    dy, h, x, _, _, up = args[:6]
    (P, N), r, T = dy.shape, up.shape[1], Window(*args[6]).taps
    spread = T * x.shape[0] * r * dy.dtype.itemsize
    return [
        Part("gemm", 2 * P * N * r, _bytes(dy) + 2 * spread),
        Part("memory", 2 * T * x.shape[0] * r * args[8], T * _bytes(x) + spread + _bytes(results[0])),
        Part("memory", 2 * P * N * r, _bytes([dy, h, results[1]])),
    ]


def _attention(args: tuple[Any, ...], results: Sequence[Tensor]) -> list[Part]:
    q, k, v = (a.transpose(1, 2).shape for a in args[:3])
    return [Part("fast_attention", sdpa_flop_count(q, k, v), _bytes(args) + _bytes(results))]


def _attention_backward(args: tuple[Any, ...], results: Sequence[Tensor]) -> list[Part]:
    shapes = [a.transpose(1, 2).shape for a in args[:4]]
    unit: Unit = "fast_attention_backward" if args[6] == "flash_attn_4" else "attention_backward"
    return [Part(unit, sdpa_backward_flop_count(*shapes), _bytes(args) + _bytes(results))]


def _adamw8bit(args: tuple[Any, ...], results: Sequence[Tensor]) -> list[Part]:
    """Factors, codes and scales are read and written, gradients read."""
    parameters, gradients, codes, scales = args[:4]
    return [Part("memory", 0, 2 * _bytes([parameters, codes, scales]) + _bytes(gradients))]


def _elementwise(args: tuple[Any, ...], results: Sequence[Tensor]) -> list[Part]:
    return [Part("memory", 0, _bytes(args) + _bytes(results))]


_COSTS: dict[str, Callable[[tuple[Any, ...], Sequence[Tensor]], list[Part]]] = {
    "w4a8_linear": _w4a8,
    "w4a8_dgrad": _w4a8_dgrad,
    "w4a4_linear": _w4a4,
    "w4a4_dgrad": _w4a4_dgrad,
    "w4a16_linear": _w4a16,
    "w4a16_dx": _w4a16_dx,
    "w4a8_conv": _conv,
    "w4a8_conv_dgrad": _conv_dgrad,
    "conv_adapter_gradients": _conv_adapter_gradients,
    "quantize_activation": _elementwise,
    "attention": _attention,
    "attention_backward": _attention_backward,
    "adapter_gradients": _adapter_gradients,
    "adamw8bit": _adamw8bit,
    "dry_rms_norm": _elementwise,
    "dry_rms_norm_backward": _elementwise,
}


def _factors(dtype: torch.dtype, *tensors: Tensor | None) -> list[int]:
    """Factors in the compute dtype and joined ([D; A] or [U, B]): each cast that changes a dtype, then the result."""
    there = [t for t in tensors if t is not None]
    casts = [t.numel() * dtype.itemsize for t in there if t.dtype != dtype]
    return [*casts, sum(t.numel() for t in there) * dtype.itemsize]


def _w4a8_space(args: tuple[Any, ...], results: Sequence[Tensor]) -> list[int]:
    dtype = args[0].dtype
    if len(args) > 15 and args[15] is not None:  # joined already
        return []
    return _factors(dtype, args[5], args[8]) + _factors(dtype, args[6], args[9])


def _w4a8_dgrad_space(args: tuple[Any, ...], results: Sequence[Tensor]) -> list[int]:
    """W_eff [N, K] in 16 bits, or codes of dy and of the weight's transpose."""
    dy, up, down, qweight = args[:4]
    (M, N), K = dy.shape, down.shape[1]
    if _dequantizes(args):
        return [N * K * up.dtype.itemsize]
    padded_N = -(-N // 128) * 128
    return [M * padded_N, 4 * M, 2 * qweight.shape[1] * padded_N, 4 * N, 4 * K]


def _w4a4_space(args: tuple[Any, ...], results: Sequence[Tensor]) -> list[int]:
    x, qweight = args[:2]
    width = (2 * qweight.shape[1] + -(-_rank(args[4], args[7]) // 8) * 8) * x.dtype.itemsize
    return [*_factors(x.dtype, args[5], args[8]), qweight.shape[0] * width, x.shape[0] * width]


def _w4a4_dgrad_space(args: tuple[Any, ...], results: Sequence[Tensor]) -> list[int]:
    dy, _, down = args[:3]
    return [dy.shape[1] * down.shape[1] * dy.dtype.itemsize]


def _conv_space(args: tuple[Any, ...], results: Sequence[Tensor]) -> list[int]:
    """Joined factors, [D; A] by taps, the branch's product before its sum over taps, codes, their scales and maxima, and the
    matrix of windows where one is written."""
    x, window = args[0], Window(*args[10])
    (M, C), P, R, T, size = x.shape, window.out_pixels, _rank(args[5], args[8]), window.taps, x.dtype.itemsize
    factors = _factors(x.dtype, args[5], args[8]) + _factors(x.dtype, args[6], args[9])
    windows = [2 * args[1].shape[1] * P] if _writes_windows(window) else []
    return [*factors, T * R * C * size, M * T * R * size, _block_codes(window, C), 4 * P, 4 * M, *windows]


def _writes_windows(window: Window) -> bool:
    """Hopper reads windows out of the codes where it can; on a machine without a GPU the prediction is for any."""
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    return not (hopper and blocks_of(window).columns >= 16)


def _conv_dgrad_space(args: tuple[Any, ...], results: Sequence[Tensor]) -> list[int]:
    """W_eff in 16 bits, with the padding of each tap, and without it where there is any."""
    dy, _, down = args[:3]
    T, N, size = Window(*args[7]).taps, dy.shape[1], dy.dtype.itemsize
    C = down.shape[1] // T
    padded = T * tap_columns(C)
    return [N * padded * size, *([N * T * C * size, len(down) * padded * size] if padded != T * C else [])]


def _conv_adapter_space(args: tuple[Any, ...], results: Sequence[Tensor]) -> list[int]:
    """dy B, its taps, dA tap by tap, and the partial sums of one product."""
    dy, _, x, _, _, up = args[:6]
    r, T, size = up.shape[1], Window(*args[6]).taps, dy.dtype.itemsize
    partial = _parts(up.new_empty((x.shape[0], r)), x, None)
    return [dy.shape[0] * r * size, T * x.shape[0] * r * size, 2 * results[0].numel() * 4, partial]


def _adapter_gradients_space(args: tuple[Any, ...], results: Sequence[Tensor]) -> list[int]:
    """float32 parts of up to 528 programs."""
    g, x, _, _, dy = args[:5]
    return [_parts(g, x, dy)]


def _parts(left: Tensor, x: Tensor, dy: Tensor | None) -> int:
    """Bytes of the parts of x's columns and of dy's, side by side."""
    M, r = left.shape
    columns = x.shape[1] + (0 if dy is None else dy.shape[1])
    _, splits = split_rows(M, sum(count_blocks(x, dy)))
    return splits * r * columns * 4


def _attention_backward_space(args: tuple[Any, ...], results: Sequence[Tensor]) -> list[int]:
    """Flash-2 adds up dq in float32, and keeps one float per row of the softmax; rows padded to 128, heads to 32."""
    return _dq_space(*args[1].shape)


def _our_attention_backward_space(args: tuple[Any, ...], results: Sequence[Tensor]) -> list[int]:
    batch, rows, heads, width = args[1].shape
    return _dq_space(batch, heads, rows, width)


def _dq_space(batch: int, heads: int, rows: int, width: int) -> list[int]:
    padded = batch * heads * (-(-rows // 128) * 128)
    return [padded * (-(-width // 32) * 32) * 4, padded * 4]


def _convolution_space(args: tuple[Any, ...], results: Sequence[Tensor]) -> list[int]:
    """cuDNN's tensor cores want channels last: it transposes what it reads and writes."""
    there = [a for a in args[:3] if isinstance(a, Tensor) and a.dim() == 4]
    if any(t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous() for t in there):
        return []
    return [_bytes(there) + _bytes([r for r in results if r.dim() == 4])]


_WORKSPACES: dict[str, Callable[[tuple[Any, ...], Sequence[Tensor]], list[int]]] = {
    "w4a8_linear": _w4a8_space,
    "w4a8_dgrad": _w4a8_dgrad_space,
    "w4a4_linear": _w4a4_space,
    "w4a4_dgrad": _w4a4_dgrad_space,
    "adapter_gradients": _adapter_gradients_space,
    "w4a8_conv": _conv_space,
    "w4a8_conv_dgrad": _conv_dgrad_space,
    "conv_adapter_gradients": _conv_adapter_space,
    "attention_backward": _our_attention_backward_space,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward_space,
    "convolution": _convolution_space,
    "convolution_backward": _convolution_space,
}
