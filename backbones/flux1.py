"""FLUX.1 [dev] and [schnell]: one 12 B architecture, two distillations. What `flux1_dev.py` and `flux1_schnell.py` share.

19 double and 38 single blocks of width 3072, 24 heads, 1024 px: 4096 image tokens and 512 (dev) or 256 (schnell) of T5. dev is
guidance-distilled: guidance is an input, and one pass does. schnell is timestep-distilled from it: 1 to 4 steps, no guidance
input; all other layers have the same names and shapes. The figures are those of the published configuration files.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

from loragraft.backbones.architectures import FLUX
from loragraft.backbones.flow import FLUX_LIKE
from loragraft.backbones.pipeline_stats import PROMPTS
from loragraft.backbones.spec import BaseSpec, Encoders, External

Kind = Literal["dev", "schnell"]
HUB = {"dev": "black-forest-labs/FLUX.1-dev", "schnell": "black-forest-labs/FLUX.1-schnell"}
TOKENS = {"dev": 512, "schnell": 256}
"""T5 tokens of a caption, padding included."""
EMBEDDING, POOLED = 4096, 768
CLIP_BYTES = 246_144_000
"""CLIP-L's text model in 16 bits."""
CHANNELS = 64
"""Of a token: 2x2 pixels of 16 latent channels."""
VAE: Mapping[str, Any] = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 16,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "act_fn": "silu",
    "sample_size": 1024,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "force_upcast": True,
}


def flux1_config(kind: Kind) -> dict[str, Any]:
    """The transformer's configuration, as `FluxTransformer2DModel.from_config` takes it."""
    return {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": CHANNELS,
        "out_channels": None,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": EMBEDDING,
        "pooled_projection_dim": POOLED,
        "guidance_embeds": kind == "dev",
        "axes_dims_rope": [16, 56, 56],
    }


def flux1_scheduler(kind: Kind) -> dict[str, Any]:
    """t = s u / (1 + (s - 1) u) of the even steps u: dev's s grows with the number of image tokens, schnell's is 1."""
    return {
        "num_train_timesteps": 1000,
        "shift": 3.0 if kind == "dev" else 1.0,
        "use_dynamic_shifting": kind == "dev",
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
    }


def check_transformer(kind: Kind, config: Mapping[str, Any], where: str) -> None:
    """Raises ValueError for the configuration of another FLUX.1 than `kind`."""
    other = {"dev": "schnell", "schnell": "dev"}[kind]
    if config.get("in_channels") != CHANNELS:
        raise ValueError(
            f"{where} has {config.get('in_channels')} input channels, FLUX.1 [{kind}] has {CHANNELS}: variants that also read a "
            "picture (Fill, Canny, Depth) are not known here"
        )
    if bool(config.get("guidance_embeds")) != (kind == "dev"):
        has = "has no" if kind == "dev" else "has a"
        raise ValueError(
            f"{where} {has} guidance embedding, so it is no FLUX.1 [{kind}]; did you mean base=flux1-{other}?"
        )


def _open(kind: Kind, folder: Path, device: torch.device, dtype: torch.dtype) -> Encoders:
    from loragraft.backbones.flux1_encoders import Flux1Encoders

    return Flux1Encoders(folder, device, dtype, TOKENS[kind])


def _random(kind: Kind, seed: int, device: torch.device, dtype: torch.dtype) -> Encoders:
    from loragraft.backbones.flux1_encoders import TEXT_PARTS
    from loragraft.backbones.text_encoders import RandomEncoders

    scheduler, shape = (FlowMatchEulerDiscreteScheduler, flux1_scheduler(kind)), (TOKENS[kind], EMBEDDING, POOLED)
    return RandomEncoders("flux1", (AutoencoderKL, VAE), scheduler, shape, seed, device, dtype, text_parts=TEXT_PARTS)


def flux1_spec(kind: Kind, **own: Any) -> BaseSpec:
    """The base `flux1-<kind>`; `own` are the fields in which the two differ."""
    return BaseSpec(
        name=f"flux1-{kind}",
        family=FLUX_LIKE,
        transformer_class=FluxTransformer2DModel,
        external=External(
            config=flux1_config(kind),
            pipeline_class="FluxPipeline",
            hub_id=HUB[kind],
            check=partial(check_transformer, kind),
            open_encoders=partial(_open, kind),
            random_encoders=partial(_random, kind),
            text_bytes=CLIP_BYTES,
            t5_tokens=TOKENS[kind],
        ),
        resolution=1024,
        quantize=FLUX.quantize,
        quantize_w4a16=FLUX.quantize_w4a16,
        keep_16bit=FLUX.keep_16bit,
        lora_targets=FLUX.quantize,
        calibration_prompts=PROMPTS,
        **own,
    )
