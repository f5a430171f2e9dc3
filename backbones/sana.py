"""SANA 0.6B and 1.6B at 1024 px: a linear-attention DiT on DC-AE latents. What `sana_06b.py` and `sana_16b.py` share.

Patch 1 on latents [32, 32, 32]: 1024 tokens. Self-attention with ReLU features in place of the softmax, no positions; the
feed-forward part is a GLUMBConv: 1x1 convolution to 2 x 2.5 D, depthwise 3x3, SiLU gate, 1x1 back. Rectified flow with times
shifted by 3, classifier-free guidance 4.5, 20 steps of a multistep DPM solver. The figures are those of the published
configuration files (Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers, Sana_600M_1024px_diffusers); Xie et al., "SANA:
Efficient High-Resolution Image Synthesis with Linear Diffusion Transformers" (2024).
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaTransformer2DModel

from loragraft.backbones.architectures import SANA
from loragraft.backbones.masked_dit import SANA_LIKE, SANA_SCHEDULER
from loragraft.backbones.pipeline_stats import PROMPTS
from loragraft.backbones.spec import BaseSpec, Encoders, External

Size = Literal["06b", "16b"]
HUB: dict[Size, str] = {
    "06b": "Efficient-Large-Model/Sana_600M_1024px_diffusers",
    "16b": "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers",
}
SHAPES: dict[Size, dict[str, int]] = {
    "06b": {
        "num_attention_heads": 36,
        "num_layers": 28,
        "num_cross_attention_heads": 16,
        "cross_attention_head_dim": 72,
        "cross_attention_dim": 1152,
    },
    "16b": {
        "num_attention_heads": 70,
        "num_layers": 20,
        "num_cross_attention_heads": 20,
        "cross_attention_head_dim": 112,
        "cross_attention_dim": 2240,
    },
}
EMBEDDING = 2304
"""Width of Gemma-2 2B."""
GEMMA_BYTES = 256_000 * EMBEDDING * 2 + 2**25
"""Its embedding, the largest of the layers that are streamed, and what it gives. When it has left, 8 captions of 560 tokens
(instruction included) take 0.8 GiB: less."""
CHANNELS = 32
_EVIT = ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3
_SCALES: list[list[int]] = [[], [], [], [5], [5], [5]]
DC_AE: Mapping[str, Any] = {
    "_class_name": "AutoencoderDC",
    "in_channels": 3,
    "latent_channels": CHANNELS,
    "attention_head_dim": 32,
    "encoder_block_types": _EVIT,
    "decoder_block_types": _EVIT,
    "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
    "decoder_layers_per_block": [3, 3, 3, 3, 3, 3],
    "encoder_qkv_multiscales": _SCALES,
    "decoder_qkv_multiscales": _SCALES,
    "downsample_block_type": "conv",
    "upsample_block_type": "interpolate",
    "decoder_norm_types": "rms_norm",
    "decoder_act_fns": "silu",
    "scaling_factor": 0.41407,
}
"""dc-ae-f32c32-sana-1.0."""


def sana_config(size: Size) -> dict[str, Any]:
    """The transformer's configuration, as `SanaTransformer2DModel.from_config` takes it."""
    return {
        "_class_name": "SanaTransformer2DModel",
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "attention_head_dim": 32,
        "caption_channels": EMBEDDING,
        "mlp_ratio": 2.5,
        "dropout": 0.0,
        "attention_bias": False,
        "sample_size": 32,
        "patch_size": 1,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        **SHAPES[size],
    }


def check_transformer(size: Size, config: Mapping[str, Any], where: str) -> None:
    """Raises ValueError for the configuration of another model than SANA of this size."""
    if config.get("guidance_embeds"):
        raise ValueError(
            f"{where} has a guidance embedding: SANA-Sprint is distilled to a few steps and is not trained as a flow; train on "
            f"base=sana-{size}"
        )
    if config.get("in_channels") != CHANNELS:
        raise ValueError(f"{where} has {config.get('in_channels')} input channels, SANA's latents have {CHANNELS}")
    other: Size = "16b" if size == "06b" else "06b"
    if config.get("cross_attention_dim") == SHAPES[other]["cross_attention_dim"]:
        raise ValueError(
            f"{where} is {SHAPES[other]['cross_attention_dim']} wide, so it is no SANA {size}; did you mean base=sana-{other}?"
        )


def _open(folder: Path, device: torch.device, dtype: torch.dtype) -> Encoders:
    from loragraft.backbones.sana_encoders import SanaEncoders

    return SanaEncoders(folder, device, dtype)


def _random(seed: int, device: torch.device, dtype: torch.dtype) -> Encoders:
    from loragraft.backbones.masked_encoders import RandomMaskedEncoders
    from loragraft.backbones.sana_encoders import TOKENS

    autoencoder, scheduler = (AutoencoderDC, DC_AE), (DPMSolverMultistepScheduler, SANA_SCHEDULER)
    return RandomMaskedEncoders("sana", autoencoder, scheduler, (TOKENS, EMBEDDING), seed, device, dtype)


def sana_spec(size: Size) -> BaseSpec:
    """The base `sana-<size>`."""
    return BaseSpec(
        name=f"sana-{size}",
        family=SANA_LIKE,
        transformer_class=SanaTransformer2DModel,
        external=External(
            config=sana_config(size),
            pipeline_class="SanaPipeline",
            hub_id=HUB[size],
            check=partial(check_transformer, size),
            open_encoders=_open,
            random_encoders=_random,
            text_bytes=GEMMA_BYTES,
        ),
        resolution=1024,
        grain=32,
        quantize=SANA.quantize,
        quantize_w4a16=SANA.quantize_w4a16,
        keep_16bit=SANA.keep_16bit,
        quantize_conv=SANA.quantize_conv,
        lora_targets=SANA.quantize,
        calibration_prompts=PROMPTS,
        guidance=4.5,
        steps=20,
    )
