"""Rows of model x precision x method with scores, time and memory, as one table; from JSON files, one row or a list each.

    {"model": "flux1-dev", "precision": "w4a8", "method": "lora", "device": "NVIDIA H100", "seconds_per_image": 5.2,
     "peak_gib": 9.8, "results": [a `standard.Result` as JSON, ...]}

A column is one metric in one variant at one N with one set of weights. Rows that were measured otherwise are refused, not put
side by side: FID falls as N grows, and differs between resizings.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loragraft.evaluation.standard import METRICS, Result

TEXT, NUMBERS = ("model", "precision", "method", "device"), ("seconds_per_image", "peak_gib")


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was run, what it cost and how good it was."""

    model: str
    precision: str
    method: str
    device: str
    seconds_per_image: float | None
    """Median time of one image; None = not measured."""
    peak_gib: float | None
    """`torch.cuda.max_memory_allocated` in GiB; None = not measured."""
    results: tuple[Result, ...]

    @property
    def name(self) -> str:
        return f"{self.model} / {self.precision} / {self.method}"

    def to_dict(self) -> dict[str, Any]:
        plain = {key: getattr(self, key) for key in (*TEXT, *NUMBERS)}
        return {**plain, "results": [result.to_dict() for result in self.results]}


def read_rows(paths: Sequence[Path]) -> list[Row]:
    """Raises ValueError naming the file and the key that is missing or unknown."""
    rows = []
    for path in paths:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        rows += [_row(entry, path) for entry in (content if isinstance(content, list) else [content])]
    return rows


def _row(entry: Mapping[str, Any], path: Path) -> Row:
    known = {*TEXT, *NUMBERS, "results"}
    if not isinstance(entry, Mapping) or set(entry) != known:
        found = sorted(entry) if isinstance(entry, Mapping) else type(entry).__name__
        raise ValueError(f"{path}: a row has the keys {', '.join(sorted(known))}; found {found}")
    return Row(**{**entry, "results": tuple(_result(result, path) for result in entry["results"])})


def _result(entry: Mapping[str, Any], path: Path) -> Result:
    fields = {key: value for key, value in entry.items() if key != "header"}
    if entry.get("metric") not in METRICS:
        raise ValueError(f"{path}: there is no metric {entry.get('metric')!r}; there are {', '.join(METRICS)}")
    try:
        result = Result(**{**fields, "notes": tuple(entry.get("notes", ()))})
    except TypeError as error:
        raise ValueError(f"{path}: {entry['metric']}: {error}") from error
    if entry.get("header", result.header) != result.header:
        raise ValueError(
            f"{path}: {entry['metric']} says {entry['header']!r}, which is another metric than {result.header!r}"
        )
    return result


def columns(rows: Sequence[Row]) -> dict[str, Result]:
    """Metric -> a result that stands for the column. Raises ValueError where two rows measured it at another N, against
    another number of real images or with other weights."""
    found: dict[str, tuple[Row, Result]] = {}
    for row in rows:
        for result in row.results:
            first, other = found.setdefault(result.metric, (row, result))
            if (result.n, result.references) != (other.n, other.references):
                raise ValueError(
                    f"{result.metric} of {row.name} is {result.header}, of {first.name} {other.header}: scores at different N do "
                    "not compare. Measure both at one N, or table them apart"
                )
            if dict(result.weights) != dict(other.weights):
                raise ValueError(
                    f"{result.metric} of {row.name} and of {first.name} were computed with different weights"
                )
    return {metric: found[metric][1] for metric in METRICS if metric in found}


def markdown(rows: Sequence[Row]) -> str:
    """One table, and the notes below it."""
    heads = columns(rows)
    names = ["model", "precision", "method", *(result.header for result in heads.values())]
    lines = ["| " + " | ".join([*names, "s per image", "peak VRAM in GiB", "device"]) + " |"]
    lines.append("|" + "---|" * (len(names) + 3))
    for row in rows:
        own = {result.metric: result.cell for result in row.results}
        cost = [_number(row.seconds_per_image), _number(row.peak_gib)]
        cells = [
            row.model,
            row.precision,
            row.method,
            *(own.get(key, "not measured") for key in heads),
            *cost,
            row.device,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    notes = dict.fromkeys(f"{METRICS[r.metric].title}: {note}" for row in rows for r in row.results for note in r.notes)
    return "\n".join([*lines, *([""] if notes else []), *(f"Note: {note}." for note in notes)])


def as_csv(rows: Sequence[Row]) -> str:
    """One line per row and metric, with everything that its header says."""
    columns(rows)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*TEXT, *NUMBERS, "metric", "header", "n", "references", "value", "low", "high"])
    for row in rows:
        about = [getattr(row, key) for key in (*TEXT, *NUMBERS)]
        for r in row.results:
            writer.writerow([*about, r.metric, r.header, r.n, r.references, r.value, r.low, r.high])
    return buffer.getvalue()


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f}"
