"""Opening a file that a stranger made: nothing in it is executed, trusted or written anywhere before these checks pass.

Refused, each with its reason: pickles (also under another suffix), headers beyond 16 MiB, truncated files, tensor names that are
paths, NaN and infinity, integers where factors belong.
"""

import re
from pathlib import Path

import torch
from torch import Tensor

from loragraft.quantization.tensor_file import CheckpointError, read_tensors

PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
MAGIC = {b"PK\x03\x04": "a zip archive, as torch.save writes it", b"\x80\x02": "a pickle", b"\x80\x04": "a pickle"}
HEADER_LIMIT = 16 * 2**20
"""Bytes. A LoRA over every layer of SDXL needs half a megabyte, kohya's tag statistics a few."""
LONGEST_NAME = 300
INTEGERS_ALLOWED = (".alpha", ".reshape_weight", ".scalar")
PATHLIKE = re.compile(r"[/\\\x00-\x1f\x7f]|(^|\.)\.\.?(\.|$)")
SAFE_NAME = re.compile(r"\w[\w .+()@-]{0,99}")


def read_untrusted(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors on the CPU, header metadata). Raises CheckpointError with what is wrong and where."""
    if file.suffix.lower() in PICKLES:
        raise CheckpointError(
            f"{file} is a pickle, which can run code when it is opened; adapters are read from .safetensors files only. "
            "Convert it on a machine that you can afford to lose, or ask its author for a .safetensors file"
        )
    if file.suffix != ".safetensors":
        raise CheckpointError(f"{file}: adapters are read from .safetensors files only (others can run code)")
    if file.is_file():
        with file.open("rb") as opened:
            start = opened.read(4)
        for magic, what in MAGIC.items():
            if start.startswith(magic):
                raise CheckpointError(f"{file} is {what}, not safetensors whatever its suffix says; it is not opened")
    tensors, header = read_tensors(file, header_limit=HEADER_LIMIT)
    if not tensors:
        raise CheckpointError(f"{file} holds no tensors")
    return {name: _checked(file, name, tensor) for name, tensor in tensors.items()}, header


def _checked(file: Path, name: str, tensor: Tensor) -> Tensor:
    if len(name) > LONGEST_NAME or PATHLIKE.search(name):
        shown = name if len(name) <= LONGEST_NAME else f"{name[:60]}..."
        raise CheckpointError(
            f"{file}: tensor name {shown!r} is a path or no name at all; the file is not to be trusted"
        )
    if not tensor.is_floating_point():
        if name.endswith(INTEGERS_ALLOWED) and not tensor.is_complex():
            return tensor
        raise CheckpointError(f"{file}: tensor {name!r} is {tensor.dtype} {tuple(tensor.shape)}, expected floats")
    wide = tensor.to(torch.bfloat16) if tensor.itemsize == 1 else tensor  # float8 has no arithmetic
    if not torch.isfinite(wide).all():
        raise CheckpointError(f"{file}: tensor {name!r} holds NaN or infinity")
    return wide


def checked_name(file: Path, name: object) -> str:
    """A name from a file's metadata, fit to become a folder's. Raises CheckpointError for anything that could be a path."""
    if not isinstance(name, str) or not SAFE_NAME.fullmatch(name) or ".." in name:
        raise CheckpointError(
            f"{file}: its metadata names the adapter {str(name)[:80]!r}, which is no plain name (letters, digits, ' .+()@-_')"
        )
    return name
