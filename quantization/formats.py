"""The precisions beside SVDQuant's own: what a weight is stored as, what its input is rounded to, and who multiplies.

Each is one `Format`; `QuantizedLinear` runs any of them. `bits` counts codes and scales of a 4096 x 4096 weight.

| name | weights | inputs | branch | bits |
|---|---|---|---|---|
| fp8 | E4M3, a scale per row | E4M3, a scale per token | - | 8.01 |
| int8 | INT8, a scale per row | INT8, a scale per token | - | 8.01 |
| nf4, nf4-double | NF4, absmax per 64, itself in 8 bits | 16-bit | - | 4.5, 4.13 |
| nvfp4 | E2M1, E4M3 scale per 16, one float32 | the same, per token | - | 4.5 |
| mxfp4 | E2M1, E8M0 scale per 32 | the same | - | 4.25 |
| int3, int2 | affine groups of 64 | 16-bit | rank 16 | 3.5, 2.5 |

W4A8, W4A4 and W4A16 are `SVDQuantLinear`'s (profiles native, interchange, weight-only).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from loragraft.quantization import fp4, low_integers, nf4, rowwise

FormatName = Literal["fp8", "int8", "nf4", "nf4-double", "nvfp4", "mxfp4", "int3", "int2"]
Engine = Literal["scaled_mm", "int_mm", "bitsandbytes", "reference"]
"""torch._scaled_mm, torch._int_mm, bitsandbytes' dequantization, or a product of what the codes stand for."""
Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]
Tensors = dict[str, Tensor]
LOW_BIT_RANK = 16


@dataclass(frozen=True, kw_only=True)
class Format:
    """One way to store a weight [N, K]. Functions on `Tensors` get the stored tensors and the `tables`."""

    name: FormatName
    source: str
    """Paper or specification."""
    block: int
    """Weights along K that share a scale; 0: a whole row."""
    layout: Callable[[int, int], Layout]
    """(N, K) -> name -> (shape, dtype) of what is stored."""
    encode: Callable[[Tensor], Tensors]
    """Weight [N, K] of any float dtype -> the stored tensors, rounded to nearest."""
    decode: Callable[[Tensors, int, int], Tensor]
    """(tensors, N, K) -> [N, K] in float32: what the codes stand for."""
    tables: dict[str, Tensor] = field(default_factory=dict)
    """Codebooks; never stored."""
    round_input: Callable[[Tensor], Tensor] | None = None
    """x [M, K] -> what the product sees of it, in x's dtype; None: x itself."""
    engine: Engine = "reference"
    """What a GPU multiplies with, where `engine_on` finds it."""
    product: Callable[[Tensor, Tensors], Tensor] | None = None
    """The engine's x W^T [M, N], input and weight both as codes."""
    rank: int = 0
    """Rank of the 16-bit branch that goes with it by default."""
    few_rows: bool = True
    """Whether layers with one row per image (adaLN) take it too; otherwise they are W4A16."""

    @property
    def bits(self) -> float:
        """Per weight, scales included, branch not, for N = K = 4096."""
        size = 4096
        stored = (torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.layout(size, size).values())
        return 8 * sum(stored) / size**2

    def engine_on(self, device: torch.device, N: int, K: int) -> Engine:
        """Who multiplies a [N, K] layer on `device`."""
        if device.type != "cuda":
            return "reference"
        found = {
            "scaled_mm": torch.cuda.get_device_capability(device) >= (8, 9) and N % 16 == K % 16 == 0,
            "int_mm": N % rowwise.INT_MM_COLUMNS == K % rowwise.INT_MM_COLUMNS == 0,
            "bitsandbytes": nf4.has_bitsandbytes(),
        }
        return self.engine if found.get(self.engine, False) else "reference"


def _rows(dtype: torch.dtype, N: int, K: int) -> Layout:
    return {"qweight": ((N, K), dtype), "row_scale": ((N,), torch.float32)}


def _row_format(
    name: FormatName,
    codes: torch.dtype,
    stored: torch.dtype,
    engine: Engine,
    product: Callable[[Tensor, Tensors], Tensor],
    source: str,
) -> Format:
    return Format(
        name=name,
        source=source,
        block=0,
        layout=partial(_rows, stored),
        encode=partial(rowwise.encode_rows, dtype=codes),
        decode=lambda tensors, N, K: rowwise.decode_rows(tensors),
        round_input=partial(rowwise.round_rows, dtype=codes),
        engine=engine,
        product=product,
    )


def _blocks(block: int, whole: Layout, N: int, K: int) -> Layout:
    count = -(-K // block)
    return {"qweight": ((N, count * block // 2), torch.uint8), "block_scale": ((N, count), torch.uint8), **whole}


def _nf4(name: FormatName, double: bool) -> Format:
    return Format(
        name=name,
        source="QLoRA, arXiv:2305.14314; bitsandbytes",
        block=nf4.BLOCK,
        layout=partial(nf4.layout, double=double),
        encode=partial(nf4.encode, double=double),
        decode=nf4.decode,
        tables=nf4.tables(double),
        engine="bitsandbytes",
    )


def _integer(name: FormatName, bits: int) -> Format:
    return Format(
        name=name,
        source="asymmetric groups as AWQ's, arXiv:2306.00978; the branch of SVDQuant, arXiv:2411.05007",
        block=low_integers.GROUP,
        layout=partial(low_integers.layout, bits=bits),
        encode=partial(low_integers.encode, bits=bits),
        decode=lambda tensors, N, K: low_integers.decode(tensors, K, bits),
        rank=LOW_BIT_RANK,
        few_rows=False,
    )


_ALL = (
    _row_format(
        "fp8", torch.float8_e4m3fn, torch.uint8, "scaled_mm", rowwise.scaled_product,
        "arXiv:2209.05433; torch._scaled_mm, rowwise",
    ),
    _row_format(
        "int8", torch.int8, torch.int8, "int_mm", rowwise.integer_product,
        "LLM.int8(), arXiv:2208.07339, without outlier columns; torch._int_mm",
    ),
    _nf4("nf4", double=False),
    _nf4("nf4-double", double=True),
    Format(
        name="nvfp4",
        source="NVIDIA NVFP4; PTX ISA, mma .kind::mxf4nvf4 with .scale_vec::4X",
        block=fp4.NV_BLOCK,
        layout=partial(_blocks, fp4.NV_BLOCK, {"tensor_scale": ((1,), torch.float32)}),
        encode=fp4.encode_nv,
        decode=lambda tensors, N, K: fp4.decode(tensors, K),
        tables=fp4.tables(),
        round_input=fp4.round_nv,
        few_rows=False,
    ),
    Format(
        name="mxfp4",
        source="OCP Microscaling Formats (MX) 1.0, MXFP4",
        block=fp4.MX_BLOCK,
        layout=partial(_blocks, fp4.MX_BLOCK, {}),
        encode=fp4.encode_mx,
        decode=lambda tensors, N, K: fp4.decode(tensors, K),
        tables=fp4.tables(),
        round_input=fp4.round_mx,
        few_rows=False,
    ),
    _integer("int3", 3),
    _integer("int2", 2),
)  # fmt: skip
FORMATS: dict[str, Format] = {found.name: found for found in _ALL}
