"""Opening a file that a stranger made: nothing in it is executed, trusted or written anywhere before these checks pass.

Refused, each with its reason: pickles (also under another suffix), headers beyond 16 MiB, truncated files, tensor names that are
paths, NaN and infinity, integers where factors belong.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loragraft.quantization.tensor_file import CheckpointError, read_tensors
from loragraft.recipes.ranges import is_plain_name

PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
MAGIC = {b"PK\x03\x04": "a zip archive, as torch.save writes it", b"\x80\x02": "a pickle", b"\x80\x04": "a pickle"}
HEADER_LIMIT = 16 * 2**20
"""Bytes. A LoRA over every layer of SDXL needs half a megabyte, kohya's tag statistics a few."""
LONGEST_NAME = 300
INTEGERS_ALLOWED = (".alpha", ".reshape_weight", ".scalar")
PATHLIKE = re.compile(r"[/\\\x00-\x1f\x7f]|(^|\.)\.\.?(\.|$)")


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
            start = opened.read(9)
        for magic, what in MAGIC.items():
            # The length of a safetensors header may begin with the same bytes; its JSON follows.
            if start.startswith(magic) and start[8:] != b"{":
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
    if not isinstance(name, str) or not is_plain_name(name):
        raise CheckpointError(
            f"{file}: its metadata names the adapter {str(name)[:80]!r}, which is no plain name (letters, digits, ' .+()@-_')"
        )
    return name


Kind = type | tuple[type]
BLOCK_KINDS: dict[str, Kind] = dict.fromkeys(("name", "base", "base_id", "profile", "contract", "start_sha256"), str)
RECIPE_KINDS: dict[str, dict[str, Kind]] = {
    "sample": {
        "prompts": (str,),
        "negative_prompt": str,
        "seed": int,
        "steps": int,
        "guidance": float,
        "true_guidance": float,
    },
    "data": {"resolution": int, "resolutions": (int,)},
    "train": {"seed": int},
    "optim": {"learning_rate": float},
}
"""What commands read of the recipe in a file, and of which type it is; (str,) is a list of strings. null is nothing said."""


def checked_block(file: Path, block: object) -> dict[str, Any]:
    """Our block of a file's metadata, where everything that is read of it has its type. Raises CheckpointError naming what has not."""
    found = _object(file, "loragraft", block)
    if found.get("name"):
        checked_name(file, found["name"])
    _check_kinds(file, "loragraft", found, BLOCK_KINDS)
    recipe = _object(file, "recipe", found.get("recipe") or {})
    for part, kinds in RECIPE_KINDS.items():
        _check_kinds(file, f"recipe.{part}", _object(file, f"recipe.{part}", recipe.get(part) or {}), kinds)
    return found


def _object(file: Path, where: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: {where!r} in its metadata is not a JSON object")
    return value


def _check_kinds(file: Path, where: str, values: dict[str, Any], kinds: Mapping[str, Kind]) -> None:
    for key, kind in kinds.items():
        value = values.get(key)
        if value is not None and not _is(value, kind):
            wanted = f"list of {kind[0].__name__}" if isinstance(kind, tuple) else kind.__name__
            raise CheckpointError(f"{file}: {where}.{key} in its metadata is {str(value)[:40]!r}, expected {wanted}")


def _is(value: object, kind: Kind) -> bool:
    if isinstance(kind, tuple):
        return isinstance(value, list) and all(_is(entry, kind[0]) for entry in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and not isinstance(value, bool)
