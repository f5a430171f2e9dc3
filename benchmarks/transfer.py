"""An adapter trained at one precision and run at another: the table of benchmarks/adapters.py, and what people do instead of grafting.

    transfer           trained on x run on, each cell one set of pictures of held-out captions, scored by KID to the real ones;
                       "none" is the base without an adapter
    merge_requantize   the 16-bit adapter merged into the 16-bit weights, which are then quantized again: by plain rounding, by
                       SVDQuant at the base's rank R, and by SVDQuant at R + r, the rank that a graft has in all

Equal prompts, seeds and settings in every cell, so that differences are paired.
"""

import re
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pocket_runs import (
    LABELS,
    NONE,
    SIXTEEN,
    device,
    domain_set,
    draw,
    features_of,
    pictures,
    real_features,
    recipe_of,
    render_on,
    run_folder,
)
from torch import nn

from loragraft.adapters.checkpoint import Adapter
from loragraft.adapters.graft import graft
from loragraft.adapters.opening import open_run
from loragraft.backbones.load import BASE_RANK, find_spec, load_16bit, load_backbone, quantize_base
from loragraft.backbones.spec import Backbone, Profile
from loragraft.data.cache import default_cache_root
from loragraft.data.folders import build_once
from loragraft.evaluation.features import FeatureStore
from loragraft.evaluation.metrics import kernel_distance_change, kernel_distance_interval
from loragraft.quantization.checkpoint import load_quantized, recorded_base_id
from loragraft.quantization.ledger import build_ledger
from loragraft.quantization.settings import Smoothing
from loragraft.recipes.schema import Recipe

PRECISIONS = ("W4A8", "W4A4", "NF4", SIXTEEN)


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


def render_transfer(args: Namespace, recipe: str, run_on: str) -> None:
    """One column of the table."""
    render_on(args, recipe, LABELS[run_on], [NONE, *(LABELS[name] for name in args.precisions)])


def render_merged(args: Namespace, recipe: str, name: str) -> None:
    """Merges, quantizes and draws what is missing."""
    adapter, settings = open_run(run_folder(args.work, recipe, LABELS[SIXTEEN]))
    backbone = requantized(args, recipe, name, adapter, settings, device())
    draw(args.work, recipe, slug(name), backbone, [domain_set(NONE, None, settings, args.images)])


def slug(method: str) -> str:
    """A method's name as a file's."""
    return "merged-" + re.sub(r"[^\w+]+", "-", method)


def requantized(args: Namespace, recipe: str, name: str, adapter: Adapter, settings: Recipe, device: str) -> Backbone:
    """The base with `adapter` merged into its 16-bit weights and quantized again; kept in --work."""
    method, spec = METHODS[name], find_spec(settings.base)
    rank = method.rank + (adapter.rank if method.widened else 0)
    smoothing: Smoothing = "none" if method.plain else args.smoothing
    folder = args.work / "merged" / recipe / f"{method.profile}-{smoothing}-rank{rank}"
    merged = build_once(
        args.work / "merged" / recipe / "16bit",
        lambda scratch: merge(load_16bit(spec), adapter).save_pretrained(scratch),  # type: ignore[operator]
    )
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


def score(args: Namespace, recipe: str) -> tuple[dict[str, Any], dict[str, Any], list[Path]]:
    """(transfer, merge_requantize, pictures) of one recipe: KID with intervals, and paired differences to what each is
    compared with.

    A cell of the table is compared with the adapter that was trained where it runs, a merged model with the graft.
    """
    names = {NONE: NONE, **{name: LABELS[name] for name in args.precisions}}
    cells = {
        name: {run_on: pictures(args, recipe, LABELS[run_on], trained) for run_on in args.precisions}
        for name, trained in names.items()
    }
    merged = {name: pictures(args, recipe, slug(name), NONE) for name in methods(args)}
    settings = recipe_of(args.work, recipe, LABELS[args.precisions[0]])
    store = FeatureStore(args.work / "features", device())
    real = real_features(store, settings)

    def compared(files: list[Path], with_files: list[Path] | None) -> dict[str, Any]:
        own = features_of(store, files)
        entry: dict[str, Any] = {"images": len(files), "kid_lite0": asdict(kernel_distance_interval(own, real))}
        if with_files is not None and with_files != files:
            entry["kid_change"] = asdict(kernel_distance_change(features_of(store, with_files), own, real))
        return entry

    table = {
        name: {run_on: compared(files, cells[run_on][run_on]) for run_on, files in row.items()}
        for name, row in cells.items()
    }
    grafts = cells.get(SIXTEEN, {})
    against = {name: grafts.get(METHODS[name].run_on) for name in merged}
    requantized = {name: compared(files, against[name]) for name, files in merged.items()}
    drawn = [path for row in cells.values() for files in row.values() for path in files]
    return table, requantized, drawn + [path for files in merged.values() for path in files]


def methods(args: Namespace) -> list[str]:
    """Those that can be made: all merge a 16-bit run."""
    return list(args.methods) if SIXTEEN in args.precisions else []


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
