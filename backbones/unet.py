"""The two kinds of UNet: Stable Diffusion 1 and 2 (`SD_LIKE`), and SDXL (`SDXL_LIKE`).

    SD      eps(x_t, t, c),             c = prompt_embeds [B, 77, D] through cross-attention
    SDXL    eps(x_t, t, c, p, s),       p = pooled_prompt_embeds [B, 1280],  s = (H, W, 0, 0, H, W): original size, crop's corner,
                                        target size, in pixels

A cached picture was cropped and scaled to what is trained on, so its original size is its size, as it is when the pipeline draws.
Sources: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (2022); Podell et al., "SDXL" (2023),
section 2.2; diffusers' pipelines.
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from torch import Tensor, nn

from loragraft.backbones.ddpm import Ddpm
from loragraft.backbones.family import Family

LATENT_PIXELS = 8
"""Pixels along the edge of a latent pixel."""
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}


@dataclass(frozen=True, kw_only=True)
class UNetFamily(Family):
    """`UNet2DConditionModel`."""

    process: Ddpm
    sized: bool
    """Whether it also reads the pooled text and the sizes."""
    levels: tuple[int, ...]
    """Where its transformers run: level l sees h w / 4^l tokens."""

    def predict(
        self, model: nn.Module, latents: Tensor, times: Tensor, text: dict[str, Tensor], guidance: float | None = None
    ) -> Tensor:
        """The noise (or v)."""
        added = None
        if self.sized:
            pooled = text["pooled_prompt_embeds"]
            added = {"text_embeds": pooled, "time_ids": time_ids(latents).to(pooled.dtype)}
        (prediction,) = model(
            latents, self.process.steps(times), text["prompt_embeds"], added_cond_kwargs=added, return_dict=False
        )
        return prediction

    def rows(self, latents: tuple[int, ...], text: dict[str, Tensor]) -> set[int]:
        """The text's, and the picture's at every level of the transformers."""
        b, _, h, w = latents
        levels = {b * -(-h // 2**level) * -(-w // 2**level) for level in self.levels}  # halved upwards
        return {b * text["prompt_embeds"].shape[1], *levels}


def time_ids(latents: Tensor) -> Tensor:
    """(H, W, 0, 0, H, W) of every sample of latents [B, C, h, w], [B, 6] float32."""
    b, _, h, w = latents.shape
    numbers = [LATENT_PIXELS * h, LATENT_PIXELS * w, 0, 0, LATENT_PIXELS * h, LATENT_PIXELS * w]
    return torch.stack([torch.full((b,), float(number), device=latents.device) for number in numbers], dim=1)


def _scheduler() -> Any:
    return EulerDiscreteScheduler.from_config(SCHEDULER)


SD_LIKE = UNetFamily(
    component="unet",
    process=Ddpm(),
    text_keys=("prompt_embeds",),
    patch=2,
    text_to_image=StableDiffusionPipeline,
    image_to_image=StableDiffusionImg2ImgPipeline,
    inpaint=StableDiffusionInpaintPipeline,
    scheduler=_scheduler,
    options={"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
    sized=False,
    levels=(0, 1, 2, 3),
)
SDXL_LIKE = UNetFamily(
    component="unet",
    process=Ddpm(),
    text_keys=("prompt_embeds", "pooled_prompt_embeds"),
    patch=2,
    text_to_image=StableDiffusionXLPipeline,
    image_to_image=StableDiffusionXLImg2ImgPipeline,
    inpaint=StableDiffusionXLInpaintPipeline,
    scheduler=_scheduler,
    options={"add_watermarker": False},
    sized=True,
    levels=(1, 2),
)
