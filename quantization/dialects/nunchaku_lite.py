"""diffusers' Nunchaku Lite, read and written: a model folder whose config.json names the packed layers.

quantization_config = {quant_method: "nunchaku_lite", compute_dtype, svdq_w4a4: {precision, group_size, rank, targets},
awq_w4a16: {precision, group_size, targets}}. Module names are diffusers' own (q, k, v apart, proj_out whole, adaLN rows in
the model's order), the layers Nunchaku's v2 tensors (`nunchaku_layers`). One rank for all W4A4 layers, signed activations
only, N divisible by 128 and K by 128, no padding in the shapes. diffusers `quantizers/nunchaku/utils.py`.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loragraft.disk import replacing_folder
from loragraft.quantization.checkpoint import CONFIG_NAME, WEIGHTS_NAME, check_saveable, quantized_layers
from loragraft.quantization.dialects import packing
from loragraft.quantization.dialects.assembly import Opened, Progress, read_json
from loragraft.quantization.dialects.files import TensorFiles
from loragraft.quantization.dialects.nunchaku_layers import read_awq, read_part, w4a4_layer
from loragraft.quantization.linear import SVDQuantLinear
from loragraft.quantization.tensor_file import CheckpointError, write_tensors

QUANT_METHOD = "nunchaku_lite"
SECTIONS = {"svdq_w4a4": "w4a4", "awq_w4a16": "w4a16"}


def open_lite(folder: Path) -> Opened:
    """Open a Nunchaku Lite folder. Raises CheckpointError: another method, NVFP4, no targets, damaged files."""
    config = read_json(folder / CONFIG_NAME)
    block = config.pop("quantization_config", None) or {}
    if block.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(
            f"{folder / CONFIG_NAME}: quant_method is {block.get('quant_method')!r}, not {QUANT_METHOD!r}"
        )
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise CheckpointError(f"{folder}: no safetensors file there")
    opened = Opened("nunchaku-lite", TensorFiles(paths), config)
    for section, numerics in SECTIONS.items():
        described = block.get(section)
        if described is None:
            continue
        if described.get("precision") != "int4" or described.get("group_size") != 64:
            raise CheckpointError(
                f"{folder / CONFIG_NAME}: {section} has precision {described.get('precision')!r} in groups of "
                f"{described.get('group_size')!r}; only int4 in groups of 64 is read"
            )
        read = _read_w4a4 if numerics == "w4a4" else _read_w4a16
        for path in described.get("targets", []):
            opened.layers[path] = partial(read, opened.files, path)
    if not opened.layers:
        raise CheckpointError(f"{folder / CONFIG_NAME}: quantization_config names no targets")
    return opened


def _read_w4a4(files: TensorFiles, path: str, linear: nn.Linear) -> SVDQuantLinear:
    part = read_part(files, path, linear.in_features, linear.out_features)
    return w4a4_layer(part, linear, files.where(f"{path}.bias"))


def _read_w4a16(files: TensorFiles, path: str, linear: nn.Linear) -> SVDQuantLinear:
    return read_awq(files, path, linear)


def save_lite(
    model: nn.Module, folder: Path | str, *, overwrite: bool = False, bake_grafts: bool = False,
    progress: Progress | None = None,
) -> Path:  # fmt: skip
    """Write a W4A4 (and W4A16) model as Nunchaku Lite; the folder appears complete or not at all.

    Ranks are padded to the largest one with zeros, which changes no result. Raises ValueError naming the layer that the
    format cannot hold (W4A8, rotated, unsigned, sizes not divisible by 128), and as save_quantized does for adapters;
    FileExistsError unless `overwrite`.
    """
    check_saveable(model, bake_grafts)
    folder, layers = Path(folder), quantized_layers(model)
    targets: dict[str, list[str]] = {section: [] for section in SECTIONS}
    for path, layer in layers.items():
        check_interchange(path, layer, "Nunchaku Lite")
        targets["svdq_w4a4" if layer.numerics == "w4a4" else "awq_w4a16"].append(path)
    ranks = [layer.rank for layer in layers.values() if layer.numerics == "w4a4"]
    if not ranks:
        raise ValueError("Nunchaku Lite holds W4A4 layers, and this model has none")
    rank = max(packing.RANK_TILE, packing.round_up(max(ranks), packing.RANK_TILE))
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name.rpartition(".")[0] not in layers:
            tensors[name] = tensor
    for done, (path, layer) in enumerate(layers.items(), start=1):
        packed = _pack_w4a4(path, layer, rank) if layer.numerics == "w4a4" else _pack_w4a16(path, layer)
        tensors |= {f"{path}.{name}": tensor.contiguous() for name, tensor in packed.items()}
        if progress is not None:
            progress(done, len(layers), path)
    block: dict[str, Any] = {"quant_method": QUANT_METHOD, "compute_dtype": _compute_dtype(layers)}
    block["svdq_w4a4"] = {"precision": "int4", "group_size": 64, "rank": rank, "targets": targets["svdq_w4a4"]}
    if targets["awq_w4a16"]:
        block["awq_w4a16"] = {"precision": "int4", "group_size": 64, "targets": targets["awq_w4a16"]}
    with replacing_folder(folder, overwrite=overwrite) as scratch:
        write_config(model, scratch, block)
        write_tensors(scratch / WEIGHTS_NAME, tensors, {"format": "pt"})
    return folder


def write_config(model: nn.Module, folder: Path, block: dict[str, Any]) -> None:
    """config.json of a diffusers model with a quantization_config, without the local path it was loaded from."""
    model.save_config(folder)  # type: ignore[operator]  # diffusers' ConfigMixin
    config = json.loads((folder / CONFIG_NAME).read_text())
    config.pop("_name_or_path", None)
    config["quantization_config"] = block
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")


def check_interchange(path: str, layer: SVDQuantLinear, dialect: str) -> None:
    """Raises ValueError naming a layer whose numerics the interchange files have no word for, and the remedy."""
    if layer.numerics == "w4a8":
        raise ValueError(f"layer {path!r} is w4a8, which {dialect} cannot hold; convert with --numerics w4a4 first")
    if layer.hadamard:
        raise ValueError(f"layer {path!r} is rotated, which {dialect} cannot hold; convert with --numerics w4a4 first")
    if layer.numerics == "w4a16" and layer.rank:
        raise ValueError(f"layer {path!r} is w4a16 with a branch of rank {layer.rank}, which {dialect} cannot hold")
    if layer.act_unsigned and (dialect == "Nunchaku Lite" or layer.unsigned_from):
        which = f"columns from {layer.unsigned_from} on" if layer.unsigned_from else "activations"
        raise ValueError(f"layer {path!r} has unsigned {which}, which {dialect} cannot hold; convert with --signed")


def _compute_dtype(layers: dict[str, SVDQuantLinear]) -> str:
    dtypes = {layer.wscale.dtype for layer in layers.values()}
    if len(dtypes) > 1:
        raise ValueError(
            f"Nunchaku Lite has one 16-bit dtype per model, the scales here have {sorted(map(str, dtypes))}"
        )
    return str(dtypes.pop()).removeprefix("torch.")


def _pack_w4a4(path: str, layer: SVDQuantLinear, rank: int) -> dict[str, Tensor]:
    K, N, dtype = layer.in_features, layer.out_features, layer.wscale.dtype
    if K % packing.TILE or N % packing.TILE:
        raise ValueError(f"layer {path!r} is {N} x {K}; Nunchaku Lite needs both divisible by 128")
    assert layer.smooth is not None  # w4a4
    down, up = layer.lora_down.to(dtype), layer.lora_up.to(dtype)
    if not (
        torch.equal(down.to(layer.lora_down.dtype), layer.lora_down)
        and torch.equal(up.to(layer.lora_up.dtype), layer.lora_up)
    ):
        raise ValueError(f"layer {path!r}: its {layer.lora_down.dtype} branch does not fit into {dtype} unrounded")
    packed = {
        "qweight": packing.pack_qweight(layer.qweight),
        "wscales": packing.pack_scales(layer.wscale),
        "smooth_factor": packing.pack_vector(layer.smooth),
        "proj_down": packing.pack_down(packing.pad_to(down, (rank, K))),
        "proj_up": packing.pack_up(packing.pad_to(up, (N, rank))),
    }
    return packed if layer.bias is None else packed | {"bias": packing.pack_vector(layer.bias)}


def _pack_w4a16(path: str, layer: SVDQuantLinear) -> dict[str, Tensor]:
    K, N = layer.in_features, layer.out_features
    if K % packing.GROUP or N % 4:
        raise ValueError(f"layer {path!r} is {N} x {K}; AWQ needs K % 64 == 0 and N % 4 == 0")
    groups = K // packing.GROUP
    packed = {
        "qweight": packing.pack_awq(layer.qweight[:, : K // 2]),
        "wscales": layer.wscale[:groups], "wzeros": layer.wzero[:groups],
    }  # fmt: skip
    return packed if layer.bias is None else packed | {"bias": layer.bias}
