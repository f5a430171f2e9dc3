"""Standard metrics of the sets of a score: measured, and as lines of its report."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL.Image import Image

from loragraft.evaluation.standard import METRICS, Result, StandardMetrics, header

PAIR = ("base", "adapter")


def measure_sets(
    metrics: StandardMetrics,
    images: Mapping[str, Sequence[Path]],
    captions: Sequence[str],
    references: Sequence[Path],
    read_reference: Callable[[Path], Image],
    how: str,
) -> dict[str, list[dict[str, Any]]]:
    """Set -> results. Image i of a set is scored with caption i, modulo their number; of a `-short` set too, which was
    asked for less.

    Pairs are `adapter` against `base`, equal prompts and seeds: how far the adapter moves the picture.
    """
    found: dict[str, list[Result]] = {}
    for name, paths in images.items():
        if name.startswith("drift-"):
            continue
        asked = [captions[i % len(captions)] for i in range(len(paths))]
        found[name] = metrics.against_references(paths, references, read_reference, how)
        found[name] += metrics.with_prompts(paths, asked)
    if metrics.of_kind("pairs"):
        found["adapter against base"] = metrics.paired(*(images[name] for name in PAIR))
    return {name: [result.to_dict() for result in results] for name, results in found.items() if results}


def lines(standard: Mapping[str, Sequence[Mapping[str, Any]]], label: Callable[[str], str]) -> list[str]:
    """One table per kind of comparison: rows are sets, heads say metric, variant and N; notes below."""
    out: list[str] = []
    for tables in ([name for name in standard if name not in _pairs(standard)], _pairs(standard)):
        heads = dict.fromkeys(_column(entry) for name in tables for entry in standard[name])
        if not heads:
            continue
        out += ["", "| set | " + " | ".join(header(*head) for head in heads) + " |", "|---" * (len(heads) + 1) + "|"]
        for name in tables:
            own = {_column(entry): _result(entry).cell for entry in standard[name]}
            shown = name if name in _pairs(standard) else label(name)
            out.append(f"| {shown} | " + " | ".join(own.get(head, "") for head in heads) + " |")
    every = [entry for entries in standard.values() for entry in entries]
    notes = dict.fromkeys(f"{METRICS[entry['metric']].title}: {note}" for entry in every for note in entry["notes"])
    return [*out, *([""] if notes else []), *(f"Note: {note}." for note in notes)]


def _pairs(standard: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    return [name for name, entries in standard.items() if METRICS[entries[0]["metric"]].kind == "pairs"]


def _column(entry: Mapping[str, Any]) -> tuple[str, int, int]:
    return entry["metric"], entry["n"], entry["references"]


def _result(entry: Mapping[str, Any]) -> Result:
    return Result(**{key: value for key, value in entry.items() if key != "header"})
