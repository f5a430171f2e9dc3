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

from loragraft.kernels import act_quant, matmul, w4a4_linear, w4a8_linear, w4a16_linear, w4a16_skinny

ARCHITECTURES = (75, 80, 86, 89, 90, 120)
PORTABLE_SHARED = 99 * 1024  # bytes a block may have on sm_86, sm_89 and sm_120
INT8_DOT = 80  # below it Triton has no INT8 dot


@dataclass(frozen=True)
class Build:
    """One kernel as it is launched.

    types: of pointers that are not `*bf16`, and of numbers that are not `i32` divisible by 16 ("i32" alone: not divisible;
    "None": the pointer is absent). constants: the constexprs. least: the lowest compute capability that has its
    instructions. portable: must fit into 99 KB of shared memory. quick: compiled in every run of the tests.
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
    source = ASTSource(fn, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).metadata


def _quantizers() -> list[Build]:
    types = {"p_codes": "*i8", "p_scale": "*fp32"}
    return [
        Build(kernel, {"HAS_SMOOTH": True, "HADAMARD": hadamard, "BM": 16}, types, quick=hadamard)
        for kernel in (act_quant.quantize_token_kernel, act_quant.quantize_group_kernel)
        for hadamard in (False, True)
    ]


def _matmuls() -> list[Build]:
    plain = {"p_scale": "None", "s_ak": "i32", "s_bk": "i32"}
    codes = {"p_b": "*i8", "p_scale": "*fp32", "p_out": "*fp32", "s_am": "i32", "s_bn": "i32"}
    kernel = matmul.matmul_kernel
    return [
        Build(kernel, {"HAS_SCALE": False, "BM": 16, "BN": 64, "BK": 64}, plain),
        Build(kernel, {"HAS_SCALE": False, "BM": 64, "BN": 16, "BK": 64}, plain, least=75),
        Build(kernel, {"HAS_SCALE": True, "BM": 16, "BN": 64, "BK": 64}, codes, quick=True),
    ]


def _w4a8() -> list[Build]:
    scales = {"p_q": "*u8", "p_row_scale": "*fp32", "p_group_scale": "*u8", "p_group_zero": "*u8"}
    tiles = {"BN": 64, "BK": 64, "BR": 16}
    forward = {"p_x": "*i8", "p_a": "*fp32", **scales}
    flags = {"HADAMARD": True, "HAS_SMOOTH": True}
    dx = {"p_t": "None", **scales}
    return [
        Build(w4a8_linear.w4a8_fwd_kernel, {"HAS_BIAS": True, "BM": 64, **tiles}, forward, quick=True),
        Build(w4a8_linear.w4a8_fwd_kernel, {"HAS_BIAS": True, "BM": 16, **tiles}, forward),
        Build(w4a8_linear.w4a8_dx_kernel, {"INT8": False, "BM": 64, **flags, **tiles}, dx),
        Build(
            w4a8_linear.w4a8_dx_kernel, {"INT8": True, "BM": 64, **flags, **tiles}, {**dx, "p_dy": "*i8", "p_t": "*fp32"}, quick=True
        ),
    ]  # fmt: skip


def _w4a4() -> list[Build]:
    forward = {"p_x": "*i8", "p_a": "*fp32", "p_q": "*u8"}
    tiles = {"BM": 64, "BN": 64, "BR": 16}
    return [
        Build(w4a4_linear.w4a4_fwd_kernel, {"HAS_BIAS": True, **tiles}, forward, quick=True),
        Build(w4a4_linear.w4a4_dx_kernel, {"HADAMARD": False, "HAS_SMOOTH": True, **tiles}, {"p_q": "*u8"}),
    ]


def _w4a16() -> list[Build]:
    """Float16 on sm_75, which has no bfloat16."""
    builds: list[Build] = []
    for half, least, most in (("*bf16", 80, 999), ("*fp16", 75, 79)):
        halves = dict.fromkeys(("p_x", "p_h", "p_up", "p_bias", "p_y"), half)
        bf16 = half == "*bf16"
        span: dict[str, Any] = {"least": least, "most": most}
        large = {"BM": 64, "BN": 64, "BR": 16}
        builds += [
            Build(w4a16_linear.w4a16_fwd_kernel, {"HAS_BIAS": True, **large}, {**halves, "p_q": "*u8"}, **span),
            Build(
                w4a16_linear.w4a16_dx_kernel,
                large,
                {"p_q": "*u8", "p_dy": half, "p_g": half, "p_down": half, "p_dx": half},
                **span,
            ),
            Build(
                w4a16_skinny.down_kernel, {"BK": 2048}, {"p_x": half, "p_down": half, "p_h": half, "R": "i32"}, **span
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


TABLE: tuple[Build, ...] = (*_quantizers(), *_matmuls(), *_w4a8(), *_w4a4(), *_w4a16())
