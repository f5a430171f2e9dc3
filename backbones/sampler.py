"""Images from a backbone, through diffusers' own FluxPipeline.

Euler steps along the learned velocity from t = 1 (noise) to t = 0; classifier-free guidance
v = v_empty + g (v_prompt - v_empty) (Ho and Salimans, 2022), or what a distilled base has in its place. Each image has a
seed of its own, drawn on the CPU, so an image does not depend on its batch or on the device.

The times are even steps u, shifted as the base's scheduler says: t = s u / (1 + (s - 1) u), with s = 1 for `pocket`; FLUX.1
[dev]'s s grows with the number of image tokens (Esser et al., 2024, section 5.3.2; diffusers' FluxPipeline).

From a picture x_0 (image-to-image) the same path is entered later, at t = strength:

    x_strength = (1 - strength) x_0 + strength e,        then ceil(steps u(strength)) Euler steps from strength to 0

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
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from PIL.Image import Image
from torch import Tensor, nn

from loragraft.backbones.resting import rest
from loragraft.backbones.spec import Backbone, Encoders

TOKENS_TOGETHER = 4096
"""Image tokens that are drawn in one batch: 64 pictures of 128 px, 4 of 512, 1 of 1024."""

_log = logging.getLogger(__name__)

OnStep = Callable[[int, int], None]
"""(steps done, steps in all), called after each; what it raises ends the sampling and reaches the caller."""


def unread(encoders: Encoders, prompt: str) -> str:
    """The end of a prompt that the text encoder does not read; "" if it reads all of it."""
    return prompt.removeprefix(encoders.readable(prompt)).strip()


def build_pipeline(transformer: nn.Module, encoders: Encoders) -> FluxPipeline:
    """The stock diffusers pipeline around a (possibly quantized, possibly grafted) transformer."""
    parts = {"scheduler": FlowMatchEulerDiscreteScheduler(), **encoders.pipeline_parts}
    pipeline = FluxPipeline(transformer=transformer, **parts)
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
    embedded_guidance: float = 1.0,
    start: Tensor | None = None,
    strength: float = 1.0,
    on_step: OnStep | None = None,
) -> list[Image]:
    """len(seeds) images from encoded prompts, `TOKENS_TOGETHER` at a time.

    `text`: `prompt_embeds` [B, T, D], `pooled_prompt_embeds` [B, P]; `empty`: the same for one negative prompt
    (batch 1). guidance (classifier-free) <= 1 skips the negative pass; `embedded_guidance` is the input of a guidance-distilled
    transformer (`BaseSpec.guided` gives both). `start`: scaled latents [1 or B, C, h, w] of pictures to begin
    from, with `strength` in (0, 1] (formula above). Raises ValueError if B differs from len(seeds), or for a strength
    out of range.
    """
    count = text["prompt_embeds"].shape[0]
    if count != len(seeds):
        raise ValueError(f"{count} prompts but {len(seeds)} seeds: give each image its own seed")
    if start is not None and not 0 < strength <= 1:
        raise ValueError(f"strength is {strength}: it must be above 0 (keep the picture) and at most 1 (ignore it)")
    tokens = (resolution // (2 * pipeline.vae_scale_factor)) ** 2
    path: dict[str, Any] = {"sigmas": np.linspace(1, 1 / steps, steps)}
    if start is not None:
        first = _even_time(pipeline, strength, tokens)
        taken = steps_from(first, steps)
        # diffusers' own `strength` would round the time to the grid of all `steps`
        path = {"strength": 1.0, "sigmas": np.linspace(first, first / taken, taken)}
        pipeline = _from_picture(pipeline)
    together = max(1, TOKENS_TOGETHER // max(1, tokens))
    chunks = [slice(first, first + together) for first in range(0, count, together)]
    images: list[Image] = []
    for number, chunk in enumerate(chunks):
        images += _draw(
            pipeline, {key: value[chunk] for key, value in text.items()}, empty if guidance > 1 else {},
            **path,
            **({} if start is None else {"image": start if len(start) == 1 else start[chunk]}),
            true_cfg_scale=guidance,
            guidance_scale=embedded_guidance,
            num_inference_steps=len(path["sigmas"]),
            height=resolution,
            width=resolution,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds[chunk]],
            callback_on_step_end=None if on_step is None else _reporter(on_step, number, len(chunks), len(path["sigmas"])),
        )  # fmt: skip
    rest(pipeline.vae)
    return images


def _draw(pipeline: FluxPipeline, text: dict[str, Tensor], empty: dict[str, Tensor], **how: Any) -> list[Image]:
    """One batch."""
    device, dtype = pipeline.transformer.device, pipeline.transformer.x_embedder.weight.dtype
    cast = {key: value.to(device, dtype) for key, value in text.items()}
    count = cast["prompt_embeds"].shape[0]
    negative = {
        f"negative_{key}": value.to(device, dtype).expand(count, *value.shape[1:]) for key, value in empty.items()
    }
    if "image" in how:
        how["image"] = how["image"].to(device, dtype)
    return list(pipeline(**cast, **negative, **how).images)


def _even_time(pipeline: FluxPipeline, t: float, tokens: int) -> float:
    """u of t = s u / (1 + (s - 1) u), where the scheduler shifts by s at so many image tokens."""
    config = pipeline.scheduler.config
    shift = config.shift
    if config.use_dynamic_shifting:
        bounds = config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
        shift = math.exp(calculate_shift(tokens, *bounds))
    return t / (shift - (shift - 1) * t)


def steps_from(even_time: float, steps: int) -> int:
    """Euler steps from u = even_time: the share of `steps` (those from u = 1) that lies below it, at least 1."""
    return max(1, math.ceil(even_time * steps - 1e-6))


def _from_picture(pipeline: FluxPipeline) -> FluxImg2ImgPipeline:
    again = FluxImg2ImgPipeline(**pipeline.components)
    again.set_progress_bar_config(disable=True)
    return again


def _reporter(on_step: OnStep, chunk: int, chunks: int, steps: int) -> Callable[..., dict[str, Tensor]]:
    def report(pipeline: FluxPipeline, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        on_step(chunk * steps + step + 1, chunks * steps)
        return tensors

    return report


def generate_images(
    backbone: Backbone,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance: float | None = None,
    true_guidance: float = 1.0,
    negative_prompt: str = "",
    batch_size: int = 16,
) -> list[Image]:
    """One image of `backbone.resolution` per prompt and seed; `guidance` None takes the base's default.

    All prompts are encoded before the transformer goes onto the device. Warns of prompts that are too long; raises ValueError
    as `BaseSpec.guided` does.
    """
    guided = backbone.spec.guided(
        backbone.spec.guidance if guidance is None else guidance, true_guidance, negative_prompt
    )
    for prompt in dict.fromkeys((*prompts, negative_prompt)):
        if lost := unread(backbone.encoders, prompt):
            _log.warning("the prompt %r is longer than the text encoder reads; its end is lost: %r", prompt, lost)
    empty = backbone.encoders.encode_text([negative_prompt])
    chunks = [slice(start, start + batch_size) for start in range(0, len(prompts), batch_size)]
    texts = [backbone.encoders.encode_text(list(prompts[chunk])) for chunk in chunks]
    backbone.onto_device()
    pipeline = build_pipeline(backbone.transformer, backbone.encoders)
    images: list[Image] = []
    for chunk, text in zip(chunks, texts, strict=True):
        images += generate_from_text(
            pipeline, text, empty, seeds[chunk], resolution=backbone.resolution, steps=steps, **guided
        )
    return images
