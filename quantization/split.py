"""One linear layer under one transform: smoothing vector, branch and codes, and the error that they make.

The formulas are those of `svdquant`. A `Layer` is what is asked for, a `Transform` what is tried, a `Split` what came out.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loragraft.kernels.act_quant import dequantize_activation, quantize_activation
from loragraft.kernels.layout import apply_hadamard, relative_rms, uses_triton
from loragraft.quantization.fused_rounding import round_progressive_fused
from loragraft.quantization.low_rank import InputMoment, Subspace, low_rank
from loragraft.quantization.settings import QuantSettings
from loragraft.quantization.weight_quant import RoundedWeight, round_affine, round_progressive, round_symmetric

ROUNDING_CHUNK = 1 << 24
"""Elements rounded at once: the intermediates of a wide layer would take a gigabyte otherwise."""
LEAST_GAIN = 1e-3
"""A subsampled search ends the alternation at a round that gains less; an exhaustive one at a round that loses."""


@dataclass(frozen=True)
class Transform:
    """One candidate: exponents of the smoothing vector and whether blocks of 64 inputs are rotated."""

    alpha: float
    beta: float
    hadamard: bool


@dataclass(frozen=True)
class Layer:
    """The float layer, the rows it is judged on, and what it should answer."""

    weight_NK: Tensor
    absmax_K: Tensor
    """max |x| per in feature."""
    weight_absmax_K: Tensor
    rows_SK: Tensor
    target_SN: Tensor
    settings: QuantSettings
    measured: bool
    """Whether the rows are activations that were measured, not synthetic ones."""
    taps: int = 1
    """Blocks of columns that share smoothing and rotation: the k^2 taps of a convolution."""
    fitted_SK: Tensor | None = None
    """Measured rows besides those that judge, for what is fitted to its rows and would flatter itself on them."""

    def part(self, rows: int, outputs: int) -> "Layer":
        """The same layer with at most so many rows and out features, evenly spread; itself if it has no more."""
        S, N = self.target_SN.shape
        if rows >= S and outputs >= N:
            return self
        device = self.weight_NK.device
        of_S = torch.arange(0, S, max(1, S // rows), device=device)[:rows]
        of_N = torch.arange(0, N, max(1, N // outputs), device=device)[:outputs]
        return replace(
            self,
            weight_NK=self.weight_NK[of_N],
            rows_SK=self.rows_SK[of_S],
            target_SN=self.target_SN[of_S][:, of_N],
        )


@dataclass(frozen=True)
class Split:
    """One finished quantization of a layer."""

    transform: Transform
    smooth_K: Tensor
    down_RK: Tensor
    up_NR: Tensor
    rounded: RoundedWeight
    error: float
    iterations: int
    weighted: bool = False
    """Whether the branch was fitted to the inputs (`InputMoment`)."""


def smoothing_vector(absmax_x_K: Tensor, absmax_w_K: Tensor, alpha: float | Tensor, beta: float | Tensor) -> Tensor:
    """s = max|x|^alpha / max|W|^beta, [K] in bfloat16, geometric mean 1; [C, K] for exponents [C, 1].

    Only the ratios matter: a common factor cancels between x / s and W s. Channels that (almost) never fire are held
    at 1e-5 of the largest, so that a stray value at run time is not blown up.
    """
    absmax_x = absmax_x_K.clamp(min=1e-5 * absmax_x_K.max().clamp(min=1e-30))
    absmax_w = absmax_w_K.clamp(min=1e-5 * absmax_w_K.max().clamp(min=1e-30))
    log_s = alpha * absmax_x.log() - beta * absmax_w.log()
    return (log_s - log_s.mean(-1, keepdim=True)).exp().to(torch.bfloat16)


def split_layer(layer: Layer, transform: Transform, rounds: int, *, weighted: bool = False) -> Split:
    """Branch and codes for one transform, alternating for at most `rounds` rounds; the best round is returned.

    weighted, of a subsampled search only: the branch is fitted to the inputs `layer.fitted_SK`.
    """
    settings, weight = layer.settings, layer.weight_NK
    smooth = smoothing_vector(layer.absmax_K, layer.weight_absmax_K, transform.alpha, transform.beta)
    # Of a wide layer every matrix [N, K] that need not live takes 200 MB of a GPU: a vector of ones multiplies nothing.
    plain = transform.alpha == transform.beta == 0
    target = rotate(weight if plain else weight * smooth.float(), transform.hadamard)
    inputs = quantized_inputs(layer, smooth, transform.hadamard)
    subsampled = settings.search == "subsampled"
    moment = None
    if weighted and layer.fitted_SK is not None:
        moment = InputMoment(rotate(layer.fitted_SK / smooth.float(), transform.hadamard))
    subspace = Subspace(settings.branch_rank, settings.seed, moment=moment)
    best: Split | None = None
    for iteration in range(1, rounds + 1):
        residual = target if best is None else target - best.rounded.dense_NK
        if subsampled:
            up, right = subspace.factors(residual)
        else:
            up, right = low_rank(residual, settings.branch_rank, settings.seed)
        del residual
        down = (rotate(right, transform.hadamard) / smooth.float()).to(torch.bfloat16)
        up = up.to(torch.bfloat16)
        rounded = round_weight(without_branch(target, down, up, smooth, transform.hadamard), settings)
        output = inputs @ rounded.dense_NK.T + (layer.rows_SK @ down.float().T) @ up.float().T
        error = relative_rms(output, layer.target_SN)
        if best is not None and error >= best.error:
            break
        gain = 1.0 if best is None else 1 - error / best.error
        best = Split(transform, smooth, down, up, rounded, error, iteration, weighted)
        del rounded
        if subsampled and gain < LEAST_GAIN:
            break
    assert best is not None  # rounds >= 1
    return best


def rotate(matrix: Tensor, hadamard: bool) -> Tensor:
    """M H, or M."""
    return apply_hadamard(matrix) if hadamard else matrix


def transformed_branch(down_RK: Tensor, up_NR: Tensor, smooth_K: Tensor, hadamard: bool) -> Tensor:
    """U D diag(s) H [N, K]: the branch as the transformed inputs see it."""
    return up_NR.float() @ rotate(down_RK.float() * smooth_K.float(), hadamard)


def without_branch(target_NK: Tensor, down_RK: Tensor, up_NR: Tensor, smooth_K: Tensor, hadamard: bool) -> Tensor:
    """W' - U D diag(s) H: what is left to the codes; W' itself without a branch. Not to be written to."""
    if not down_RK.shape[-2]:
        return target_NK
    branch_NK = transformed_branch(down_RK, up_NR, smooth_K, hadamard)
    return torch.sub(target_NK, branch_NK, out=branch_NK)


def round_weight(residual_NK: Tensor, settings: QuantSettings) -> RoundedWeight:
    """Codes of the residual in the settings' code system; large ones a part of the rows at a time (rows are independent)."""
    rounding = {"w4a8": round_progressive, "w4a4": round_symmetric, "w4a16": round_affine}[settings.numerics]
    if settings.search == "subsampled" and settings.numerics == "w4a8" and uses_triton(residual_NK):
        return round_progressive_fused(residual_NK, settings.group_size)
    if residual_NK.numel() <= ROUNDING_CHUNK:
        return rounding(residual_NK, settings.group_size)
    rows = max(1, ROUNDING_CHUNK // residual_NK.shape[1])
    dense = torch.empty_like(residual_NK, dtype=torch.float32)
    codes: Tensor | None = None
    scales: dict[str, list[Tensor]] = {}
    for start in range(0, residual_NK.shape[0], rows):
        part = rounding(residual_NK[start : start + rows], settings.group_size)
        if codes is None:
            codes = part.codes_NK.new_empty((residual_NK.shape[0], part.codes_NK.shape[1]))
        codes[start : start + rows], dense[start : start + rows] = part.codes_NK, part.dense_NK
        for name, values in part.scales.items():
            scales.setdefault(name, []).append(values)
    assert codes is not None  # it has more elements than a chunk
    # [N] per row, [G, N] per group: the out features are the last dimension of both.
    return RoundedWeight(codes, dense, {name: torch.cat(parts, dim=-1) for name, parts in scales.items()})


def quantized_inputs(layer: Layer, smooth_K: Tensor, hadamard: bool) -> Tensor:
    """[S, K]: what the integer GEMM sees of the rows, dequantized (the rows themselves for w4a16).

    A row has one scale: a token's, or a window's of a convolution, which are drawn without what else is in their blocks.
    """
    if layer.settings.numerics == "w4a16":
        return layer.rows_SK
    bits = 8 if layer.settings.numerics == "w4a8" else 4
    codes, scale = quantize_activation(layer.rows_SK, smooth_K, hadamard, bits)
    return dequantize_activation(codes, scale, torch.float32)[:, : layer.rows_SK.shape[1]]


def layer_output(layer: Layer, split: Split) -> Tensor:
    """y [S, N] of the quantized layer on the layer's rows, without bias."""
    inputs = quantized_inputs(layer, split.smooth_K, split.transform.hadamard)
    branch = (layer.rows_SK @ split.down_RK.float().T) @ split.up_NR.float().T
    return inputs @ split.rounded.dense_NK.T + branch


def weight_error(layer: Layer, split: Split) -> float:
    """|W_eff - W| / |W| with W_eff = (deq(q) H) / s + U D; a part of the rows at a time where the layer is large."""
    down, smooth = split.down_RK.float(), split.smooth_K.float()
    rows = max(1, ROUNDING_CHUNK // layer.weight_NK.shape[1])
    parts = [w.split(rows) for w in (layer.weight_NK, split.rounded.dense_NK, split.up_NR)]
    if len(parts[0]) == 1:
        effective = rotate(split.rounded.dense_NK, split.transform.hadamard) / smooth + split.up_NR.float() @ down
        return relative_rms(effective, layer.weight_NK)
    wrong = size = 0.0
    for weight, dense, up in zip(*parts, strict=True):
        effective = rotate(dense, split.transform.hadamard) / smooth + up.float() @ down
        wrong += (effective - weight).double().square().sum().item()
        size += weight.double().square().sum().item()
    return (wrong / size) ** 0.5 if size else (0.0 if wrong == 0 else float("inf"))
