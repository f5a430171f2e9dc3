"""Denoising diffusion as Stable Diffusion was trained with it: discrete times, and the noise or the velocity as target.

    x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e,        a_t = prod_{s <= t} (1 - b_s),        t = 0 .. 999
    epsilon:  e                     v_prediction:  sqrt(a_t) e - sqrt(1 - a_t) x_0

with b_s from 0.00085 to 0.012: even in sqrt b ("scaled_linear", Stable Diffusion) or in b ("linear"). Sources: Ho et al.,
"Denoising Diffusion Probabilistic Models" (2020), equations 4 and 14; Salimans and Ho, "Progressive Distillation" (2022), section
4 (v); diffusers' DDPMScheduler, whose tables these are.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

STEPS = 1000
"""Training times."""


@dataclass(frozen=True)
class Ddpm:
    """A time of [0, 1] stands for step floor(1000 t), 1 for the last."""

    prediction: Literal["epsilon", "v_prediction"] = "epsilon"
    betas: tuple[float, float] = (0.00085, 0.012)
    schedule: Literal["scaled_linear", "linear"] = "scaled_linear"

    def sample_times(self, count: int, generator: torch.Generator) -> Tensor:
        """Uniform."""
        return torch.rand(count, generator=generator, device=generator.device)

    def steps(self, times: Tensor) -> Tensor:
        """[B] of [0, 1] -> [B] of 0 .. 999, int64."""
        return (times * STEPS).long().clamp(0, STEPS - 1)

    def kept(self, times: Tensor) -> Tensor:
        """a_t [B, 1, 1, 1], float32.

        The table is made where it is needed: a copy from the host could not be captured, and a cached one would outlive a dry run.
        """
        power = 0.5 if self.schedule == "scaled_linear" else 1.0
        first, last = (beta**power for beta in self.betas)
        betas = torch.linspace(first, last, STEPS, device=times.device, dtype=torch.float32) ** (1 / power)
        return (1 - betas).cumprod(0)[self.steps(times)].view(-1, 1, 1, 1)

    def noisy(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """x_t, in the latents' dtype."""
        kept = self.kept(times)
        return (kept.sqrt() * latents + (1 - kept).sqrt() * noise).to(latents.dtype)

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """e or v."""
        if self.prediction == "epsilon":
            return noise
        kept = self.kept(times)
        return kept.sqrt() * noise - (1 - kept).sqrt() * latents
