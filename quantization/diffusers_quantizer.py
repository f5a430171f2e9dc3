"""diffusers' `from_pretrained` on our checkpoints, through its own quantizer registry.

register(); FluxTransformer2DModel.from_pretrained(folder)        a model with our layers, any GPU or none

`from_pretrained` casts floating tensors to `torch_dtype`; those of quantized layers are taken as they are stored. Nunchaku Lite
folders belong to diffusers' own quantizer, which is left alone: `load_nunchaku_lite` reads one on our kernels when asked,
on Hopper and on a CPU too. diffusers `quantizers/auto.py`, `models/model_loading_utils.py` (0.42).
"""

import logging
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from loragraft.quantization.branched import BranchedLinear
from loragraft.quantization.checkpoint import (
    QUANT_METHOD,
    base_id,
    check_block,
    check_tensor,
    empty_layer,
    record_base_id,
)
from loragraft.quantization.dialects.assembly import Progress, assemble
from loragraft.quantization.dialects.nunchaku_lite import open_lite
from loragraft.quantization.linear import share_inputs
from loragraft.quantization.names import named_module, replace_module
from loragraft.quantization.tensor_file import CheckpointError

LOGGER = logging.getLogger(__name__)


class Method(StrEnum):
    """What diffusers calls a quantization method: it asks for `.value`."""

    LORAGRAFT = QUANT_METHOD


class LoragraftConfig(QuantizationConfigMixin):  # type: ignore[misc]  # diffusers is untyped
    """The quantization_config of our config.json. Raises CheckpointError for another version or an impossible layer."""

    def __init__(self, layers: dict[str, Any], version: int, profile: str = "mixed", **_: Any) -> None:
        self.quant_method = Method.LORAGRAFT
        self.layers, self.version, self.profile = layers, version, profile
        check_block({"quant_method": QUANT_METHOD, "version": version, "layers": layers}, "config.json")

    def to_diff_dict(self) -> dict[str, Any]:
        """Everything, as nothing has a default; diffusers prints this."""
        found: dict[str, Any] = self.to_dict()
        return found


class StoredLayer(nn.Module):
    """The tensors of a quantized layer as its file has them, on the meta device until they are read."""

    def __init__(self, layer: BranchedLinear) -> None:
        super().__init__()
        self._layer = (layer,)  # a tuple hides it: its own buffers may be in another order
        for name, tensor in layer.state_dict().items():
            self.register_buffer(name, tensor)

    def finish(self) -> BranchedLinear:
        """The layer, once all tensors are there."""
        (layer,) = self._layer
        layer.load_state_dict(dict(self.named_buffers()), strict=True, assign=True)
        return layer


class LoragraftQuantizer(DiffusersQuantizer):  # type: ignore[misc]  # diffusers is untyped
    """Puts a `StoredLayer` for every quantized one before the weights are read, and the finished layers after.

    The base id is that of the tensors as they are stored, as `load_quantized` has it.
    """

    _stored_ids: tuple[str, ...] = ()

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The tensors of one file, before anything is cast: their id is taken, nothing is changed."""
        self._stored_ids += (base_id(state_dict),)
        return state_dict

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        for path, layer in self.quantization_config.layers.items():
            replace_module(model, path, StoredLayer(empty_layer(model, path, layer, None, "config.json")))

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **_: Any
    ) -> bool:
        """Whether the tensor is a quantized layer's."""
        return param_name.rpartition(".")[0] in self.quantization_config.layers

    def check_quantized_param_shape(self, param_name: str, current_param: Tensor, loaded_param: Tensor) -> bool:
        """Raises CheckpointError; called where the shapes differ."""
        check_tensor(param_name, loaded_param, current_param, "checkpoint", strict=False)
        return True

    def create_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, target_device: torch.device,
        state_dict: dict[str, Any], *_: Any, **__: Any,
    ) -> None:  # fmt: skip
        """The tensor as the file has it: `param_value` was cast to torch_dtype already. Raises CheckpointError."""
        path, name = param_name.rsplit(".", 1)
        layer, stored = named_module(model, path), state_dict[param_name]
        check_tensor(param_name, stored, getattr(layer, name), "checkpoint", strict=name != "bias")
        setattr(layer, name, stored.to(target_device))

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        absent = sorted(name for name, tensor in model.state_dict().items() if tensor.is_meta)
        if absent:  # of any layer: diffusers would warn, and return a model that cannot run
            more = f", and {len(absent) - 1} more" if len(absent) > 1 else ""
            raise CheckpointError(f"checkpoint: tensor {absent[0]!r} is missing{more}; fetch it again")
        for path in self.quantization_config.layers:
            layer = named_module(model, path)
            assert isinstance(layer, StoredLayer)  # put there before
            replace_module(model, path, layer.finish())
        share_inputs(model)
        if len(self._stored_ids) == 1:  # of a folder with several files it is the id of what was made of them
            record_base_id(model, self._stored_ids[0])
        return model.requires_grad_(False)

    @property
    def is_serializable(self) -> bool:
        """`save_pretrained` is refused, and diffusers' message points to the log."""
        LOGGER.warning(
            "save_pretrained does not know SVDQuant's layers; loragraft.quantization.checkpoint.save_quantized(model, folder) writes "
            "a folder that from_pretrained reads, `loragraft convert` other formats"
        )
        return False

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on it; the base itself is frozen."""
        return True

    @property
    def is_compileable(self) -> bool:
        """All ops are custom ops with fake implementations."""
        return True


def register() -> None:
    """Make `from_pretrained` of every diffusers model read our checkpoints; calling it again changes nothing."""
    AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = LoragraftQuantizer
    AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = LoragraftConfig


def load_nunchaku_lite(folder: Path | str, progress: Progress | None = None) -> Any:
    """The model of a Nunchaku Lite folder on our kernels, frozen, in its own W4A4 numerics. Raises CheckpointError."""
    opened = open_lite(Path(folder))
    with opened.files:
        return assemble(opened, progress)
