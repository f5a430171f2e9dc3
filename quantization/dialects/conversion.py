"""One checkpoint into another dialect, and on request into other numerics: what `loragraft convert` does."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Never, get_args

import torch
from diffusers import FluxTransformer2DModel
from torch import nn
from tqdm import tqdm

from loragraft.quantization.checkpoint import branched_layers, quantized_layers, record_base_id, save_quantized
from loragraft.quantization.dialects.assembly import Progress
from loragraft.quantization.dialects.comfyui import Layout, Names, save_comfyui
from loragraft.quantization.dialects.detection import detect_dialect, load_any
from loragraft.quantization.dialects.flux_names import flux_linears
from loragraft.quantization.dialects.nunchaku_lite import save_lite
from loragraft.quantization.ledger import build_ledger
from loragraft.quantization.names import replace_module
from loragraft.quantization.numerics import Conversion, conversion_table, convert_numerics, sign_activations
from loragraft.quantization.settings import SVDQuantNumerics

Target = Literal["native", "nunchaku-lite", "comfyui", "comfyui-flux"]
TARGETS: tuple[Target, ...] = ("native", "nunchaku-lite", "comfyui", "comfyui-flux")


@dataclass(frozen=True)
class Converted:
    """What was read, what was changed on the way, and every layer as it was written."""

    source_dialect: str
    path: Path
    changes: tuple[Conversion, ...]
    """Layers whose numerics changed; empty where only the format did, which changes no value."""
    ledger_table: str
    dense: tuple[str, ...] = ()
    """Layers that `graft` reached and the target cannot hold so, hence written in 16 bits (`dense_where_grafted`)."""

    def table(self) -> str:
        """The added error per changed layer, or all layers where none was changed."""
        return conversion_table(list(self.changes)) if self.changes else self.ledger_table


def convert_checkpoint(
    source: Path,
    dest: Path,
    to: Target = "native",
    *,
    numerics: Literal["w4a8", "w4a4"] | None = None,
    signed: bool = False,
    layout: Layout = "row-major",
    graft: Callable[[nn.Module], None] | None = None,
    show_progress: bool = True,
) -> Converted:
    """Read `source`, whatever dialect it is in, and write `dest` (a folder; one file for ComfyUI), whole or not at all.

    to: "comfyui" names layers as diffusers does (ComfyUI's names too for Qwen-Image), "comfyui-flux" as ComfyUI's FLUX does;
    with numerics="w4a4" the layers that it fuses get one smoothing factor.
    numerics: convert W4A4 or W4A8 layers to these; signed: give unsigned activations up. Without either every value is
    carried over as it is. graft: called with the model as it will be written but for adapters, to graft them; they become part
    of the base that is written, and no code of it changes. Raises CheckpointError for what cannot be read, ValueError for a `dest` with the
    other's suffix and naming the layer that the target cannot hold, FileExistsError if `dest` exists.
    """
    if to not in TARGETS:
        raise ValueError(f"target {to!r}: expected one of {', '.join(TARGETS)}")
    is_file = to.startswith("comfyui")
    if is_file != (dest.suffix == ".safetensors"):
        wanted = f"a .safetensors file: {dest}.safetensors" if is_file else f"a folder: {dest.with_suffix('')}"
        raise ValueError(f"{dest} is written as {to}, which is {wanted} (--to says what is written)")
    if dest.exists():
        raise FileExistsError(f"{dest} exists; name another place, or move it away")
    dialect = detect_dialect(source)
    with _bar(f"read {dialect}", show_progress) as bar:
        model, _ = load_any(source, _stepping(bar))
    foreign = sorted({layer.numerics for layer in branched_layers(model).values()} - set(get_args(SVDQuantNumerics)))
    if foreign and (to != "native" or numerics is not None):
        raise ValueError(
            f"{source} is {', '.join(foreign)}: only SVDQuant's W4A8, W4A4 and W4A16 are converted; quantize again"
        )
    changes: list[Conversion] = []
    device = "cuda" if torch.cuda.is_available() else None
    if signed:
        with _bar("sign activations", show_progress) as bar:
            changes += sign_activations(model, _stepping(bar), device=device)
    if numerics is not None:
        with _bar(f"convert to {numerics}", show_progress) as bar:
            fused = to == "comfyui-flux" and isinstance(
                model, FluxTransformer2DModel
            )  # others are refused when written
            groups = list(flux_linears(model.config).values()) if fused else []
            changes += convert_numerics(model, numerics, _stepping(bar), device=device, together=groups)
    dense: tuple[str, ...] = ()
    if graft is not None:
        if changes:
            record_base_id(model)  # other codes are another base, which an adapter must be for
        graft(model)
        dense = () if to == "native" else dense_where_grafted(model)
    table, bake = build_ledger(model).table(), graft is not None
    if to == "native":
        save_quantized(model, dest, bake_grafts=bake)
    else:
        with _bar(f"write {to}", show_progress) as bar:
            if to == "nunchaku-lite":
                save_lite(model, dest, bake_grafts=bake, progress=_stepping(bar))
            else:
                names: Names = "flux" if to == "comfyui-flux" else "diffusers"
                step = _stepping(bar)
                save_comfyui(model, dest, layout=layout, names=names, bake_grafts=bake, progress=step)
    return Converted(dialect, dest, tuple(changes), table, dense)


def dense_where_grafted(model: nn.Module) -> tuple[str, ...]:
    """Turn grafted W4A16 layers into 16-bit ones, W = deq(q) + U D + w B A rounded once: the interchange files give them no
    branch. Returns their paths. Nothing is quantized again."""
    found = {p: m for p, m in quantized_layers(model).items() if m.numerics == "w4a16" and m.rank != m.base_rank}
    for path, layer in found.items():
        dtype = layer.wscale.dtype
        linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        linear.weight = nn.Parameter(layer.dequantized_weight(dtype), requires_grad=False)
        if layer.bias is not None:
            linear.bias = nn.Parameter(layer.bias.to(dtype), requires_grad=False)
        replace_module(model, path, linear)
    return tuple(found)


def run_convert(args: Namespace) -> int:
    """The verb: converts as its options say and prints the table; options are those of `convert_checkpoint`."""
    done = convert_checkpoint(
        Path(args.source), Path(args.dest), args.to, numerics=args.numerics, signed=args.signed, layout=args.layout
    )
    print(f"{done.table()}\n{args.source} ({done.source_dialect}) as {args.to}: {done.path}")
    return 0


def _bar(text: str, shown: bool) -> "tqdm[Never]":
    return tqdm(desc=text, unit="layer", disable=not shown, leave=False)


def _stepping(bar: "tqdm[Never]") -> Progress:
    def step(done: int, total: int, _path: str) -> None:
        bar.total = total
        bar.update(done - bar.n)

    return step
