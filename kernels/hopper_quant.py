"""`token_quant` for Hopper (sm_90), in Gluon: every byte of x is fetched once and stays in shared memory until it is coded.

A program holds SPLIT columns of BM rows, fetched by TMA in tiles of 64 columns as they are used: once by the tensor core
(h^T = D x^T), once from registers for the rows' maxima, and after all programs of these rows have met, once more for the
codes. The meeting is token_quant's: tickets in order of start, integer counters, partial h added in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from loragraft.kernels.hopper import on_hopper, thread_barrier, tma_load
from loragraft.kernels.layout import on_device, padded, rank_rows

BM, TILE = 64, 64
RECIPROCAL = gl.constexpr("rcp.approx.ftz.f32 $0, $1;")  # to 1 ulp, in one instruction
NAN = gl.constexpr(tl.PropagateNan.ALL)


@gluon.jit
def _prepared(
    buffer, p_smooth, k, K, hadamard, HAS_SMOOTH: gl.constexpr, HADAMARD: gl.constexpr, LAYOUT: gl.constexpr
):  # fmt: skip
    """x' of one 64 x 64 tile in float32, in registers."""
    READ: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    if HADAMARD and not HAS_SMOOTH:  # entries of H are +-1/8: 16-bit products are exact, and x needs no register
        return warpgroup_mma(buffer, hadamard, gl.zeros([64, 64], gl.float32, layout=LAYOUT), use_acc=False)
    else:
        b_x = buffer.load(READ).to(gl.float32)
        if HAS_SMOOTH:
            o_k = k + gl.arange(0, 64, layout=gl.SliceLayout(0, READ))
            b_smooth = gl.load(p_smooth + o_k, mask=o_k < K, other=1.0).to(gl.float32)
            b_inverse = gl.inline_asm_elementwise(
                RECIPROCAL, "=f,f", [b_smooth], dtype=gl.float32, is_pure=True, pack=1
            )
            b_x *= b_inverse[None, :]
        if HADAMARD:
            TF32: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 8])
            LEFT: gl.constexpr = gl.DotOperandLayout(0, TF32, 1)
            # TF32 keeps 10 bits of a fraction: the upper ones first, then what is left.
            b_upper = (b_x.to(gl.int32, bitcast=True) & -8192).to(gl.float32, bitcast=True)
            b_y = gl.zeros([64, 64], gl.float32, layout=TF32)
            b_y = warpgroup_mma(gl.convert_layout(b_upper, LEFT), hadamard, b_y)
            b_y = warpgroup_mma(gl.convert_layout(b_x - b_upper, LEFT), hadamard, b_y)
            return gl.convert_layout(b_y, LAYOUT)
        else:
            return b_x


@gluon.jit
def hopper_quant_kernel(
    x_desc, d_desc, p_smooth, p_counters, p_rows, p_part, p_codes, p_scale, p_h, M, K, KP, R, s_hm,
    SPLITS: gl.constexpr, TILES: gl.constexpr, RING: gl.constexpr, DOWN: gl.constexpr, DOWN_BY_RANK: gl.constexpr,
    HAS_SMOOTH: gl.constexpr, HADAMARD: gl.constexpr, BH: gl.constexpr,
):  # fmt: skip
    """TILES of 64 columns a program, RING of them in shared memory at a time (TILES a multiple of RING).

    DOWN: whether there is a branch, of at most 64 ranks. DOWN_BY_RANK: D is [R, K], else [K, R]. BH: rows of h that a program adds up.
    """
    WRITE: gl.constexpr = gl.BlockedLayout([1, 16], [8, 4], [4, 1], [1, 0])
    FLOAT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    ROWS: gl.constexpr = FLOAT if HADAMARD else gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    xs = gl.allocate_shared_memory(x_desc.dtype, [RING, 64, 64], x_desc.layout)
    ds = gl.allocate_shared_memory(x_desc.dtype, [3, 64, 64], d_desc.layout)
    x_full = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    d_full = gl.allocate_shared_memory(gl.int64, [3, 1], mbarrier.MBarrierLayout())
    for tile in gl.static_range(RING):
        mbarrier.init(x_full.index(tile), count=1)
    for tile in gl.static_range(3):
        mbarrier.init(d_full.index(tile), count=1)
    fence_async_shared()
    hadamard = ds.index(0)
    if HADAMARD:
        hadamard = _hadamard_tile(gl.float32 if HAS_SMOOTH else x_desc.dtype)
    # Tickets follow the order of start, so the programs that one waits for have started or are next: no deadlock.
    ticket = gl.atomic_add(p_counters, 1, sem="relaxed") if SPLITS > 1 else gl.program_id(0)
    block, split = ticket // SPLITS, ticket % SPLITS
    first = split * (TILES * 64)
    for tile in gl.static_range(RING):
        _fetch_x(x_desc, x_full, xs, tile, block, first + tile * 64)
    o_row = gl.arange(0, 64, layout=gl.SliceLayout(1, ROWS))
    o_m = block * 64 + o_row
    b_max = gl.zeros([64, 64], gl.float32, layout=ROWS)  # per element: one reduction across threads, at the end
    acc = gl.zeros([64, 64], gl.float32, layout=FLOAT)
    if DOWN:
        for tile in gl.static_range(min(2, TILES)):
            _fetch_down(d_desc, d_full, ds, tile, first, DOWN_BY_RANK)
    for tile in range(TILES):
        x_tile = xs.index(tile % RING)
        mbarrier.wait(x_full.index(tile % RING), (tile // RING) & 1)
        if DOWN:
            if tile + 2 < TILES:  # the product before last, which read this buffer, has been waited for
                _fetch_down(d_desc, d_full, ds, tile + 2, first, DOWN_BY_RANK)
            mbarrier.wait(d_full.index(tile % 3), (tile // 3) & 1)
            d_tile = ds.index(tile % 3)
            if not DOWN_BY_RANK:
                d_tile = d_tile.permute((1, 0))
            acc = warpgroup_mma(d_tile, x_tile.permute((1, 0)), acc, is_async=True)
        b_x = _prepared(x_tile, p_smooth, first + tile * 64, K, hadamard, HAS_SMOOTH, HADAMARD, ROWS)
        b_max = gl.maximum(b_max, gl.abs(b_x), propagate_nan=NAN)
        if DOWN:
            acc = warpgroup_mma_wait(0, deps=(acc,))
        thread_barrier()
        if tile + RING < TILES:
            _fetch_x(x_desc, x_full, xs, tile % RING, block, first + (tile + RING) * 64)
    b_row = gl.max(b_max, axis=1) + gl.sum(b_max * 0.0, axis=1)  # a reduction drops NaN, and codes would hide it
    o_rank = gl.arange(0, 64, layout=gl.SliceLayout(1, FLOAT))
    o_token = block * 64 + gl.arange(0, 64, layout=gl.SliceLayout(0, FLOAT))
    m_own = (o_rank < R)[:, None] & (o_token < M)[None, :]
    if SPLITS > 1:
        # The bits of floats >= 0, NaN included, are ordered as integers.
        b_bits = b_row.to(gl.int32, bitcast=True) & 0x7FFFFFFF
        gl.atomic_max(p_rows + o_m, b_bits, mask=o_m < M, sem="relaxed")
        if DOWN:
            gl.store(p_part + (split * M + o_token).to(gl.int64)[None, :] * R + o_rank[:, None], acc, mask=m_own)
        thread_barrier()
        gl.atomic_add(p_counters + 1 + block, 1, sem="release")
        while gl.atomic_add(p_counters + 1 + block, 0, sem="acquire") < SPLITS:
            pass
        thread_barrier()
        b_bits = gl.load(p_rows + o_m, mask=o_m < M, other=0, cache_modifier=".cg")
        b_row = b_bits.to(gl.float32, bitcast=True)
        if DOWN:
            SUM: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])
            o_i = split * BH + gl.arange(0, BH, layout=gl.SliceLayout(1, SUM))
            o_h, o_r = block * 64 + o_i, gl.arange(0, 64, layout=gl.SliceLayout(0, SUM))
            m_h = ((o_i < 64) & (o_h < M))[:, None] & (o_r < R)[None, :]
            b_h = gl.zeros([BH, 64], gl.float32, layout=SUM)
            for other in gl.static_range(SPLITS):  # unrolled: all loads in flight at once
                p_other = p_part + (other * M + o_h).to(gl.int64)[:, None] * R + o_r[None, :]
                b_h += gl.load(p_other, mask=m_h, other=0.0, cache_modifier=".cg")
            gl.store(p_h + o_h.to(gl.int64)[:, None] * s_hm + o_r[None, :], b_h.to(p_h.dtype.element_ty), mask=m_h)
    elif DOWN:
        gl.store(p_h + o_token.to(gl.int64)[None, :] * s_hm + o_rank[:, None], acc.to(p_h.dtype.element_ty), mask=m_own)
    b_row = gl.where(b_row == 0, 127.0, b_row)
    if split == 0:
        gl.store(p_scale + o_m, b_row / 127.0, mask=o_m < M)
    b_inverse = 127.0 / b_row
    for i in range(TILES):  # the last RING tiles are still here; the others come once more, from L2
        tile = (TILES - RING + i) % TILES
        k = first + tile * 64
        if i >= RING:
            mbarrier.wait(x_full.index(i % RING), (TILES // RING + (i - RING) // RING) & 1)
        b_x = _prepared(xs.index(i % RING), p_smooth, k, K, hadamard, HAS_SMOOTH, HADAMARD, ROWS)
        # Ties to even: adding 1.5 * 2^23 leaves the integer in the low byte.
        b_codes = (b_x * b_inverse[:, None] + 12582912.0).to(gl.int32, bitcast=True).to(gl.int8)
        b_codes = gl.convert_layout(b_codes, WRITE)
        o_k = k + gl.arange(0, 64, layout=gl.SliceLayout(0, WRITE))
        o_w = block * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, WRITE))
        p_tile = p_codes + o_w.to(gl.int64)[:, None] * KP + o_k[None, :]
        gl.store(p_tile, b_codes, mask=(o_w < M)[:, None] & (o_k < KP)[None, :])
        if i + RING < TILES:
            thread_barrier()
            _fetch_x(x_desc, x_full, xs, i % RING, block, first + i * 64)


@gluon.jit
def _fetch_x(x_desc, x_full, xs, slot, block, k):
    mbarrier.expect(x_full.index(slot), 64 * 64 * 2)
    tma_load(x_desc, [block * 64, k], x_full.index(slot), xs.index(slot))


@gluon.jit
def _fetch_down(d_desc, d_full, ds, tile, first, BY_RANK: gl.constexpr):
    barrier = d_full.index(tile % 3)
    mbarrier.expect(barrier, 64 * 64 * 2)
    if BY_RANK:
        tma_load(d_desc, [0, first + tile * 64], barrier, ds.index(tile % 3))
    else:
        tma_load(d_desc, [first + tile * 64, 0], barrier, ds.index(tile % 3))


@gluon.jit
def _hadamard_tile(dtype: gl.constexpr):
    """layout.hadamard64 in shared memory."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])
    o_i = gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
    o_j = gl.arange(0, 64, layout=gl.SliceLayout(0, LAYOUT))
    b_xor = o_i[:, None] ^ o_j[None, :]
    b_threes = b_xor & (b_xor >> 1) & 0x15
    b_parity = (b_threes ^ (b_threes >> 2) ^ (b_threes >> 4)) & 1
    BITS: gl.constexpr = dtype.primitive_bitwidth
    tile = gl.allocate_shared_memory(dtype, [64, 64], gl.NVMMASharedLayout(128, BITS))
    tile.store(((1 - 2 * b_parity).to(gl.float32) * 0.125).to(dtype))
    fence_async_shared()
    thread_barrier()
    return tile.permute((1, 0))  # symmetric; 32-bit tensor cores want both operands along their last axis


def hopper_quant_runs(x_MK: Tensor, down_RK: Tensor) -> bool:
    """Whether this kernel takes x: sm_90, 16 bits, at most 64 ranks, rows of x and D that TMA can fetch."""
    (R, K), unit = down_RK.shape, 1 in down_RK.stride()
    step = max(down_RK.stride()) if R else 8
    fetched = x_MK.data_ptr() % 16 == 0 and down_RK.data_ptr() % 16 == 0
    return on_hopper(x_MK, x_MK.dtype) and K % 8 == 0 and R <= 64 and unit and step % 8 == 0 and fetched


def _tiles(blocks: int, KP: int) -> tuple[int, int]:
    """(tiles of 64 columns a program, of which in shared memory), as they measured fastest on an H100.

    Many columns a program mean few partial h to write and add, few mean programs enough for a card where rows are few.
    """
    if blocks < 16:
        return (4, 4) if KP <= 4096 else (6, 6)
    return (12, 4) if KP <= 4096 else (8, 4)


def hopper_quantize_down(
    x_MK: Tensor, smooth_K: Tensor | None, hadamard: bool, down_RK: Tensor, tiles: int | None = None, ring: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`token_quant.quantize_down`, where `hopper_quant_runs`. tiles, ring: see `_tiles`, which chooses them otherwise."""
    (M, K), R, KP = x_MK.shape, down_RK.shape[0], padded(x_MK.shape[1])
    codes_MK = x_MK.new_empty((M, KP), dtype=torch.int8)
    scale_M1 = x_MK.new_empty((M, 1), dtype=torch.float32)
    h_MR = rank_rows(x_MK, R)
    blocks = triton.cdiv(M, BM)
    if tiles is None or ring is None:
        tiles, ring = _tiles(blocks, KP)
    splits = triton.cdiv(KP, tiles * TILE)
    alone = splits == 1
    # A ticket, an arrival counter per block of rows, the maximum of every row.
    counters = None if alone else torch.zeros(1 + blocks + M, dtype=torch.int32, device=x_MK.device)
    rows_M = None if counters is None else counters[1 + blocks :]
    part_SMR = None if alone else x_MK.new_empty((splits, M, R), dtype=torch.float32)
    box = gl.NVMMASharedLayout(128, 16)
    x_desc = TensorDescriptor.from_tensor(x_MK, [BM, TILE], box)
    by_rank = down_RK.stride(1) == 1
    d_desc = TensorDescriptor.from_tensor(down_RK if by_rank else down_RK.T, [64, 64], box) if R else x_desc
    with on_device(x_MK):
        hopper_quant_kernel[(blocks * splits,)](
            x_desc, d_desc, smooth_K, counters, rows_M, part_SMR, codes_MK, scale_M1, h_MR, M, K, KP, R, h_MR.stride(0),
            SPLITS=splits, TILES=tiles, RING=ring, DOWN=R > 0, DOWN_BY_RANK=by_rank, HAS_SMOOTH=smooth_K is not None,
            HADAMARD=hadamard, BH=max(8, triton.next_power_of_2(triton.cdiv(BM, splits))), num_warps=4,
        )  # fmt: skip
    return codes_MK, scale_M1, h_MR
