"""Fixtures: a tiny quantized FLUX, its inputs, and an adapter that matters."""

from collections.abc import Callable

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from loragraft.adapters.checkpoint import Adapter
from loragraft.quantization.checkpoint import base_id, quantized_layers
from loragraft.quantization.convert import plan_layers, quantize_model
from loragraft.quantization.settings import QuantSettings

BLOCK_LINEARS = (
    r"transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)",
    r"transformer_blocks\.\d+\.ff(_context)?\.net\.(0\.proj|2)",
    r"single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out)",
)
ADALN = (r"(single_)?transformer_blocks\.\d+\.norm(1|1_context)?\.linear",)
KEEP = ("x_embedder", "context_embedder", r"time_text_embed\..*", r"norm_out\.linear", "proj_out")


@pytest.fixture
def plain_flux() -> FluxTransformer2DModel:
    """One double and one single block, two heads of 64, 16-bit linears (held in float32)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=64, num_attention_heads=2,
            joint_attention_dim=64, pooled_projection_dim=32, guidance_embeds=False, axes_dims_rope=(16, 24, 24),
        )  # fmt: skip
    return model.eval().requires_grad_(False)


@pytest.fixture
def flux(plain_flux: FluxTransformer2DModel) -> FluxTransformer2DModel:
    """The same, native: W4A8 blocks with a branch of rank 4, W4A16 adaLN without one."""
    main = QuantSettings("w4a8", smoothing="weight", rank=4, iterations=1, grid=1)
    rules = dict.fromkeys(BLOCK_LINEARS, main) | dict.fromkeys(ADALN, QuantSettings("w4a16"))
    quantize_model(plain_flux, plan_layers(plain_flux, rules, KEEP), {}, keep=KEEP)
    return plain_flux


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
def make_adapter(flux: FluxTransformer2DModel) -> Callable[..., Adapter]:
    """An adapter on every quantized layer (or on `paths`), strong enough to move the model's output by over 5 %."""
    identity = base_id(flux)

    def make(name: str, seed: int, rank: int = 3, paths: list[str] | None = None, strength: float = 0.3) -> Adapter:
        generator = torch.Generator().manual_seed(seed)
        layers = quantized_layers(flux)
        pairs = {}
        for path in layers if paths is None else paths:
            K, N = layers[path].in_features, layers[path].out_features
            down = torch.randn(rank, K, generator=generator) / K**0.5
            pairs[path] = (down, strength * torch.randn(N, rank, generator=generator) / rank**0.5)
        return Adapter(name, {"base": "tiny", "base_id": identity, "name": name}, pairs)

    return make
