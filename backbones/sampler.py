"""Images from a backbone, through diffusers' own FluxPipeline.

Euler steps along the learned velocity from t = 1 (noise) to t = 0; classifier-free guidance
v = v_empty + g (v_prompt - v_empty) (Ho and Salimans, 2022). Each image has a seed of its own, drawn on the CPU, so
an image does not depend on its batch or on the device.
"""

import logging
from collections.abc import Sequence

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from PIL.Image import Image
from torch import Tensor, nn

from loragraft.backbones.spec import Backbone, Encoders

_log = logging.getLogger(__name__)


def unread(encoders: Encoders, prompt: str) -> str:
    """The end of a prompt that the text encoder does not read; "" if it reads all of it."""
    return prompt.removeprefix(encoders.readable(prompt)).strip()


def build_pipeline(transformer: nn.Module, encoders: Encoders) -> FluxPipeline:
    """The stock diffusers pipeline around a (possibly quantized, possibly grafted) transformer."""
    pipeline = FluxPipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), **encoders.pipeline_parts
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def generate_from_text(
    pipeline: FluxPipeline,
    text: dict[str, Tensor],
    empty: dict[str, Tensor],
    seeds: Sequence[int],
    *,
    resolution: int,
    steps: int,
    guidance: float,
) -> list[Image]:
    """len(seeds) images from encoded prompts.

    `text`: `prompt_embeds` [B, T, D], `pooled_prompt_embeds` [B, P]; `empty`: the same for one negative prompt
    (batch 1). guidance <= 1 skips the negative pass. Raises ValueError if B differs from len(seeds).
    """
    count = text["prompt_embeds"].shape[0]
    if count != len(seeds):
        raise ValueError(f"{count} prompts but {len(seeds)} seeds: give each image its own seed")
    device, dtype = pipeline.transformer.device, pipeline.transformer.x_embedder.weight.dtype
    cast = {key: value.to(device, dtype) for key, value in text.items()}
    negative = {
        f"negative_{key}": value.to(device, dtype).expand(count, *value.shape[1:]) for key, value in empty.items()
    }
    return list(
        pipeline(
            **cast,
            **(negative if guidance > 1 else {}),
            true_cfg_scale=guidance,
            num_inference_steps=steps,
            height=resolution,
            width=resolution,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        ).images
    )


def generate_images(
    backbone: Backbone,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance: float | None = None,
    negative_prompt: str = "",
    batch_size: int = 16,
) -> list[Image]:
    """One image per prompt and seed; `guidance` None takes the base's default. Warns of prompts that are too long."""
    for prompt in dict.fromkeys((*prompts, negative_prompt)):
        if lost := unread(backbone.encoders, prompt):
            _log.warning("the prompt %r is longer than the text encoder reads; its end is lost: %r", prompt, lost)
    pipeline = build_pipeline(backbone.transformer, backbone.encoders)
    empty = backbone.encoders.encode_text([negative_prompt])
    images: list[Image] = []
    for start in range(0, len(prompts), batch_size):
        chunk = slice(start, start + batch_size)
        images += generate_from_text(
            pipeline,
            backbone.encoders.encode_text(list(prompts[chunk])),
            empty,
            seeds[chunk],
            resolution=backbone.spec.resolution,
            steps=steps,
            guidance=backbone.spec.guidance if guidance is None else guidance,
        )
    return images
