"""How good the quantizer is, layer by layer, beside an SVDQuant that is written out plainly here.

    python benchmarks/quantizer_accuracy.py --out benchmarks/results/quantizer_accuracy.json

20 layers: five kinds of synthetic data in two shapes, and ten layers of `pocket` on its own activations. Errors are those of the
layer's output on rows that no quantizer has seen. The plain SVDQuant takes the exact SVD in float64, every candidate of
DeepCompressor's grid at full size, and alternates until worse. Ratios:

    auto_over_w4a4          `auto` W4A8, groups of 64, over plain SVDQuant W4A4; auto_g128_over_w4a4 with groups of 128
    data_free_over_w4a4     the same without any activation statistics
    gptq_over_auto          what GPTQ adds to `auto`
    w4a4_over_plain         our W4A4 over plain W4A4, equal bits and rank
    refinement              `auto` over the plain algorithm with our W4A8 codes and rotations among the candidates
    refinement_data_free    the same where both know nothing of the inputs, judged on other synthetic inputs
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loragraft.backbones.architectures import FLUX, folder_settings
from loragraft.backbones.load import denoise_calibration_prompts, load_16bit
from loragraft.backbones.pocket import SPEC
from loragraft.disk import write_atomic
from loragraft.kernels.act_quant import dequantize_activation, quantize_activation
from loragraft.kernels.layout import apply_hadamard, relative_rms
from loragraft.quantization.calibrate import ActivationStats, collect
from loragraft.quantization.linear import SVDQuantLinear
from loragraft.quantization.names import match_paths
from loragraft.quantization.settings import QuantSettings
from loragraft.quantization.svdquant import synthetic_rows
from loragraft.quantization.weight_quant import round_progressive, round_symmetric

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RANK, ROWS, LOUDNESS = 32, 512, 30.0
GRID, MOST_ROUNDS = 20, 100  # DeepCompressor's
KINDS = ("gaussian", "loud inputs", "loud inputs and weights", "heavy tails", "low-rank weights")


@dataclass(frozen=True)
class Case:
    """One layer, the rows to quantize it with and the rows to judge it on."""

    name: str
    kind: str
    weight_NK: Tensor
    fit_SK: Tensor
    judge_SK: Tensor


def synthetic_cases(width: int) -> Iterator[Case]:
    """The kinds of METHODS' layer test, [width, width] and [width, 2 width]; t with 3 degrees of freedom for heavy tails."""
    for number, kind in enumerate(KINDS):
        for N, K in ((width, width), (width, 2 * width)):
            generator = torch.Generator().manual_seed(1000 * number + K)
            normal = [torch.randn(n, K, generator=generator) for n in (N, ROWS, ROWS)]
            if kind == "heavy tails":
                chi = [torch.randn(3, n, K, generator=generator).square().mean(0).sqrt() for n in (N, ROWS, ROWS)]
                normal = [values / scale for values, scale in zip(normal, chi, strict=True)]
            weight, fit, judge = normal
            if kind.startswith("loud inputs"):
                channels = torch.randperm(K, generator=generator)[: K // 48]
                fit[:, channels] *= LOUDNESS
                judge[:, channels] *= LOUDNESS
            if kind.endswith("and weights"):
                weight[:, torch.randperm(K, generator=generator)[: K // 96]] *= 10
            if kind == "low-rank weights":
                left = torch.randn(N, 64, generator=generator) * torch.logspace(0.5, -0.5, 64)
                weight += 0.4 * left @ torch.randn(64, K, generator=generator)
            yield Case(f"{kind} {N}x{K}", kind, *(t.to(DEVICE) for t in (weight, fit, judge)))


def pocket_cases(count: int, prompts: int) -> Iterator[Case]:
    """Layers of `pocket`, evenly spread, with the inputs that they receive while it draws."""
    spec = replace(SPEC, calibration_prompts=SPEC.calibration_prompts[:prompts])
    model = load_16bit(spec).eval().requires_grad_(False)
    nn.Module.to(model, DEVICE, torch.float32)
    linears = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    paths = sorted({path for found in match_paths(FLUX.quantize, linears).values() for path in found})
    paths = paths[:: max(1, len(paths) // count)][:count]
    stats = collect(model, paths, lambda: denoise_calibration_prompts(spec, model, torch.float32), rows=2 * ROWS)
    for path in paths:
        rows = stats[path].samples_SK.to(DEVICE)
        yield Case(path, "pocket", model.get_submodule(path).weight.detach(), rows[0::2], rows[1::2])


def exact_low_rank(matrix_NK: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Rank-R factors from the full spectrum in float64: the eigenvectors of the smaller Gram matrix."""
    wide = matrix_NK.double()
    if wide.shape[0] > wide.shape[1]:
        left, right = exact_low_rank(matrix_NK.T, rank)
        return right.T, left.T
    _, vectors = torch.linalg.eigh(wide @ wide.T)
    top = vectors[:, -rank:]
    return top, top.T @ wide


def plain_svdquant(case: Case, numerics: str, *, calibrated: bool = True, grid: int = GRID) -> float:
    """Error on the judging rows of SVDQuant by the book, in float64 but for the codes, whose scales are those of the format.

    Every smoothing candidate (for w4a8 each with and without rotation) gets one exact SVD; the best alternates until worse.
    Without `calibrated` x is taken for N(0, I) mixed as in `synthetic_rows`, and only the weight shapes the smoothing.
    """
    W, fit = case.weight_NK.double(), case.fit_SK.double()
    steps = [i / grid for i in range(1, grid)]
    exponents = [(0.0, 0.0), *((0.0, b) for b in [*steps, 1.0])]
    if calibrated:
        exponents = [(0.0, 0.0), *((a, 0.0) for a in steps), *((a, 1 - a) for a in steps)]
    absmax_x = fit.abs().amax(0) if calibrated else torch.ones_like(fit[0])
    absmax_w = W.abs().amax(0).clamp(min=1e-12)

    def parts(a: float, b: float, rotated: bool, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s = absmax_x.clamp(min=1e-12) ** a / absmax_w**b
        s = (s / s.log().mean().exp()).bfloat16()
        codes, scale = quantize_activation(rows.float(), s, rotated, 8 if numerics == "w4a8" else 4)
        rounded_x = dequantize_activation(codes, scale, torch.float64)[:, : rows.shape[1]]
        turn = apply_hadamard if rotated else lambda m: m
        return turn(W * s.double()), rounded_x, turn(rows / s.double())

    def rounded(matrix: Tensor) -> Tensor:
        rounding = round_progressive if numerics == "w4a8" else round_symmetric
        return rounding(matrix, 64).dense_NK.double()

    def one_round(target: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        left, right = exact_low_rank(residual, RANK)
        return left @ right, rounded(target - left @ right)

    def error(x: Tensor, rounded_x: Tensor, raw_x: Tensor, branch: Tensor, codes: Tensor) -> float:
        return relative_rms(rounded_x @ codes.T + raw_x @ branch.T, x @ W.T)

    found = []
    for a, b in exponents:
        for rotated in (False, True) if numerics == "w4a8" else (False,):
            target, rounded_x, raw_x = parts(a, b, rotated, fit)
            found.append((error(fit, rounded_x, raw_x, *one_round(target, target)), (a, b, rotated)))
    best = min(found)[1]
    target, rounded_x, raw_x = parts(*best, fit)
    _, judge_q, judge_raw = parts(*best, case.judge_SK.double())
    codes, least, judged = torch.zeros_like(target), float("inf"), float("nan")
    for _ in range(MOST_ROUNDS):
        branch, codes = one_round(target, target - codes)
        now = error(fit, rounded_x, raw_x, branch, codes)
        if now >= least:
            break
        least, judged = now, error(case.judge_SK.double(), judge_q, judge_raw, branch, codes)
    return judged


def our_error(case: Case, settings: QuantSettings, *, calibrated: bool = True) -> float:
    """Error on the judging rows of a `SVDQuantLinear`: what its kernels compute."""
    N, K = case.weight_NK.shape
    linear = nn.Linear(K, N, bias=False, device=case.weight_NK.device).requires_grad_(False)
    linear.weight.data = case.weight_NK.float()
    stats = ActivationStats(case.fit_SK.abs().amax(0), case.fit_SK) if calibrated else None
    layer, _ = SVDQuantLinear.from_linear(linear, stats, settings)
    return relative_rms(layer(case.judge_SK), linear(case.judge_SK))


def data_free(case: Case) -> Case:
    """The same weight with the quantizer's idea of unknown inputs, each row scaled to one unit of output."""
    fit, judge = (synthetic_rows(case.weight_NK.shape[1], seed).to(case.weight_NK) for seed in (0, 1))
    return replace(case, fit_SK=_unit_output(fit, case), judge_SK=_unit_output(judge, case))


def _unit_output(rows: Tensor, case: Case) -> Tensor:
    return rows / torch.linalg.vector_norm(rows @ case.weight_NK.T, dim=1, keepdim=True)


def layer_row(case: Case) -> dict[str, Any]:
    """All errors of one layer, and their ratios."""
    native = folder_settings("native", calibrated=True, rank=RANK)
    unknown = data_free(case)
    errors = {
        "plain w4a4": plain_svdquant(case, "w4a4"),
        "w4a4": our_error(case, folder_settings("interchange", calibrated=True, rank=RANK)),
        "plain w4a8": plain_svdquant(case, "w4a8", grid=10),
        "auto": our_error(case, native),
        "auto g128": our_error(case, replace(native, group_size=128)),
        "auto gptq": our_error(case, replace(native, gptq=True)),
        "auto data-free": our_error(case, folder_settings("native", calibrated=False, rank=RANK), calibrated=False),
        "plain w4a8, synthetic rows": plain_svdquant(unknown, "w4a8", calibrated=False, grid=10),
        "auto data-free, synthetic rows": our_error(
            unknown, folder_settings("native", calibrated=False, rank=RANK), calibrated=False
        ),
    }
    ratios = {
        "auto_over_w4a4": errors["auto"] / errors["plain w4a4"],
        "auto_g128_over_w4a4": errors["auto g128"] / errors["plain w4a4"],
        "data_free_over_w4a4": errors["auto data-free"] / errors["plain w4a4"],
        "gptq_over_auto": errors["auto gptq"] / errors["auto"],
        "w4a4_over_plain": errors["w4a4"] / errors["plain w4a4"],
        "refinement": errors["auto"] / errors["plain w4a8"],
        "refinement_data_free": errors["auto data-free, synthetic rows"] / errors["plain w4a8, synthetic rows"],
    }
    return {"layer": case.name, "kind": case.kind, "errors": errors, "ratios": ratios}


def accuracy(args: argparse.Namespace) -> dict[str, Any]:
    """Every layer, and per ratio the worst kind's mean, the mean and the worst layer."""
    rows = []
    pocket = pocket_cases(args.pocket_layers, args.prompts) if args.pocket_layers else ()
    for case in (*synthetic_cases(args.width), *pocket):
        if args.only not in case.name:
            continue
        rows.append(layer_row(case))
        print(case.name, {name: round(value, 3) for name, value in rows[-1]["ratios"].items()}, flush=True)
    return {"width": args.width, "rank": RANK, "ratios": summary(rows), "layers": rows}


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Ratio -> {mean, worst, kinds: mean per kind}."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    found = {}
    for name in rows[0]["ratios"]:
        by_kind = {kind: statistics.mean(r["ratios"][name] for r in rows if r["kind"] == kind) for kind in kinds}
        values = [row["ratios"][name] for row in rows]
        found[name] = {"mean": statistics.mean(values), "worst": max(values), "kinds": by_kind}
    return found


def main() -> int:
    """Measures, writes the JSON, prints the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--commit", default="", help="commit of the code that runs")
    parser.add_argument("--width", type=int, default=384, help="in and out features of the synthetic layers")
    parser.add_argument("--only", default="", help="only layers whose name holds this, e.g. 'gaussian 3072x3072'")
    parser.add_argument("--pocket-layers", type=int, default=10)
    parser.add_argument("--prompts", type=int, default=6, help="calibration prompts of pocket")
    args = parser.parse_args()
    started = time.monotonic()
    result = accuracy(args)
    for name, value in result["ratios"].items():
        print(
            f"{name:24s} mean {value['mean']:.3f}, worst kind {max(value['kinds'].values()):.3f}, worst layer {value['worst']:.3f}"
        )
    about = {"device": torch.cuda.get_device_name() if DEVICE == "cuda" else platform.processor() or platform.machine()}
    about |= {"torch": torch.__version__, "commit": args.commit, "command": " ".join(sys.argv)}
    if args.out:
        content = {**about, "seconds": time.monotonic() - started, **result}
        write_atomic(args.out, (json.dumps(content, indent=1) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
