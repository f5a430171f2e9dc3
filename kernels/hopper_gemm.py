"""INT8 matrix product for Hopper (sm_90), warp-specialized, in Gluon: loads, widening and epilogues overlap.

    y_mn = a_m s_n sum_k x_mk w_nk  +  sum_r h_mr u_nr  +  bias_n

x INT8; w either packed UINT4 with one 32-bit word of scales and offsets per row and 128 columns (see layout.pack_tiles), or
INT8 as it lies. Tiles are computed as Y^T = W X^T: the weight is the tensor core's A operand, which may come from registers,
so widened codes are never written anywhere. One warp keeps STAGES tiles of 128 columns in flight (TMA); two warpgroups, WN
weight rows each, share every tile of x. They run out of step, so one widens or finishes a tile while the other multiplies.
The low-rank branch is one more step through the same stages, after the sums were scaled in place: its first 64 ranks are one
stage, in which h fills the tiles of x; of U 32 ranks lie where weights do, 32 where the tile before left its outputs. Every
further 32 are a stage. Sixteen ranks are multiplied at a time, and those beyond R read as 0.
Programs are persistent. INT32 sums are exact, so results do not depend on the schedule.

A convolution reads the same tiles of x out of the codes of an image (`block_codes`): BX outputs that are neighbours find each
tap's pixels in BX neighbouring rows, hence a tile is BM / BX boxes of BX rows. No matrix of windows is written.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from loragraft.kernels.block_codes import Blocks
from loragraft.kernels.hopper import on_hopper, reinterpret, thread_barrier, tma_load, tma_store
from loragraft.kernels.layout import on_device
from loragraft.kernels.tiles import WIDEN_HIGH, WIDEN_LOW

SHARED_BYTES = 232448 - 512  # of one SM, less barriers


@gluon.jit
def _tile(pid, M, N, group_m, BM: gl.constexpr, BN: gl.constexpr):
    """Tile numbers of a program: group_m tiles of tokens share each strip of weights, for the L2 cache."""
    tiles_m, tiles_n = gl.cdiv(M, BM), gl.cdiv(N, BN)
    group = pid // (group_m * tiles_n)
    first = group * group_m
    size = gl.minimum(tiles_m - first, group_m)
    inside = pid % (group_m * tiles_n)
    return first + inside % size, inside // size


@gluon.jit
def _load_stage(desc, row, column, barrier, buffers, slot):
    """One 128-byte-wide tile as two 64-byte-wide boxes."""
    tma_load(desc, [row, column], barrier, buffers.index(slot))
    tma_load(desc, [row, column + 64], barrier, buffers.index(slot + 1))


@gluon.jit
def _load_boxes(
    desc, barrier, buffers, slot, first, u, v, c, across, block_height, block_rows, steps_x, stride, kernel, columns,
    BM: gl.constexpr, BX: gl.constexpr,
):  # fmt: skip
    """64 columns of a tile of windows, from channel c of tap (u, v) on. first: where in its block the tile begins, (block
    row of the batch, row of outputs in it, block of that row)."""
    tap_row = (u * stride + v % stride) * steps_x + v // stride
    c = gl.where(u < kernel, c, columns)  # behind the last tap: outside of the codes, where a box reads zeros
    band, row, block = first
    for part in gl.static_range(BM // BX):
        source = (band * across + block) * block_rows + row * (stride * stride * steps_x) + tap_row
        tma_load(desc, [source, c], barrier, _part(buffers.index(slot), part, BM, BX))
        block += 1
        row += gl.where(block == across, 1, 0)
        block = gl.where(block == across, 0, block)
        band += gl.where(row == block_height, 1, 0)
        row = gl.where(row == block_height, 0, row)


@gluon.jit
def _part(buffer, part: gl.constexpr, BM: gl.constexpr, BX: gl.constexpr):
    """Rows part BX .. of a [BM, 64] tile."""
    if BX == BM:
        return buffer
    else:
        return reinterpret(buffer, gl.int8, [BM // BX, BX, 64], buffer.layout).index(part)


@gluon.jit
def _produce(
    x_desc, w_desc, h_desc, up_desc, full, empty, xs, ws, M, N, steps, group_m,
    across, block_height, block_rows, steps_x, stride, kernel, columns, BX: gl.constexpr,
    PACKED: gl.constexpr, UP_BY_RANK: gl.constexpr, RANKS: gl.constexpr, BM: gl.constexpr, WN: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    stage, phase = 0, 1
    BOXES: gl.constexpr = 2 if PACKED else 4
    for tile in range(gl.program_id(0), gl.cdiv(M, BM) * gl.cdiv(N, 2 * WN), gl.num_programs(0)):
        t_m, t_n = _tile(tile, M, N, group_m, BM, 2 * WN)
        u, v, c = 0, 0, 0
        first = (0, 0, 0)
        if BX > 0:
            piece = t_m * (BM // BX)
            line = piece // across
            first = (line // block_height, line % block_height, piece % across)
        for k in range(steps):
            mbarrier.wait(empty.index(stage), phase)
            barrier = full.index(stage)
            mbarrier.expect(barrier, BM * 128 + BOXES * WN * 64)
            if BX > 0:
                for half in gl.static_range(2):
                    _load_boxes(x_desc, barrier, xs, 2 * stage + half, first, u, v, c, across, block_height, block_rows,
                                steps_x, stride, kernel, columns, BM, BX)  # fmt: skip
                    c += 64
                    v += gl.where(c == columns, 1, 0)
                    c = gl.where(c == columns, 0, c)
                    u += gl.where(v == kernel, 1, 0)
                    v = gl.where(v == kernel, 0, v)
            else:
                _load_stage(x_desc, t_m * BM, k * 128, barrier, xs, 2 * stage)
            for group in gl.static_range(2):
                row = (2 * t_n + group) * WN
                if PACKED:
                    tma_load(w_desc, [row, k * 64], barrier, ws.index(2 * stage + group))
                else:
                    _load_stage(w_desc, row, k * 128, barrier, ws, 4 * stage + 2 * group)
            stage += 1
            if stage == STAGES:
                stage, phase = 0, phase ^ 1
        for step in gl.static_range(_rank_steps(RANKS)):
            mbarrier.wait(empty.index(stage), phase)
            barrier = full.index(stage)
            first_rank = 32 * step + (32 if step > 0 else 0)
            mbarrier.expect(barrier, (2 if step == 0 and RANKS > 32 else 1) * BM * 64 + 2 * WN * 64)
            tma_load(h_desc, [t_m * BM, first_rank * 2], barrier, xs.index(2 * stage))
            if step == 0 and RANKS > 32:
                tma_load(h_desc, [t_m * BM, 64], barrier, xs.index(2 * stage + 1))
            for group in gl.static_range(2):
                up = _up_tile(ws.index(BOXES * stage + group), up_desc.dtype, WN, UP_BY_RANK)
                _load_up(up_desc, first_rank, (2 * t_n + group) * WN, barrier, up, UP_BY_RANK)
            stage += 1
            if stage == STAGES:
                stage, phase = 0, phase ^ 1


@gluon.jit
def _up_tile(buffer, dtype: gl.constexpr, WN: gl.constexpr, UP_BY_RANK: gl.constexpr):
    """A box of ws as it holds 32 ranks of U: [WN, 32], or [32, WN] of its transpose."""
    if UP_BY_RANK:
        WIDE: gl.constexpr = gl.NVMMASharedLayout(128, 16)
        return reinterpret(buffer, dtype, [32, WN], WIDE)
    else:
        NARROW: gl.constexpr = gl.NVMMASharedLayout(64, 16)
        return reinterpret(buffer, dtype, [WN, 32], NARROW)


@gluon.jit
def _load_up(desc, rank, row, barrier, up, UP_BY_RANK: gl.constexpr):
    """32 ranks of U for WN rows of the weight."""
    if UP_BY_RANK:
        tma_load(desc, [rank, row], barrier, up)
    else:
        tma_load(desc, [row, rank], barrier, up)


@gluon.jit
def _branch_product(up, h, b_y, RANKS: gl.constexpr, UP_BY_RANK: gl.constexpr):
    """b_y + U h^T over the first RANKS (16 or 32) of the 32 that lie there, under way."""
    if RANKS == 16:
        up = up.slice(0, 16, 0 if UP_BY_RANK else 1)
        h = h.slice(0, 16, 1)
    if UP_BY_RANK:
        up = up.permute((1, 0))
    return warpgroup_mma(up, h.permute((1, 0)), b_y, is_async=True)


@gluon.constexpr_function
def _rank_steps(ranks):
    """Stages of a branch."""
    return 0 if ranks == 0 else 1 + max(0, (ranks - 33) // 32)


@gluon.constexpr_function
def _step_ranks(ranks, step):
    """Ranks of a stage's last 32."""
    return min(32, ranks - (0 if ranks <= 32 else 32 * (step + 1)))


@gluon.jit
def _widen(b_w, word, HALF: gl.constexpr):
    """INT8 codes of the low or the high nibbles; the four words of pack=4 are one row's, hence equal."""
    b_word = word[:, None].broadcast_to(b_w.shape)
    return gl.inline_asm_elementwise(HALF, "=r,r,r,r,r,r", [b_w, b_word], dtype=gl.int8, is_pure=True, pack=4)


@gluon.jit
def _consume(
    GROUP: gl.constexpr, p_a, p_words, p_s, p_bias, up_desc, y_desc, full, empty, up_full, xs, ws, ys, scales, M, N,
    steps, group_m, PACKED: gl.constexpr, UP_BY_RANK: gl.constexpr, RANKS: gl.constexpr, BM: gl.constexpr, WN: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    INT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    FLOAT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    A_INT: gl.constexpr = gl.DotOperandLayout(0, INT, 4)
    HALF: gl.constexpr = gl.NVMMASharedLayout(64, 16)
    FLAT: gl.constexpr = gl.BlockedLayout([BM // 128], [32], [4], [0])
    BOXES: gl.constexpr = 2 if PACKED else 4
    PARTS: gl.constexpr = 2 if RANKS > 32 else 1
    o_word = gl.arange(0, WN, layout=gl.SliceLayout(1, A_INT))
    o_n = gl.arange(0, WN, layout=gl.SliceLayout(1, FLOAT))
    o_m = gl.arange(0, BM, layout=FLAT)
    stage, phase, up_phase = 0, 0, 0
    CODES: gl.constexpr = gl.NVMMASharedLayout(64, 8)
    second_up = _up_tile(reinterpret(ys, gl.int8, [BM // 32, WN, 64], CODES).index(0), up_desc.dtype, WN, UP_BY_RANK)
    for tile in range(gl.program_id(0), gl.cdiv(M, BM) * gl.cdiv(N, 2 * WN), gl.num_programs(0)):
        t_m, t_n = _tile(tile, M, N, group_m, BM, 2 * WN)
        first = (2 * t_n + GROUP) * WN
        # Fetched before the sums, used after them.
        r_n = gl.minimum(first + o_n, N - 1)
        b_s = gl.load(p_s + r_n).to(gl.float32)
        b_a = gl.load(p_a + gl.minimum(t_m * BM + o_m, M - 1))
        b_bias = gl.zeros([WN], gl.float32, layout=gl.SliceLayout(1, FLOAT))
        if p_bias is not None:
            b_bias = gl.load(p_bias + r_n).to(gl.float32)
        acc = gl.zeros([WN, BM], gl.int32, layout=INT)
        p_word = p_words
        if PACKED:
            p_word += gl.minimum(first + o_word, N - 1)  # rows beyond N repeat a valid one and are not stored
            word = gl.load(p_word)
        # What follows the first step makes it a part of its own: asked for in the loop, it costs every step some 20 cycles.
        for part in gl.static_range(PARTS):
            for k in range(part, 1 if part < PARTS - 1 else steps):
                mbarrier.wait(full.index(stage), phase)
                x_low = xs.index(2 * stage).permute((1, 0))
                x_high = xs.index(2 * stage + 1).permute((1, 0))
                if PACKED:
                    b_w = ws.index(2 * stage + GROUP).load(A_INT)
                    acc = warpgroup_mma(_widen(b_w, word, WIDEN_LOW), x_low, acc, is_async=True)
                    acc = warpgroup_mma(_widen(b_w, word, WIDEN_HIGH), x_high, acc, is_async=True)
                    p_word += N
                    word = gl.load(p_word, mask=o_word < (steps - 1 - k) * WN, other=0)  # nothing after the last step
                else:
                    acc = warpgroup_mma(ws.index(4 * stage + 2 * GROUP), x_low, acc, is_async=True)
                    acc = warpgroup_mma(ws.index(4 * stage + 2 * GROUP + 1), x_high, acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=(acc,))
                mbarrier.arrive(empty.index(stage))
                stage += 1
                if stage == STAGES:
                    stage, phase = 0, phase ^ 1
            if part < PARTS - 1:
                tma.store_wait(0)  # the tile before has left ys; what comes there now is wanted after the sums
                thread_barrier()
                mbarrier.expect(up_full, WN * 64)
                _load_up(up_desc, 32, first, up_full, second_up, UP_BY_RANK)
        scales.store(b_a)  # a value per column: through shared memory, as a thread needs many of them
        thread_barrier()
        b_y = gl.convert_layout(acc.to(gl.float32), FLOAT)
        b_y = b_y * (b_s[:, None] * scales.load(gl.SliceLayout(0, FLOAT))[None, :]) + b_bias[:, None]
        for step in gl.static_range(_rank_steps(RANKS)):
            mbarrier.wait(full.index(stage), phase)
            up = _up_tile(ws.index(BOXES * stage + GROUP), up_desc.dtype, WN, UP_BY_RANK)
            h = reinterpret(xs.index(2 * stage), up_desc.dtype, [BM, 32], HALF)
            if step == 0 and RANKS > 32:
                b_y = _branch_product(up, h, b_y, 32, UP_BY_RANK)
                mbarrier.wait(up_full, up_phase)
                h = reinterpret(xs.index(2 * stage + 1), up_desc.dtype, [BM, 32], HALF)
                b_y = _branch_product(second_up, h, b_y, _step_ranks(RANKS, step), UP_BY_RANK)
            else:
                b_y = _branch_product(up, h, b_y, _step_ranks(RANKS, step), UP_BY_RANK)
            b_y = warpgroup_mma_wait(0, deps=(b_y,))
            mbarrier.arrive(empty.index(stage))
            stage += 1
            if stage == STAGES:
                stage, phase = 0, phase ^ 1
        up_phase ^= 1
        if RANKS <= 32:
            tma.store_wait(0)  # the tile before has left ys
        thread_barrier()
        ys.store(b_y.to(ys.dtype))
        fence_async_shared()
        thread_barrier()
        tma_store(y_desc, [t_m * BM, first], ys.permute((1, 0)))
    tma.store_wait(0)


COUNTS = ("steps", "group_m", "across", "block_height", "block_rows", "steps_x", "stride", "kernel", "columns")


@gluon.jit(do_not_specialize=COUNTS)  # they only count: one kernel for all layers
def hopper_gemm_kernel(
    x_desc, w_desc, h_desc, up_desc, y_desc, p_a, p_words, p_s, p_bias, M, N, steps, group_m,
    across, block_height, block_rows, steps_x, stride, kernel, columns, BX: gl.constexpr,
    PACKED: gl.constexpr, UP_BY_RANK: gl.constexpr, RANKS: gl.constexpr, BM: gl.constexpr, WN: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """RANKS: of the branch, rounded up to a multiple of 16."""
    TRANSPOSED: gl.constexpr = gl.NVMMASharedLayout(128, 16, transposed=True)
    BOXES: gl.constexpr = 2 if PACKED else 4
    xs = gl.allocate_shared_memory(gl.int8, [2 * STAGES, BM, 64], x_desc.layout)
    ws = gl.allocate_shared_memory(gl.int8, [BOXES * STAGES, WN, 64], w_desc.layout)
    ys = gl.allocate_shared_memory(y_desc.dtype, [2, WN, BM], TRANSPOSED)
    scales = gl.allocate_shared_memory(gl.float32, [2, BM], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    up_full = full
    if RANKS > 32:
        up_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        for group in gl.static_range(2):
            mbarrier.init(up_full.index(group), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (0, p_a, p_words, p_s, p_bias, up_desc, y_desc, full, empty, up_full.index(0), xs, ws, ys.index(0),
                        scales.index(0), M, N, steps, group_m, PACKED, UP_BY_RANK, RANKS, BM, WN, STAGES)),
            (_consume, (1, p_a, p_words, p_s, p_bias, up_desc, y_desc, full, empty, up_full.index(1), xs, ws, ys.index(1),
                        scales.index(1), M, N, steps, group_m, PACKED, UP_BY_RANK, RANKS, BM, WN, STAGES)),
            (_produce, (x_desc, w_desc, h_desc, up_desc, full, empty, xs, ws, M, N, steps, group_m, across, block_height,
                        block_rows, steps_x, stride, kernel, columns, BX, PACKED, UP_BY_RANK, RANKS, BM, WN, STAGES)),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip


def hopper_gemm_runs(x_MK: Tensor, y_dtype: torch.dtype, up_NR: Tensor) -> bool:
    """Whether this kernel takes the product: an sm_90 device, a 16-bit result, rows of y and of U that TMA can move."""
    (N, R), by_rank, fetched = up_NR.shape, up_NR.stride(1) != 1, up_NR.data_ptr() % 16 == 0
    return on_hopper(x_MK, y_dtype) and N % 8 == 0 and (by_rank or R % 8 == 0) and fetched


def hopper_gemm(
    x_MK: Tensor, a_M1: Tensor, weight: Tensor, words: Tensor | None, s_N: Tensor, h_MR: Tensor, up_NR: Tensor,
    bias: Tensor | None, config: dict[str, int] | None = None, out: Tensor | None = None, blocks: Blocks | None = None,
) -> Tensor:  # fmt: skip
    """y [M, N] in h's dtype; x int8 [M, Kp], weight uint8 [N, Kp/2] with its words, or int8 [N, Kp] without.

    h [M, R] and up [N, R], or the transpose that up is a view of, with rows of a multiple of 16 bytes. out: where y goes.
    blocks: x are codes [rows, Ct] of blocks of an image, and y is their convolution (`hopper_boxes_run`).
    """
    (M, N), R, packed = (h_MR.shape[0], up_NR.shape[0]), up_NR.shape[1], words is not None
    KP = weight.shape[1] * (2 if packed else 1)
    config = config or hopper_config(x_MK.device, M, N, KP, packed)
    BM, WN = config["BM"], config["WN"]
    stages = (SHARED_BYTES - 4 * WN * BM - 8 * BM) // (BM * 128 + 2 * WN * (64 if packed else 128))
    y_MN = h_MR.new_empty((M, N)) if out is None else out
    box = gl.NVMMASharedLayout(64, 8)
    BX = 0 if blocks is None else blocks.columns
    x_desc = TensorDescriptor.from_tensor(x_MK, [BX or BM, 64], box)
    w_desc = TensorDescriptor.from_tensor(weight.view(torch.int8), [WN, 64], box)
    h_desc = TensorDescriptor.from_tensor(h_MR.view(torch.int8), [BM, 64], box) if R else x_desc
    by_rank = R > 0 and up_NR.stride(1) != 1  # the transpose of a [R, N] matrix
    if by_rank:
        up_desc = TensorDescriptor.from_tensor(up_NR.T, [32, WN], gl.NVMMASharedLayout(128, 16))
    elif R:
        up_desc = TensorDescriptor.from_tensor(up_NR, [WN, 32], gl.NVMMASharedLayout(64, 16))
    else:
        up_desc = x_desc
    y_desc = TensorDescriptor.from_tensor(y_MN, [BM, WN], gl.NVMMASharedLayout(128, 16))
    tiles = triton.cdiv(M, BM) * triton.cdiv(N, 2 * WN)
    programs = torch.cuda.get_device_properties(x_MK.device).multi_processor_count
    with on_device(x_MK):
        hopper_gemm_kernel[(min(tiles, programs),)](
            x_desc, w_desc, h_desc, up_desc, y_desc, a_M1, words, s_N, bias, M, N, KP // 128, config["GROUP_M"],
            *_geometry(blocks, x_MK.shape[1]), BX=BX, PACKED=packed, UP_BY_RANK=by_rank, RANKS=16 * triton.cdiv(R, 16), BM=BM, WN=WN, STAGES=stages, num_warps=4,
        )  # fmt: skip
    return y_MN


def hopper_boxes_run(x: Tensor, up_NR: Tensor, blocks: Blocks) -> bool:
    """Whether this kernel convolves x: `hopper_gemm_runs`, and boxes that are no smaller than 16 rows."""
    return hopper_gemm_runs(x, x.dtype, up_NR) and blocks.columns >= 16


def _geometry(blocks: Blocks | None, columns: int) -> tuple[int, ...]:
    """(blocks across, rows of outputs in a block, rows of codes in a block, steps, stride, kernel, Ct)."""
    if blocks is None:
        return (0,) * 7
    code_rows = blocks.patch_rows * blocks.patch_columns
    return blocks.across, blocks.rows, code_rows, blocks.steps, blocks.window.stride, blocks.window.kernel, columns


def hopper_config(device: torch.device, M: int, N: int, KP: int, packed: bool) -> dict[str, int]:
    """Tile sizes for a shape: those that benchmarks/tune.py found on this card for as many outputs and inputs and the
    nearest number of tokens, up to twice as many; else large tiles where there are tokens enough to fill the card."""
    rows = [row for row in _tuned(card_name(device)) if (row["N"], row["K"], row["packed"]) == (N, KP, packed)]
    near = [row for row in rows if 2 * row["M"] >= M and row["M"] <= 2 * M]
    if near:
        return min(near, key=lambda row: abs(row["M"] - M))
    return {"BM": 256, "WN": 64, "GROUP_M": 8} if M > 1024 else {"BM": 128, "WN": 64, "GROUP_M": 8}


def card_name(device: torch.device) -> str:
    """File name of a card in kernels/tuned: its name in lower case with underscores."""
    return re.sub(r"[^a-z0-9]+", "_", torch.cuda.get_device_properties(device).name.lower())


TUNED = Path(__file__).parent / "tuned"
_KEY = ("M", "N", "K", "packed")


@cache
def _tuned(card: str) -> tuple[dict[str, int], ...]:
    file = TUNED / f"{card}.json"
    return tuple(json.loads(file.read_text())["hopper_gemm"]) if file.is_file() else ()


def keep_tuned(device: torch.device, rows: Sequence[Mapping[str, Any]], folder: Path = TUNED) -> Path:
    """Adds tile sizes of shapes (M, N, K, packed, BM, WN, GROUP_M) to what is known of this card; they hold at once."""
    file = folder / f"{card_name(device)}.json"
    known = json.loads(file.read_text()) if file.is_file() else {"hopper_gemm": []}
    new = {tuple(row[key] for key in _KEY) for row in rows}
    kept = [row for row in known["hopper_gemm"] if tuple(row[key] for key in _KEY) not in new]
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"torch": torch.__version__, "hopper_gemm": [*kept, *rows]}, indent=1) + "\n")
    _tuned.cache_clear()
    return file
