"""`token_quant` for Hopper (sm_90), in Gluon: every byte of x is fetched once and stays in shared memory until it is coded.

A program holds some columns of 64 rows, fetched by TMA in tiles of 64 columns as they are used: once by the tensor core
(h^T = D x^T), once from registers for the rows' maxima, and after all programs of these rows have met, once more for the
codes. The meeting is token_quant's: tickets in order of start, integer counters, partial h added in a fixed order.

Partial h is written and read once. Left alone it goes on to memory, an eighth more than x and the codes are; so it is discarded
in L2 by the program that has added it up (PTX `discard.global.L2`, whole lines of 128 bytes).
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

ROWS, TILE = 64, 64
PART_RANKS = 16  # partial h has its ranks padded to this, so that 2 rows of it are whole lines
RECIPROCAL = gl.constexpr("rcp.approx.ftz.f32 $0, $1;")  # to 1 ulp, in one instruction
DISCARD = gl.constexpr(
    "{ .reg .pred wanted; setp.ne.s32 wanted, $2, 0; @wanted discard.global.L2 [$1], 128; mov.b32 $0, 0; }"
)
NAN = gl.constexpr(tl.PropagateNan.ALL)


@gluon.jit
def _smooth(p_smooth, k, K, LAYOUT: gl.constexpr):
    """Smoothing of 64 columns; 1 beyond K."""
    o_k = k + gl.arange(0, 64, layout=LAYOUT)
    return gl.load(p_smooth + o_k, mask=o_k < K, other=1.0)


@gluon.jit
def _prepared(
    buffer, b_smooth, hadamard, HAS_SMOOTH: gl.constexpr, HADAMARD: gl.constexpr, LAYOUT: gl.constexpr
):  # fmt: skip
    """x' of one tile in float32, in registers. A rotation alone is still under way."""
    READ: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    if HADAMARD and not HAS_SMOOTH:  # entries of H are +-1/8: 16-bit products are exact, and x needs no register
        b_zero = gl.zeros([64, 64], gl.float32, layout=LAYOUT)
        return warpgroup_mma(buffer, hadamard, b_zero, use_acc=False, is_async=True)
    else:
        b_x = buffer.load(READ).to(gl.float32)
        if HAS_SMOOTH:
            b_inverse = gl.inline_asm_elementwise(
                RECIPROCAL, "=f,f", [b_smooth.to(gl.float32)], dtype=gl.float32, is_pure=True, pack=1
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
def _larger(a, b):
    return gl.maximum(a, b, propagate_nan=NAN)


@gluon.jit
def _columns_max(b_x, HADAMARD: gl.constexpr):
    """max |x'| over those of 64 columns that one thread holds, NaN if one is."""
    b_x = gl.abs(b_x)
    if HADAMARD:  # a thread of a tensor core's result has 2 of every 8 columns
        return gl.reduce(gl.reduce(b_x.reshape([64, 8, 4, 2]), 3, _larger), 1, _larger)
    else:
        return gl.reduce(b_x.reshape([64, 8, 8]), 2, _larger)


@gluon.jit
def hopper_quant_kernel(
    x_desc, d_desc, p_smooth, p_counters, p_rows, p_part, p_codes, p_scale, p_h, M, K, KP, R, RP, s_hm,
    SPLITS: gl.constexpr, TILES: gl.constexpr, RING: gl.constexpr, D_RING: gl.constexpr,
    DOWN: gl.constexpr, DOWN_BY_RANK: gl.constexpr, HAS_SMOOTH: gl.constexpr, HADAMARD: gl.constexpr, BH: gl.constexpr,
):  # fmt: skip
    """TILES of 64 columns a program, RING of them in shared memory at a time (TILES a multiple of RING), D_RING of D.

    DOWN: whether there is a branch, of at most 64 ranks; p_part is [blocks of rows, SPLITS, 64, RP]. DOWN_BY_RANK: D is [R, K], else [K, R]. BH: rows of h that a program adds up.
    """
    FLOAT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    BLOCKED: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    ROWS: gl.constexpr = FLOAT if HADAMARD else BLOCKED
    WRITE: gl.constexpr = gl.BlockedLayout([1, 16], [8, 4], [4, 1], [1, 0]) if HADAMARD else BLOCKED
    COLUMNS: gl.constexpr = gl.SliceLayout(0, BLOCKED)
    ALONE: gl.constexpr = HADAMARD and not HAS_SMOOTH
    xs = gl.allocate_shared_memory(x_desc.dtype, [RING, 64, 64], x_desc.layout)
    x_full = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    for tile in gl.static_range(RING):
        mbarrier.init(x_full.index(tile), count=1)
    ds, d_full = xs, x_full
    # A barrier that nothing waits for would share memory with the ticket's broadcast, and its init may land after it.
    if DOWN:
        ds = gl.allocate_shared_memory(x_desc.dtype, [D_RING, 64, 64], d_desc.layout)
        d_full = gl.allocate_shared_memory(gl.int64, [D_RING, 1], mbarrier.MBarrierLayout())
        for tile in gl.static_range(D_RING):
            mbarrier.init(d_full.index(tile), count=1)
    fence_async_shared()
    hadamard = xs.index(0)
    if HADAMARD:
        hadamard = _hadamard_tile(gl.float32 if HAS_SMOOTH else x_desc.dtype)
    # Tickets follow the order of start, so the programs that one waits for have started or are next: no deadlock.
    ticket = gl.atomic_add(p_counters, 1, sem="relaxed") if SPLITS > 1 else gl.program_id(0)
    block, split = ticket // SPLITS, ticket % SPLITS
    first = split * (TILES * 64)
    for tile in gl.static_range(RING):
        _fetch_x(x_desc, x_full, xs, tile, block, first + tile * 64)
    if DOWN:
        for tile in gl.static_range(min(D_RING, TILES)):
            _fetch_down(d_desc, d_full, ds, tile, tile, first, DOWN_BY_RANK)
    o_row = gl.arange(0, 64, layout=gl.SliceLayout(1, ROWS))
    o_m = block * 64 + o_row
    b_max = _columns_max(gl.zeros([64, 64], gl.float32, layout=ROWS), HADAMARD)
    acc = gl.zeros([64, 64], gl.float32, layout=FLOAT)
    b_next = gl.zeros([64], p_codes.dtype.element_ty, layout=COLUMNS)
    if HAS_SMOOTH:
        b_next = _smooth(p_smooth, first, K, COLUMNS)
    for tile in range(TILES):
        b_smooth = b_next
        if HAS_SMOOTH:  # of the next tile: its latency is this one's time
            b_next = _smooth(p_smooth, first + gl.minimum(tile + 1, TILES - 1) * 64, K, COLUMNS)
        x_tile = xs.index(tile % RING)
        mbarrier.wait(x_full.index(tile % RING), (tile // RING) & 1)
        if DOWN:
            mbarrier.wait(d_full.index(tile % D_RING), (tile // D_RING) & 1)
            d_tile = ds.index(tile % D_RING)
            if not DOWN_BY_RANK:
                d_tile = d_tile.permute((1, 0))
            acc = warpgroup_mma(d_tile, x_tile.permute((1, 0)), acc, is_async=True)
        b_x = _prepared(x_tile, b_smooth, hadamard, HAS_SMOOTH, HADAMARD, ROWS)
        if ALONE:
            b_x, acc = warpgroup_mma_wait(0, deps=(b_x, acc))
        b_max = _larger(b_max, _columns_max(b_x, HADAMARD))
        if DOWN and not ALONE:
            acc = warpgroup_mma_wait(0, deps=(acc,))
        thread_barrier()
        if DOWN and tile + D_RING < TILES:
            _fetch_down(d_desc, d_full, ds, tile % D_RING, tile + D_RING, first, DOWN_BY_RANK)
        if tile + RING < TILES:
            _fetch_x(x_desc, x_full, xs, tile % RING, block, first + (tile + RING) * 64)
    b_row = gl.reduce(b_max, 1, _larger)
    b_row = gl.convert_layout(b_row, gl.SliceLayout(1, ROWS))
    o_rank = gl.arange(0, 64, layout=gl.SliceLayout(1, FLOAT))
    o_token = block * 64 + gl.arange(0, 64, layout=gl.SliceLayout(0, FLOAT))
    m_own = (o_rank < R)[:, None] & (o_token < M)[None, :]
    if SPLITS > 1:
        # The bits of floats >= 0, NaN included, are ordered as integers.
        b_bits = b_row.to(gl.int32, bitcast=True) & 0x7FFFFFFF
        gl.atomic_max(p_rows + o_m, b_bits, mask=o_m < M, sem="relaxed")
        p_block = p_part + block.to(gl.int64) * (SPLITS * 64) * RP
        if DOWN:
            o_local = split * 64 + gl.arange(0, 64, layout=gl.SliceLayout(0, FLOAT))
            gl.store(p_block + o_local[None, :] * RP + o_rank[:, None], acc, mask=m_own)
        thread_barrier()
        gl.atomic_add(p_counters + 1 + block, 1, sem="release")
        while gl.atomic_add(p_counters + 1 + block, 0, sem="acquire") < SPLITS:
            pass
        thread_barrier()
        b_bits = gl.load(p_rows + o_m, mask=o_m < M, other=0, cache_modifier=".cg")
        b_row = b_bits.to(gl.float32, bitcast=True)
        if DOWN:
            _add_up(p_block, p_h, block, split, M, R, RP, s_hm, SPLITS, BH)
    elif DOWN:
        gl.store(p_h + o_token.to(gl.int64)[None, :] * s_hm + o_rank[:, None], acc.to(p_h.dtype.element_ty), mask=m_own)
    b_row = gl.where(b_row == 0, 127.0, b_row)
    if split == 0:
        gl.store(p_scale + o_m, b_row / 127.0, mask=o_m < M)
    b_inverse = 127.0 / b_row
    if HAS_SMOOTH:
        b_next = _smooth(p_smooth, first + (TILES - RING) * 64, K, COLUMNS)
    for i in range(TILES):  # the last RING tiles are still here; the others come once more, from L2
        k = first + (TILES - RING + i) % TILES * 64
        b_smooth = b_next
        if HAS_SMOOTH:
            b_next = _smooth(p_smooth, first + (TILES - RING + i + 1) % TILES * 64, K, COLUMNS)
        if i >= RING:
            mbarrier.wait(x_full.index(i % RING), (TILES // RING + (i - RING) // RING) & 1)
        b_x = _prepared(xs.index(i % RING), b_smooth, hadamard, HAS_SMOOTH, HADAMARD, ROWS)
        if ALONE:
            b_x = warpgroup_mma_wait(0, deps=(b_x,))
        # Ties to even: adding 1.5 * 2^23 leaves the integer in the low byte.
        b_codes = (b_x * b_inverse[:, None] + 12582912.0).to(gl.int32, bitcast=True).to(gl.int8)
        b_codes = gl.convert_layout(b_codes, WRITE)
        o_k = k + gl.arange(0, 64, layout=gl.SliceLayout(0, WRITE))
        o_w = block * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, WRITE))
        # Streamed, so that partial h and x, which come once more, stay in L2 as long as they may.
        p_tile = p_codes + o_w.to(gl.int64)[:, None] * KP + o_k[None, :]
        gl.store(p_tile, b_codes, mask=(o_w < M)[:, None] & (o_k < KP)[None, :], cache_modifier=".cs")
        if i + RING < TILES:
            thread_barrier()
            _fetch_x(x_desc, x_full, xs, i % RING, block, first + i * 64)


@gluon.jit
def _add_up(p_block, p_h, block, split, M, R, RP, s_hm, SPLITS: gl.constexpr, BH: gl.constexpr):
    """BH rows of h: the partial ones of SPLITS programs, in their order. These are discarded, as nobody reads them any more."""
    SUM: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])
    o_i = split * BH + gl.arange(0, BH, layout=gl.SliceLayout(1, SUM))
    o_h, o_r = block * 64 + o_i, gl.arange(0, 64, layout=gl.SliceLayout(0, SUM))
    m_h = ((o_i < 64) & (o_h < M))[:, None] & (o_r < R)[None, :]
    b_h = gl.zeros([BH, 64], gl.float32, layout=SUM)
    for other in gl.static_range(SPLITS):  # unrolled: all loads in flight at once
        p_other = p_block + (other * 64 + o_i)[:, None] * RP + o_r[None, :]
        b_h += gl.load(p_other, mask=m_h, other=0.0, cache_modifier=".cg")
    gl.store(p_h + o_h.to(gl.int64)[:, None] * s_hm + o_r[None, :], b_h.to(p_h.dtype.element_ty), mask=m_h)
    thread_barrier()
    if split * BH < 64:
        _discard_rows(p_block + split * BH * RP, RP, SPLITS, BH)


@gluon.jit
def _discard_rows(p_rows, RP, SPLITS: gl.constexpr, BH: gl.constexpr):
    """BH rows of the partial h of SPLITS programs, which nobody reads any more: their lines in L2 are not written to memory."""
    LINES: gl.constexpr = 2 * BH  # at 64 ranks
    o_i = gl.arange(0, triton.next_power_of_2(SPLITS) * LINES, layout=gl.BlockedLayout([1], [32], [4], [0]))
    o_split, o_line = o_i // LINES, o_i % LINES
    p_line = (p_rows + o_split * 64 * RP + o_line * 32).to(gl.int64, bitcast=True)
    m_line = ((o_split < SPLITS) & (o_line < BH * RP // 32)).to(gl.int32)
    gl.inline_asm_elementwise(DISCARD, "=r,l,r", [p_line, m_line], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _fetch_x(x_desc, x_full, xs, slot, block, k):
    mbarrier.expect(x_full.index(slot), 64 * 64 * 2)
    tma_load(x_desc, [block * 64, k], x_full.index(slot), xs.index(slot))


@gluon.jit
def _fetch_down(d_desc, d_full, ds, slot, tile, first, BY_RANK: gl.constexpr):
    barrier = d_full.index(slot)
    mbarrier.expect(barrier, 64 * 64 * 2)
    if BY_RANK:
        tma_load(d_desc, [0, first + tile * 64], barrier, ds.index(slot))
    else:
        tma_load(d_desc, [first + tile * 64, 0], barrier, ds.index(slot))


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


def _config(M: int, KP: int) -> dict[str, int]:
    """Tiles of 64 columns a program, and of x and of D in shared memory, as they measured fastest on an H100.

    Many columns a program mean few partial h to write and add, few mean programs enough for a card where rows are few.
    """
    if M <= 1024:
        return {"TILES": 3, "RING": 3, "D_RING": 3} if KP <= 4096 else {"TILES": 6, "RING": 6, "D_RING": 4}
    return {"TILES": 8, "RING": 2, "D_RING": 2} if KP <= 4096 else {"TILES": 8, "RING": 4, "D_RING": 4}


def hopper_quantize_down(
    x_MK: Tensor, smooth_K: Tensor | None, hadamard: bool, down_RK: Tensor, config: dict[str, int] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`token_quant.quantize_down`, where `hopper_quant_runs`. config: see `_config`, which chooses it otherwise."""
    (M, K), R, KP = x_MK.shape, down_RK.shape[0], padded(x_MK.shape[1])
    codes_MK = x_MK.new_empty((M, KP), dtype=torch.int8)
    scale_M1 = x_MK.new_empty((M, 1), dtype=torch.float32)
    h_MR = rank_rows(x_MK, R)
    config = config or _config(M, KP)
    blocks, splits = triton.cdiv(M, ROWS), triton.cdiv(KP, config["TILES"] * TILE)
    alone = splits == 1
    # A ticket, an arrival counter per block of rows, the maximum of every row.
    counters = None if alone else torch.zeros(1 + blocks + M, dtype=torch.int32, device=x_MK.device)
    rows_M = None if counters is None else counters[1 + blocks :]
    ranks = triton.cdiv(R, PART_RANKS) * PART_RANKS
    part = None if alone else x_MK.new_empty((blocks, splits, ROWS, ranks), dtype=torch.float32)
    box = gl.NVMMASharedLayout(128, 16)
    x_desc = TensorDescriptor.from_tensor(x_MK, [ROWS, TILE], box)
    by_rank = down_RK.stride(1) == 1
    d_desc = TensorDescriptor.from_tensor(down_RK if by_rank else down_RK.T, [64, 64], box) if R else x_desc
    with on_device(x_MK):
        hopper_quant_kernel[(blocks * splits,)](
            x_desc, d_desc, smooth_K, counters, rows_M, part, codes_MK, scale_M1, h_MR, M, K, KP, R, ranks,
            h_MR.stride(0),
            SPLITS=splits, DOWN=R > 0, DOWN_BY_RANK=by_rank, HAS_SMOOTH=smooth_K is not None, HADAMARD=hadamard,
            BH=max(8, triton.next_power_of_2(triton.cdiv(ROWS, splits))), **config, num_warps=4,
        )  # fmt: skip
    return codes_MK, scale_M1, h_MR
