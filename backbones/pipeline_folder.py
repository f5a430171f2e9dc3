"""What a diffusers pipeline's folder says before anything of it is loaded: the variant of its weights, its scheduler."""

from pathlib import Path
from typing import Any

import diffusers
from diffusers import SchedulerMixin
from diffusers.schedulers.scheduling_utils import SCHEDULER_CONFIG_NAME

from loragraft.quantization.dialects.assembly import read_json
from loragraft.quantization.tensor_file import CheckpointError


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
