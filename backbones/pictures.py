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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKL, SchedulerMixin
from torch import Tensor

from loragraft.backbones.flux1_encoders import KlPictures

DECODING = 1_670
"""Bytes of activations that DC-AE's decoder takes for a pixel, in 16 bits."""
SHARE = 4
"""The decoder may have a SHARE-th of the GPU's memory."""
GRAIN = 64


class Pictures(KlPictures):
    """An autoencoder of either class, and the scheduler of its pipeline."""

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderDC,
        scheduler: tuple[type[SchedulerMixin], Mapping[str, Any]],
        device: torch.device,
    ) -> None:
        """scheduler: its class and configuration."""
        super().__init__(vae, scheduler[1], device)
        self._scheduler_class = scheduler[0]
        if isinstance(vae, AutoencoderDC):
            vae.disable_tiling()
            if device.type == "cuda":
                tile_decoding(vae, tile_edge(torch.cuda.get_device_properties(device).total_memory))

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> (z - shift) * scale, [B, C, H/f, W/f]: about unit variance.

        The autoencoder stays on the device for the next picture, until `rest`.
        """
        if not isinstance(self.vae, AutoencoderDC):
            return super().encode_images(pixels)
        with _whole(self.vae):
            z = self.vae.encode(pixels.to(self._device, self.vae.dtype)).latent
        scaled: Tensor = z * self.vae.config.scaling_factor
        return scaled

    @property
    def pipeline_parts(self) -> dict[str, Any]:
        scheduler = self._scheduler_class.from_config(dict(self._scheduler))
        return {"vae": self.vae, "scheduler": scheduler, "text_encoder": None, "tokenizer": None}


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
