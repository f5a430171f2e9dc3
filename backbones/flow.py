"""Rectified flow: the path from data to noise, its velocity, and the training loss.

    x_t = (1 - t) x_0 + t e,        v = dx_t/dt = e - x_0,        loss = mean (v_theta(x_t, t, c) - v)^2

with t = sigmoid(n), n ~ N(0, 1) ("logit-normal"). Source: Esser et al., "Scaling Rectified Flow Transformers for
High-Resolution Image Synthesis" (2024), sections 2 and 3.1; FLUX.1 keeps the same convention (t = 1 is noise).

Sampling takes Euler steps at even times u, shifted as the base's scheduler says: t = s u / (1 + (s - 1) u), with s = 1 for
`pocket`; FLUX.1 [dev]'s s grows with the number of image tokens (Esser et al., section 5.3.2; diffusers' FluxPipeline). From a
picture x_0 the same path is entered later, at t = strength:

    x_strength = (1 - strength) x_0 + strength e,        then ceil(steps u(strength)) Euler steps from strength to 0
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline, FluxInpaintPipeline, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor, nn

from loragraft.backbones.family import Family, steps_from


@dataclass(frozen=True)
class Flow:
    """The straight path and its velocity."""

    def sample_times(self, count: int, generator: torch.Generator) -> Tensor:
        """Logit-normal."""
        return sample_timesteps(count, generator)

    def noisy(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """(1 - t) x_0 + t e, in the latents' dtype."""
        t = times.view(-1, 1, 1, 1).to(latents.dtype)
        return (1 - t) * latents + t * noise

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """e - x_0"""
        return noise - latents


def sample_timesteps(count: int, generator: torch.Generator) -> Tensor:
    """`count` logit-normal times in (0, 1), float32 on the generator's device."""
    return torch.sigmoid(torch.randn(count, generator=generator, device=generator.device))


def predict_velocity(
    transformer: nn.Module, latents: Tensor, times: Tensor, text: dict[str, Tensor], guidance: float | None = None
) -> Tensor:
    """v_theta of a FLUX-shaped transformer: latents [B, C, h, w], times [B] in [0, 1] -> [B, C, h, w].

    `text` holds `prompt_embeds` [B, T, D] and `pooled_prompt_embeds` [B, P]. Packing is FLUX's own: 2x2 latent
    pixels make one token of 4 C channels (diffusers `FluxPipeline._pack_latents`). `guidance` is the input of a
    guidance-distilled transformer, and None for any other.
    """
    b, c, h, w = latents.shape
    prompt_embeds = text["prompt_embeds"]
    image_ids = latent_image_ids(h // 2, w // 2, latents.device, latents.dtype)
    text_ids = torch.zeros(prompt_embeds.shape[1], 3, device=latents.device, dtype=latents.dtype)
    (packed,) = transformer(
        hidden_states=FluxPipeline._pack_latents(latents, b, c, h, w),
        encoder_hidden_states=prompt_embeds,
        pooled_projections=text["pooled_prompt_embeds"],
        timestep=times.to(latents.dtype),
        guidance=None if guidance is None else torch.full((b,), guidance, device=latents.device),
        img_ids=image_ids,
        txt_ids=text_ids,
        return_dict=False,
    )
    # [B, h/2 w/2, 4C] -> [B, C, h, w], the inverse of _pack_latents.
    unpacked = packed.view(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return unpacked.reshape(b, c, h, w)


def latent_image_ids(rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Position (0, row, column) of every token, [rows columns, 3]; diffusers' own function makes them on the CPU, which a
    CUDA graph cannot capture."""
    axes = [torch.arange(size, device=device) for size in (1, rows, columns)]
    return torch.cartesian_prod(*axes).to(dtype)


@dataclass(frozen=True, kw_only=True)
class FluxFamily(Family):
    """FLUX-shaped transformers."""

    def predict(
        self, model: nn.Module, latents: Tensor, times: Tensor, text: dict[str, Tensor], guidance: float | None = None
    ) -> Tensor:
        """The velocity."""
        return predict_velocity(model, latents, times, text, guidance)

    def rows(self, latents: tuple[int, ...], text: dict[str, Tensor]) -> set[int]:
        """Image, text, and both in the single blocks."""
        apart = super().rows(latents, text)
        b, _, h, w = latents
        return {*apart, b * (self.tokens(h, w) + text["prompt_embeds"].shape[1])}

    def guided(self, guidance: float, embedded: float) -> dict[str, float]:
        """FluxPipeline's own names."""
        return {"true_cfg_scale": guidance, "guidance_scale": embedded}

    def path(self, pipeline: Any, steps: int, tokens: int, strength: float | None) -> tuple[dict[str, Any], int]:
        """Even times from 1, or from u(strength)."""
        if strength is None:
            return {"sigmas": np.linspace(1, 1 / steps, steps), "num_inference_steps": steps}, steps
        first = even_time(pipeline.scheduler.config, strength, tokens)
        taken = steps_from(first, steps)
        # diffusers' own `strength` would round the time to the grid of all `steps`
        sigmas = np.linspace(first, first / taken, taken)
        return {"strength": 1.0, "sigmas": sigmas, "num_inference_steps": taken}, taken


def even_time(config: Any, t: float, tokens: int) -> float:
    """u of t = s u / (1 + (s - 1) u), where a scheduler of that configuration shifts by s at so many image tokens."""
    shift = config.shift
    if config.use_dynamic_shifting:
        bounds = config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
        shift = math.exp(calculate_shift(tokens, *bounds))
    return float(t / (shift - (shift - 1) * t))


FLUX_LIKE = FluxFamily(
    component="transformer",
    process=Flow(),
    text_keys=("prompt_embeds", "pooled_prompt_embeds"),
    patch=2,
    text_to_image=FluxPipeline,
    image_to_image=FluxImg2ImgPipeline,
    inpaint=FluxInpaintPipeline,
    scheduler=FlowMatchEulerDiscreteScheduler,
)
flow_loss = FLUX_LIKE.loss
"""`Family.loss` of a FLUX-shaped transformer."""
