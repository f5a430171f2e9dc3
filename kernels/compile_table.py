"""Every Triton kernel with the arguments it is launched with, so that it can be compiled without a GPU.

`TABLE` holds one `Build` per kernel and config. A kernel joins by a line; nothing else knows about it. `compile_build`
turns one into machine code for a compute capability and returns Triton's metadata (`shared`: bytes of shared memory).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

from loragraft.kernels import (
    act_quant,
    adamw8bit,
    block_codes,
    gemm,
    hopper_gemm,
    hopper_quant,
    join_factors,
    row_product,
    taps,
    token_quant,
    unpack,
    w4a16_linear,
    w4a16_skinny,
)

ARCHITECTURES = (75, 80, 86, 89, 90, 120)
PORTABLE_SHARED = 99 * 1024  # bytes a block may have on sm_86, sm_89 and sm_120
INT8_DOT = 80  # below it Triton has no INT8 dot


@dataclass(frozen=True)
class Build:
    """One kernel as it is launched.

    types: of pointers that are not `*bf16`, and of numbers that are not `i32` divisible by 16 ("i32" alone: not divisible;
    "None": the pointer is absent). constants: the constexprs. least: the lowest compute capability that has its
    instructions. portable: must fit into 99 KB of shared memory. quick: compiled in every run of the tests, one of each kernel at
    least.
    """

    kernel: Any
    constants: Mapping[str, Any]
    types: Mapping[str, str] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    least: int = INT8_DOT
    most: int = 999
    portable: bool = True
    quick: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        constants = "-".join(f"{name}{value}" for name, value in self.constants.items())
        return f"{self.kernel.__name__}-{constants}-{self.num_warps}w{self.num_stages}s"


def compile_build(build: Build, capability: int) -> Any:
    """Triton's metadata of the machine code. Raises ValueError if the kernel's arguments and the build's disagree."""
    fn = build.kernel
    given = {*build.types, *build.constants}
    if unknown := given - set(fn.arg_names):
        raise ValueError(f"{build}: {fn.__name__} has no argument {sorted(unknown)}; it has {fn.arg_names}")
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(fn.params):
        name = parameter.name
        kind = build.types.get(name, "*bf16" if name.startswith("p_") else "i32:16")
        if parameter.is_constexpr or kind == "None":
            if parameter.is_constexpr and name not in build.constants:
                raise ValueError(f"{build}: constexpr {name} has no value; add it to `constants`")
            signature[name], constants[(i,)] = "constexpr", build.constants.get(name)
            continue
        signature[name] = kind.removesuffix(":16")
        if kind.startswith("*") or kind.endswith(":16"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages, **build.options}
    make = GluonASTSource if isinstance(fn, GluonJITFunction) else ASTSource
    source = make(fn, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).metadata


def _quantizers() -> list[Build]:
    scales = {"p_scale": "*fp32"}
    parts = {"p_ticket": "*i32", "p_arrived": "*i32", "p_max": "*fp32", "p_part": "*fp32", "p_codes": "*i8", **scales}
    tiles = {"PRECISION": "tf32", "BM": 64, "BK": 64, "BR": 64, "BH": 16, "CODE_STAGES": 3}
    builds = []
    for hadamard in (False, True):
        flags = {"HAS_SMOOTH": True, "HADAMARD": hadamard}
        group = {**flags, "UNSIGNED": not hadamard, "BM": 16}
        token = {"SPLITS": 4, **flags, **tiles, "BC": 64 if hadamard else 128}
        builds += [
            Build(act_quant.quantize_group_kernel, group, {"p_out": "*i8", **scales}, quick=hadamard),
            Build(act_quant.quantize_group_kernel, group, {"p_scale": "None"}),
            Build(token_quant.token_quant_kernel, token, parts, num_stages=4, quick=not hadamard),
        ]
    return builds


def _products() -> list[Build]:
    codes = {"p_x": "*i8", "p_a": "*fp32", "p_s": "*fp32"}
    packed = {**codes, "p_q": "*i8", "p_words": "*i32", "s_ur": "i32"}
    plain = {**codes, "p_w": "*i8", "s_un": "i32"}
    ranks = {"RANKS": 3, "BR": 16, "GROUP_M": 8}
    rotated = {"HADAMARD": True, "PRECISION": "tf32", "BM": 128, "BN": 64, "BK": 64, **ranks}
    gradients = {
        "CODES": True,
        "ASM": True,
        "HAS_SCALE": True,
        "HAS_DY": True,
        "BM": 128,
        "BR": 16,
        "BK": 128,
        "BN": 64,
    }
    raw = {**gradients, "CODES": False, "ASM": False, "HAS_SCALE": False, "BK": 64}
    parts = {"p_part": "*fp32", "p_scale": "*fp32", "x_blocks": "i32"}
    sums = {"HAS_SMOOTH": True, "HADAMARD": True, "HAS_DY": True, "AHEAD": 8, "BR": 16}
    summed = {"p_part": "*fp32", "p_down": "*fp32", "p_up": "*fp32", "splits": "i32", "x_blocks": "i32"}
    return [
        Build(gemm.w4a8_gemm_kernel, {"ASM": True, "BM": 128, "BN": 128, **ranks}, packed, quick=True),
        Build(gemm.w4a8_gemm_kernel, {"ASM": True, "BM": 16, "BN": 64, **ranks}, packed),
        Build(gemm.int8_gemm_kernel, {**rotated, "HADAMARD": False, "BN": 128}, plain, num_stages=4, quick=True),
        Build(gemm.int8_gemm_kernel, rotated, plain, num_stages=4),
        Build(row_product.row_product_kernel, gradients, {**parts, "p_x": "*i32"}, quick=True),
        Build(row_product.row_product_kernel, raw, {**parts, "p_scale": "None"}),
        Build(row_product.sum_parts_kernel, sums, summed, quick=True),
        Build(
            row_product.sum_parts_kernel,
            {**sums, "HAS_SMOOTH": False, "HADAMARD": False},
            {**summed, "p_smooth": "None"},
        ),
    ]


def _transients() -> list[Build]:
    kernel = unpack.effective_weight_kernel
    flags = {"HADAMARD": True, "HAS_SMOOTH": True, "RANK_BLOCKS": 1, "ASM": True, "BN": 64, "BR": 64, "STAGES": 3}
    native = {"p_q": "*u8", "p_words": "*i32", "p_scale": "*fp32", "p_hadamard": "*fp16", "s_ur": "i32"}
    exact = {"p_up": "*fp32", "p_down": "*fp32", "p_out": "*fp32"}
    integer = {**native, "p_scale": "*bf16", "p_words": "None"}
    return [
        Build(unpack.transposed_int8_kernel, {"BN": 64}, {"p_q": "*u8", "p_words": "*i32", "p_out": "*i8"}, quick=True),
        Build(kernel, {"W4A8": True, **flags}, native, quick=True),
        Build(kernel, {"W4A8": True, **flags, "RANK_BLOCKS": 2}, native),
        Build(kernel, {"W4A8": True, **flags, "RANK_BLOCKS": 2, "BR": 16}, {**native, **exact}),
        Build(kernel, {"W4A8": False, **flags}, integer),
        Build(kernel, {"W4A8": False, **flags, "HADAMARD": False, "RANK_BLOCKS": 0}, {**integer, "p_hadamard": "None"}),
    ]


def _optimizer() -> list[Build]:
    tables = {
        "p_factors": "*i64",
        "p_work": "*i32",
        "p_codes": "*u8",
        "p_scales": "*fp32",
        "values": "i32",
        "blocks": "i32",
    }
    numbers = dict.fromkeys(("keep", "rate", "beta1", "rest1", "beta2", "rest2", "root", "eps"), "fp32")
    (e_m, m_m), (e_r, m_r) = adamw8bit.SIGNED, adamw8bit.UNSIGNED
    sizes = {"BLOCKS": adamw8bit.BLOCKS, "BLOCK": adamw8bit.BLOCK, "E_M": e_m, "M_M": m_m, "E_R": e_r, "M_R": m_r}
    options = {"enable_fp_fusion": False}
    join = {"p_table": "*i64", "p_scales": "*fp32", "p_work": "*i32"}
    return [
        Build(join_factors.join_factors_kernel, {"BLOCK": join_factors.BLOCK}, join, quick=True),
        Build(
            join_factors.join_factors_kernel,
            {"BLOCK": join_factors.BLOCK},
            {**join, "p_like": "*fp16"},
            least=75,
            most=79,
            quick=True,
        ),
        *(
            Build(
                adamw8bit.adamw8bit_kernel,
                sizes,
                {**tables, **numbers},
                least=least,
                most=most,
                options=options,
                quick=True,
            )
            for least, most in ((80, 999), (75, 79))
        ),
    ]


def _convolutions() -> list[Build]:
    sizes = dict.fromkeys(("H", "W", "HO", "WO", "R"), "i32")
    window = {"KERNEL": 3, "STRIDE": 1, "PADDING": 1}
    builds = [
        Build(taps.sum_taps_kernel, {**window, "BP": 32, "BR": 64}, {**sizes, "s_em": "i32"}, quick=True),
        Build(taps.spread_taps_kernel, {**window, "BM": 64, "BR": 16}, {**sizes, "s_gp": "i32"}, quick=True),
    ]
    counts = ("H", "W", "HO", "WO", "DOWN", "ACROSS", "PATCH_ROWS", "STEPS", "STRIDE", "PADDING")
    types = {**dict.fromkeys(counts, "i32"), "p_max": "*fp32", "p_codes": "*i8", "p_scale": "*fp32"}
    for hadamard in (False, True):
        flags = {"HAS_SMOOTH": True, "HADAMARD": hadamard, "PRECISION": "tf32x3"}
        tile = {"BH": 8, "BW": 64, "PY": 16, "PX": 128, "BX": 16, "BC": 64 if hadamard else 128}
        pixels = {"BM": 16, "BC": 64} if hadamard else {"BM": 4, "BC": 512}
        builds += [
            Build(block_codes.pixel_absmax_kernel, {**flags, **pixels}, {"p_max": "*fp32"}, quick=not hadamard),
            Build(block_codes.block_codes_kernel, {**flags, **tile}, types, quick=not hadamard),
        ]
    return builds


def _descriptor(dtype: str, shape: list[int], swizzle: int) -> str:
    """Type of a host descriptor in a signature."""
    layout = gl.NVMMASharedLayout(swizzle, 8 if dtype == "i8" else 16, rank=len(shape))
    return f"tensordesc<{dtype}{shape},{layout!r}>"


def _hopper() -> list[Build]:
    """Gluon, sm_90 alone: they may have all of its 227 KB."""
    only: dict[str, Any] = {"least": 90, "most": 90, "portable": False, "num_stages": 1}
    codes, y = _descriptor("i8", [256, 64], 64), _descriptor("bf16", [256, 64], 128)
    weight, up = _descriptor("i8", [64, 64], 64), _descriptor("bf16", [64, 32], 64)
    product = {
        "x_desc": codes,
        "w_desc": weight,
        "h_desc": codes,
        "up_desc": up,
        "y_desc": y,
        "p_a": "*fp32",
        "p_s": "*fp32",
        **dict.fromkeys(hopper_gemm.COUNTS, "i32"),
    }
    tiles = {"RANKS": 48, "BM": 256, "WN": 64, "BX": 0}
    packed = {"PACKED": True, "UP_BY_RANK": False, "STAGES": 4, **tiles}
    plain = {"PACKED": False, "UP_BY_RANK": True, "STAGES": 3, **tiles}
    transposed = {"up_desc": _descriptor("bf16", [32, 64], 128), "p_words": "None", "p_bias": "None"}
    windows = {**product, "p_words": "*i32", "x_desc": _descriptor("i8", [64, 64], 64)}
    tile = _descriptor("bf16", [64, 64], 128)
    quant = {
        "x_desc": tile,
        "d_desc": tile,
        "p_counters": "*i32",
        "p_rows": "*i32",
        "p_part": "*fp32",
        "p_codes": "*i8",
        "p_scale": "*fp32",
    }
    shape = {"SPLITS": 8, "TILES": 6, "RING": 6, "D_RING": 4, "DOWN": True, "DOWN_BY_RANK": True, "BH": 8}
    return [
        Build(hopper_gemm.hopper_gemm_kernel, packed, {**product, "p_words": "*i32"}, quick=True, **only),
        Build(hopper_gemm.hopper_gemm_kernel, plain, {**product, **transposed}, **only),
        Build(hopper_gemm.hopper_gemm_kernel, {**packed, "BX": 64}, windows, quick=True, **only),
        Build(hopper_gemm.hopper_gemm_kernel, {**packed, "RANKS": 0}, {**product, "p_words": "*i32", "up_desc": codes}, quick=True, **only),
        Build(hopper_gemm.hopper_gemm_kernel, {**packed, "RANKS": 16}, {**product, "p_words": "*i32"}, **only),
        Build(hopper_gemm.hopper_gemm_kernel, {**plain, "RANKS": 80}, {**product, **transposed}, **only),
        Build(hopper_quant.hopper_quant_kernel, {**shape, "HAS_SMOOTH": True, "HADAMARD": False}, quant, quick=True, **only),
        Build(hopper_quant.hopper_quant_kernel, {**shape, "DOWN": False, "HAS_SMOOTH": True, "HADAMARD": False}, quant, **only),
        Build(hopper_quant.hopper_quant_kernel, {**shape, "HAS_SMOOTH": True, "HADAMARD": True}, quant, **only),
        Build(hopper_quant.hopper_quant_kernel, {**shape, "HAS_SMOOTH": False, "HADAMARD": True}, quant, **only),
    ]  # fmt: skip


def _w4a16() -> list[Build]:
    """Float16 on sm_75, which has no bfloat16."""
    builds: list[Build] = []
    for half, least, most in (("*bf16", 80, 999), ("*fp16", 75, 79)):
        halves = dict.fromkeys(("p_x", "p_h", "p_up", "p_bias", "p_y"), half)
        bf16 = half == "*bf16"
        span: dict[str, Any] = {"least": least, "most": most}
        large = {"BM": 64, "BN": 64, "BR": 16}
        builds += [
            Build(
                w4a16_linear.w4a16_fwd_kernel, {"HAS_BIAS": True, **large}, {**halves, "p_q": "*u8"}, quick=True, **span
            ),
            Build(
                w4a16_linear.w4a16_dx_kernel,
                large,
                {"p_q": "*u8", "p_dy": half, "p_g": half, "p_down": half, "p_dx": half},
                quick=True,
                **span,
            ),
            Build(
                w4a16_skinny.down_kernel,
                {"BK": 2048},
                {"p_x": half, "p_down": half, "p_h": half, "R": "i32"},
                quick=True,
                **span,
            ),
        ]
        for configs, kernel, words, default in (
            (w4a16_skinny.GEMV_CONFIGS, w4a16_skinny.gemv_kernel, "*i32", w4a16_skinny.GEMV_DEFAULT),
            (w4a16_skinny.SKINNY_CONFIGS, w4a16_skinny.skinny_kernel, "*u8", w4a16_skinny.SKINNY_DEFAULT),
        ):
            for name, config in configs.items():
                constants = {"BF16": bf16, "HAS_BIAS": True, "BR": 16} | {
                    k: config[k] for k in ("BN", "BW") if k in config
                }
                options = {k: config[k] for k in ("maxnreg",) if k in config}
                launch: dict[str, Any] = {k: config[k] for k in ("num_warps", "num_stages") if k in config}
                types = {**halves, "p_x": "*i32", "p_q": words}
                builds.append(Build(kernel, constants, types, options=options, quick=name == default, **launch, **span))
    return builds


TABLE: tuple[Build, ...] = (
    *_quantizers(), *_products(), *_transients(), *_convolutions(), *_optimizer(), *_w4a16(), *_hopper(),
)  # fmt: skip
