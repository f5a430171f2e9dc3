"""Fixtures: layers with outliers, their statistics, and a tiny FLUX."""

from collections.abc import Callable

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from loragraft.quantization.calibrate import ActivationStats
from loragraft.quantization.convert import plan_layers, quantize_model
from loragraft.quantization.settings import Numerics, QuantSettings

BLOCK_LINEARS = (
    r"transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)",
    r"transformer_blocks\.\d+\.ff(_context)?\.net\.(0\.proj|2)",
    r"single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out)",
)
ADALN = (r"(single_)?transformer_blocks\.\d+\.norm(1|1_context)?\.linear",)
KEEP = ("x_embedder", "context_embedder", r"time_text_embed\..*", r"norm_out\.linear", "proj_out")


def _outlier_layer(in_features: int = 256, out_features: int = 192) -> tuple[nn.Linear, ActivationStats]:
    """Activations with four channels 30 times as loud as the rest, and some structure in the weight."""
    generator = torch.Generator().manual_seed(7)
    linear = nn.Linear(in_features, out_features)
    low = torch.randn(out_features, 8, generator=generator) @ torch.randn(8, in_features, generator=generator)
    linear.weight.data = 0.02 * torch.randn(out_features, in_features, generator=generator) + 0.01 * low
    linear.bias.data = torch.randn(out_features, generator=generator)
    x_SK = torch.randn(256, in_features, generator=generator)
    x_SK[:, torch.randperm(in_features, generator=generator)[:4]] *= 30
    return linear.requires_grad_(False), ActivationStats(x_SK.abs().amax(0), x_SK)


@pytest.fixture
def outlier_layer() -> tuple[nn.Linear, ActivationStats]:
    return _outlier_layer()


def _tiny_flux(dtype: torch.dtype = torch.float32) -> FluxTransformer2DModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=64, num_attention_heads=2,
            joint_attention_dim=64, pooled_projection_dim=32, guidance_embeds=False, axes_dims_rope=(16, 24, 24),
        )  # fmt: skip
    return model.to(dtype).eval().requires_grad_(False)


@pytest.fixture
def tiny_flux() -> FluxTransformer2DModel:
    return _tiny_flux()


@pytest.fixture
def flux_inputs() -> Callable[[int], dict[str, Tensor]]:
    def inputs(seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {
            "hidden_states": torch.randn(2, 16, 16, generator=generator),
            "encoder_hidden_states": torch.randn(2, 8, 64, generator=generator),
            "pooled_projections": torch.randn(2, 32, generator=generator),
            "timestep": torch.rand(2, generator=generator),
            "img_ids": torch.zeros(16, 3),
            "txt_ids": torch.zeros(8, 3),
        }

    return inputs


@pytest.fixture
def flux_rules() -> Callable[..., dict[str, QuantSettings]]:
    def rules(numerics: Numerics = "w4a8", **settings: object) -> dict[str, QuantSettings]:
        main = QuantSettings(numerics, **settings)  # type: ignore[arg-type]
        return dict.fromkeys(BLOCK_LINEARS, main) | dict.fromkeys(ADALN, QuantSettings("w4a16"))

    return rules


@pytest.fixture
def flux_keep() -> tuple[str, ...]:
    return KEEP


@pytest.fixture
def quantized_flux(flux_rules: Callable[..., dict[str, QuantSettings]]) -> FluxTransformer2DModel:
    """W4A8 with W4A16 adaLN, data-free, rank 4, stored in bfloat16 beside the codes."""
    model = _tiny_flux(torch.bfloat16)
    plan = plan_layers(model, flux_rules("w4a8", smoothing="weight", rank=4, iterations=1, grid=1), KEEP)
    quantize_model(model, plan, {}, keep=KEEP)
    return model
