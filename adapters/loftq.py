"""LoftQ's start on a frozen base: factors that make up for what quantization took (Li et al., 2023, arXiv:2310.08659).

    E = W - W_eff                                            [N, K], W the 16-bit weight
    W_eff = (deq(q) H) / smooth + lora_up lora_down          the base as it is, its branch included
    (alpha / r) B0 A0 = L1 L2 / smooth,  L1 L2 the best rank-r approximation of E smooth, singular values shared evenly

An adapter reads raw x, so E is taken where x is raw: smoothing and rotation are undone in W_eff. The layer's inputs differ in size
from channel to channel, x / smooth less so: errors are weighed with `smooth` (1 where a layer has none). LoftQ quantizes again after
every SVD and repeats; here the codes are given, and of the alternation one SVD is left. A convolution's E is
[N, C k k]. PEFT calls it `init_lora_weights="loftq"` and has it for bitsandbytes' NF4 on a GPU alone.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loragraft.adapters.inject import DEFAULT_NAME, adapter_factors, load_factors
from loragraft.quantization.branched import BranchedLinear
from loragraft.quantization.conv import SVDQuantConv2d
from loragraft.quantization.low_rank import Subspace
from loragraft.quantization.names import named_module

ITERATIONS = 12
"""Power iterations: a residual's singular values fall slowly; with 12 its norm is within 0.1 % of the best."""


@dataclass(frozen=True)
class Compensation:
    """What the start does, over all layers of an adapter: |W - W_eff| / |W|, Frobenius, without it and with it."""

    layers: int
    rank: int
    error_before: float
    error_after: float

    def __str__(self) -> str:
        return (
            f"LoftQ start, rank {self.rank} on {self.layers} layers: error of their weights {100 * self.error_before:.2f} % -> "
            f"{100 * self.error_after:.2f} %"
        )


@torch.no_grad()
def compensate(transformer: nn.Module, read: Callable[[str], Tensor], name: str = DEFAULT_NAME) -> Compensation:
    """Puts the injected adapter `name` at LoftQ's start; one layer at a time, on the transformer's device.

    read: path of a layer -> its 16-bit weight [N, K] or [N, C, k, k]. Raises ValueError as `residual` and
    `loftq_factors`, for a layer that is not quantized, and if no layer carries `name`.
    """
    start: dict[str, tuple[Tensor, Tensor]] = {}
    sums, rank = [0.0, 0.0, 0.0], 0
    for path, (down, _) in adapter_factors(transformer, name).items():
        layer = named_module(transformer, f"{path}.base_layer")
        if not isinstance(layer, BranchedLinear):
            raise ValueError(f"{path!r} is not quantized: LoftQ makes up for an error of quantization")
        weight = read(path).to(down.device, torch.float32)
        lost = residual(layer, weight, path)
        start[path] = loftq_factors(layer, lost, down.shape[0], path)
        left = lost.flatten(1) - start[path][1].flatten(1) @ start[path][0].flatten(1)
        parts = zip(sums, (weight, lost, left), strict=True)
        sums = [total + float(part.double().square().sum()) for total, part in parts]
        rank = max(rank, down.shape[0])
    load_factors(transformer, start, name)
    return Compensation(len(start), rank, math.sqrt(sums[1] / sums[0]), math.sqrt(sums[2] / sums[0]))


def residual(layer: BranchedLinear, weight: Tensor, path: str = "") -> Tensor:
    """E = W - W_eff in float32, [N, K] or [N, C, k, k]. Raises ValueError for a weight of another shape."""
    effective = layer.kernel_weight() if isinstance(layer, SVDQuantConv2d) else layer.dequantized_weight()
    if weight.shape != effective.shape:
        raise ValueError(
            f"{path!r}: the 16-bit weight is {tuple(weight.shape)}, the quantized layer {tuple(effective.shape)}"
        )
    return weight.to(effective) - effective


@torch.no_grad()
def loftq_factors(layer: BranchedLinear, lost: Tensor, rank: int, path: str = "") -> tuple[Tensor, Tensor]:
    """A0 [r, K] and (alpha / r) B0 [N, r] of a residual E; of a convolution's [r, C, k, k] and [N, r, 1, 1].

    Raises ValueError for a rank above the layer's, and where nothing was lost: factors of zero would never train.
    """
    matrix = lost.flatten(1)
    if rank > min(matrix.shape):
        raise ValueError(
            f"{path!r}: adapter.init=loftq cannot start rank {rank} on a layer of {tuple(matrix.shape)}: lower adapter.rank"
        )
    if not matrix.any():
        raise ValueError(f"{path!r}: quantization lost nothing there; leave it out of adapter.targets")
    size = _input_size(layer, lost)
    up, down = Subspace(rank, seed=0, cold_iterations=ITERATIONS).factors(matrix * size)
    down = (down / size).view(-1, *lost.shape[1:])
    return down, up.view(*up.shape, *[1] * (lost.ndim - 2))


def _input_size(layer: BranchedLinear, lost: Tensor) -> Tensor:
    """`smooth` of every column of `lost.flatten(1)`; 1 without smoothing."""
    smooth = getattr(layer, "smooth", None)
    if smooth is None:
        return lost.new_ones(())
    channels: Tensor = smooth[: lost.shape[1]].to(lost)
    return channels.repeat_interleave(lost[0, 0].numel())
