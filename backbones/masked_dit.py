"""The two kinds of diffusion transformer that attend to masked text: SANA (`SANA_LIKE`) and PixArt-Sigma (`PIXART_LIKE`).

    SANA      v(x_t, 1000 t, c, m)       velocity of the straight path, its times shifted by s = 3
    PixArt    e(x_t, step, c, m)         the noise: the first 4 of 8 output channels, the others are a learned variance

with c = prompt_embeds [B, T, D] and m = prompt_attention_mask [B, T]. PixArt's variance channels are neither trained here nor read
by diffusers' sampler, so an adapter moves them only as far as it moves what they share with the noise.

diffusers has no image-to-image and no inpainting pipeline for either. Sources: Xie et al., "SANA" (2024); Chen et al.,
"PixArt-Sigma" (2024); Nichol and Dhariwal, "Improved Denoising Diffusion Probabilistic Models" (2021) for the variance.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, SanaPipeline
from torch import Tensor, nn

from loragraft.backbones.ddpm import STEPS, Ddpm
from loragraft.backbones.family import Family
from loragraft.backbones.flow import Flow

TEXT_KEYS = ("prompt_embeds", "prompt_attention_mask")
SANA_SHIFT = 3.0
SANA_SCHEDULER = {
    "num_train_timesteps": STEPS,
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": SANA_SHIFT,
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
}
PIXART_SCHEDULER = {
    "num_train_timesteps": STEPS,
    "prediction_type": "epsilon",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
}
ARGUMENTS = {"use_resolution_binning": False, "clean_caption": False, "negative_prompt": None}
"""Of both pipelines: pictures at the size that is asked for, captions as they are, the empty prompt as embeddings."""


@dataclass(frozen=True)
class ShiftedFlow(Flow):
    """The straight path, trained more often near noise: t = s u / (1 + (s - 1) u) of logit-normal u."""

    shift: float = SANA_SHIFT

    def sample_times(self, count: int, generator: torch.Generator) -> Tensor:
        """Shifted logit-normal."""
        u = super().sample_times(count, generator)
        return self.shift * u / (1 + (self.shift - 1) * u)


@dataclass(frozen=True, kw_only=True)
class SanaFamily(Family):
    """`SanaTransformer2DModel`."""

    def predict(
        self, model: nn.Module, latents: Tensor, times: Tensor, text: dict[str, Tensor], guidance: float | None = None
    ) -> Tensor:
        """The velocity."""
        (velocity,) = model(
            latents,
            encoder_hidden_states=text["prompt_embeds"],
            encoder_attention_mask=text["prompt_attention_mask"],
            timestep=times * STEPS,
            return_dict=False,
        )
        return velocity


@dataclass(frozen=True, kw_only=True)
class PixArtFamily(Family):
    """`PixArtTransformer2DModel`."""

    process: Ddpm

    def predict(
        self, model: nn.Module, latents: Tensor, times: Tensor, text: dict[str, Tensor], guidance: float | None = None
    ) -> Tensor:
        """The noise."""
        (both,) = model(
            latents,
            encoder_hidden_states=text["prompt_embeds"],
            encoder_attention_mask=text["prompt_attention_mask"],
            timestep=self.process.steps(times),
            return_dict=False,
        )
        return both[:, : latents.shape[1]]

    def reporting(self, report: Callable[[int], None] | None) -> dict[str, Any]:
        """This pipeline has diffusers' older callback."""
        if report is None:
            return {}

        def at_end(step: int, timestep: Tensor, latents: Tensor) -> None:
            report(step + 1)

        return {"callback": at_end, "callback_steps": 1}


def sana_scheduler() -> DPMSolverMultistepScheduler:
    """SANA's Flow-DPM-Solver."""
    return DPMSolverMultistepScheduler.from_config(SANA_SCHEDULER)


def pixart_scheduler() -> DPMSolverMultistepScheduler:
    """A second-order DPM solver."""
    return DPMSolverMultistepScheduler.from_config(PIXART_SCHEDULER)


SANA_LIKE = SanaFamily(
    component="transformer",
    process=ShiftedFlow(),
    text_keys=TEXT_KEYS,
    patch=1,
    text_to_image=SanaPipeline,
    scheduler=sana_scheduler,
    arguments=ARGUMENTS,
)
PIXART_LIKE = PixArtFamily(
    component="transformer",
    process=Ddpm(betas=(0.0001, 0.02), schedule="linear"),
    text_keys=TEXT_KEYS,
    patch=2,
    text_to_image=PixArtSigmaPipeline,
    scheduler=pixart_scheduler,
    arguments=ARGUMENTS,
)
