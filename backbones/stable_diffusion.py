"""Stable Diffusion's UNets as data: what `sd15.py`, `sd_turbo.py`, `sdxl.py` and `sdxl_turbo.py` share.

    sd15          0.86 B    512 px    CLIP-L
    sd-turbo      0.87 B    512 px    OpenCLIP-H            SD 2.1 distilled to 1 to 4 steps
    sdxl          2.57 B   1024 px    CLIP-L, OpenCLIP-bigG
    sdxl-turbo    2.57 B    512 px    the same              SDXL distilled to 1 to 4 steps

All predict the noise of a DDPM on latents of 4 channels, f8. The Turbo models are distilled adversarially (ADD: Sauer et al.,
"Adversarial Diffusion Distillation", 2023): few steps at even times that end at the last ("trailing"), no guidance, and no
training here. The figures are those of the published configuration files; parameters: diffusers 0.42.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    UNet2DConditionModel,
)

from loragraft.backbones.architectures import UNET
from loragraft.backbones.pipeline_stats import PROMPTS
from loragraft.backbones.spec import BaseSpec, Encoders, External
from loragraft.backbones.unet import SCHEDULER, SD_LIKE, SDXL_LIKE, UNetFamily

LORA_TARGETS = (r".*\.transformer_blocks\.\d+\.(attn[12]\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2))",)
"""Attention and feed-forward."""
TURBO = {**SCHEDULER, "timestep_spacing": "trailing"}
TOKENS = 77
CLIP_L_BYTES, OPENCLIP_H_BYTES, OPENCLIP_G_BYTES = 246_144_000, 680_775_680, 1_389_319_680
"""Text models in 16 bits."""

_SD: Mapping[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
SD15_UNET = _SD
SD2_UNET: Mapping[str, Any] = {
    **_SD,
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
SDXL_UNET: Mapping[str, Any] = {
    **_SD,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
    "use_linear_projection": True,
}
SDXL_TURBO_UNET: Mapping[str, Any] = {**SDXL_UNET, "sample_size": 64}


def sd_vae(scaling_factor: float, sample_size: int) -> dict[str, Any]:
    """The autoencoder's configuration."""
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": sample_size,
        "scaling_factor": scaling_factor,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    }


SDXL_VAE: Mapping[str, Any] = {**sd_vae(0.13025, 1024), "force_upcast": True}


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What one of them has of its own."""

    family: UNetFamily
    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    scheduler: tuple[type[Any], Mapping[str, Any]]
    pooled: int
    """Width of the pooled text vector; 0 = there is none."""
    text_bytes: int
    hub_id: str


KINDS: Mapping[str, Kind] = {
    "sd15": Kind(
        family=SD_LIKE,
        unet=SD15_UNET,
        vae=sd_vae(0.18215, 512),
        # Published with PNDM, which takes a step more than it is asked for; the times are the same.
        scheduler=(EulerDiscreteScheduler, SCHEDULER),
        pooled=0,
        text_bytes=CLIP_L_BYTES,
        hub_id="stable-diffusion-v1-5/stable-diffusion-v1-5",
    ),
    "sd-turbo": Kind(
        family=SD_LIKE,
        unet=SD2_UNET,
        vae=sd_vae(0.18215, 768),
        scheduler=(EulerDiscreteScheduler, TURBO),
        pooled=0,
        text_bytes=OPENCLIP_H_BYTES,
        hub_id="stabilityai/sd-turbo",
    ),
    "sdxl": Kind(
        family=SDXL_LIKE,
        unet=SDXL_UNET,
        vae=SDXL_VAE,
        scheduler=(EulerDiscreteScheduler, SCHEDULER),
        pooled=1280,
        text_bytes=CLIP_L_BYTES + OPENCLIP_G_BYTES,
        hub_id="stabilityai/stable-diffusion-xl-base-1.0",
    ),
    "sdxl-turbo": Kind(
        family=SDXL_LIKE,
        unet=SDXL_TURBO_UNET,
        vae=SDXL_VAE,
        scheduler=(EulerAncestralDiscreteScheduler, TURBO),
        pooled=1280,
        text_bytes=CLIP_L_BYTES + OPENCLIP_G_BYTES,
        hub_id="stabilityai/sdxl-turbo",
    ),
}
_TOLD_BY = ("addition_embed_type", "use_linear_projection", "down_block_types")
"""What tells them apart, whatever their width and depth; SDXL-Turbo differs from SDXL in its size alone."""


def check_unet(name: str, config: Mapping[str, Any], where: str) -> None:
    """Raises ValueError for the configuration of another UNet than base `name`'s, with the base whose it is."""
    if config.get("in_channels") != 4:
        raise ValueError(
            f"{where} has {config.get('in_channels')} input channels, {name} has 4: variants that also read a picture (inpainting, "
            "depth, upscaling) are not known here; stock inpainting works with the plain model"
        )
    differing = _differences(name, config)
    if differing:
        key, wanted, found = differing[0]
        near = [other for other in KINDS if not _differences(other, config)]
        hint = f"; did you mean base={near[0]}?" if near else ""
        raise ValueError(f"{where} has {key} {found}, {name} has {wanted}{hint}")


def _differences(name: str, config: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, the base's value, the value found)."""
    ours = KINDS[name].unet
    keys = (*_TOLD_BY, "sample_size") if KINDS[name].family.sized else _TOLD_BY
    pairs = ((key, _plain(ours.get(key)), _plain(config.get(key))) for key in keys)
    return [(key, wanted, found) for key, wanted, found in pairs if wanted != found]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value or None  # absent is False


def _open(name: str, folder: Path, device: torch.device, dtype: torch.dtype) -> Encoders:
    from loragraft.backbones.clip_encoders import ClipEncoders

    return ClipEncoders(folder, KINDS[name].family, KINDS[name].scheduler[0], device, dtype)


def _random(name: str, seed: int, device: torch.device, dtype: torch.dtype) -> Encoders:
    from loragraft.backbones.clip_encoders import text_parts
    from loragraft.backbones.text_encoders import RandomEncoders

    kind = KINDS[name]
    shape, parts = (TOKENS, int(kind.unet["cross_attention_dim"]), kind.pooled), text_parts(kind.family)
    return RandomEncoders(
        "clip", (AutoencoderKL, kind.vae), kind.scheduler, shape, seed, device, dtype, text_parts=parts
    )


def unet_spec(name: str, **own: Any) -> BaseSpec:
    """The base `name`; `own` are the fields in which they differ."""
    kind = KINDS[name]
    return BaseSpec(
        name=name,
        family=kind.family,
        transformer_class=UNet2DConditionModel,
        external=External(
            config=kind.unet,
            pipeline_class=kind.family.text_to_image.__name__,
            hub_id=kind.hub_id,
            check=partial(check_unet, name),
            open_encoders=partial(_open, name),
            random_encoders=partial(_random, name),
            text_bytes=kind.text_bytes,
        ),
        quantize=UNET.quantize,
        quantize_w4a16=UNET.quantize_w4a16,
        keep_16bit=UNET.keep_16bit,
        quantize_conv=UNET.quantize_conv,
        lora_targets=LORA_TARGETS,
        calibration_prompts=PROMPTS,
        **own,
    )
