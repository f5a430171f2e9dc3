"""A tiny FLUX of random weights with an adapter that matters, and one loss of it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from loragraft.adapters.inject import inject_adapter
from loragraft.backbones.architectures import FLUX
from loragraft.backbones.flow import flow_loss
from loragraft.backbones.skeleton import meta_transformer, plan_architecture, randomize
from loragraft.quantization.settings import QuantSettings
from loragraft.recipes.schema import AdapterConfig

CONFIG: dict[str, Any] = {
    "patch_size": 1, "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 64,
    "num_attention_heads": 2, "joint_attention_dim": 64, "pooled_projection_dim": 32, "guidance_embeds": False,
    "axes_dims_rope": (16, 24, 24),
}  # fmt: skip


def build_tiny_flux(
    dtype: torch.dtype = torch.float32, smoothing: Any = "hadamard", device: str = "cpu", quantized: bool = True
) -> tuple[nn.Module, list[nn.Parameter]]:
    """Two double and two single blocks of width 128, rotated or smoothed or in 16 bits, and their adapter."""
    plan = partial(plan_architecture, FLUX, QuantSettings(rank=8, smoothing=smoothing)) if quantized else None
    model = randomize(meta_transformer(FluxTransformer2DModel, CONFIG, plan), device, dtype)
    parameters = inject_adapter(model, AdapterConfig(rank=4, alpha=4), FLUX.quantize)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in parameters[1::2]:  # B starts at zero
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    return model, parameters


@pytest.fixture
def tiny_flux() -> Callable[..., tuple[nn.Module, list[nn.Parameter]]]:
    return build_tiny_flux


@pytest.fixture
def loss_of() -> Callable[..., torch.Tensor]:
    """(model, dtype, device) -> the flow loss of two fixed samples of 4 x 8 x 8 latents (16 tokens) and 5 text tokens."""

    def loss(model: nn.Module, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
        generator = torch.Generator().manual_seed(5)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        text = {"prompt_embeds": draw(2, 5, 64), "pooled_prompt_embeds": draw(2, 32)}
        return flow_loss(model, draw(2, 4, 8, 8), draw(2, 4, 8, 8), torch.tensor([0.3, 0.8], device=device), text)

    return loss
