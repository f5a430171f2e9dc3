"""Reads the INT4 FLUX.1 files of Nunchaku, v1 and v2: a single file, or a folder with the two parts it is merged from.

    transformer_blocks.safetensors + unquantized_layers.safetensors (+ config.json)         v1, as first published
    svdq-int4_r32-*.safetensors with `config` and `quantization_config` in its header       merged; v1 or v2 names

| ours (diffusers) | v2 | v1 |
|---|---|---|
| attn.to_q, to_k, to_v | attn.to_qkv, rows one after another | qkv_proj |
| attn.add_q_proj, add_k_proj, add_v_proj | attn.add_qkv_proj | qkv_proj_context |
| attn.to_out.0, attn.to_add_out | the same | out_proj, out_proj_context |
| ff.net.0.proj, ff.net.2 | the same; ff.net.2 unsigned | mlp_fc1, mlp_fc2 |
| ff_context.net.0.proj, ff_context.net.2 | the same; net.2 unsigned | mlp_context_fc1, mlp_context_fc2 |
| single: attn.to_q, to_k, to_v | attn.to_qkv | qkv_proj |
| single: proj_mlp | mlp_fc1 | mlp_fc1 |
| single: proj_out | attn.to_out beside mlp_fc2 (unsigned) | out_proj beside mlp_fc2 |
| norm1(_context).linear; single: norm.linear | AWQ, 6 splits; 3 splits | the same |

The three of a fused qkv keep their rows of the codes and share smooth and lora_down, each with its own copy; proj_out stays
one layer, its columns from the model's width on unsigned. Both are exact. NVFP4 files are refused.
nunchaku `models/transformers/transformer_flux_v2.py`, DeepCompressor `backend/nunchaku/convert.py`.
"""

from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from loragraft.quantization.dialects.assembly import Opened, parse_json, read_json
from loragraft.quantization.dialects.files import TensorFiles
from loragraft.quantization.dialects.nunchaku_layers import beside, read_awq, read_part, w4a4_layer
from loragraft.quantization.linear import SVDQuantLinear
from loragraft.quantization.tensor_file import CheckpointError

BLOCKS, UNQUANTIZED = "transformer_blocks.safetensors", "unquantized_layers.safetensors"
FUSED = {
    "attn.to_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attn.add_qkv_proj": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
DOUBLE_V1 = {
    "attn.to_qkv": "qkv_proj",
    "attn.add_qkv_proj": "qkv_proj_context",
    "attn.to_out.0": "out_proj",
    "attn.to_add_out": "out_proj_context",
    "ff.net.0.proj": "mlp_fc1",
    "ff.net.2": "mlp_fc2",
    "ff_context.net.0.proj": "mlp_context_fc1",
    "ff_context.net.2": "mlp_context_fc2",
}
SINGLE_V1 = {"attn.to_qkv": "qkv_proj", "attn.to_out": "out_proj"}
UNSIGNED = ("ff.net.2", "ff_context.net.2")
HEAD_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")


def find_files(path: Path) -> list[Path] | None:
    """The safetensors files of a Nunchaku checkpoint at `path`, or None if it does not look like one."""
    if path.is_dir():
        return [path / BLOCKS, path / UNQUANTIZED] if (path / BLOCKS).is_file() else None
    return [path]


def is_nunchaku(files: TensorFiles) -> bool:
    """Whether the tensors of a single file are Nunchaku's: packed FLUX layers under its names."""
    return any(name.endswith((".qweight", ".wscales")) for name in files.names) and any(
        ".qkv_proj." in name or ".to_qkv." in name for name in files.names
    )


def open_nunchaku(path: Path) -> Opened:
    """Open a v1 or v2 FLUX checkpoint. Raises CheckpointError: no configuration, another model, NVFP4, damaged files."""
    paths = find_files(path)
    if paths is None:
        raise CheckpointError(f"{path}: no {BLOCKS} there; expected a Nunchaku folder or file")
    files = TensorFiles(paths)
    opened = Opened("nunchaku", files, _config(path, files))
    _check_precision(files)
    for kind, count in (("transformer_blocks", "num_layers"), ("single_transformer_blocks", "num_single_layers")):
        for index in range(int(opened.config[count])):
            block = f"{kind}.{index}"
            (_open_double if kind == "transformer_blocks" else _open_single)(opened, block)
            for norm in HEAD_NORMS:
                if f"{block}.{norm}.weight" in files:  # v1
                    opened.dense[f"{block}.attn.{norm}.weight"] = f"{block}.{norm}.weight"
    return opened


def _config(path: Path, files: TensorFiles) -> dict[str, Any]:
    if "config" in files.metadata:
        config = parse_json(files.metadata["config"], f"{path}: `config` in the header")
    elif (beside_it := (path if path.is_dir() else path.parent) / "config.json").is_file():
        config = read_json(beside_it)
    else:
        raise CheckpointError(f"{path}: no `config` in its header and no config.json beside it: the model is unknown")
    if "fluxtransformer2d" not in str(config.get("_class_name")).lower():
        raise CheckpointError(f"{path}: model {config.get('_class_name')!r}; Nunchaku files are read for FLUX.1 only")
    config.pop("quantization_config", None)
    for key in ("num_layers", "num_single_layers"):
        if not isinstance(config.get(key), int):
            raise CheckpointError(f"{path}: its configuration lacks {key}")
    return config


def _check_precision(files: TensorFiles) -> None:
    if "quantization_config" not in files.metadata:
        return
    where = f"{files.paths[0]}: `quantization_config` in the header"
    block = parse_json(files.metadata["quantization_config"], where)
    weight = block.get("weight") or {}
    if weight.get("dtype") != "int4" or weight.get("group_size") != 64:
        raise CheckpointError(f"{where}: weights {weight}; only int4 in groups of 64 is read (no NVFP4)")


def _prefix(files: TensorFiles, block: str, local: str, v1_names: dict[str, str]) -> str:
    v1 = f"{block}.{v1_names.get(local, local)}"
    return v1 if f"{v1}.qweight" in files else f"{block}.{local}"


def _open_double(opened: Opened, block: str) -> None:
    for local in DOUBLE_V1:
        prefix = _prefix(opened.files, block, local, DOUBLE_V1)
        if local in FUSED:
            _open_fused(opened, block, prefix, FUSED[local])
        else:
            unsigned_from = 0 if local in UNSIGNED else None
            opened.layers[f"{block}.{local}"] = partial(_read_whole, opened.files, prefix, unsigned_from)
    for norm in ("norm1.linear", "norm1_context.linear"):
        _open_adaln(opened, f"{block}.{norm}", splits=6)


def _open_single(opened: Opened, block: str) -> None:
    files = opened.files
    _open_fused(opened, block, _prefix(files, block, "attn.to_qkv", SINGLE_V1), FUSED["attn.to_qkv"])
    opened.layers[f"{block}.proj_mlp"] = partial(_read_whole, files, f"{block}.mlp_fc1", None)
    attention = _prefix(files, block, "attn.to_out", SINGLE_V1)
    opened.layers[f"{block}.proj_out"] = partial(_read_split, files, attention, f"{block}.mlp_fc2")
    _open_adaln(opened, f"{block}.norm.linear", splits=3)


def _open_fused(opened: Opened, block: str, prefix: str, locals_: tuple[str, ...]) -> None:
    for index, local in enumerate(locals_):
        opened.layers[f"{block}.{local}"] = partial(_read_rows, opened.files, prefix, index, len(locals_))


def _open_adaln(opened: Opened, path: str, splits: int) -> None:
    opened.layers[path] = partial(_read_adaln, opened.files, path, splits)


def _read_adaln(files: TensorFiles, path: str, splits: int, linear: nn.Linear) -> SVDQuantLinear:
    return read_awq(files, path, linear, splits=splits)


def _read_whole(files: TensorFiles, prefix: str, unsigned_from: int | None, linear: nn.Linear) -> SVDQuantLinear:
    part = read_part(files, prefix, linear.in_features, linear.out_features)
    return w4a4_layer(part, linear, files.where(f"{prefix}.bias"), unsigned_from=unsigned_from)


def _read_rows(files: TensorFiles, prefix: str, index: int, count: int, linear: nn.Linear) -> SVDQuantLinear:
    N = linear.out_features
    part = read_part(files, prefix, linear.in_features, count * N).rows(index * N, (index + 1) * N)
    return w4a4_layer(part, linear, files.where(f"{prefix}.bias"))


def _read_split(files: TensorFiles, attention: str, mlp: str, linear: nn.Linear) -> SVDQuantLinear:
    """proj_out: the first N columns (the width of the model) are the attention's, the others follow the GELU."""
    N, K = linear.out_features, linear.in_features
    if N % 64:
        raise CheckpointError(f"{files.where(f'{attention}.qweight')}: width {N} is not a multiple of 64")
    joined = beside(read_part(files, attention, N, N), read_part(files, mlp, K - N, N))
    return w4a4_layer(joined, linear, files.where(f"{mlp}.bias"), unsigned_from=N)
