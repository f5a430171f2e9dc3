"""The ledger: which path every linear layer and convolution of a model takes. Nothing is left out, 16-bit ones are listed as such."""

from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from loragraft.kernels.layout import uses_triton
from loragraft.quantization.branched import BranchedLinear
from loragraft.quantization.conv import SVDQuantConv2d
from loragraft.quantization.linear import SVDQuantLinear
from loragraft.quantization.quantized_linear import QuantizedLinear

DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}


@dataclass(frozen=True)
class LedgerRow:
    """One linear layer or convolution."""

    path: str
    numerics: str
    """w4a8, w4a4, w4a16, a format (`formats.FORMATS`), or the dtype of a layer that is not quantized."""
    out_features: int
    in_features: int
    """Of a convolution: columns of its weight as a matrix, k k C and what pads it."""
    rank: int
    group_size: int
    hadamard: bool
    backend: str
    """triton: our kernels; reference: their plain-torch twins; scaled_mm, int_mm, bitsandbytes: a format's own engine;
    torch: an ordinary linear layer."""
    nbytes: int
    error: float | None
    """Output error measured when the layer was quantized; None if it was not, or if the checkpoint does not say."""
    kind: str = "linear"
    """linear, conv 3x3, conv 3x3 /2 (stride), depthwise 3x3."""


@dataclass(frozen=True)
class Ledger:
    """All linear layers and convolutions of one model, in module order, and its attention."""

    rows: tuple[LedgerRow, ...]
    attention: str = "sdpa"
    """What computes attention (`backbones/attention.py`)."""

    def moved(self, model: nn.Module) -> "Ledger":
        """The same layers with the backends that they take where `model` lies now."""
        backends = {row.path: row.backend for row in build_ledger(model).rows}
        return replace(self, rows=tuple(replace(row, backend=backends.get(row.path, row.backend)) for row in self.rows))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: counts and bytes per numerics, the attention, then every row."""
        counts = Counter(row.numerics for row in self.rows)
        sizes = {name: sum(row.nbytes for row in self.rows if row.numerics == name) for name in counts}
        rows = [asdict(row) for row in self.rows]
        return {"layers": dict(counts), "nbytes": sizes, "attention": self.attention, "rows": rows}

    def summary(self) -> str:
        """One line: `w4a8 66, w4a16 12, bf16 9; triton`; then the attention unless it is torch's."""
        counts = Counter(row.numerics for row in self.rows)
        backends = sorted({row.backend for row in self.rows if row.backend != "torch"}) or ["torch"]
        line = ", ".join(f"{name} {count}" for name, count in counts.items()) + "; " + ", ".join(backends)
        return line if self.attention == "sdpa" else f"{line}; attention {self.attention}"

    def table(self) -> str:
        """All rows as aligned text."""
        head = ("path", "kind", "numerics", "N x K", "rank", "group", "H", "backend", "MB", "error %")
        lines = [head, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        text = (
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        )
        return "\n".join([*text, self.summary()])


def _cells(row: LedgerRow) -> tuple[str, ...]:
    quantized = row.backend != "torch"
    return (
        row.path,
        row.kind,
        row.numerics,
        f"{row.out_features} x {row.in_features}",
        str(row.rank) if quantized else "-",
        str(row.group_size) if quantized else "-",
        "yes" if row.hadamard else "-",
        row.backend,
        f"{row.nbytes / 1e6:.2f}",
        "-" if row.error is None else f"{100 * row.error:.2f}",
    )


def _backend(layer: BranchedLinear) -> str:
    if isinstance(layer, QuantizedLinear):
        return layer.engine
    return "triton" if uses_triton(layer.qweight) else "reference"


def build_ledger(model: nn.Module) -> Ledger:
    """List every linear layer and convolution; the factors of injected adapters are no layers of the base and are skipped."""
    rows = []
    for path, module in model.named_modules():
        if ".lora_A." in f".{path}" or ".lora_B." in f".{path}":
            continue
        name = path.removesuffix(".base_layer")
        if isinstance(module, BranchedLinear):
            rows.append(
                LedgerRow(
                    name,
                    module.numerics,
                    module.out_features,
                    module.in_features,
                    module.rank,
                    module.group_size,
                    isinstance(module, SVDQuantLinear) and module.hadamard,
                    _backend(module),
                    module.nbytes,
                    module.output_error,
                    _kind(module) if isinstance(module, SVDQuantConv2d) else "linear",
                )
            )
        elif isinstance(module, nn.Linear | nn.Conv2d):
            numerics = DTYPE_NAMES.get(module.weight.dtype, str(module.weight.dtype).removeprefix("torch."))
            nbytes = sum(parameter.nbytes for parameter in module.parameters())
            N, K = module.weight.shape[0], module.weight[:1].numel()
            kind = _kind(module) if isinstance(module, nn.Conv2d) else "linear"
            rows.append(LedgerRow(name, numerics, N, K, 0, 0, False, "torch", nbytes, None, kind))
    return Ledger(tuple(rows))


def _kind(conv: SVDQuantConv2d | nn.Conv2d) -> str:
    """conv 3x3, conv 3x3 /2, depthwise 3x3."""
    (high, wide), stride = conv.kernel_size, conv.stride[0]
    name = "depthwise" if isinstance(conv, nn.Conv2d) and conv.groups > 1 else "conv"
    return f"{name} {high}x{wide}" + (f" /{stride}" if stride != 1 else "")
