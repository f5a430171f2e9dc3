"""How large a base's INT4 file is, from its configuration alone: the model's shapes on the meta device, nothing read or written."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from loragraft.backbones.architectures import folder_settings
from loragraft.backbones.skeleton import Plan, meta_transformer, plan_architecture
from loragraft.backbones.spec import BaseSpec, Profile
from loragraft.quantization.checkpoint import base_state
from loragraft.quantization.partial_file import file_header
from loragraft.quantization.weight_source import TensorInfo


def stored_bytes(model: nn.Module) -> int:
    """Size of the safetensors file that `quantize_stream` or `save_quantized` writes of `model`, header included.

    Tensors as a checkpoint stores them, wider than 16 bits and not quantized ones in bfloat16. The model may be on meta.
    """
    named = {name for name, parameter in model.named_parameters()}
    infos = {}
    for name, tensor in base_state(model).items():
        wide = name in named and tensor.dtype in (torch.float32, torch.float64)
        infos[name] = TensorInfo(torch.bfloat16 if wide else tensor.dtype, tuple(tensor.shape))
    head, spans = file_header(infos)
    return max((start + count for start, count in spans.values()), default=len(head))


def predicted_bytes(
    transformer_class: type[nn.Module],
    config: Mapping[str, Any],
    plan: Plan | Callable[[nn.Module], Plan] | None = None,
) -> int:
    """`stored_bytes` of a model of `config`, quantized as planned. Raises as `meta_transformer` does."""
    return stored_bytes(meta_transformer(transformer_class, config, plan))


def base_bytes(spec: BaseSpec, profile: Profile | None) -> int:
    """The denoiser file of a base that does not travel with the package; None: in 16 bits. Raises ValueError for another."""
    if spec.external is None:
        raise ValueError(f"the weights of {spec.name} travel with the package: look at their file")
    if profile is None:
        return predicted_bytes(spec.transformer_class, spec.external.config)
    main = folder_settings(profile, calibrated=False)
    return predicted_bytes(spec.transformer_class, spec.external.config, partial(plan_architecture, spec, main))
