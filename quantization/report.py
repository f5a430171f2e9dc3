"""The quantizer's per-layer reports as a table for people and as JSON for files."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from loragraft.quantization.settings import Inputs, LayerReport

INPUTS: dict[Inputs, str] = {
    "measured": "measured inputs",
    "normal": "N(0, 1) inputs (nothing was measured)",
    "mixed": "synthetic inputs, outliers among them (nothing was measured)",
}


def report_to_dict(reports: Sequence[LayerReport]) -> dict[str, Any]:
    """JSON-able: mean errors per numerics and what they were measured on, then every layer."""
    summary = {name: {**mean, "inputs": _inputs(reports, name)} for name, mean in _means(reports).items()}
    return {"summary": summary, "layers": [asdict(report) for report in reports]}


def report_table(reports: Sequence[LayerReport]) -> str:
    """One line per layer, errors in per cent of the 16-bit layer's output (RMS), then the means and what they were measured on."""
    head = (
        "path",
        "numerics",
        "group",
        "rank",
        "smooth a, b",
        "H",
        "rounds",
        "weight %",
        "output %",
        "plain rounding %",
    )
    lines = [head, *(_cells(report) for report in reports)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    for numerics, mean in _means(reports).items():
        text.append(
            f"{numerics}: {mean['layers']:.0f} layers, mean output error {100 * mean['output_error']:.2f} %, "
            f"plain rounding {100 * mean['rtn_error']:.2f} %, on "
            + " and ".join(INPUTS[kind] for kind in _inputs(reports, numerics))
        )
    if len({report.inputs for report in reports}) > 1:
        text.append("Errors on unlike inputs are not comparable.")
    return "\n".join(text)


def _cells(report: LayerReport) -> tuple[str, ...]:
    return (
        report.path,
        report.numerics,
        str(report.group_size),
        str(report.rank),
        f"{report.alpha:.2f}, {report.beta:.2f}",
        "yes" if report.hadamard else "-",
        str(report.iterations),
        f"{100 * report.weight_error:.2f}",
        f"{100 * report.output_error:.2f}",
        f"{100 * report.rtn_error:.2f}",
    )


def _inputs(reports: Sequence[LayerReport], numerics: str) -> list[Inputs]:
    """What the errors of the layers of these numerics were measured on."""
    return sorted({report.inputs for report in reports if report.numerics == numerics})


def _means(reports: Sequence[LayerReport]) -> dict[str, dict[str, float]]:
    means: dict[str, dict[str, float]] = {}
    for numerics in sorted({report.numerics for report in reports}):
        chosen = [report for report in reports if report.numerics == numerics]
        means[numerics] = {"layers": float(len(chosen))} | {
            name: sum(getattr(report, name) for report in chosen) / len(chosen)
            for name in ("weight_error", "output_error", "rtn_error")
        }
    return means
