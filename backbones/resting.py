"""Models that are on the GPU only while they work: an autoencoder as a whole, a text encoder one layer at a time.

accelerate's hooks do both, and diffusers' pipelines know them. Without a GPU nothing rests: the CPU is where it works.
"""

import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import CpuOffload
from torch import nn


def rest_between_calls(model: nn.Module, device: torch.device) -> None:
    """`model` (of diffusers) goes to the CPU; its next `encode` or `decode` brings it to `device`, until `rest`."""
    if device.type == "cuda":
        cpu_offload_with_hook(model, device)


def rest(model: nn.Module) -> None:
    """Back to the CPU after use, and what its activations held back to the device."""
    hook = getattr(model, "_hf_hook", None)
    if isinstance(hook, CpuOffload):
        hook.init_hook(model)
        torch.cuda.empty_cache()


def stream_layers(model: nn.Module, device: torch.device) -> None:
    """`model` stays on the CPU; each layer is copied to `device` for its own part of a forward pass and dropped there."""
    cpu_offload(model, device, offload_buffers=True)
