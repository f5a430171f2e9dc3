"""The autoencoder's half of `Encoders`: pictures to scaled latents and back, and memory.

    latents = (z - shift) * scale        z: the mean of the posterior (AutoencoderKL, f8) or the code itself (AutoencoderDC, f32)

The scale is applied here and nowhere else: what the cache holds is what the transformer reads, and diffusers' pipelines divide
by it once before they decode. On a GPU the autoencoder is there only while it works.

DC-AE's decoder takes 1.6 GiB of activations at 1024 px, more than SANA's whole transformer (Chen et al., "Deep Compression
Autoencoder for Efficient High-Resolution Diffusion Models", 2024). What would take more than a quarter of the GPU's memory is
decoded in tiles that overlap by an eighth: from 1152 px on with 8 GiB, from 832 with 4. It is never encoded in tiles: the deep
stages attend to the whole picture, so that a tile has other latents, and they are what is trained on.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKL, SchedulerMixin
from torch import Tensor, nn

from loragraft.backbones.resting import rest_between_calls

DECODING = 1_670
"""Bytes of activations that DC-AE's decoder takes for a pixel, in 16 bits."""
SHARE = 4
"""The decoder may have a SHARE-th of the GPU's memory."""
GRAIN = 64


class Pictures:
    """An autoencoder of either class, and the scheduler of its pipeline."""

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderDC,
        scheduler: tuple[type[SchedulerMixin], Mapping[str, Any]],
        device: torch.device,
        text_parts: Sequence[str],
    ) -> None:
        """scheduler: its class and configuration. text_parts: what else the base's pipelines want named, and get None for."""
        self.vae, self._scheduler, self._device, self._text_parts = vae, scheduler, device, tuple(text_parts)
        vae.eval().requires_grad_(False)
        vae.enable_slicing()  # one picture at a time: at 1024 px each takes 1.5 GiB of activations
        if isinstance(vae, AutoencoderKL):
            vae.enable_tiling()  # takes effect above the size that it was trained at
        elif device.type == "cuda":
            tile_decoding(vae, tile_edge(torch.cuda.get_device_properties(device).total_memory))
        rest_between_calls(vae, device)

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> (z - shift) * scale, [B, C, H/f, W/f]: about unit variance.

        The autoencoder stays on the device for the next picture; it leaves before captions are encoded, and with
        `release_text`.
        """
        pixels = pixels.to(self._device, self.vae.dtype)
        if isinstance(self.vae, AutoencoderDC):
            with _whole(self.vae):
                scaled: Tensor = self.vae.encode(pixels).latent * self.vae.config.scaling_factor
            return scaled
        mean = self.vae.encode(pixels).latent_dist.mode()
        latents: Tensor = (mean - (self.vae.config.shift_factor or 0.0)) * self.vae.config.scaling_factor
        return latents

    @property
    def pipeline_parts(self) -> dict[str, Any]:
        made, config = self._scheduler
        return {"vae": self.vae, "scheduler": made.from_config(dict(config)), **dict.fromkeys(self._text_parts)}


def random_vae(config: Mapping[str, Any], seed: int, dtype: torch.dtype, made: type[Any] = AutoencoderKL) -> Any:
    """The shapes of an autoencoder of class `made` with values from `seed`; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        random = made.from_config(dict(config))
    nn.Module.to(random, dtype=dtype)
    return random


def tile_edge(total: int) -> int:
    """Pixels along the edge of the largest picture that is decoded whole on a GPU of `total` bytes; a multiple of GRAIN."""
    return max(1, math.isqrt(total // SHARE // DECODING) // GRAIN) * GRAIN


def tile_decoding(vae: AutoencoderDC, edge: int) -> None:
    """Pictures above `edge` pixels are decoded in tiles of it, whose seams are blended over an eighth."""
    stride = edge * 7 // 8 // 32 * 32
    vae.enable_tiling(edge, edge, stride, stride)


@contextmanager
def _whole(vae: AutoencoderDC) -> Iterator[None]:
    before, vae.use_tiling = vae.use_tiling, False
    try:
        yield
    finally:
        vae.use_tiling = before
