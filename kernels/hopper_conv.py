"""INT8 convolution for Hopper (sm_90), warp-specialized, in Gluon: `conv_gemm` with TMA for windows and packed weights.

    y_pn = s_n sum_t a_q(p,t) sum_c x_qc w_ntc  +  sum_r h_pr u_nr  +  bias_n

A tile is two warpgroups' work, TH x TW output pixels of one image by 64 outputs each: OUT of them side by side in the outputs,
PIX in the pixels, one below the other. What tap (u, v) reads of x is the same rectangle moved by (u - padding, v - padding):
one box of a four-dimensional TMA descriptor [B, H, W, C], which fills with zeros outside of the image; so windows cost no
address arithmetic, no masks and no memory. The rest is `hopper_gemm`: Y^T = W X^T with the weight's codes widened in registers,
one warp that keeps STAGES tiles of 128 columns in flight, two warpgroups out of step, the branch as one more product. The
registers of an INT32 and a float32 sum of 256 pixels would not fit: there are 64 or 128.

A step has 128 columns, two halves of 64. Where Ct / 64 is odd (320, 960 channels) every other tap ends between the halves of
a step. Boxes have no gaps, so for stride 2 x is seen as [B, H / 2, 2, W / 2, 2 C]: a tap reads one parity of rows and of columns.
"""

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad
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

from loragraft.kernels.hopper import on_hopper, reinterpret, thread_barrier, tma_load, tma_store
from loragraft.kernels.hopper_gemm import SHARED_BYTES, STEP_RANKS, _tile, _widen
from loragraft.kernels.layout import on_device
from loragraft.kernels.taps import Window
from loragraft.kernels.tiles import WIDEN_HIGH, WIDEN_LOW

OUTPUTS = 64  # of one warpgroup
HOPPER_CONFIGS: dict[str, tuple[int, int] | None] = {
    "hopper": None, "hopper128": (128, 2), "hopper64": (64, 2), "hopper64p": (64, 1),
}  # fmt: skip
"""(pixels of a warpgroup, OUT) by the name of a configuration; None: `choose_tile` decides."""


@gluon.jit
def _corner(t_m, HO, WO, TH: gl.constexpr, TW: gl.constexpr):
    """(image, first row, first column) of a tile of TH x TW output pixels."""
    across, down = gl.cdiv(WO, TW), gl.cdiv(HO, TH)
    return t_m // (across * down), t_m // across % down * TH, t_m % across * TW


@gluon.jit
def _produce(
    x_desc, w_desc, h_desc, up_desc, full, empty, xs, ws, M_TILES, N, HO, WO, XC, steps, CT64,
    KERNEL: gl.constexpr, STRIDE: gl.constexpr, PADDING: gl.constexpr, RANK_STEPS: gl.constexpr, TH: gl.constexpr,
    TW: gl.constexpr, OUT: gl.constexpr, WN: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    PIX: gl.constexpr = 3 - OUT
    BM: gl.constexpr = TH * TW
    PARITY_BOX: gl.constexpr = gl.NVMMASharedLayout(64, 8, rank=5)
    BOX: gl.constexpr = gl.NVMMASharedLayout(64, 8, rank=4)
    HALF: gl.constexpr = gl.NVMMASharedLayout(64, 16)
    stage, phase = 0, 1
    for tile in range(gl.program_id(0), M_TILES * gl.cdiv(N, OUT * WN), gl.num_programs(0)):
        t_m, t_n = _tile(tile, M_TILES, N, 1, OUT * WN, GROUP_M)
        image, row, column = _corner(t_m, HO, WO, PIX * TH, TW)
        for k in range(steps):
            mbarrier.wait(empty.index(stage), phase)
            barrier = full.index(stage)
            mbarrier.expect(barrier, PIX * BM * 128 + OUT * WN * 64)
            for half in gl.static_range(2):
                tap = (2 * k + half) // CT64
                channel = (2 * k + half - tap * CT64) * 64
                u, v = tap // KERNEL - PADDING, tap % KERNEL - PADDING
                for group in gl.static_range(PIX):
                    slot = xs.index((2 * stage + half) * PIX + group)
                    top = row + group * TH
                    if STRIDE == 1:
                        box = reinterpret(slot, gl.int8, [1, TH, TW, 64], BOX)
                        tma_load(x_desc, [image, top + u, column + v, channel], barrier, box)
                    else:
                        at = [image, top + (u >> 1), u & 1, column + (v >> 1), (v & 1) * XC + channel]
                        tma_load(x_desc, at, barrier, reinterpret(slot, gl.int8, [1, TH, 1, TW, 64], PARITY_BOX))
            for group in gl.static_range(OUT):
                tma_load(w_desc, [(OUT * t_n + group) * WN, k * 64], barrier, ws.index(OUT * stage + group))
            stage += 1
            if stage == STAGES:
                stage, phase = 0, phase ^ 1
        for step in gl.static_range(RANK_STEPS):
            mbarrier.wait(empty.index(stage), phase)
            barrier = full.index(stage)
            mbarrier.expect(barrier, PIX * BM * 64 + OUT * WN * 64)
            for group in gl.static_range(PIX):
                box = reinterpret(xs.index(2 * stage * PIX + group), gl.int8, [1, TH, TW, 64], BOX)
                tma_load(h_desc, [image, row + group * TH, column, step * 64], barrier, box)
            for group in gl.static_range(OUT):
                up = reinterpret(ws.index(OUT * stage + group), up_desc.dtype, [WN, 32], HALF)
                tma_load(up_desc, [(OUT * t_n + group) * WN, step * 32], barrier, up)
            stage += 1
            if stage == STAGES:
                stage, phase = 0, phase ^ 1


@gluon.jit
def _load_scales(
    p_a, tap, image, row, column, H, W,
    KERNEL: gl.constexpr, STRIDE: gl.constexpr, PADDING: gl.constexpr, TH: gl.constexpr, TW: gl.constexpr,
):  # fmt: skip
    """The scale of the pixel that each output of the tile reads at this tap; 0 outside of the image."""
    FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    o_m = gl.arange(0, TH * TW, layout=FLAT)
    b_row = (row + o_m // TW) * STRIDE + tap // KERNEL - PADDING
    b_column = (column + o_m % TW) * STRIDE + tap % KERNEL - PADDING
    inside = (b_row >= 0) & (b_row < H) & (b_column >= 0) & (b_column < W)
    return gl.load(p_a + (image * H + b_row) * W + b_column, mask=inside, other=0.0)


@gluon.jit
def _weights(ws, stage, GROUP: gl.constexpr, OUT: gl.constexpr):
    """A warpgroup's rows of W (or of U) in a stage."""
    return ws.index(OUT * stage + GROUP % OUT)


@gluon.jit
def _pixels(xs, stage, half: gl.constexpr, GROUP: gl.constexpr, OUT: gl.constexpr):
    """A warpgroup's pixels of x (or of h) in half a stage."""
    PIX: gl.constexpr = 3 - OUT
    return xs.index((2 * stage + half) * PIX + GROUP % PIX)


@gluon.jit
def _steps(
    count, acc, word, done, stage, phase, p_words, full, empty, xs, ws, o_word, N, steps,
    GROUP: gl.constexpr, OUT: gl.constexpr, WN: gl.constexpr, STAGES: gl.constexpr, A_INT: gl.constexpr,
):  # fmt: skip
    """`count` whole steps of one tap into acc. word: scales and offsets of the step to come, of which `done` lie behind."""
    for _ in range(count):
        mbarrier.wait(full.index(stage), phase)
        b_w = _weights(ws, stage, GROUP, OUT).load(A_INT)
        x_low, x_high = _pixels(xs, stage, 0, GROUP, OUT), _pixels(xs, stage, 1, GROUP, OUT)
        acc = warpgroup_mma(_widen(b_w, word, WIDEN_LOW), x_low.permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma(_widen(b_w, word, WIDEN_HIGH), x_high.permute((1, 0)), acc, is_async=True)
        done += 1
        word = gl.load(p_words + done * N, mask=o_word < (steps - done) * WN, other=0)  # nothing after the last step
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index(stage))
        stage += 1
        if stage == STAGES:
            stage, phase = 0, phase ^ 1
    return acc, word, done, stage, phase


@gluon.jit
def _promote(total, acc, b_a, scales, tap, FLOAT: gl.constexpr):
    """total += a_q times a tap's INT32 sum. A value per column: through shared memory, as a thread needs many of them.

    Two buffers in turn: whoever writes one has met, at the barrier of the tap between, all who read it.
    """
    buffer = scales.index(tap % 2)
    buffer.store(b_a)
    thread_barrier()
    return total + gl.convert_layout(acc.to(gl.float32), FLOAT) * buffer.load(gl.SliceLayout(0, FLOAT))[None, :]


@gluon.jit
def _consume(
    GROUP: gl.constexpr, p_a, p_words, p_s, p_bias, up_desc, y_desc, full, empty, xs, ws, ys, scales, M_TILES, N, H, W, HO, WO,
    steps, CT64, ODD: gl.constexpr, KERNEL: gl.constexpr, STRIDE: gl.constexpr, PADDING: gl.constexpr, RANK_STEPS: gl.constexpr,
    TH: gl.constexpr, TW: gl.constexpr, OUT: gl.constexpr, WN: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    PIX: gl.constexpr = 3 - OUT
    BM: gl.constexpr = TH * TW
    TAPS: gl.constexpr = KERNEL * KERNEL
    INT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 32])
    FLOAT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    A_INT: gl.constexpr = gl.DotOperandLayout(0, INT, 4)
    HALF: gl.constexpr = gl.NVMMASharedLayout(64, 16)
    IMAGE: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=4)
    o_word = gl.arange(0, WN, layout=gl.SliceLayout(1, A_INT))
    o_n = gl.arange(0, WN, layout=gl.SliceLayout(1, FLOAT))
    stage, phase = 0, 0
    for tile in range(gl.program_id(0), M_TILES * gl.cdiv(N, OUT * WN), gl.num_programs(0)):
        t_m, t_n = _tile(tile, M_TILES, N, 1, OUT * WN, GROUP_M)
        image, row, column = _corner(t_m, HO, WO, PIX * TH, TW)
        row += GROUP % PIX * TH
        first = (OUT * t_n + GROUP % OUT) * WN
        p_word = p_words + gl.minimum(first + o_word, N - 1)  # rows beyond N repeat a valid one and are not stored
        word, done = gl.load(p_word), 0
        acc = gl.zeros([WN, BM], gl.int32, layout=INT)
        total = gl.zeros([WN, BM], gl.float32, layout=FLOAT)
        if ODD:
            for pair in range(TAPS // 2):
                b_a = _load_scales(p_a, 2 * pair, image, row, column, H, W, KERNEL, STRIDE, PADDING, TH, TW)
                acc, word, done, stage, phase = _steps(
                    CT64 // 2, acc, word, done, stage, phase, p_word, full, empty, xs, ws, o_word, N, steps,
                    GROUP, OUT, WN, STAGES, A_INT)  # fmt: skip
                # The step that both taps share: its low half ends one, its high half begins the other.
                b_next = _load_scales(p_a, 2 * pair + 1, image, row, column, H, W, KERNEL, STRIDE, PADDING, TH, TW)
                mbarrier.wait(full.index(stage), phase)
                b_w = _weights(ws, stage, GROUP, OUT).load(A_INT)
                x_low, x_high = _pixels(xs, stage, 0, GROUP, OUT), _pixels(xs, stage, 1, GROUP, OUT)
                acc = warpgroup_mma(_widen(b_w, word, WIDEN_LOW), x_low.permute((1, 0)), acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=(acc,))
                total = _promote(total, acc, b_a, scales, 0, FLOAT)
                acc = gl.zeros([WN, BM], gl.int32, layout=INT)
                acc = warpgroup_mma(_widen(b_w, word, WIDEN_HIGH), x_high.permute((1, 0)), acc, is_async=True)
                done += 1
                word = gl.load(p_word + done * N, mask=o_word < (steps - done) * WN, other=0)
                acc = warpgroup_mma_wait(0, deps=(acc,))
                mbarrier.arrive(empty.index(stage))
                stage += 1
                if stage == STAGES:
                    stage, phase = 0, phase ^ 1
                acc, word, done, stage, phase = _steps(
                    CT64 // 2, acc, word, done, stage, phase, p_word, full, empty, xs, ws, o_word, N, steps,
                    GROUP, OUT, WN, STAGES, A_INT)  # fmt: skip
                total = _promote(total, acc, b_next, scales, 1, FLOAT)
                acc = gl.zeros([WN, BM], gl.int32, layout=INT)
            # The last of an odd number of taps; the high half of its last step is beyond the weight and is left out.
            b_a = _load_scales(p_a, TAPS - 1, image, row, column, H, W, KERNEL, STRIDE, PADDING, TH, TW)
            acc, word, done, stage, phase = _steps(
                CT64 // 2, acc, word, done, stage, phase, p_word, full, empty, xs, ws, o_word, N, steps,
                GROUP, OUT, WN, STAGES, A_INT)  # fmt: skip
            mbarrier.wait(full.index(stage), phase)
            b_w = _weights(ws, stage, GROUP, OUT).load(A_INT)
            x_low = _pixels(xs, stage, 0, GROUP, OUT).permute((1, 0))
            acc = warpgroup_mma(_widen(b_w, word, WIDEN_LOW), x_low, acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(empty.index(stage))
            stage += 1
            if stage == STAGES:
                stage, phase = 0, phase ^ 1
            total = _promote(total, acc, b_a, scales, 0, FLOAT)
        else:
            for tap in range(TAPS):
                b_a = _load_scales(p_a, tap, image, row, column, H, W, KERNEL, STRIDE, PADDING, TH, TW)
                acc, word, done, stage, phase = _steps(
                    CT64 // 2, acc, word, done, stage, phase, p_word, full, empty, xs, ws, o_word, N, steps,
                    GROUP, OUT, WN, STAGES, A_INT)  # fmt: skip
                total = _promote(total, acc, b_a, scales, tap, FLOAT)
                acc = gl.zeros([WN, BM], gl.int32, layout=INT)
        r_n = gl.minimum(first + o_n, N - 1)
        b_y = total * gl.load(p_s + r_n).to(gl.float32)[:, None]
        for _ in gl.static_range(RANK_STEPS):
            mbarrier.wait(full.index(stage), phase)
            up = reinterpret(_weights(ws, stage, GROUP, OUT), up_desc.dtype, [WN, 32], HALF)
            h = reinterpret(_pixels(xs, stage, 0, GROUP, OUT), up_desc.dtype, [BM, 32], HALF)
            b_y = warpgroup_mma(up, h.permute((1, 0)), b_y, is_async=True)
            b_y = warpgroup_mma_wait(0, deps=(b_y,))
            mbarrier.arrive(empty.index(stage))
            stage += 1
            if stage == STAGES:
                stage, phase = 0, phase ^ 1
        if p_bias is not None:
            b_y += gl.load(p_bias + r_n).to(gl.float32)[:, None]
        tma.store_wait(0)  # the tile before has left ys
        thread_barrier()
        ys.store(b_y.to(ys.dtype))
        fence_async_shared()
        thread_barrier()
        tma_store(y_desc, [image, row, column, first], reinterpret(ys, ys.dtype, [1, TH, TW, WN], IMAGE))
    tma.store_wait(0)


@gluon.jit
def hopper_conv_kernel(
    x_desc, w_desc, h_desc, up_desc, y_desc, p_a, p_words, p_s, p_bias, M_TILES, N, H, W, HO, WO, XC, steps, CT64,
    ODD: gl.constexpr, KERNEL: gl.constexpr, STRIDE: gl.constexpr, PADDING: gl.constexpr, RANK_STEPS: gl.constexpr,
    TH: gl.constexpr, TW: gl.constexpr, OUT: gl.constexpr, WN: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    PIX: gl.constexpr = 3 - OUT
    BM: gl.constexpr = TH * TW
    NARROW: gl.constexpr = gl.NVMMASharedLayout(64, 8)
    TRANSPOSED: gl.constexpr = gl.NVMMASharedLayout(128, 16, transposed=True)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    xs = gl.allocate_shared_memory(gl.int8, [2 * STAGES * PIX, BM, 64], NARROW)
    ws = gl.allocate_shared_memory(gl.int8, [STAGES * OUT, WN, 64], NARROW)
    ys = gl.allocate_shared_memory(y_desc.dtype, [2, WN, BM], TRANSPOSED)
    first, second = (
        gl.allocate_shared_memory(gl.float32, [2, BM], FLAT),
        gl.allocate_shared_memory(gl.float32, [2, BM], FLAT),
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (0, p_a, p_words, p_s, p_bias, up_desc, y_desc, full, empty, xs, ws, ys.index(0), first, M_TILES, N, H, W,
                        HO, WO, steps, CT64, ODD, KERNEL, STRIDE, PADDING, RANK_STEPS, TH, TW, OUT, WN, GROUP_M, STAGES)),
            (_consume, (1, p_a, p_words, p_s, p_bias, up_desc, y_desc, full, empty, xs, ws, ys.index(1), second, M_TILES, N, H, W,
                        HO, WO, steps, CT64, ODD, KERNEL, STRIDE, PADDING, RANK_STEPS, TH, TW, OUT, WN, GROUP_M, STAGES)),
            (_produce, (x_desc, w_desc, h_desc, up_desc, full, empty, xs, ws, M_TILES, N, HO, WO, XC, steps, CT64, KERNEL, STRIDE, PADDING,
                        RANK_STEPS, TH, TW, OUT, WN, GROUP_M, STAGES)),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip


def hopper_conv_runs(x_MC: Tensor, y_dtype: torch.dtype, up_NR: Tensor, window: Window) -> bool:
    """Whether this kernel takes the convolution: sm_90, a 16-bit result, an odd kernel, rows of y that TMA can move, stride 1
    or with images of even sides 2."""
    even = window.height % 2 == 0 and window.width % 2 == 0
    fits = up_NR.shape[0] % 8 == 0 and window.kernel % 2 == 1 and (window.stride == 1 or (window.stride == 2 and even))
    return on_hopper(x_MC, y_dtype) and fits


def hopper_conv(
    x_MC: Tensor, a_M1: Tensor, qweight: Tensor, words: Tensor, s_N: Tensor, h_PR: Tensor, up_NR: Tensor, bias: Tensor | None,
    window: Window, columns: int, tile: tuple[int, int] | None = None,
) -> Tensor:  # fmt: skip
    """y [P, N] in h's dtype; x int8 [M, >= Ct], qweight uint8 [N, Kp/2] with its words and `columns` = Ct of each tap.

    tile: (pixels of a warpgroup, 64 or 128; OUT, 1 or 2); None takes `choose_tile`'s.
    """
    (N, R), HO, WO = up_NR.shape, window.out_height, window.out_width
    programs = torch.cuda.get_device_properties(x_MC.device).multi_processor_count
    pixels, out = tile or choose_tile(window, N, programs)
    TH, TW = tile_shape(HO, WO, pixels, 3 - out)
    y_PN = h_PR.new_empty((window.out_pixels, N))
    box, image = gl.NVMMASharedLayout(64, 8, rank=4), (window.batch, HO, WO)
    XC = x_MC.shape[1]
    if window.stride == 1:
        x = x_MC.view(window.batch, window.height, window.width, XC)
        x_desc = TensorDescriptor.from_tensor(x, [1, TH, TW, 64], box)
    else:
        x = x_MC.view(window.batch, window.height // 2, 2, window.width // 2, 2 * XC)
        x_desc = TensorDescriptor.from_tensor(x, [1, TH, 1, TW, 64], gl.NVMMASharedLayout(64, 8, rank=5))
    w_desc = TensorDescriptor.from_tensor(qweight.view(torch.int8), [OUTPUTS, 64], gl.NVMMASharedLayout(64, 8))
    h_desc, up_desc = x_desc, x_desc
    if R:
        h_desc = TensorDescriptor.from_tensor(h_PR.view(torch.int8).unflatten(0, image), [1, TH, TW, 64], box)
        rows = pad(up_NR, (0, -R % 8))[:, :R]  # a row starts at a multiple of 16 bytes
        up_desc = TensorDescriptor.from_tensor(rows, [OUTPUTS, 32], gl.NVMMASharedLayout(64, 16))
    y_desc = TensorDescriptor.from_tensor(
        y_PN.view(*image, N), [1, TH, TW, OUTPUTS], gl.NVMMASharedLayout(128, 16, rank=4)
    )
    tiles_m = window.batch * triton.cdiv(HO, (3 - out) * TH) * triton.cdiv(WO, TW)
    with on_device(x_MC):
        hopper_conv_kernel[(min(tiles_m * triton.cdiv(N, out * OUTPUTS), programs),)](
            x_desc, w_desc, h_desc, up_desc, y_desc, a_M1, words, s_N, bias, tiles_m, N, window.height, window.width, HO, WO, XC,
            qweight.shape[1] // 64, columns // 64, ODD=columns // 64 % 2 == 1, KERNEL=window.kernel, STRIDE=window.stride, PADDING=window.padding,
            RANK_STEPS=triton.cdiv(R, STEP_RANKS), TH=TH, TW=TW, OUT=out, WN=OUTPUTS, GROUP_M=8, STAGES=stages(pixels, out),
            num_warps=4,
        )  # fmt: skip
    return y_PN


def stages(pixels: int, out: int) -> int:
    """Steps of 128 columns in flight: what is left of shared memory beside the outputs and the scales of two taps."""
    outputs_and_scales = 4 * OUTPUTS * pixels + 16 * pixels
    return (SHARED_BYTES - outputs_and_scales) // ((3 - out) * pixels * 128 + out * OUTPUTS * 64)


def tile_shape(height: int, width: int, pixels: int, pix: int) -> tuple[int, int]:
    """(TH, TW) with TH TW = pixels so that the fewest tiles, `pix` boxes below each other, cover height x width; of equals
    the widest."""
    shapes = [(pixels // wide, wide) for wide in (128, 64, 32, 16, 8) if wide <= pixels]
    return min(shapes, key=lambda shape: triton.cdiv(height, pix * shape[0]) * triton.cdiv(width, shape[1]))


def choose_tile(window: Window, outputs: int, programs: int) -> tuple[int, int]:
    """(pixels of a warpgroup, OUT): fewest rounds of tiles over the card times the work of one; 64 pixels a warpgroup are
    taken to cost a tenth more each than 128."""

    def cost(tile: tuple[int, int]) -> float:
        pixels, out = tile
        high, wide = tile_shape(window.out_height, window.out_width, pixels, 3 - out)
        tiles = window.batch * triton.cdiv(window.out_height, (3 - out) * high) * triton.cdiv(window.out_width, wide)
        rounds = triton.cdiv(tiles * triton.cdiv(outputs, out * OUTPUTS), programs)
        return rounds * pixels * (1.1 if pixels == 64 else 1.0)

    return min(((128, 2), (64, 2), (64, 1)), key=cost)
