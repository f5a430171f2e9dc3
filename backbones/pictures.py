"""The autoencoder's half of `Encoders`: pictures to scaled latents and back, and memory.

    latents = (z - shift) * scale        z: the mean of the posterior (AutoencoderKL, f8) or the code itself (AutoencoderDC, f32)

The scale is applied here and nowhere else: what the cache holds is what the transformer reads, and diffusers' pipelines divide
by it once before they decode. On a GPU the autoencoder is there only while it works.

DC-AE's decoder takes 1.6 GiB of activations at 1024 px, more than SANA's whole transformer (Chen et al., "Deep Compression
Autoencoder for Efficient High-Resolution Diffusion Models", 2024). On a GPU of less than `SMALL_GPU` bytes it decodes in tiles
of `TILE` pixels that overlap by an eighth. It never encodes in tiles: its deep stages attend to the whole picture, so that a tile
has other latents, and they are what is trained on.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKL, SchedulerMixin
from torch import Tensor

from loragraft.backbones.flux1_encoders import KlPictures

SMALL_GPU = 9 * 2**30
"""Bytes: cards sold as 8 GB and less."""
TILE, STRIDE = 512, 448


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
            if is_small(device):
                tile_decoding(vae)

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


def is_small(device: torch.device) -> bool:
    """Whether pictures of 1024 px should be decoded in tiles there."""
    return device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory < SMALL_GPU


def tile_decoding(vae: AutoencoderDC) -> None:
    """Pictures above `TILE` pixels an edge are decoded in tiles, whose seams are blended."""
    vae.enable_tiling(TILE, TILE, STRIDE, STRIDE)


@contextmanager
def _whole(vae: AutoencoderDC) -> Iterator[None]:
    before, vae.use_tiling = vae.use_tiling, False
    try:
        yield
    finally:
        vae.use_tiling = before
