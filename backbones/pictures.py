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
from typing import Any, TypeAlias

import torch
from diffusers import AutoencoderDC, AutoencoderKL, SchedulerMixin
from torch import Tensor, nn

from loragraft.backbones.resting import rest_between_calls

SMALL_GPU = 9 * 2**30
"""Bytes: cards sold as 8 GB and less."""
TILE, STRIDE = 512, 448

Autoencoder: TypeAlias = AutoencoderKL | AutoencoderDC


class Pictures:
    """An autoencoder and the scheduler of its pipeline."""

    def __init__(
        self,
        vae: Autoencoder,
        scheduler: tuple[type[SchedulerMixin], Mapping[str, Any]],
        device: torch.device,
    ) -> None:
        self.vae, self._scheduler, self._device = vae, scheduler, device
        vae.eval().requires_grad_(False)
        vae.enable_slicing()  # one picture at a time
        if isinstance(vae, AutoencoderKL):
            vae.enable_tiling()  # takes effect above the size that it was trained at
        elif is_small(device):
            tile_decoding(vae)
        rest_between_calls(vae, device)

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> (z - shift) * scale, [B, C, H/f, W/f]: about unit variance.

        The autoencoder stays on the device for the next picture, until `rest`.
        """
        pixels = pixels.to(self._device, self.vae.dtype)
        if isinstance(self.vae, AutoencoderDC):
            with _whole(self.vae):
                z: Tensor = self.vae.encode(pixels).latent
        else:
            z = self.vae.encode(pixels).latent_dist.mode()
        shift = self.vae.config.get("shift_factor") or 0.0
        scaled: Tensor = (z - shift) * self.vae.config.scaling_factor
        return scaled

    @property
    def pipeline_parts(self) -> dict[str, Any]:
        made, config = self._scheduler
        return {"vae": self.vae, "scheduler": made.from_config(dict(config)), "text_encoder": None, "tokenizer": None}


def random_autoencoder(
    made: type[Autoencoder], config: Mapping[str, Any], seed: int, dtype: torch.dtype
) -> Autoencoder:
    """Its shapes with values from `seed`; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        vae: Autoencoder = made.from_config(dict(config))
    nn.Module.to(vae, dtype=dtype)
    return vae


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
