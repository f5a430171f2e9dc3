"""The 16-bit low-rank branch of every op, h [U, B]^T with h = x [D; A]^T, and the gradients of the adapter in it.

D = lora_down [R, K] and U = lora_up [N, R] are frozen, A = adapter_down [r, K] and B = adapter_up [N, r] are trained:

    g  = dy [U, B]            [M, R + r]     (its last r columns, g_A = dy B, belong to the adapter)
    dx = (weight part) + g [D; A]
    dA = g_A^T x              [r, K]         x raw, or rebuilt from its codes: ((codes * scale) H) * smooth
    dB = dy^T h_A             [N, r]         h_A = x A^T
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from loragraft.kernels import row_product
from loragraft.kernels.layout import apply_hadamard

SaveX = Literal["quantized", "raw"]
Dgrad = Literal["dequantized", "int8"]


class Joined(NamedTuple):
    """Branch and adapter of a layer as one pair, in the compute dtype."""

    down: Tensor
    """[D; A], [R + r, K]."""
    up: Tensor
    """[U, B], [N, R + r]."""
    together: Tensor | None = None
    """The `down` of every layer that reads one x, one below the other; this layer's begins at row `first`, a multiple of 8."""
    first: int = 0


def shared_projection(x_MK: Tensor, joined: Joined) -> Tensor | None:
    """h [M, R + r] of one layer, cut out of x times `together`: in a compiled graph the layers' equal products are one.

    None where there is no graph that would see so. Not differentiable: h is the op's own affair.
    """
    if joined.together is None or not torch.compiler.is_compiling():
        return None
    h_MR = x_MK.detach() @ joined.together.T
    return h_MR[:, joined.first : joined.first + joined.down.shape[0]]


def join(frozen: Tensor, adapter: Tensor | None, dim: int, dtype: torch.dtype) -> Tensor:
    """[D; A] (dim 0) or [U, B] (dim 1), contiguous, in the compute dtype; without an adapter the frozen factor itself, not a copy."""
    if adapter is None:
        return frozen.to(dtype).contiguous()
    return torch.cat((frozen.to(dtype), adapter.to(dtype)), dim=dim)


def branch_reference(
    x_MK: Tensor, lora_down: Tensor, lora_up: Tensor, adapter_down: Tensor | None, adapter_up: Tensor | None
) -> Tensor:
    """(x [D; A]^T) [U, B]^T in x's dtype, differentiable."""
    h_MR = x_MK @ join(lora_down, adapter_down, 0, x_MK.dtype).T
    return h_MR @ join(lora_up, adapter_up, 1, x_MK.dtype).T


def kept_x(x_MK: Tensor, codes_MK: Tensor, scale_MG: Tensor, save_x: SaveX) -> tuple[Tensor | None, ...]:
    """(x, codes, scale) that the backward pass needs for dA: either x, or what rebuilds it."""
    return (x_MK, None, None) if save_x == "raw" else (None, codes_MK, scale_MG)


def adapter_gradients(
    dy_MN: Tensor, g_MR: Tensor, h_MR: Tensor, x_MK: Tensor | None, codes_MK: Tensor | None, scale_MG: Tensor | None,
    smooth_K: Tensor | None, hadamard: bool, adapter_down: Tensor, adapter_up: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dA [r, K] and dB [N, r] in the adapter's dtypes. The rotation and smoothing of a rebuilt x act on the small dA."""
    r, K = adapter_down.shape
    if x_MK is not None:
        scale_MG, smooth_K, hadamard = None, None, False
    else:
        assert codes_MK is not None
        x_MK = codes_MK
    return row_product.adapter_gradients(
        g_MR[:, -r:], x_MK, scale_MG, h_MR[:, -r:], dy_MN, smooth_K, hadamard, K, adapter_down.dtype, adapter_up.dtype
    )


def finish_dx(dx_MKp: Tensor, smooth_K: Tensor | None, hadamard: bool, g_MR: Tensor, down_RK: Tensor) -> Tensor:
    """The end of dx in torch (the Triton kernels do it per tile): un-rotate, divide by smooth, add the branch."""
    dx_MK = unrotate(dx_MKp[:, : down_RK.shape[1]].float(), smooth_K, hadamard)
    return torch.addmm(dx_MK, g_MR.float(), down_RK.float()).to(g_MR.dtype)


def dequantized_dx(
    dy_MN: Tensor, dense_NKp: Tensor, smooth_K: Tensor | None, hadamard: bool, g_MR: Tensor, down_RK: Tensor
) -> Tensor:
    """dx in torch, from the dequantized weight; it is the weight that is un-rotated, as it has fewer rows than dy."""
    weight_NK = unrotate(dense_NKp[:, : down_RK.shape[1]], smooth_K, hadamard).to(dy_MN.dtype)
    return (dy_MN @ weight_NK).addmm_(g_MR, down_RK)


def unrotate(rotated: Tensor, smooth_K: Tensor | None, hadamard: bool) -> Tensor:
    """(rotated H) / smooth on the last dimension."""
    rotated = apply_hadamard(rotated) if hadamard else rotated
    return rotated if smooth_K is None else rotated / smooth_K.to(rotated.dtype)


def check_shapes(
    op: str, x: Tensor, qweight: Tensor, lora_down: Tensor, lora_up: Tensor, bias: Tensor | None, smooth: Tensor | None,
    adapter_down: Tensor | None, adapter_up: Tensor | None, hadamard: bool,
) -> None:  # fmt: skip
    """Raises ValueError, naming the argument, for a shape that does not fit x [..., K] and qweight [N, Kp / 2]."""
    K, N = x.shape[-1], qweight.shape[0]
    if x.numel() == 0:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}; there must be at least one token")
    if qweight.dtype != torch.uint8 or qweight.shape[1] * 2 != (K + 127) // 128 * 128:
        raise ValueError(
            f"{op}: qweight is {qweight.dtype} {tuple(qweight.shape)}, must be uint8 [N, {(K + 127) // 128 * 64}] for x with "
            f"K = {K} (K padded to a multiple of 128, two codes a byte)"
        )
    if not qweight.is_contiguous():
        raise ValueError(
            f"{op}: qweight is not contiguous (strides {qweight.stride()}); call .contiguous() once, when loading"
        )
    if hadamard and K % 64:
        raise ValueError(f"{op}: hadamard=True needs K % 64 == 0, K = {K}; quantize this layer without the rotation")
    if (adapter_down is None) != (adapter_up is None):
        raise ValueError(f"{op}: adapter_down and adapter_up come together, or neither; one of them is None")
    expected = {
        "lora_down": (lora_down, (lora_up.shape[1], K)),
        "lora_up": (lora_up, (N, lora_down.shape[0])),
        "bias": (bias, (N,)),
        "smooth": (smooth, (K,)),
        "adapter_down": (adapter_down, (0 if adapter_up is None else adapter_up.shape[1], K)),
        "adapter_up": (adapter_up, (N, 0 if adapter_down is None else adapter_down.shape[0])),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, must be {shape} (N = {N}, K = {K})")


def trainable_rank(adapter: Tensor | None) -> Tensor | None:
    """An adapter of rank 0 is no adapter."""
    return None if adapter is None or 0 in adapter.shape else adapter


def check_modes(op: str, save_x: str, dgrad: str) -> None:
    """Raises ValueError for an unknown save_x or dgrad."""
    if save_x not in ("quantized", "raw"):
        raise ValueError(f'{op}: save_x = {save_x!r}, must be "quantized" or "raw"')
    if dgrad not in ("dequantized", "int8"):
        raise ValueError(f'{op}: dgrad = {dgrad!r}, must be "dequantized" or "int8"')


def check_groups(op: str, qweight: Tensor, **scales: Tensor) -> None:
    """Raises ValueError for a scale or zero that is not [Kp / 64, N]."""
    wanted = (qweight.shape[1] // 32, qweight.shape[0])
    for name, scale in scales.items():
        if tuple(scale.shape) != wanted:
            raise ValueError(f"{op}: {name} has shape {tuple(scale.shape)}, must be {wanted}")
        if not scale.is_contiguous():
            raise ValueError(
                f"{op}: {name} is not contiguous (strides {scale.stride()}); call .contiguous() once, when loading"
            )
