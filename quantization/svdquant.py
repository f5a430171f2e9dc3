"""SVDQuant of one linear layer (Li et al., arXiv:2411.05007): smooth, split off a low-rank branch, round the residual.

For W [N, K], inputs x [S, K], a smoothing vector s [K] and a block-Hadamard H (or the identity):

    x' = (x / s) H,   W' = (W diag(s)) H                      so that x' W'^T = x W^T
    W' ~ L1 L2 + deq(q),   rank R branch and four-bit codes
    y  = Q(x') deq(q)^T + (x D^T) U^T,   U = L1, D = (L2 H) / s     the branch reads raw, 16-bit x

Smoothing (section 3.2 of the paper; grid of DeepCompressor's `examples/diffusion/configs/svdquant`):
s = max|x|^a / max|W|^b over (0, 0), (i/n, 0), (i/n, 1 - i/n), i = 1..n, judged by the error of y. The alternation
L_i = SVD_R(W' - deq(q_{i-1})), q_i = round(W' - L_i) is DeepCompressor's `calib/lowrank.py` (LoftQ, arXiv:2310.08659,
for one layer); it stops at the first round whose y is worse. The SVD is randomized (`low_rank`), seeded.

A subsampled search ranks its candidates in stacks (`candidates`). On measured activations it also tries the branch that
approximates in the metric of the inputs (`low_rank.InputMoment`): L_i C = SVD_R((W' - deq(q_{i-1})) C), C C^T = x'^T x' / S + damping,
fitted to three quarters of the rows and judged on the others.

s, D and U are rounded to bfloat16 *before* the residual is formed: the codes absorb the branch's own rounding.
All arithmetic is float32; only the orthonormal bases of `low_rank.Subspace` are made in float64.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from loragraft.kernels.layout import pack_int4, relative_rms
from loragraft.quantization.calibrate import ActivationStats
from loragraft.quantization.candidates import candidate_errors
from loragraft.quantization.format_quant import quantize_to_format
from loragraft.quantization.formats import FORMATS
from loragraft.quantization.gptq import HELD_OUT, gptq_codes
from loragraft.quantization.settings import LayerReport, QuantSettings
from loragraft.quantization.split import (
    Layer,
    Split,
    Transform,
    layer_output,
    rotate,
    split_layer,
    transformed_branch,
    weight_error,
)

SYNTHETIC_ROWS = 256
"""Rows that judge a data-free choice."""
ROTATED_CANDIDATES = 6
"""The best few smoothing candidates are also tried rotated; on synthetic layers a full second grid gained under 1 %."""
SUBSAMPLED_ROWS, SUBSAMPLED_OUTPUTS = 128, 1024
"""What a subsampled search judges its candidates on. The ranking of transforms depends on the in features, all of which stay."""
FINALISTS, FINALIST_ROUNDS = 2, 2
"""A subsampled search's best few, judged again on the whole layer after so many rounds."""
LOUD_CHANNELS, LOUDNESS = 64, 30.0
"""One in 64 channels 30 times as loud: the activation outliers of `synthetic_rows`."""


def quantize_linear(
    weight_NK: Tensor, bias: Tensor | None, stats: ActivationStats | None, settings: QuantSettings, *, path: str = "",
    taps: int = 1,
) -> tuple[dict[str, Tensor], LayerReport]:  # fmt: skip
    """Quantize one linear layer; returns the buffers of a `SVDQuantLinear` or `QuantizedLinear` by name, and the report.

    weight [N, K] and bias [N] in any float dtype (the bias is kept as it is). `stats` holds the layer's measured inputs;
    it is required for calibrated smoothing and GPTQ and, where given, is what the report's errors are measured on (with GPTQ:
    on the rows that it was not fitted to). taps: columns are so many equal blocks with one smoothing vector (a convolution).
    Raises ValueError naming `path` for non-finite weights, wrong shapes, missing statistics.
    """
    weight = weight_NK.detach().float()
    if settings.numerics in FORMATS:
        _check(weight, stats, settings, path)
        return quantize_to_format(weight, bias, stats, settings, path)
    del weight_NK  # a caller that keeps none has the 16-bit copy gone from here on
    _check(weight, stats, settings, path)
    mode = settings.smoothing_mode
    fitted, stats = _held_out(stats, settings)
    judged = _layer(weight, stats if mode in ("calibrated", "auto", "none") else None, settings, taps)
    if judged.measured and fitted is not None:
        judged = replace(judged, fitted_SK=fitted.to(weight.device).float())
    best = _search(judged) if settings.search == "subsampled" else _search_exhaustively(judged)
    reported = judged if stats is None or judged.measured else _layer(weight, stats, settings, taps)
    if settings.gptq and fitted is not None:
        best = _with_gptq(reported, best, fitted)
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
        weighted=best.weighted,
        weight_error=weight_error(reported, best),
        output_error=relative_rms(layer_output(reported, best), reported.target_SN),
        rtn_error=_plain_error(reported),
        inputs="measured" if reported.measured else "mixed" if mode == "auto" else "normal",
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
    if stats is None and settings.needs_statistics:
        what = "GPTQ" if settings.gptq else "calibrated smoothing"
        raise ValueError(
            f"{where}: {what} needs activation statistics; collect them with "
            "loragraft.quantization.calibrate.collect, or ask for smoothing='auto', 'weight' or 'hadamard' without gptq"
        )
    if stats is not None and settings.gptq and stats.samples_SK.shape[0] < 2 * HELD_OUT:
        raise ValueError(
            f"{where}: GPTQ needs at least {2 * HELD_OUT} activation rows, one in {HELD_OUT} to judge it by; "
            f"there are {stats.samples_SK.shape[0]}"
        )
    if settings.smoothing_mode == "hadamard" and K % 64:
        raise ValueError(
            f"{where}: block-Hadamard-64 needs in features divisible by 64, not {K}; use smoothing='weight'"
        )


def _held_out(stats: ActivationStats | None, settings: QuantSettings) -> tuple[Tensor | None, ActivationStats | None]:
    """(rows that branch and codes may be fitted to, statistics that judge); (None, all) where nothing is fitted to rows."""
    fits = settings.gptq or (settings.search == "subsampled" and settings.branch_rank > 0)
    if stats is None or not fits or stats.samples_SK.shape[0] < 2 * HELD_OUT:
        return None, stats
    judge = torch.arange(stats.samples_SK.shape[0], device=stats.samples_SK.device) % HELD_OUT == HELD_OUT - 1
    return stats.samples_SK[~judge], ActivationStats(stats.absmax_K, stats.samples_SK[judge])


def _layer(weight_NK: Tensor, stats: ActivationStats | None, settings: QuantSettings, taps: int) -> Layer:
    """Rows to judge on: measured ones, or synthetic ones from the settings' seed."""
    K, device = weight_NK.shape[1], weight_NK.device
    if stats is not None:
        rows, absmax = stats.samples_SK.to(device).float(), stats.absmax_K.to(device).float()
    else:
        absmax = torch.ones(K, device=device)  # no channel is known to be loud: only the weight shapes s
        if settings.smoothing_mode == "auto":
            rows = _drawn_rows(K, settings.seed, device, mixed=True)
            # Equal weight to every row, however loud: the error is then the mean over the kinds of input.
            size = torch.linalg.vector_norm(rows @ weight_NK.T, dim=1, keepdim=True)
            rows = rows / torch.where(size > 0, size, torch.ones_like(size))
        else:
            rows = _drawn_rows(K, settings.seed, device, mixed=False)
    absmax, weight_absmax = _tied(absmax, taps), _tied(weight_NK.abs().amax(0), taps)
    return Layer(weight_NK, absmax, weight_absmax, rows, rows @ weight_NK.T, settings, stats is not None, taps)


def _tied(absmax_K: Tensor, taps: int) -> Tensor:
    """The largest of every tap's, for all taps: they read the same codes."""
    return absmax_K if taps == 1 else absmax_K.view(taps, -1).amax(0).repeat(taps)


@lru_cache(maxsize=8)  # a model has few widths, and drawing for the widest takes longer than quantizing it
def _drawn_rows(K: int, seed: int, device: torch.device, *, mixed: bool) -> Tensor:
    """Synthetic rows on the device; not to be written to."""
    if mixed:
        return synthetic_rows(K, seed).to(device)
    return torch.randn(SYNTHETIC_ROWS, K, generator=torch.Generator().manual_seed(seed)).to(device)


def synthetic_rows(K: int, seed: int) -> Tensor:
    """[SYNTHETIC_ROWS, K] inputs for a choice without data: what is not known about them is drawn.

    A third each: N(0, I); the same with one channel in 64 thirty times as loud, anew in every row; and heavy tails
    (Student's t with 3 degrees of freedom) without any channel structure. These are the activations of the synthetic layer test
    that set this project's numerics. Which channels are loud is unknown, so a smoothing vector cannot be fitted to them;
    what they reward is a transform that does not depend on knowing.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(SYNTHETIC_ROWS, K, generator=generator)
    third = SYNTHETIC_ROWS // 3
    loud = torch.rand(third, K, generator=generator) < 1 / LOUD_CHANNELS
    rows[third : 2 * third] *= torch.where(loud, LOUDNESS, 1.0)
    chi_squared = torch.randn(3, SYNTHETIC_ROWS - 2 * third, K, generator=generator).square_().mean(0)
    rows[2 * third :] /= chi_squared.sqrt_()  # t_3 = N(0, 1) / sqrt(chi^2_3 / 3)
    return rows


def _search_exhaustively(layer: Layer) -> Split:
    """Every candidate for one round on the whole layer; the best is alternated."""
    settings = layer.settings
    first_round = [split_layer(layer, candidate, rounds=1) for candidate in _candidates(layer)]
    if _rotates(layer):
        favourites = sorted(first_round, key=_error)[:ROTATED_CANDIDATES]
        first_round += [split_layer(layer, replace(f.transform, hadamard=True), rounds=1) for f in favourites]
    best = min(first_round, key=_error)
    if settings.branch_rank > 0 and settings.iterations > 1:
        best = split_layer(layer, best.transform, rounds=settings.iterations)
    return best


def _search(layer: Layer) -> Split:
    """Candidates on a part of the layer, the finalists on all of it, and the winner alternated."""
    settings = layer.settings
    candidates = list(_candidates(layer))
    if _rotates(layer):
        candidates += [replace(candidate, hadamard=True) for candidate in candidates]
    rounds = settings.iterations if settings.branch_rank > 0 else 1
    if len(candidates) == 1 and layer.fitted_SK is None:
        return split_layer(layer, candidates[0], rounds)
    small = layer.part(SUBSAMPLED_ROWS, SUBSAMPLED_OUTPUTS)
    ranked = sorted((error, i) for i, error in enumerate(candidate_errors(small, candidates)))
    ways = (False, True) if layer.fitted_SK is not None and settings.branch_rank > 0 else (False,)
    finalists = [(candidates[i], weighted) for _, i in ranked[:FINALISTS] for weighted in ways]
    tried = min(rounds, FINALIST_ROUNDS)
    # Only the error is kept of each: a wide layer's splits would fill the memory.
    errors = [split_layer(layer, transform, tried, weighted=weighted).error for transform, weighted in finalists]
    transform, weighted = finalists[errors.index(min(errors))]
    return split_layer(layer, transform, rounds, weighted=weighted)


def _rotates(layer: Layer) -> bool:
    """Whether a rotation may be tried on top of the candidates."""
    settings = layer.settings
    return (
        settings.smoothing_mode in ("calibrated", "auto")
        and settings.numerics == "w4a8"
        and settings.rotation == "auto"
        and layer.weight_NK.shape[1] % 64 == 0
    )


def _candidates(layer: Layer) -> Iterator[Transform]:
    """The transforms to try, before rotation; the first is always the plainest, and wins ties."""
    mode, n = layer.settings.smoothing_mode, layer.settings.grid
    steps = [i / n for i in range(1, n)]
    yield Transform(0.0, 0.0, hadamard=mode == "hadamard")
    if mode == "weight" or (mode == "auto" and not layer.measured):
        yield from (Transform(0.0, step, False) for step in [*steps, 1.0])
    elif mode in ("calibrated", "auto"):
        yield from (Transform(step, 0.0, False) for step in [*steps, 1.0])
        yield from (Transform(step, 1 - step, False) for step in steps)


def _error(split: Split) -> float:
    return split.error


def _with_gptq(layer: Layer, split: Split, fitted_SK: Tensor) -> Split:
    """The split with GPTQ's codes if they are better on the rows that judge."""
    target = rotate(layer.weight_NK * split.smooth_K.float(), split.transform.hadamard)
    target = target - transformed_branch(split.down_RK, split.up_NR, split.smooth_K, split.transform.hadamard)
    inputs = rotate(fitted_SK.to(target) / split.smooth_K.float(), split.transform.hadamard)
    tried = replace(split, rounded=gptq_codes(target, inputs, split.rounded, layer.settings))
    before, after = (relative_rms(layer_output(layer, s), layer.target_SN) for s in (split, tried))
    return replace(tried, error=after) if after < before else split


def _plain_error(layer: Layer) -> float:
    """Output error of plain rounding: no smoothing, no rotation, no branch."""
    plain = replace(layer.settings, rank=0, smoothing="none", rotation="never", gptq=False)
    return split_layer(replace(layer, settings=plain), Transform(0.0, 0.0, False), rounds=1).error


def _tensors(split: Split, bias: Tensor | None, settings: QuantSettings) -> dict[str, Tensor]:
    """Checkpoint names -> contiguous tensors; w4a16 stores no smoothing vector."""
    tensors = {"qweight": pack_int4(split.rounded.codes_NK), **split.rounded.scales}
    if settings.numerics != "w4a16":
        tensors["smooth"] = split.smooth_K
    tensors["lora_down"], tensors["lora_up"] = split.down_RK, split.up_NR
    if bias is not None:
        tensors["bias"] = bias.detach().clone()
    return {name: tensor.contiguous() for name, tensor in tensors.items()}
