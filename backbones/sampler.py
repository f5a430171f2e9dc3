"""Images from a backbone, through diffusers' own FluxPipeline.

Euler steps along the learned velocity from t = 1 (noise) to t = 0; classifier-free guidance
v = v_empty + g (v_prompt - v_empty) (Ho and Salimans, 2022). Each image has a seed of its own, drawn on the CPU, so
an image does not depend on its batch or on the device.

From a picture x_0 (image-to-image) the same path is entered later, at t = strength:

    x_strength = (1 - strength) x_0 + strength e,        then ceil(steps strength) Euler steps from strength to 0

so strength 1 is text-to-image, to the bit, and strength near 0 returns the picture as the autoencoder keeps it. The method
is SDEdit (Meng et al., 2022) on the straight path; diffusers' FluxImg2ImgPipeline does it.
"""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline, FluxPipeline
from PIL.Image import Image
from torch import Tensor, nn

from loragraft.backbones.spec import Backbone, Encoders

_log = logging.getLogger(__name__)

OnStep = Callable[[int, int], None]
"""(steps done, steps in all), called after each; what it raises ends the sampling and reaches the caller."""


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
    start: Tensor | None = None,
    strength: float = 1.0,
    on_step: OnStep | None = None,
) -> list[Image]:
    """len(seeds) images from encoded prompts.

    `text`: `prompt_embeds` [B, T, D], `pooled_prompt_embeds` [B, P]; `empty`: the same for one negative prompt
    (batch 1). guidance <= 1 skips the negative pass. `start`: scaled latents [1 or B, C, h, w] of pictures to begin
    from, with `strength` in (0, 1] (formula above). Raises ValueError if B differs from len(seeds), or for a strength
    out of range.
    """
    count = text["prompt_embeds"].shape[0]
    if count != len(seeds):
        raise ValueError(f"{count} prompts but {len(seeds)} seeds: give each image its own seed")
    device, dtype = pipeline.transformer.device, pipeline.transformer.x_embedder.weight.dtype
    cast = {key: value.to(device, dtype) for key, value in text.items()}
    negative = {
        f"negative_{key}": value.to(device, dtype).expand(count, *value.shape[1:]) for key, value in empty.items()
    }
    if start is not None:
        if not 0 < strength <= 1:
            raise ValueError(f"strength is {strength}: it must be above 0 (keep the picture) and at most 1 (ignore it)")
        count_steps = steps_from(strength, steps)
        pipeline = _from_picture(pipeline)
        path: dict[str, Any] = {
            "image": start.to(device, dtype),
            "strength": 1.0,  # diffusers' own `strength` would round the time to the grid of all `steps`
            "sigmas": np.linspace(strength, strength / count_steps, count_steps),
        }
    else:
        count_steps, path = steps, {}
    return list(
        pipeline(
            **cast,
            **path,
            **(negative if guidance > 1 else {}),
            true_cfg_scale=guidance,
            num_inference_steps=count_steps,
            height=resolution,
            width=resolution,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            callback_on_step_end=None if on_step is None else _reporter(on_step, count_steps),
        ).images
    )


def steps_from(strength: float, steps: int) -> int:
    """Euler steps from t = strength: the share of `steps` (those from t = 1) that lies below it, at least 1."""
    return max(1, math.ceil(strength * steps - 1e-6))


def _from_picture(pipeline: FluxPipeline) -> FluxImg2ImgPipeline:
    again = FluxImg2ImgPipeline(**pipeline.components)
    again.set_progress_bar_config(disable=True)
    return again


def _reporter(on_step: OnStep, steps: int) -> Callable[..., dict[str, Tensor]]:
    def report(pipeline: FluxPipeline, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        on_step(step + 1, steps)
        return tensors

    return report


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
