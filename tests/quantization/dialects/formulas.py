"""The packing formulas as index arithmetic, one element at a time: slow, and independent of the permutations under test.

`offset(...)` functions give where the files keep an element; `scatter` builds a packed tensor from them.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def scatter(shape: tuple[int, int], offset: Callable[[Tensor, Tensor], Tensor], values: Tensor, size: int) -> Tensor:
    """Flat tensor of `size` with values[i, j] at offset(i, j); every slot is written exactly once."""
    i, j = torch.meshgrid(torch.arange(shape[0]), torch.arange(shape[1]), indexing="ij")
    where = offset(i, j).flatten()
    assert torch.equal(where.sort().values, torch.arange(size))
    packed = values.new_empty(size)
    packed[where] = values.flatten()
    return packed


def nibbles_to_bytes(nibbles: Tensor) -> Tensor:
    """Flat codes -> flat int8 bytes, the first of two codes in the low nibble (two's complement)."""
    low, high = (nibbles.to(torch.int32) & 15).view(-1, 2).unbind(1)
    return (low + 16 * high).to(torch.uint8).view(torch.int8)


def packed_qweight(codes_NK: Tensor) -> Tensor:
    N, K = codes_NK.shape

    def offset(n: Tensor, k: Tensor) -> Tensor:
        nt, np, ns, nl = n // 128, n % 128 // 16, n // 8 % 2, n % 8
        kt, ks, kl, r = k // 64, k % 64 // 32, k // 8 % 4, k % 8
        word = ((((nt * (K // 64) + kt) * 8 + np) * 8 + nl) * 4 + kl) * 4 + ns * 2 + ks
        return word * 8 + r

    return nibbles_to_bytes(scatter((N, K), offset, codes_NK, N * K)).view(N, K // 2)


def slot(n: Tensor) -> Tensor:
    return (4 * (n % 128 // 16) + n % 8 // 2) * 4 + n % 16 // 8 * 2 + n % 2


def packed_vector(vector_N: Tensor) -> Tensor:
    return scatter((1, len(vector_N)), lambda _, n: n // 128 * 128 + slot(n), vector_N[None], len(vector_N))


def packed_scales(scale_GN: Tensor) -> Tensor:
    G, N = scale_GN.shape
    return scatter((G, N), lambda g, n: (n // 128 * G + g) * 128 + slot(n), scale_GN, G * N).view(G, N)


def _low_rank(row: Tensor, col: Tensor, tile: Tensor) -> Tensor:
    return tile * 256 + (((row % 8) * 4 + (col % 8) // 2) * 2 + row // 8) * 4 + (col // 8) * 2 + col % 2


def packed_down(down_RC: Tensor) -> Tensor:
    R, C = down_RC.shape
    where = lambda r, c: _low_rank(r % 16, c % 16, c // 16 * (R // 16) + r // 16)  # noqa: E731
    return scatter((R, C), where, down_RC, R * C).view(C, R)


def packed_up(up_CR: Tensor) -> Tensor:
    C, R = up_CR.shape
    where = lambda c, r: _low_rank(c % 16, r % 16, c // 16 * (R // 16) + r // 16)  # noqa: E731
    return scatter((C, R), where, up_CR, R * C).view(C, R)


def packed_awq(codes_NK: Tensor) -> Tensor:
    N, K = codes_NK.shape

    def offset(o: Tensor, k: Tensor) -> Tensor:
        short = (o // 4 * (K // 64) + k // 64) * 64 + o % 4 * 16 + k % 64 // 32 * 8 + k % 8
        return short * 4 + k % 32 // 8

    return nibbles_to_bytes(scatter((N, K), offset, codes_NK, N * K)).view(torch.int32).view(N // 4, K // 2)


def interleaved(rows: Tensor, splits: int) -> Tensor:
    """File row i splits + j is model row j (N / splits) + i."""
    each = rows.shape[0] // splits
    return torch.stack([rows[j * each + i] for i in range(each) for j in range(splits)])


def tile_packed(codes_NK: Tensor) -> Tensor:
    """ComfyUI: byte (t, g, quad, 32 i + b) holds columns 64 g + 2 b and the next of row 128 t + 4 quad + i."""
    N, K = codes_NK.shape
    where = lambda n, k: (  # noqa: E731
        ((n // 128 * (K // 64) + k // 64) * 32 + n % 128 // 4) * 256 + (n % 4) * 64 + k % 64
    )
    return nibbles_to_bytes(scatter((N, K), where, codes_NK, N * K)).view(N // 128, K // 64, 32, 128)
