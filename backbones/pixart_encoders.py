"""PixArt-Sigma's encoders: T5-XXL for captions, SDXL's autoencoder (f8, 4 channels) for pictures.

    text = T5(caption padded to T tokens, padding masked)     [B, 300, 4096]
    latents = mean of the posterior * 0.13025                 [B, 4, H/8, W/8]

Captions are stripped and put in lower case, as diffusers' PixArtSigmaPipeline does without `clean_caption`.
"""

from diffusers import AutoencoderKL, PixArtSigmaPipeline

from loragraft.backbones.masked_encoders import MaskedEncoders
from loragraft.backbones.pixart_sigma import TOKENS


class PixArtEncoders(MaskedEncoders):
    """From the folder of a PixArt-Sigma pipeline. Raises CheckpointError where that is incomplete."""

    name, pipeline, autoencoder, tokens = "pixart", PixArtSigmaPipeline, AutoencoderKL, TOKENS
