"""An adapter trained at one precision and run at another: the table of benchmarks/adapters.py, and what people do instead of grafting.

    transfer           trained on x run on, each cell one set of pictures of held-out captions, scored by KID to the real ones;
                       "none" is the base without an adapter
    merge_requantize   the 16-bit adapter merged into the 16-bit weights, which are then quantized again: by plain rounding, by
                       SVDQuant at the base's rank R, and by SVDQuant at R + r, the rank that a graft has in all

Equal prompts, seeds and settings in every cell, so that differences are paired.
"""

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from convergence import domain_set, real_features
from torch import nn

from loragraft.adapters.checkpoint import Adapter
from loragraft.adapters.graft import graft
from loragraft.adapters.opening import open_run
from loragraft.backbones.load import find_spec, load_16bit, load_backbone, quantize_base
from loragraft.backbones.spec import Backbone, Profile
from loragraft.data.cache import default_cache_root
from loragraft.disk import replacing_folder
from loragraft.evaluation import measure
from loragraft.evaluation.features import FeatureStore
from loragraft.evaluation.image_sets import ImageSet, render_missing
from loragraft.evaluation.metrics import kernel_distance_change, kernel_distance_interval
from loragraft.quantization.checkpoint import load_quantized, recorded_base_id
from loragraft.quantization.ledger import build_ledger
from loragraft.quantization.settings import Smoothing
from loragraft.recipes.schema import Recipe

PRECISIONS = {"W4A8": "native", "W4A4": "interchange", "NF4": "nf4", "16-bit": "16bit"}
SIXTEEN, NONE, BASE_RANK = "16-bit", "none", 16


@dataclass(frozen=True)
class Method:
    """How merged weights are quantized again."""

    run_on: str
    """The graft that it is compared with: the 16-bit adapter at this precision."""
    rank: int
    """Of the SVD branch without what an adapter's rank adds; 0: none."""
    widened: bool = False
    """Whether the adapter's rank is added."""
    plain: bool = False
    """Rounding to nearest, without smoothing."""

    @property
    def profile(self) -> Profile:
        return "native" if self.run_on == "W4A8" else "interchange"


METHODS = {
    "RTN W4A4": Method("W4A4", 0, plain=True),
    "SVDQuant W4A4, rank R": Method("W4A4", BASE_RANK),
    "SVDQuant W4A4, rank R + r": Method("W4A4", BASE_RANK, widened=True),
    "SVDQuant W4A8, rank R": Method("W4A8", BASE_RANK),
    "SVDQuant W4A8, rank R + r": Method("W4A8", BASE_RANK, widened=True),
}


def run_folder(args: Namespace, recipe: str, precision: str) -> Path:
    """Where training at this precision writes."""
    found: Path = args.work / "runs" / recipe / PRECISIONS[precision]
    return found


def trained(args: Namespace, recipe: str) -> dict[str, tuple[Adapter, Recipe]]:
    """Precision -> (adapter, recipe). Raises ValueError for an unfinished run."""
    return {precision: open_run(run_folder(args, recipe, precision)) for precision in args.precisions}


def onto(adapter: Adapter, base_id: str) -> Adapter:
    """The same for another base: the one place where that may be, as the transfer is what is measured."""
    return replace(adapter, metadata={**adapter.metadata, "base_id": base_id})


def render_transfer(args: Namespace, recipe: str, device: str) -> dict[str, dict[str, str]]:
    """Trained on -> run on -> folder, relative to --work; draws what is missing."""
    runs = trained(args, recipe)
    folders: dict[str, dict[str, str]] = {NONE: {}, **{precision: {} for precision in runs}}
    for run_on in args.precisions:
        settings = runs[run_on][1]
        backbone = load_backbone(settings.base, PRECISIONS[run_on], device, default_cache_root())  # type: ignore[arg-type]
        sets = []
        for name, (adapter, _) in runs.items():
            sets.append(domain_set(name, onto(adapter, backbone.base_id), settings, args.images))
        sets.append(replace(sets[0], name=NONE, adapter=None))
        for name, folder in _drawn(args, backbone, sets).items():
            folders[name][run_on] = folder
    return folders


def render_merged(args: Namespace, recipe: str, device: str) -> dict[str, str]:
    """Method -> folder, relative to --work; merges, quantizes and draws what is missing. None without a 16-bit run."""
    if SIXTEEN not in args.precisions:
        return {}
    adapter, settings = open_run(run_folder(args, recipe, SIXTEEN))
    folders = {}
    for name in args.methods:
        backbone = requantized(args, recipe, name, adapter, settings, device)
        entry = replace(domain_set("merged", adapter, settings, args.images), adapter=None)
        folders[name] = _drawn(args, backbone, [entry])["merged"]
    return folders


def _drawn(args: Namespace, backbone: Backbone, sets: list[ImageSet]) -> dict[str, str]:
    drawn = render_missing(backbone, sets, args.work / "images")
    return {name: str(folder.relative_to(args.work)) for name, folder in drawn.items()}


def requantized(args: Namespace, recipe: str, name: str, adapter: Adapter, settings: Recipe, device: str) -> Backbone:
    """The base with `adapter` merged into its 16-bit weights and quantized again; kept in --work."""
    method, spec = METHODS[name], find_spec(settings.base)
    rank = method.rank + (adapter.rank if method.widened else 0)
    smoothing: Smoothing = "none" if method.plain else args.smoothing
    merged = args.work / "merged" / recipe / "16bit"
    folder = args.work / "merged" / recipe / f"{method.profile}-{smoothing}-rank{rank}"
    if not merged.exists():
        with replacing_folder(merged, overwrite=False) as scratch:
            merge(load_16bit(spec), adapter).save_pretrained(scratch)  # type: ignore[operator]
    if not folder.exists():
        changed = replace(spec, transformer_16bit=merged)
        quantize_base(changed, method.profile, folder, device, smoothing=smoothing, rank=rank)
    backbone = load_backbone(settings.base, "16bit", device, default_cache_root())
    transformer = load_quantized(folder, spec.transformer_class)
    nn.Module.to(transformer, device=backbone.device, dtype=backbone.dtype)
    return replace(
        backbone, profile=method.profile, transformer=transformer, base_id=recorded_base_id(transformer),
        ledger=build_ledger(transformer),
    )  # fmt: skip


def merge(transformer: nn.Module, adapter: Adapter) -> nn.Module:
    """W + B A in place of every W, added in float32 and rounded once to W's dtype: what people ship as a merged model."""
    graft(transformer, adapter, any_base=True)
    return transformer


def score(
    args: Namespace, recipe: str, cells: Mapping[str, Mapping[str, list[Path]]], merged: Mapping[str, list[Path]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(transfer, merge_requantize) of one recipe: KID with intervals, and paired differences to what each is compared with.

    A cell of the table is compared with the adapter that was trained where it runs, a merged model with the graft.
    """
    settings = open_run(run_folder(args, recipe, args.precisions[0]))[1]
    store = FeatureStore(args.work / "features", "cuda" if torch.cuda.is_available() else "cpu")
    real = real_features(store, settings)

    def features(files: list[Path]) -> torch.Tensor:
        return store.of(files, measure.read_image, measure.GENERATED)

    def compared(files: list[Path], with_files: list[Path] | None) -> dict[str, Any]:
        own = features(files)
        entry: dict[str, Any] = {"images": len(files), "kid_lite0": asdict(kernel_distance_interval(own, real))}
        if with_files is not None and with_files != files:
            entry["kid_change"] = asdict(kernel_distance_change(features(with_files), own, real))
        return entry

    table = {
        name: {run_on: compared(files, cells[run_on][run_on]) for run_on, files in row.items()}
        for name, row in cells.items()
    }
    grafts = cells.get(SIXTEEN, {})
    against = {name: grafts.get(METHODS[name].run_on) for name in merged}
    return table, {name: compared(files, against[name]) for name, files in merged.items()}


def tables(result: Mapping[str, Any]) -> str:
    """Markdown, both tables of every recipe."""
    lines: list[str] = []
    for recipe, table in result["transfer"].items():
        columns = list(table[NONE])
        lines += [f"| {recipe}: trained on, KID run on | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        lines += [f"| {name} | {' | '.join(_cell(row[run_on]) for run_on in columns)} |" for name, row in table.items()]
        merged = result["merge_requantize"][recipe]
        if merged:
            lines += [
                "",
                f"| {recipe}: 16-bit adapter merged, quantized again | KID | change against the graft |",
                "|---|---|---|",
            ]
        for name, entry in merged.items():
            change = entry.get("kid_change")
            shown = f"{change['value']:+.4f} ({change['low']:+.4f} to {change['high']:+.4f})" if change else ""
            lines.append(f"| {name} | {_cell(entry)} | {shown} |")
        lines.append("")
    return "\n".join(lines)


def _cell(entry: Mapping[str, Any]) -> str:
    kid = entry["kid_lite0"]
    return f"{kid['value']:.4f} ({kid['low']:.4f} to {kid['high']:.4f})"
