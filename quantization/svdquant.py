"""SVDQuant of one linear layer (Li et al., arXiv:2411.05007): smooth, split off a low-rank branch, round the residual.

For W [N, K], inputs x [S, K], a smoothing vector s [K] and a block-Hadamard H (or the identity):

    x' = (x / s) H,   W' = (W diag(s)) H                      so that x' W'^T = x W^T
    W' ~ L1 L2 + deq(q),   rank R branch and four-bit codes
    y  = Q(x') deq(q)^T + (x D^T) U^T,   U = L1, D = (L2 H) / s     the branch reads raw, 16-bit x

Smoothing (section 3.2 of the paper; grid of DeepCompressor's `examples/diffusion/configs/svdquant`):
s = max|x|^a / max|W|^b over (0, 0), (i/n, 0), (i/n, 1 - i/n), i = 1..n, judged by the error of y. The alternation
L_i = SVD_R(W' - deq(q_{i-1})), q_i = round(W' - L_i) is DeepCompressor's `calib/lowrank.py` (LoftQ, arXiv:2310.08659,
for one layer); it stops at the first round whose y is worse. The SVD is randomized (`torch.svd_lowrank`, seeded).

s, D and U are rounded to bfloat16 *before* the residual is formed: the codes absorb the branch's own rounding.
All arithmetic is float32.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loragraft.kernels.act_quant import dequantize_activation, quantize_activation
from loragraft.kernels.layout import apply_hadamard, pack_int4, relative_rms
from loragraft.quantization.calibrate import ActivationStats
from loragraft.quantization.settings import LayerReport, QuantSettings
from loragraft.quantization.weight_quant import RoundedWeight, round_affine, round_progressive, round_symmetric

SYNTHETIC_ROWS = 256
"""Rows of x ~ N(0, I) that judge a data-free choice."""
ROTATED_CANDIDATES = 6
"""The best few smoothing candidates are also tried rotated; on synthetic layers a full second grid gained under 1 %."""
OVERSAMPLING, POWER_ITERATIONS = 10, 4
"""q = R + 10 and niter = 4: DeepCompressor PR #111 (50x faster than the full SVD at the same image quality)."""


@dataclass(frozen=True)
class _Transform:
    """One candidate: exponents of the smoothing vector and whether blocks of 64 inputs are rotated."""

    alpha: float
    beta: float
    hadamard: bool


@dataclass(frozen=True)
class _Layer:
    """The float layer, the rows it is judged on, and what it should answer."""

    weight_NK: Tensor
    absmax_K: Tensor
    rows_SK: Tensor
    target_SN: Tensor
    settings: QuantSettings


@dataclass(frozen=True)
class _Split:
    """One finished quantization of a layer."""

    transform: _Transform
    smooth_K: Tensor
    down_RK: Tensor
    up_NR: Tensor
    rounded: RoundedWeight
    error: float
    iterations: int


def quantize_linear(
    weight_NK: Tensor, bias: Tensor | None, stats: ActivationStats | None, settings: QuantSettings, *, path: str = ""
) -> tuple[dict[str, Tensor], LayerReport]:
    """Quantize one linear layer; returns the buffers of a `SVDQuantLinear` by name, and the report.

    weight [N, K] and bias [N] in any float dtype (the bias is kept as it is). `stats` holds the layer's measured inputs;
    it is required for calibrated smoothing and, where given, is what the report's errors are measured on.
    Raises ValueError naming `path` for non-finite weights, wrong shapes, missing statistics.
    """
    weight = weight_NK.detach().float()
    _check(weight, stats, settings, path)
    mode = settings.smoothing_mode
    judged = _layer(weight, stats if mode in ("calibrated", "none") else None, settings)
    first_round = [_split(judged, candidate, rounds=1) for candidate in _candidates(settings)]
    if (
        mode == "calibrated"
        and settings.numerics == "w4a8"
        and settings.rotation == "auto"
        and weight.shape[1] % 64 == 0
    ):
        favourites = sorted(first_round, key=_error)[:ROTATED_CANDIDATES]
        first_round += [_split(judged, replace(f.transform, hadamard=True), rounds=1) for f in favourites]
    best = min(first_round, key=_error)
    if settings.branch_rank > 0 and settings.iterations > 1:
        best = _split(judged, best.transform, rounds=settings.iterations)
    reported = _layer(weight, stats, settings)
    plain = replace(settings, rank=0, smoothing="none", rotation="never")
    rtn = _split(replace(reported, settings=plain), _Transform(0.0, 0.0, False), rounds=1)
    report = LayerReport(
        path=path,
        numerics=settings.numerics,
        group_size=settings.group_size,
        rank=best.down_RK.shape[0],
        smoothing=mode,
        alpha=best.transform.alpha,
        beta=best.transform.beta,
        hadamard=best.transform.hadamard,
        iterations=best.iterations,
        weight_error=relative_rms(_effective_weight(best), weight),
        output_error=relative_rms(_output(reported, best), reported.target_SN),
        rtn_error=rtn.error,
    )
    return _tensors(best, bias, settings), report


def _check(weight: Tensor, stats: ActivationStats | None, settings: QuantSettings, path: str) -> None:
    where = f"layer {path!r}" if path else "layer"
    if weight.ndim != 2:
        raise ValueError(f"{where}: weight has shape {tuple(weight.shape)}, expected [N, K]")
    if not torch.isfinite(weight).all():
        raise ValueError(f"{where}: weight holds NaN or infinity; nothing can be quantized from it")
    K = weight.shape[1]
    if stats is not None and stats.samples_SK.shape[1] != K:
        raise ValueError(f"{where}: statistics of {stats.samples_SK.shape[1]} in features for a weight of {K}")
    if stats is None and settings.smoothing_mode == "calibrated":
        raise ValueError(
            f"{where}: calibrated smoothing needs activation statistics; collect them with "
            "loragraft.quantization.calibrate.collect, or ask for smoothing='weight' or 'hadamard'"
        )
    if settings.smoothing_mode == "hadamard" and K % 64:
        raise ValueError(
            f"{where}: block-Hadamard-64 needs in features divisible by 64, not {K}; use smoothing='weight'"
        )


def _layer(weight_NK: Tensor, stats: ActivationStats | None, settings: QuantSettings) -> _Layer:
    """Rows to judge on: measured ones, or N(0, 1) from the settings' seed."""
    K, device = weight_NK.shape[1], weight_NK.device
    if stats is None:
        generator = torch.Generator().manual_seed(settings.seed)
        rows = torch.randn(SYNTHETIC_ROWS, K, generator=generator).to(device)
        absmax = torch.ones(K, device=device)  # the channels of N(0, I) are alike: only the weight shapes s
    else:
        rows, absmax = stats.samples_SK.to(device).float(), stats.absmax_K.to(device).float()
    return _Layer(weight_NK, absmax, rows, rows @ weight_NK.T, settings)


def _candidates(settings: QuantSettings) -> Iterator[_Transform]:
    """The transforms to try; the first is always the plainest, and wins ties."""
    mode, n = settings.smoothing_mode, settings.grid
    steps = [i / n for i in range(1, n)]
    yield _Transform(0.0, 0.0, hadamard=mode == "hadamard")
    if mode == "weight":
        yield from (_Transform(0.0, step, False) for step in [*steps, 1.0])
    elif mode == "calibrated":
        yield from (_Transform(step, 0.0, False) for step in [*steps, 1.0])
        yield from (_Transform(step, 1 - step, False) for step in steps)


def _error(split: _Split) -> float:
    return split.error


def smoothing_vector(absmax_x_K: Tensor, absmax_w_K: Tensor, alpha: float, beta: float) -> Tensor:
    """s = max|x|^alpha / max|W|^beta, [K] in bfloat16, geometric mean 1.

    Only the ratios matter: a common factor cancels between x / s and W s. Channels that (almost) never fire are held
    at 1e-5 of the largest, so that a stray value at run time is not blown up.
    """
    absmax_x = absmax_x_K.clamp(min=1e-5 * absmax_x_K.max().clamp(min=1e-30))
    absmax_w = absmax_w_K.clamp(min=1e-5 * absmax_w_K.max().clamp(min=1e-30))
    log_s = alpha * absmax_x.log() - beta * absmax_w.log()
    return (log_s - log_s.mean()).exp().to(torch.bfloat16)


def _split(layer: _Layer, transform: _Transform, rounds: int) -> _Split:
    """Branch and codes for one transform, alternating for at most `rounds` rounds; the best round is returned."""
    settings, weight = layer.settings, layer.weight_NK
    smooth = smoothing_vector(layer.absmax_K, weight.abs().amax(0), transform.alpha, transform.beta)
    target = _rotate(weight * smooth.float(), transform.hadamard)
    inputs = _quantized_inputs(layer, smooth, transform.hadamard)
    best: _Split | None = None
    rounded_before = torch.zeros_like(target)
    for iteration in range(1, rounds + 1):
        up, right = low_rank(target - rounded_before, settings.branch_rank, settings.seed)
        down = (_rotate(right, transform.hadamard) / smooth.float()).to(torch.bfloat16)
        up = up.to(torch.bfloat16)
        branch = up.float() @ _rotate(down.float() * smooth.float(), transform.hadamard)
        rounded = _round(target - branch, settings)
        output = inputs @ rounded.dense_NK.T + (layer.rows_SK @ down.float().T) @ up.float().T
        error = relative_rms(output, layer.target_SN)
        if best is not None and error >= best.error:
            break
        best = _Split(transform, smooth, down, up, rounded, error, iteration)
        rounded_before = rounded.dense_NK
    assert best is not None  # rounds >= 1
    return best


def low_rank(matrix_NK: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Best rank-R factors [N, R], [R, K] of a matrix, singular values shared evenly; the global RNG is left alone."""
    N, K = matrix_NK.shape
    rank = min(rank, N, K)
    if rank == 0:
        return matrix_NK.new_zeros(N, 0), matrix_NK.new_zeros(0, K)
    devices = [matrix_NK.device] if matrix_NK.is_cuda else []
    with torch.random.fork_rng(devices=devices):  # svd_lowrank takes no generator of its own
        if matrix_NK.is_cuda:
            torch.cuda.default_generators[matrix_NK.device.index].manual_seed(seed)
        else:
            torch.default_generator.manual_seed(seed)
        U, S, V = torch.svd_lowrank(matrix_NK, q=min(rank + OVERSAMPLING, N, K), niter=POWER_ITERATIONS)
    root = S[:rank].sqrt()
    return U[:, :rank] * root, (V[:, :rank] * root).T


def _rotate(matrix: Tensor, hadamard: bool) -> Tensor:
    return apply_hadamard(matrix) if hadamard else matrix


def _round(residual_NK: Tensor, settings: QuantSettings) -> RoundedWeight:
    rounding = {"w4a8": round_progressive, "w4a4": round_symmetric, "w4a16": round_affine}[settings.numerics]
    return rounding(residual_NK, settings.group_size)


def _quantized_inputs(layer: _Layer, smooth_K: Tensor, hadamard: bool) -> Tensor:
    """[S, K]: what the integer GEMM sees of the rows, dequantized (the rows themselves for w4a16)."""
    if layer.settings.numerics == "w4a16":
        return layer.rows_SK
    bits = 8 if layer.settings.numerics == "w4a8" else 4
    codes, scale = quantize_activation(layer.rows_SK, smooth_K, hadamard, bits)
    return dequantize_activation(codes, scale, torch.float32)[:, : layer.rows_SK.shape[1]]


def _output(layer: _Layer, split: _Split) -> Tensor:
    inputs = _quantized_inputs(layer, split.smooth_K, split.transform.hadamard)
    branch = (layer.rows_SK @ split.down_RK.float().T) @ split.up_NR.float().T
    return inputs @ split.rounded.dense_NK.T + branch


def _effective_weight(split: _Split) -> Tensor:
    """W_eff = (deq(q) H) / s + U D."""
    residual = _rotate(split.rounded.dense_NK, split.transform.hadamard) / split.smooth_K.float()
    return residual + split.up_NR.float() @ split.down_RK.float()


def _tensors(split: _Split, bias: Tensor | None, settings: QuantSettings) -> dict[str, Tensor]:
    """Checkpoint names -> contiguous tensors; w4a16 stores no smoothing vector."""
    tensors = {"qweight": pack_int4(split.rounded.codes_NK), **split.rounded.scales}
    if settings.numerics != "w4a16":
        tensors["smooth"] = split.smooth_K
    tensors["lora_down"], tensors["lora_up"] = split.down_RK, split.up_NR
    if bias is not None:
        tensors["bias"] = bias.detach().clone()
    return {name: tensor.contiguous() for name, tensor in tensors.items()}
