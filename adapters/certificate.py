"""What a grafted model answers for: each layer as it is now, against the same layer with what is grafted kept apart.

    y(branch [D; A; 0] [U, w B, 0])   against   y(branch D U) + (x A^T)(w B)^T     in float32 and in bfloat16, RMS ratios

The right side is computed as an unmerged adapter is everywhere: the base layer, then two products of torch's, then a sum, each
rounded to the dtype of x. (`graft_deviation` compares with our own training op, which adds before it rounds.) The factors are read off the branch, padding included: it is the model that is certified, not the adapter file.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loragraft.adapters.graft import GraftDeviation, exactly_added
from loragraft.kernels.layout import relative_rms
from loragraft.quantization.checkpoint import quantized_layers
from loragraft.quantization.linear import SVDQuantLinear

FLOAT32_BOUND, BFLOAT16_BOUND, NO_WORSE = 1e-5, 5e-3, 1.05


@dataclass(frozen=True)
class Certificate:
    """Layer by layer, on one probe."""

    rows: int
    """Fewest rows of x (images of a convolution) that any layer was probed with."""
    float32: tuple[GraftDeviation, ...]
    bfloat16: tuple[GraftDeviation, ...]

    @property
    def rel_dev_fp32(self) -> float:
        """Worst layer, grafted against apart."""
        return max(row.merged_vs_apart for row in self.float32)

    @property
    def rel_dev_bf16(self) -> float:
        """The same in bfloat16."""
        return max(row.merged_vs_apart for row in self.bfloat16)

    @property
    def passed(self) -> bool:
        """1e-5 in float32, 5e-3 in bfloat16 and there against float64 no worse than apart (5 % for the order of adding)."""
        merged = max(row.merged_vs_exact for row in self.bfloat16)
        apart = max(row.apart_vs_exact for row in self.bfloat16)
        return self.rel_dev_fp32 <= FLOAT32_BOUND and self.rel_dev_bf16 <= BFLOAT16_BOUND and merged <= NO_WORSE * apart

    def __str__(self) -> str:
        merged = max(row.merged_vs_exact for row in self.bfloat16)
        apart = max(row.apart_vs_exact for row in self.bfloat16)
        return (
            f"{'passed' if self.passed else 'FAILED'}: {len(self.float32)} layers on at least {self.rows} rows, grafted against "
            f"apart {self.rel_dev_fp32:.1e} in float32, {self.rel_dev_bf16:.1e} in bfloat16; against float64 in bfloat16 "
            f"{merged:.1e} grafted, {apart:.1e} apart"
        )


def certify(transformer: nn.Module, probe: Mapping[str, Tensor]) -> Certificate:
    """Compare every grafted INT4 layer named in `probe` (path -> x [..., K], images of a convolution); the model is left as it was.

    Raises ValueError for a layer that is not INT4 or carries no graft, and for an empty probe.
    """
    layers = quantized_layers(transformer)
    if not probe:
        raise ValueError("the probe is empty: give inputs of at least one grafted layer")
    for path in probe:
        if path not in layers or layers[path].rank == layers[path].base_rank:
            raise ValueError(f"layer {path!r} {'carries no graft' if path in layers else 'is no INT4 layer'}")
    rows: dict[torch.dtype, list[GraftDeviation]] = {torch.float32: [], torch.bfloat16: []}
    for dtype, found in rows.items():
        found += [_deviation(path, layers[path], x.to(layers[path].lora_up.device, dtype)) for path, x in probe.items()]
    fewest = min(len(x) if x.ndim == 4 else x[..., 0].numel() for x in probe.values())
    return Certificate(fewest, tuple(rows[torch.float32]), tuple(rows[torch.bfloat16]))


@torch.no_grad()
def _deviation(path: str, layer: SVDQuantLinear, x: Tensor) -> GraftDeviation:
    wide, rank = (layer.lora_down, layer.lora_up), layer.base_rank
    down, up = wide[0][rank:].contiguous(), wide[1][:, rank:].contiguous()
    merged = layer(x)
    try:
        layer.set_branch(wide[0][:rank], wide[1][:, :rank])
        plain = layer(x)
        apart = plain + exactly_added(layer, x, down.to(x.dtype), up.to(x.dtype))
        added = exactly_added(layer, x.double(), down.double(), up.double())
        exact = layer(x.float()).double() + added
    finally:
        layer.set_branch(*wide)
    return GraftDeviation(
        path,
        relative_rms(merged, apart),
        relative_rms(merged, exact),
        relative_rms(apart, exact),
        relative_rms(plain.double() + added, plain),
    )
