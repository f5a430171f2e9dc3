"""Which dialect a file or folder is written in, and the model in it."""

from pathlib import Path
from typing import Any

from loragraft.quantization.checkpoint import CONFIG_NAME, QUANT_METHOD, load_quantized
from loragraft.quantization.dialects.assembly import Opened, Progress, assemble, model_class, read_json
from loragraft.quantization.dialects.comfyui import is_comfyui, open_comfyui
from loragraft.quantization.dialects.files import TensorFiles
from loragraft.quantization.dialects.nunchaku_flux import BLOCKS, is_nunchaku, open_nunchaku
from loragraft.quantization.dialects.nunchaku_lite import QUANT_METHOD as LITE_METHOD
from loragraft.quantization.dialects.nunchaku_lite import open_lite
from loragraft.quantization.tensor_file import CheckpointError

READ = "Loragraft's own folder, Nunchaku's FLUX file or folder, diffusers' Nunchaku Lite folder, ComfyUI's svdquant_w4a4 file"
OPENERS = {"nunchaku": open_nunchaku, "nunchaku-lite": open_lite, "comfyui": open_comfyui}


def detect_dialect(path: Path) -> str:
    """native, nunchaku, nunchaku-lite or comfyui. Raises CheckpointError for anything else, saying what is read."""
    if path.is_file():
        with TensorFiles([path]) as files:
            if is_comfyui(files):
                return "comfyui"
            if is_nunchaku(files):
                return "nunchaku"
        raise CheckpointError(f"{path}: a safetensors file, but no SVDQuant checkpoint. Read are: {READ}")
    if not path.is_dir():
        raise CheckpointError(f"no file or folder {path}")
    if (path / BLOCKS).is_file():
        return "nunchaku"
    if not (path / CONFIG_NAME).is_file():
        inside = " (its transformer/ may be what is meant)" if (path / "transformer").is_dir() else ""
        raise CheckpointError(f"{path}: no {CONFIG_NAME} and no {BLOCKS} there{inside}. Read are: {READ}")
    method = (read_json(path / CONFIG_NAME).get("quantization_config") or {}).get("quant_method")
    if method == QUANT_METHOD:
        return "native"
    if method == LITE_METHOD:
        return "nunchaku-lite"
    if method is None:
        raise CheckpointError(
            f"{path / CONFIG_NAME} names no quantization: these are 16-bit weights, which `loragraft quantize` quantizes. "
            f"Read are: {READ}"
        )
    raise CheckpointError(f"{path / CONFIG_NAME}: quant_method {method!r}. Read are: {READ}")


def load_any(path: Path, progress: Progress | None = None) -> tuple[Any, str]:
    """(model, dialect): the frozen model in the numerics that its checkpoint states. Raises CheckpointError."""
    dialect = detect_dialect(path)
    if dialect == "native":
        config = read_json(path / CONFIG_NAME)
        return load_quantized(path, model_class(config, str(path / CONFIG_NAME))), dialect
    opened: Opened = OPENERS[dialect](path)
    with opened.files:
        return assemble(opened, progress), dialect
