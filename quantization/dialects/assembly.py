"""From an opened foreign checkpoint to a model on our layers: one layer, one tensor at a time, nothing missing or left over."""

import inspect
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from loragraft.quantization.checkpoint import record_base_id
from loragraft.quantization.convert import linear_paths
from loragraft.quantization.dialects.files import FLOATS, TensorFiles
from loragraft.quantization.linear import SVDQuantLinear
from loragraft.quantization.names import named_module, nearest, replace_module
from loragraft.quantization.tensor_file import CheckpointError

Progress = Callable[[int, int, str], object]
"""Called with (tensors' owners done, in all, path now done)."""


@dataclass
class Opened:
    """A foreign checkpoint whose headers are read: what it holds, and how to read each part of it."""

    dialect: str
    files: TensorFiles
    config: dict[str, Any]
    """The diffusers configuration of the model."""
    layers: dict[str, Callable[[nn.Linear], SVDQuantLinear]] = field(default_factory=dict)
    """Path -> reader, called with the float layer (on the meta device) that it takes the place of."""
    dense: dict[str, str | Callable[[], Tensor]] = field(default_factory=dict)
    """The model's tensor name -> the file's, or what reads it, where they differ; others are looked up under their own."""

    @property
    def source(self) -> str:
        """The file or files, for messages."""
        return ", ".join(str(path) for path in self.files.paths)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError if there is none."""
    if not path.is_file():
        raise CheckpointError(f"no file {path}")
    return parse_json(path.read_text(encoding="utf-8"), str(path))


def parse_json(text: str, where: str) -> dict[str, Any]:
    """A JSON object from text found at `where`. Raises CheckpointError."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{where} is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{where} is JSON, but no object")
    return found


def model_class(config: dict[str, Any], where: str) -> type[Any]:
    """diffusers' class that the configuration names (Nunchaku writes its own class names). Raises CheckpointError."""
    name = str(config.get("_class_name"))
    known = {n.lower(): n for n, c in _classes() if issubclass(c, diffusers.ModelMixin)}
    found = known.get(name.lower().removeprefix("nunchaku").removesuffix("v2"))
    if found is None:
        raise CheckpointError(f"{where}: _class_name {name!r} is no model of diffusers {diffusers.__version__}")
    chosen: type[Any] = getattr(diffusers, found)
    return chosen


def _classes() -> Iterator[tuple[str, type]]:
    for name in dir(diffusers):
        if name.endswith("Model"):
            value = getattr(diffusers, name)
            if inspect.isclass(value):
                yield name, value


def empty_model(config: dict[str, Any], where: str) -> Any:
    """The 16-bit model on the meta device."""
    with init_empty_weights(include_buffers=False):
        return model_class(config, where).from_config(config)


def assemble(opened: Opened, progress: Progress | None = None) -> Any:
    """Read everything into a frozen model in evaluation mode, stored as it will run; each tensor is dropped once unpacked.

    Raises CheckpointError naming file and tensor: what is missing, left over, of another shape or dtype, or not finite.
    """
    model = empty_model(opened.config, opened.source)
    linears = linear_paths(model)
    for path in opened.layers:
        if path not in linears:
            raise CheckpointError(
                f"{opened.source}: layer {path!r} is no linear layer of {type(model).__name__}; {nearest(path, linears)}"
            )
    rest = [name for name in model.state_dict() if name.rpartition(".")[0] not in opened.layers]
    total = len(opened.layers) + len(rest)
    for done, (path, read) in enumerate(opened.layers.items(), start=1):
        linear = named_module(model, path)
        assert isinstance(linear, nn.Linear)
        replace_module(model, path, read(linear))
        if progress is not None:
            progress(done, total, path)
    for done, name in enumerate(rest, start=len(opened.layers) + 1):
        _set_tensor(model, name, opened)
        if progress is not None:
            progress(done, total, name)
    if opened.files.unread:
        left = sorted(opened.files.unread)
        raise CheckpointError(
            f"{opened.files.where(left[0])} belongs to no layer of {type(model).__name__} ({len(left)} such tensor(s))"
        )
    record_base_id(model)
    return model.requires_grad_(False).eval()


def _set_tensor(model: nn.Module, name: str, opened: Opened) -> None:
    owner_path, _, leaf = name.rpartition(".")
    owner = named_module(model, owner_path) if owner_path else model
    found, shape = opened.dense.get(name, name), tuple(getattr(owner, leaf).shape)
    tensor = opened.files.read(found, shape, FLOATS) if isinstance(found, str) else found()
    if tuple(tensor.shape) != shape:
        raise CheckpointError(
            f"{opened.source}: what is stored for {name!r} has shape {tuple(tensor.shape)}, expected {shape}"
        )
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


def bias_or_none(linear: nn.Linear, bias: Tensor, where: str) -> Tensor | None:
    """The bias of a layer, as formats store one that is all zeros for a layer without. Raises CheckpointError."""
    if linear.bias is not None:
        return bias
    if torch.count_nonzero(bias):
        raise CheckpointError(f"{where} is not zero, and the layer has no bias")
    return None
