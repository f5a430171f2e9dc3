"""ComfyUI's `svdquant_w4a4` (and `awq_w4a16`) layers, read and written: one safetensors file, layers marked one by one.

| tensor of a layer | row-major | tile-packed | |
|---|---|---|---|
| comfy_quant | uint8 JSON {format, layout, act_unsigned, ...} | | which of the two, and what the codes mean |
| weight | int8 [N, K/2] | [N/128, K/64, 32, 128] | two codes a byte, low nibble = even column |
| weight_scale | [K/64, N] | [N/128, K/64, 128] | |
| smooth_factor | [K] | [K] | x is divided by it |
| proj_down, proj_up | [K, R], [N, R] | [K, R], [N/128, R, 128] | the branch, on raw x |
| weight_zero (awq_w4a16) | [K/64, N] | | the center: W = (c - 8) weight_scale + weight_zero |

Two spellings of the same are about: those above (comfy-quants, ComfyUI's pull request 13580), which are written, and
weight_proj_down, weight_proj_up, weight_smooth_factor, weight_zeros (comfy-kitchen's `state_dict_tensors`); both are read.
Layers are named by their diffusers path, or for FLUX as ComfyUI names them (`flux_names`); both are read. The model's configuration is put into the header (`config`), where ComfyUI has no
use for it. Our W4A16 layers keep the lowest value z of a group, these files its center z + 8 s in the dtype of s: writing
rounds it (by 2^-9 of itself), reading is exact. comfy-kitchen `backends/eager/{svdquant,awq}.py`, comfy-quants
`docs/formats/`.
"""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from loragraft.kernels.layout import padded
from loragraft.quantization.checkpoint import CONFIG_NAME, check_saveable, quantized_layers
from loragraft.quantization.dialects import packing
from loragraft.quantization.dialects.assembly import Opened, Progress, bias_or_none, empty_model, parse_json, read_json
from loragraft.quantization.dialects.files import FLOATS, SIXTEEN_BIT, TensorFiles
from loragraft.quantization.dialects.flux_names import (
    EXCHANGED,
    FIRST,
    exchange_halves,
    flux_linears,
    flux_norms,
    fuse_rows,
)
from loragraft.quantization.dialects.nunchaku_layers import Part, w4a4_layer
from loragraft.quantization.dialects.nunchaku_lite import check_interchange
from loragraft.quantization.linear import SVDQuantLinear
from loragraft.quantization.tensor_file import CheckpointError, write_tensors

W4A4, W4A16, MARK = "svdquant_w4a4", "awq_w4a16", "comfy_quant"
TILES = "kitchen_tile_packed_w4a4"
KITCHEN = {
    "proj_down": "weight_proj_down",
    "proj_up": "weight_proj_up",
    "smooth_factor": "weight_smooth_factor",
    "weight_zero": "weight_zeros",
}
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
Layout = Literal["row-major", "tile-packed"]
Names = Literal["diffusers", "flux"]


def is_comfyui(files: TensorFiles) -> bool:
    """Whether a file marks layers the way ComfyUI does."""
    return any(name.endswith(f".{MARK}") for name in files.names)


def open_comfyui(path: Path, config: dict[str, Any] | None = None) -> Opened:
    """Open a file. `config` is the diffusers configuration where neither the header nor a config.json beside it has one.

    Raises CheckpointError: no marked layer, an unknown format, no configuration, damaged files.
    """
    files = TensorFiles([path])
    if not is_comfyui(files):
        raise CheckpointError(f"{path}: no tensor named *.{MARK}; this is no quantized file of ComfyUI's")
    opened = Opened("comfyui", files, _config(path, files) if config is None else dict(config))
    prefix = next(prefix for prefix in PREFIXES if any(name.startswith(prefix) for name in files.names))
    marked: dict[str, tuple[str, dict[str, Any]]] = {}
    for name in files.names:
        if name.endswith(f".{MARK}"):
            stem = name.removesuffix(f".{MARK}")
            mark = files.read(name, None, (torch.uint8,))
            described = parse_json(bytes(mark.tolist()).decode("utf-8", "replace"), files.where(name))
            if described.get("format") not in (W4A4, W4A16):
                raise CheckpointError(
                    f"{files.where(name)}: format {described.get('format')!r}; known: {W4A4}, {W4A16}"
                )
            marked[stem.removeprefix(prefix)] = stem, described
    if any(name.removeprefix(prefix).startswith(FIRST) for name in files.names):
        _open_flux(opened, prefix, marked)
        return opened
    opened.dense = {name.removeprefix(prefix): name for name in files.names}
    for layer, (stem, described) in marked.items():
        opened.layers[layer] = partial(READERS[described["format"]], files, stem, described)
    return opened


def _open_flux(opened: Opened, prefix: str, marked: dict[str, tuple[str, dict[str, Any]]]) -> None:
    """The parts of every fused linear, quantized or not, by their rows."""
    files, model = opened.files, empty_model(opened.config, opened.source)
    if not isinstance(model, FluxTransformer2DModel):
        raise CheckpointError(f"{opened.source}: layers of FLUX, but the configuration is of {type(model).__name__}")
    opened.dense = {ours: prefix + theirs for theirs, ours in flux_norms(opened.config).items()}
    for theirs, paths in flux_linears(opened.config).items():
        sizes = [model.get_submodule(path).out_features for path in paths]
        for i, path in enumerate(paths):
            rows = slice(sum(sizes[:i]), sum(sizes[: i + 1]))
            if theirs not in marked:
                for leaf in ("weight", "bias"):
                    name = f"{prefix}{theirs}.{leaf}"
                    opened.dense[f"{path}.{leaf}"] = partial(_read_dense_rows, files, name, rows, theirs == EXCHANGED)
                continue
            stem, described = marked[theirs]
            if len(paths) == 1:
                opened.layers[path] = partial(READERS[described["format"]], files, stem, described)
            elif described["format"] == W4A4:
                opened.layers[path] = partial(_read_rows, files, stem, described, rows, sum(sizes))
            else:
                raise CheckpointError(f"{files.where(f'{stem}.{MARK}')}: a fused layer in {W4A16}, which is not read")


def _read_dense_rows(files: TensorFiles, name: str, rows: slice, exchanged: bool) -> Tensor:
    whole = files.read(name)
    return (exchange_halves(whole) if exchanged else whole)[rows].clone()


def _read_rows(
    files: TensorFiles, stem: str, described: dict[str, Any], rows: slice, total: int, linear: nn.Linear
) -> SVDQuantLinear:
    """One part of a fused layer; ranks that do nothing in its rows belong to the others and are left out."""
    part = _read_part(files, stem, described, linear.in_features, total).rows(rows.start, rows.stop)
    used = part.lora_up.count_nonzero(dim=0) > 0
    part = replace(part, lora_down=part.lora_down[used], lora_up=part.lora_up[:, used])
    unsigned_from = 0 if described.get("act_unsigned", False) else None
    return w4a4_layer(part, linear, files.where(f"{stem}.bias"), unsigned_from=unsigned_from)


def _config(path: Path, files: TensorFiles) -> dict[str, Any]:
    if "config" in files.metadata:
        config = parse_json(files.metadata["config"], f"{path}: `config` in the header")
    elif (path.parent / CONFIG_NAME).is_file():
        config = read_json(path.parent / CONFIG_NAME)
    else:
        raise CheckpointError(
            f"{path}: no `config` in its header and no {CONFIG_NAME} beside it: put the model's there"
        )
    config.pop("quantization_config", None)
    return config


def _name(files: TensorFiles, stem: str, leaf: str) -> str:
    """The tensor's name in the spelling that the file uses."""
    kitchen = f"{stem}.{KITCHEN.get(leaf, leaf)}"
    return kitchen if kitchen in files else f"{stem}.{leaf}"


def _read_w4a4(files: TensorFiles, stem: str, described: dict[str, Any], linear: nn.Linear) -> SVDQuantLinear:
    part = _read_part(files, stem, described, linear.in_features, linear.out_features)
    unsigned_from = 0 if described.get("act_unsigned", False) else None
    return w4a4_layer(part, linear, files.where(f"{stem}.bias"), unsigned_from=unsigned_from)


def _read_part(files: TensorFiles, stem: str, described: dict[str, Any], K: int, N: int) -> Part:
    rank = files.shape(_name(files, stem, "proj_down"))[-1]
    where, groups = files.where(f"{stem}.weight"), K // packing.GROUP
    if K % packing.GROUP:
        raise CheckpointError(f"{where}: K = {K} is not divisible by 64")
    if described.get("lowrank_branch_input_basis", "raw") != "raw" or not described.get(
        "proj_down_smooth_folded", True
    ):
        raise CheckpointError(f"{files.where(f'{stem}.{MARK}')}: its branch does not read raw x, which is not read")
    if described.get("layout") == TILES:
        tiles = packing.round_up(N, packing.TILE) // packing.TILE
        weight = packing.unpack_tiles(files.read(f"{stem}.weight", (tiles, groups, 32, packing.TILE), (torch.int8,)))
        scale = packing.unpack_tile_columns(
            files.read(f"{stem}.weight_scale", (tiles, groups, packing.TILE), SIXTEEN_BIT)
        )
        up = packing.unpack_tile_columns(files.read(_name(files, stem, "proj_up"), (tiles, rank, packing.TILE))).T
    else:
        weight = files.read(f"{stem}.weight", (N, K // 2), (torch.int8,)).view(torch.uint8)
        scale = files.read(f"{stem}.weight_scale", (groups, N), SIXTEEN_BIT)
        up = files.read(_name(files, stem, "proj_up"), (N, rank))
    return Part(
        codes=weight[:N], wscale=scale[:, :N], smooth=files.read(_name(files, stem, "smooth_factor"), (K,), SIXTEEN_BIT),
        lora_down=files.read(_name(files, stem, "proj_down"), (K, rank)).T, lora_up=up[:N],
        bias=files.read(f"{stem}.bias", (N,)) if f"{stem}.bias" in files else None,
    )  # fmt: skip


def _read_w4a16(files: TensorFiles, stem: str, described: dict[str, Any], linear: nn.Linear) -> SVDQuantLinear:
    K, N, Kp = linear.in_features, linear.out_features, padded(linear.in_features)
    if K % packing.GROUP or described.get("group_size", 64) != 64:
        raise CheckpointError(f"{files.where(f'{stem}.weight')}: only groups of 64 that divide K = {K} are read")
    groups = K // packing.GROUP
    weight = files.read(f"{stem}.weight", (N, K // 2), (torch.int8,)).view(torch.uint8)
    scale = files.read(f"{stem}.weight_scale", (groups, N), SIXTEEN_BIT)
    center = files.read(_name(files, stem, "weight_zero"), (groups, N), SIXTEEN_BIT)
    tensors = {
        "qweight": packing.pad_to(weight, (N, Kp // 2)),
        "wscale": packing.pad_to(scale, (Kp // packing.GROUP, N), 1),
        "wzero": packing.pad_to(center.float() - 8 * scale.float(), (Kp // packing.GROUP, N)),
        "lora_down": torch.zeros(0, K, dtype=scale.dtype), "lora_up": torch.zeros(N, 0, dtype=scale.dtype),
    }  # fmt: skip
    if f"{stem}.bias" in files:
        bias = bias_or_none(linear, files.read(f"{stem}.bias", (N,), FLOATS), files.where(f"{stem}.bias"))
        tensors |= {} if bias is None else {"bias": bias}
    elif linear.bias is not None:
        raise CheckpointError(f"{files.where(f'{stem}.bias')} is missing")
    return SVDQuantLinear(K, N, "w4a16", tensors)


READERS = {W4A4: _read_w4a4, W4A16: _read_w4a16}


def save_comfyui(
    model: nn.Module, path: Path | str, *, layout: Layout = "row-major", names: Names = "diffusers", overwrite: bool = False,
    bake_grafts: bool = False, progress: Progress | None = None,
) -> Path:  # fmt: skip
    """Write a W4A4 (and W4A16) model to one file; it appears complete or not at all.

    names: of layers, diffusers', or those of ComfyUI's FLUX, whose fused layers want parts of one smoothing factor. Raises ValueError naming the layer that the format cannot hold (W4A8, rotated, unsigned in part, K not divisible by 64,
    tile-packed with N not divisible by 128), and as save_quantized does for adapters; FileExistsError unless `overwrite`.
    """
    check_saveable(model, bake_grafts)
    path, layers = Path(path), quantized_layers(model)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; choose another name or pass overwrite=True")
    if not layers:
        raise ValueError("the model has no quantized layer: there is nothing to write for ComfyUI")
    for name, layer in layers.items():
        check_interchange(name, layer, "ComfyUI")
    if names == "flux":
        tensors, written = _flux_tensors(model, layers)
    else:
        tensors = {n: t for n, t in model.state_dict().items() if n.rpartition(".")[0] not in layers}
        written = layers
    for done, (name, layer) in enumerate(written.items(), start=1):
        pack = _pack_w4a4 if layer.numerics == "w4a4" else _pack_w4a16
        tensors |= {f"{name}.{leaf}": tensor.contiguous() for leaf, tensor in pack(name, layer, layout).items()}
        if progress is not None:
            progress(done, len(written), name)
    config = json.loads(model.to_json_string())  # type: ignore[operator]  # diffusers' ConfigMixin
    config.pop("_name_or_path", None)
    config.pop("quantization_config", None)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, tensors, {"config": json.dumps(config)})  # safetensors writes several keys in any order
    return path


def _flux_tensors(
    model: nn.Module, layers: dict[str, SVDQuantLinear]
) -> tuple[dict[str, Tensor], dict[str, SVDQuantLinear]]:
    """(16-bit tensors, quantized layers) under the names of ComfyUI's FLUX. Raises ValueError as `fuse_rows` does."""
    if not isinstance(model, FluxTransformer2DModel):
        raise ValueError(f"names of FLUX for a {type(model).__name__}; write diffusers' names (--to comfyui)")
    state, written = model.state_dict(), {}
    tensors = {theirs: state[ours] for theirs, ours in flux_norms(model.config).items()}
    for theirs, paths in flux_linears(model.config).items():
        quantized = {path: layers[path] for path in paths if path in layers}
        if 0 < len(quantized) < len(paths):
            raise ValueError(
                f"of {', '.join(paths)}, one layer ({theirs}) in ComfyUI, only {', '.join(quantized)} are quantized"
            )
        if quantized:
            written[theirs] = fuse_rows(quantized, theirs)
            continue
        for leaf in ("weight", "bias"):
            rows = torch.cat([state[f"{path}.{leaf}"] for path in paths])
            tensors[f"{theirs}.{leaf}"] = exchange_halves(rows) if theirs == EXCHANGED else rows
    return tensors, written


def _marked(described: dict[str, Any]) -> Tensor:
    return torch.tensor(list(json.dumps(described).encode()), dtype=torch.uint8)


def _groups(name: str, layer: SVDQuantLinear) -> int:
    if layer.in_features % packing.GROUP:
        raise ValueError(f"layer {name!r} has K = {layer.in_features}; ComfyUI needs K % 64 == 0")
    return layer.in_features // packing.GROUP


def _pack_w4a4(name: str, layer: SVDQuantLinear, layout: Layout) -> dict[str, Tensor]:
    K, N, groups = layer.in_features, layer.out_features, _groups(name, layer)
    assert layer.smooth is not None  # w4a4
    weight, scale, up = layer.qweight[:, : K // 2], layer.wscale[:groups], layer.lora_up
    described: dict[str, Any] = {"format": W4A4}
    if layout == "tile-packed":
        if N % packing.TILE:
            raise ValueError(f"layer {name!r} has N = {N}; ComfyUI's tile pack needs N % 128 == 0, row-major does not")
        described["layout"] = TILES
        packed = {
            "weight": packing.pack_tiles(weight.contiguous()),
            "weight_scale": packing.pack_tile_columns(scale),
            "proj_up": packing.pack_tile_columns(up.T),
        }
    else:
        packed = {"weight": weight.view(torch.int8), "weight_scale": scale, "proj_up": up}
    described |= {
        "act_unsigned": layer.act_unsigned, "lowrank_branch_input_basis": "raw", "proj_down_smooth_folded": True
    }  # fmt: skip
    packed |= {"smooth_factor": layer.smooth, "proj_down": layer.lora_down.T, MARK: _marked(described)}
    return packed if layer.bias is None else packed | {"bias": layer.bias}


def _pack_w4a16(name: str, layer: SVDQuantLinear, layout: Layout) -> dict[str, Tensor]:
    groups = _groups(name, layer)
    scale = layer.wscale[:groups]
    center = (layer.wzero[:groups].float() + 8 * scale.float()).to(scale.dtype)
    packed = {
        "weight": layer.qweight[:, : layer.in_features // 2].view(torch.int8),
        "weight_scale": scale, "weight_zero": center, MARK: _marked({"format": W4A16, "group_size": 64}),
    }  # fmt: skip
    return packed if layer.bias is None else packed | {"bias": layer.bias}
