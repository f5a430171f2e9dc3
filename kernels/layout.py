"""Shared conventions of the low-bit kernels: shape legend, INT4 packing, the block Hadamard, the error metric.

Shape legend (suffix of a tensor's name): M tokens, N output features, K input features, Kp = K padded to a multiple of
128, G groups along K, R rank (branch plus adapter), r rank of the adapter alone. `scale_GN` is a [G, N] tensor.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 64  # columns that share one activation scale (4 bits), one weight scale, or one Hadamard block
K_ALIGN = 128  # K of packed weights and of activation codes is padded to this
LEAST_CAPABILITY = (8, 0)  # of GPUs on which Triton multiplies INT8
INT8_NUMERICS = ("w4a8", "w4a4")


@dataclass(frozen=True)
class LinearCase:
    """One shape on which a linear op is tested and benchmarked: M x N x K, branch rank R, adapter rank r."""

    M: int
    N: int
    K: int
    R: int = 16
    r: int = 8
    bias: bool = True
    hadamard: bool = False
    group: int = GROUP
    unsigned: bool = False
    unsigned_from: int = 0

    def __str__(self) -> str:
        flags = ("-bias" if self.bias else "") + ("-hadamard" if self.hadamard else "")
        flags += (f"-unsigned{self.unsigned_from or ''}") if self.unsigned else ""
        return f"{self.M}x{self.N}x{self.K}-R{self.R}-r{self.r}-g{self.group}{flags}"


def padded(k: int) -> int:
    """K rounded up to the multiple of 128 that packed weights and activation codes have."""
    return (k + K_ALIGN - 1) // K_ALIGN * K_ALIGN


def pack_int4(codes_NK: Tensor) -> Tensor:
    """[N, K] codes (uint8 0..15, or int8 -8..7 stored two's complement) -> uint8 [N, K/2], low nibble = even column.

    Raises ValueError if K is odd or the dtype is not int8 or uint8.
    """
    if codes_NK.dtype not in (torch.uint8, torch.int8):
        raise ValueError(f"pack_int4: codes are {codes_NK.dtype}, must be uint8 (0..15) or int8 (-8..7)")
    if codes_NK.shape[-1] % 2:
        raise ValueError(
            f"pack_int4: K = {codes_NK.shape[-1]} is odd; pad K to a multiple of {K_ALIGN} with zero codes"
        )
    nibbles_NK = codes_NK.view(torch.uint8) & 15
    return nibbles_NK[..., 0::2] | (nibbles_NK[..., 1::2] << 4)


def unpack_uint4(packed_NK2: Tensor) -> Tensor:
    """uint8 [N, K/2] -> uint8 codes [N, K] in 0..15."""
    return torch.stack((packed_NK2 & 15, packed_NK2 >> 4), dim=-1).flatten(-2)


def unpack_int4(packed_NK2: Tensor) -> Tensor:
    """uint8 [N, K/2] of two's complement nibbles -> int8 codes [N, K] in -8..7."""
    packed_i8 = packed_NK2.view(torch.int8)
    return torch.stack(((packed_i8 << 4) >> 4, packed_i8 >> 4), dim=-1).flatten(-2)


def pack_tiles(codes_NK: Tensor) -> Tensor:
    """uint8 codes 0..15 [N, Kp] -> [N, Kp/2]: in each 128 columns, the first 64 in the low nibbles, the second in the high.

    One mask then gives 64 neighbouring columns in order: four codes per 32-bit operation, no interleaving.
    Raises ValueError if Kp is not a multiple of 128 or the dtype is not uint8.
    """
    if codes_NK.dtype != torch.uint8 or codes_NK.shape[-1] % K_ALIGN:
        raise ValueError(
            f"pack_tiles: codes are {codes_NK.dtype} {tuple(codes_NK.shape)}, must be uint8 with K a multiple of {K_ALIGN}"
        )
    halves = codes_NK.view(codes_NK.shape[0], -1, 2, 64)
    return (halves[:, :, 0] | (halves[:, :, 1] << 4)).flatten(1)


def unpack_tiles(packed_NK2: Tensor) -> Tensor:
    """uint8 [N, Kp/2] of `pack_tiles` -> uint8 codes [N, Kp] in 0..15."""
    tiles = packed_NK2.view(packed_NK2.shape[0], -1, 64)
    return torch.stack((tiles & 15, tiles >> 4), dim=2).flatten(1)


def pack_words(group_scale: Tensor, group_zero: Tensor, group_size: int) -> Tensor:
    """Integer scales s and zeros z of groups of 64 or 128, uint8 [Kp/g, N] -> int32 words [Kp/128, N].

    One word per row and 128 columns, s0 | c0 << 8 | s1 << 16 | c1 << 24 with c = 128 - z s, so that code u stands for the
    byte u s + c with its sign bit flipped. Raises ValueError where z s > 128: c would leave its byte.
    """
    scale, zero = group_scale.to(torch.int32), group_zero.to(torch.int32)
    offset = 128 - zero * scale
    if offset.numel() and not offset.is_meta and int(offset.min()) < 0:
        raise ValueError(f"pack_words: zero * scale reaches {128 - int(offset.min())}, must not exceed 128")
    if group_size == K_ALIGN:
        scale, offset = scale.repeat_interleave(2, dim=0), offset.repeat_interleave(2, dim=0)
    return scale[0::2] | (offset[0::2] << 8) | (scale[1::2] << 16) | (offset[1::2] << 24)


def unpack_words(words: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """int32 [Kp/128, N] of `pack_words` -> integer scales and zeros, uint8 [Kp/g, N]."""
    scale, offset = word_bytes(words)
    zero = (128 - offset) // scale.clamp(min=1)  # meta tensors and garbage may hold a zero scale
    if group_size == K_ALIGN:
        scale, zero = scale[0::2], zero[0::2]
    return scale.to(torch.uint8).contiguous(), zero.to(torch.uint8).contiguous()


def word_bytes(words: Tensor) -> tuple[Tensor, Tensor]:
    """int32 [Kp/128, N] of `pack_words` -> scale s and offset c = 128 - z s of every 64 columns, int32 [Kp/64, N]."""
    scale = torch.stack((words & 255, (words >> 16) & 255), dim=1).flatten(0, 1)
    offset = torch.stack(((words >> 8) & 255, (words >> 24) & 255), dim=1).flatten(0, 1)
    return scale, offset


def hadamard64(dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """[64, 64] regular Hadamard matrix H4 x H4 x H4 / 8 (Kronecker): symmetric, orthonormal, H H = I.

    "Regular" (all row sums equal, H4 has -1 on its antidiagonal) spreads a constant block, where Sylvester's form would
    gather it into one outlier.
    """
    h4 = 1 - 2 * torch.eye(4, dtype=dtype, device=device).flip(0)
    return torch.kron(torch.kron(h4, h4), h4) / 8


def apply_hadamard(x: Tensor) -> Tensor:
    """x H with H block-diagonal in 64x64 blocks along the last dimension, whose size must be a multiple of 64."""
    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // GROUP, GROUP)
    return (blocks @ hadamard64(x.dtype, x.device)).reshape(x.shape)


def relative_rms(a: Tensor, ref: Tensor) -> float:
    """rms(a - ref) / rms(ref) in float64: the one error metric. 0 / 0 = 0, and any non-finite value gives nan or inf."""
    a64, ref64 = a.detach().double(), ref.detach().double()
    error, size = (a64 - ref64).norm().item(), ref64.norm().item()
    return error / size if size else (0.0 if error == 0 else float("inf"))


def uses_triton(x: Tensor) -> bool:
    """Whether an op on x runs its Triton kernels: on CUDA, or anywhere if TRITON_INTERPRET=1 (Triton's interpreter).

    Triton reads the same variable when a kernel is decorated, so it must be set before the kernels are imported.
    """
    return x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


def check_card(numerics: Iterable[str], device: torch.device) -> None:
    """Raises ValueError, with the remedy, where layers of these numerics have no kernel on `device`.

    Below compute capability 8.0 Triton multiplies no INT8: W4A16 alone runs there.
    """
    if device.type != "cuda" or (found := torch.cuda.get_device_capability(device)) >= LEAST_CAPABILITY:
        return
    if lacking := sorted({name for name in numerics if name in INT8_NUMERICS}):
        raise ValueError(
            f"{torch.cuda.get_device_name(device)} has compute capability {found[0]}.{found[1]}, and {', '.join(lacking)} layers need "
            f"{LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]} for their INT8 products: only W4A16 runs on it, numerics=weight-only"
        )


@contextmanager
def on_device(x: Tensor) -> Iterator[None]:
    """Launches go to the current device, which need not be the one of x."""
    if not x.is_cuda:
        yield
        return
    with torch.cuda.device(x.device):
        yield


def rank_rows(x: Tensor, rank: int) -> Tensor:
    """Empty [M, rank] in x's dtype with rows of a multiple of 8 elements, as a tensor memory access wants them."""
    return x.new_empty((x.shape[0], (rank + 7) // 8 * 8))[:, :rank]


def rank_product(x_MK: Tensor, y_KR: Tensor) -> Tensor:
    """x y as `rank_rows`, written there at once. Not differentiable."""
    return torch.mm(x_MK, y_KR, out=rank_rows(x_MK, y_KR.shape[1]))
