"""What bases of one kind share: what their denoiser reads, which process it is trained on, which stock pipeline draws with it.

    flow.FLUX_LIKE          FLUX.1, pocket      FluxTransformer2DModel, rectified flow, velocity
    unet.SD_LIKE            SD1.5, SD-Turbo     UNet2DConditionModel, DDPM, noise; text through cross-attention
    unet.SDXL_LIKE          SDXL, SDXL-Turbo    the same, and a pooled text vector and six numbers of size and crop
    masked_dit.SANA_LIKE    SANA                SanaTransformer2DModel, rectified flow, velocity; masked text
    masked_dit.PIXART_LIKE  PixArt-Sigma        PixArtTransformer2DModel, DDPM, noise; masked text

A kind is one object; a base names it (`BaseSpec.family`). Shape legend as in `spec.py`. Times are in [0, 1] everywhere, 1 = noise.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

Component = Literal["transformer", "unet"]


class Process(Protocol):
    """How a picture becomes noise, and what the denoiser is asked for on the way."""

    def sample_times(self, count: int, generator: torch.Generator) -> Tensor:
        """`count` training times in [0, 1], float32 on the generator's device."""
        ...

    def noisy(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """x_t [B, C, h, w] of clean latents and noise, at times [B]."""
        ...

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """What the prediction is compared with, [B, C, h, w]."""
        ...


@dataclass(frozen=True, kw_only=True)
class Family(ABC):
    """One kind of base. A new kind is a subclass with `predict`, and its object."""

    component: Component
    """The denoiser's name in a diffusers pipeline, and its prefix in LoRA files."""
    process: Process
    text_keys: tuple[str, ...]
    """What `Encoders.encode_text` returns, [B, ...] each: the pipeline's argument names; with `negative_` before them, those
    of the empty prompt."""
    patch: int
    """Latent pixels along the edge of one image token."""
    text_to_image: type[Any]
    """diffusers' pipelines; None where it has none."""
    image_to_image: type[Any] | None = None
    inpaint: type[Any] | None = None
    scheduler: Callable[[], Any]
    """What steps where the encoders bring no scheduler (`Encoders.pipeline_parts`)."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of every pipeline's constructor, besides its parts."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Of every pipeline call."""

    @abstractmethod
    def predict(
        self, model: nn.Module, latents: Tensor, times: Tensor, text: dict[str, Tensor], guidance: float | None = None
    ) -> Tensor:
        """What `model` says of noisy latents [B, C, h, w] at times [B] -> [B, C, h, w], as `process.target` means it.

        `guidance` is the input of a guidance-distilled model, and None for any other.
        """

    def loss(
        self,
        model: nn.Module,
        latents: Tensor,
        noise: Tensor,
        times: Tensor,
        text: dict[str, Tensor],
        weights: Tensor | None = None,
        guidance: float | None = None,
    ) -> Tensor:
        """Mean squared error of `predict` against the process's target, a float32 scalar.

        weights [B]: the error of sample b counts weights[b] times; the mean is still over B.
        """
        noisy = self.process.noisy(latents, noise, times)
        prediction = self.predict(model, noisy, times, text, guidance).float()
        target = self.process.target(latents, noise, times).float()
        if weights is None:
            return torch.nn.functional.mse_loss(prediction, target)
        return ((prediction - target).square().flatten(1).mean(1) * weights).mean()

    def tokens(self, h: int, w: int) -> int:
        """Image tokens of latents [h, w]: how many pictures are drawn together goes by them."""
        return (h // self.patch) * (w // self.patch)

    def rows(self, latents: tuple[int, ...], text: dict[str, Tensor]) -> set[int]:
        """How many rows the denoiser's linear layers get from a micro-batch of latents [B, C, h, w] and `text`."""
        b, _, h, w = latents
        return {b * self.tokens(h, w), b * text["prompt_embeds"].shape[1]}

    def guided(self, guidance: float, embedded: float) -> dict[str, float]:
        """The pipeline's arguments of classifier-free guidance and of a guidance embedding."""
        return {"guidance_scale": guidance}

    def path(self, pipeline: Any, steps: int, tokens: int, strength: float | None) -> tuple[dict[str, Any], int]:
        """(the pipeline's arguments that say where sampling begins and how many steps it takes, steps taken).

        strength in (0, 1), or None from noise: the share of `steps` that is left, rounded up, as `steps_from`.
        """
        if strength is None:
            return {"num_inference_steps": steps}, steps
        taken = steps_from(strength, steps)
        # diffusers takes int(steps strength): half a step more, and no rounding error loses one
        return {"num_inference_steps": steps, "strength": min((taken + 0.5) / steps, 1.0)}, taken

    def reporting(self, report: Callable[[int], None] | None) -> dict[str, Any]:
        """The pipeline's arguments by which `report(steps done)` hears of every step."""
        if report is None:
            return {"callback_on_step_end": None}

        def at_end(pipeline: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            report(step + 1)
            return tensors

        return {"callback_on_step_end": at_end}


def steps_from(even_time: float, steps: int) -> int:
    """Steps from even time u: the share of `steps` (those from u = 1) that lies below it, at least 1."""
    return max(1, math.ceil(even_time * steps - 1e-6))
