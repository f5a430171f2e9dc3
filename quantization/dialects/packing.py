"""The byte orders of Nunchaku's and ComfyUI's INT4 files, to and from row-major: permutations, bit exact both ways.

Offsets count elements of the flattened tensor; N out features, K in features, R rank, G = K / 64 groups.

    qweight   n = 128 nt + 16 np + 8 ns + nl,  k = 64 kt + 32 ks + 8 kl + r
              nibble ((((nt (K/64) + kt) 8 + np) 8 + nl) 4 + kl) 32 + (2 ns + ks) 8 + r     low nibble of a byte first
    vectors   channel n = 128 nt + 16 a + 8 b + 2 c + d  at  128 nt + 16 a + 4 c + 2 b + d       bias, smooth
    wscales   scale (g, n) at (nt G + g) 128 + slot(n % 128); the shape [G, N] of the file is nominal
    lora_*    both [C, R], in tiles of 16 x 16, rank tiles inside channel tiles; with (row, col) = (r, c) % 16 for
              lora_down [R, C] and (c, r) % 16 for lora_up [C, R], row = 8 rb + ra, col = 8 cb + 2 cc + cd:
              tile 256 + (((ra 4 + cc) 2 + rb) 4 + 2 cb + cd
    AWQ       o = 4 ot + oi,  k = 64 kt + 32 h + 8 s + e
              nibble (((ot (K/64) + kt) 4 + oi) 2 + h) 32 + 4 e + s                           viewed as int32 [N/4, K/2]
    adaLN     row j (N / splits) + i of the model is row i splits + j of the file: the splits are interleaved
    tile pack weight [N/128, K/64, 32, 128]: rows of four, each with the 32 bytes of its group; scales and up-projection
              [N/128, ., 128]                                                                                    ComfyUI

Compared bit for bit with DeepCompressor's packer (`backend/nunchaku/utils.py`); the tile pack is comfy-kitchen's
(`backends/eager/svdquant.py`). `tests/` holds the formulas once more, as index arithmetic.
"""

import torch
from torch import Tensor

GROUP, TILE = 64, 128
"""Columns per scale; rows (and, for qweight, padded columns) per tile."""
RANK_TILE = 16


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `size`."""
    return -(-size // multiple) * multiple


def pad_to(tensor: Tensor, shape: tuple[int, ...], value: float = 0) -> Tensor:
    """`tensor` in the low corner of a tensor of `shape` filled with `value`."""
    if tuple(tensor.shape) == shape:
        return tensor
    padded = tensor.new_full(shape, value)
    padded[tuple(slice(size) for size in tensor.shape)] = tensor
    return padded


def pack_qweight(rows_NK2: Tensor) -> Tensor:
    """Row-major uint8 [N, K/2] -> the file's int8 [N, K/2]; N and K divisible by 128."""
    N, K2 = rows_NK2.shape
    bytes_ = rows_NK2.view(N // TILE, 8, 2, 8, 2 * K2 // GROUP, 2, 4, 4)  # nt np ns nl kt ks kl, byte of r
    return bytes_.permute(0, 4, 1, 3, 6, 2, 5, 7).reshape(N, K2).view(torch.int8)


def unpack_qweight(packed_NK2: Tensor) -> Tensor:
    """The file's int8 [N, K/2] -> row-major uint8 [N, K/2], low nibble = even column."""
    N, K2 = packed_NK2.shape
    bytes_ = packed_NK2.contiguous().view(torch.uint8).view(N // TILE, 2 * K2 // GROUP, 8, 8, 4, 2, 2, 4)
    return bytes_.permute(0, 2, 5, 3, 1, 6, 4, 7).reshape(N, K2)


def pack_vector(vector_N: Tensor) -> Tensor:
    """[N], N divisible by 128, into the order of bias and smoothing factors."""
    return vector_N.view(-1, 8, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(-1)


def unpack_vector(packed_N: Tensor) -> Tensor:
    """The inverse of `pack_vector`."""
    return packed_N.reshape(-1, 8, 4, 2, 2).permute(0, 1, 3, 2, 4).reshape(-1)


def pack_scales(scale_GN: Tensor) -> Tensor:
    """[G, N], N divisible by 128, into the order of wscales (shape unchanged)."""
    G, N = scale_GN.shape
    return scale_GN.view(G, N // TILE, 8, 2, 4, 2).permute(1, 0, 2, 4, 3, 5).reshape(G, N)


def unpack_scales(packed_GN: Tensor) -> Tensor:
    """The inverse of `pack_scales`."""
    G, N = packed_GN.shape
    return packed_GN.reshape(N // TILE, G, 8, 4, 2, 2).permute(1, 0, 2, 4, 3, 5).reshape(G, N)


def pack_down(down_RC: Tensor) -> Tensor:
    """lora_down [R, C], both divisible by 16, -> the file's [C, R]."""
    R, C = down_RC.shape
    return down_RC.view(R // 16, 2, 8, C // 16, 2, 4, 2).permute(3, 0, 2, 5, 1, 4, 6).reshape(C, R)


def unpack_down(packed_CR: Tensor) -> Tensor:
    """The inverse of `pack_down`."""
    C, R = packed_CR.shape
    return packed_CR.reshape(C // 16, R // 16, 8, 4, 2, 2, 2).permute(1, 4, 2, 0, 5, 3, 6).reshape(R, C)


def pack_up(up_CR: Tensor) -> Tensor:
    """lora_up [C, R], both divisible by 16, -> the file's [C, R]."""
    C, R = up_CR.shape
    return up_CR.view(C // 16, 2, 8, R // 16, 2, 4, 2).permute(0, 3, 2, 5, 1, 4, 6).reshape(C, R)


def unpack_up(packed_CR: Tensor) -> Tensor:
    """The inverse of `pack_up`."""
    C, R = packed_CR.shape
    return packed_CR.reshape(C // 16, R // 16, 8, 4, 2, 2, 2).permute(0, 4, 2, 1, 5, 3, 6).reshape(C, R)


def pack_awq(rows_NK2: Tensor) -> Tensor:
    """Row-major uint8 [N, K/2] of codes 0..15 -> int32 [N/4, K/2]; N divisible by 4, K by 64."""
    N, K2 = rows_NK2.shape
    nibbles = torch.stack((rows_NK2 & 15, rows_NK2 >> 4), dim=-1).view(N // 4, 4, 2 * K2 // GROUP, 2, 4, 8)
    pairs = nibbles.permute(0, 2, 1, 3, 5, 4).reshape(-1, 2)
    return (pairs[:, 0] | (pairs[:, 1] << 4)).view(torch.int32).view(N // 4, K2)


def unpack_awq(packed: Tensor) -> Tensor:
    """The inverse of `pack_awq`."""
    N, K2 = 4 * packed.shape[0], packed.shape[1]
    bytes_ = packed.contiguous().view(torch.uint8).view(-1)
    nibbles = torch.stack((bytes_ & 15, bytes_ >> 4), dim=-1).view(N // 4, 2 * K2 // GROUP, 4, 2, 8, 4)
    pairs = nibbles.permute(0, 2, 1, 3, 5, 4).reshape(N, K2, 2)
    return pairs[..., 0] | (pairs[..., 1] << 4)


def separate_splits(rows: Tensor, splits: int) -> Tensor:
    """Rows (dimension 0) in the file's order, channel after channel -> the model's order, split after split."""
    return rows.unflatten(0, (-1, splits)).transpose(0, 1).flatten(0, 1).contiguous()


def pack_tiles(rows_NK2: Tensor) -> Tensor:
    """Row-major uint8 [N, K/2] -> int8 [N/128, K/64, 32, 128]; N divisible by 128, K by 64."""
    N, K2 = rows_NK2.shape
    bytes_ = rows_NK2.view(N // TILE, 32, 4, 2 * K2 // GROUP, 32)
    return bytes_.permute(0, 3, 1, 2, 4).reshape(N // TILE, 2 * K2 // GROUP, 32, TILE).view(torch.int8)


def unpack_tiles(packed: Tensor) -> Tensor:
    """The inverse of `pack_tiles`."""
    tiles, groups = packed.shape[:2]
    bytes_ = packed.contiguous().view(torch.uint8).view(tiles, groups, 32, 4, 32)
    return bytes_.permute(0, 2, 3, 1, 4).reshape(tiles * TILE, groups * 32)


def pack_tile_columns(matrix_XN: Tensor) -> Tensor:
    """[X, N] -> [N/128, X, 128]: tile-packed scales, and the transposed up-projection."""
    return matrix_XN.unflatten(1, (-1, TILE)).transpose(0, 1).contiguous()


def unpack_tile_columns(packed: Tensor) -> Tensor:
    """The inverse of `pack_tile_columns`."""
    return packed.transpose(0, 1).flatten(1).contiguous()
