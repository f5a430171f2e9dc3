"""What is asked of a diffusers pipeline's folder before anything of it is loaded: is it whole, in which variant, which files."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
from diffusers import SchedulerMixin
from diffusers.schedulers.scheduling_utils import SCHEDULER_CONFIG_NAME

from loragraft.quantization.dialects.assembly import read_json
from loragraft.quantization.tensor_file import CheckpointError

WHOLE, SAMPLES, SAMPLE = 2**24, 64, 2**16
"""A file of at most WHOLE bytes is read for its digest, of a larger one SAMPLES stretches of SAMPLE bytes."""


def check_parts(folder: Path, parts: Sequence[str]) -> None:
    """Raises CheckpointError naming the parts that `folder` lacks."""
    missing = [part for part in parts if not (folder / part).is_dir()]
    if missing:
        raise CheckpointError(f"the pipeline {folder} lacks {', '.join(missing)}: fetch it again")


def digest(folder: Path, parts: Sequence[str]) -> str:
    """16 hex digits over the files of `parts`: names, sizes, small ones whole, of large ones stretches from end to end."""
    found = hashlib.sha256()
    for file in sorted(file for part in parts for file in (folder / part).rglob("*") if file.is_file()):
        size = file.stat().st_size
        found.update(f"{file.relative_to(folder)} {size}\n".encode())
        with file.open("rb") as content:
            if size <= WHOLE:
                found.update(content.read())
                continue
            for i in range(SAMPLES):
                content.seek(i * (size - SAMPLE) // (SAMPLES - 1))
                found.update(content.read(SAMPLE))
    return found.hexdigest()[:16]


def variant(folder: Path) -> str | None:
    """The `variant` that `from_pretrained` needs for the weights in `folder`: None where plain ones lie there.

    SANA's are published as `model.bf16.safetensors` or `model.bf16-00001-of-00002.safetensors` too. Raises CheckpointError
    for several variants without a plain one, which only their owner can choose from.
    """
    stems = {file.name.removesuffix(".safetensors").partition("-")[0] for file in folder.glob("*.safetensors")}
    named = sorted({stem.partition(".")[2] for stem in stems})
    if not named or "" in named:
        return None
    if len(named) > 1:
        raise CheckpointError(f"{folder} holds the variants {', '.join(named)}: leave the one that is meant")
    return named[0]


def open_scheduler(folder: Path) -> tuple[type[SchedulerMixin], dict[str, Any]]:
    """(class, configuration) of the pipeline's scheduler. Raises CheckpointError for one that diffusers does not have."""
    config = read_json(folder / "scheduler" / SCHEDULER_CONFIG_NAME)
    name = str(config.get("_class_name"))
    found = getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, SchedulerMixin)):
        raise CheckpointError(f"{folder / 'scheduler'} names the class {name}, which is no scheduler of diffusers")
    return found, config
