"""`pixart-sigma`: PixArt-Sigma XL/2 at 1024 px, 0.6 B: 28 blocks of width 1152 on SDXL's latents.

Patch 2 on latents [4, 128, 128]: 4096 tokens; self-attention, cross-attention to 300 tokens of T5-XXL, feed-forward; one adaLN for
all blocks. Noise prediction on 1000 linear steps, classifier-free guidance 4.5, 20 steps of a DPM solver. The figures are those of
the published configuration files (PixArt-alpha/PixArt-Sigma-XL-2-1024-MS). Chen et al., "PixArt-Sigma: Weak-to-Strong Training of
Diffusion Transformer for 4K Text-to-Image Generation" (2024).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtTransformer2DModel

from loragraft.backbones.architectures import PIXART
from loragraft.backbones.masked_dit import PIXART_LIKE, PIXART_SCHEDULER
from loragraft.backbones.pipeline_stats import PROMPTS
from loragraft.backbones.spec import BaseSpec, Encoders, External
from loragraft.backbones.stable_diffusion import SDXL_VAE

TOKENS, EMBEDDING = 300, 4096
"""T5-XXL's of a caption, padding included, and its width."""
CONFIG: Mapping[str, Any] = {
    "_class_name": "PixArtTransformer2DModel",
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "dropout": 0.0,
    "norm_num_groups": 32,
    "cross_attention_dim": 1152,
    "attention_bias": True,
    "sample_size": 128,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "interpolation_scale": 2,
    "use_additional_conditions": False,
    "caption_channels": EMBEDDING,
}


def check_transformer(config: Mapping[str, Any], where: str) -> None:
    """Raises ValueError for the configuration of another model than PixArt-Sigma."""
    channels = config.get("in_channels"), config.get("out_channels")
    if channels != (4, 8):
        raise ValueError(
            f"{where} has {channels[0]} input and {channels[1]} output channels, PixArt-Sigma 4 and 8 (noise and variance)"
        )
    if config.get("use_additional_conditions"):
        raise ValueError(
            f"{where} also reads resolution and aspect ratio: that is PixArt-alpha at 1024 px, which PixArtSigmaPipeline cannot draw "
            "with; PixArt-Sigma has no such inputs"
        )


def _open(folder: Path, device: torch.device, dtype: torch.dtype) -> Encoders:
    from loragraft.backbones.pixart_encoders import PixArtEncoders

    return PixArtEncoders(folder, device, dtype)


def _random(seed: int, device: torch.device, dtype: torch.dtype) -> Encoders:
    from loragraft.backbones.masked_encoders import RandomMaskedEncoders

    autoencoder, scheduler = (AutoencoderKL, SDXL_VAE), (DPMSolverMultistepScheduler, PIXART_SCHEDULER)
    return RandomMaskedEncoders("pixart", autoencoder, scheduler, (TOKENS, EMBEDDING), seed, device, dtype)


SPEC = BaseSpec(
    name="pixart-sigma",
    family=PIXART_LIKE,
    transformer_class=PixArtTransformer2DModel,
    external=External(
        config=CONFIG,
        pipeline_class="PixArtSigmaPipeline",
        hub_id="PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
        check=check_transformer,
        open_encoders=_open,
        random_encoders=_random,
        text_bytes=0,
        t5_tokens=TOKENS,
    ),
    resolution=1024,
    quantize=PIXART.quantize,
    quantize_w4a16=PIXART.quantize_w4a16,
    keep_16bit=PIXART.keep_16bit,
    lora_targets=PIXART.quantize,
    calibration_prompts=PROMPTS,
    guidance=4.5,
    steps=20,
)
