"""FLUX.1's encoders: T5-XXL and CLIP-L for captions, a 16-channel autoencoder (f8) for pictures.

    prompt_embeds = T5(caption padded to T tokens), padding included as FLUX.1 was trained     [B, T, 4096], T = 512 or 256
    pooled_prompt_embeds = CLIP-L's pooled output of the first 77 tokens                        [B, 768]
    latents = (mean of the posterior - shift) * scale                                          [B, 16, H/8, W/8]

transformers' and diffusers' own classes compute them. On a GPU nothing of this stays there: T5 (8.9 GiB) is copied layer by
layer during its forward pass, the autoencoder is there only while pictures are encoded or decoded. A run that finds all captions
in its cache never loads the text encoders. Source of the conventions: diffusers' FluxPipeline.
"""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from torch import Tensor, nn

from loragraft.backbones.resting import rest, stream_layers
from loragraft.backbones.text_encoders import FolderEncoders, check_parts, without_warnings

CAPTIONS_TOGETHER = 8
"""Captions in one forward pass of T5, whose attention takes most of 2.4 GiB at 512 tokens."""
TEXT_PARTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
PARTS = (*TEXT_PARTS, "vae")


class Flux1Encoders(FolderEncoders):
    """From the folder of a diffusers pipeline. Raises CheckpointError where that is incomplete."""

    tokenizer_part = "tokenizer_2"

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype, tokens: int) -> None:
        check_parts(folder, (*PARTS, "scheduler"))
        vae = AutoencoderKL.from_pretrained(folder / "vae", dtype=dtype, local_files_only=True)
        scheduler = FlowMatchEulerDiscreteScheduler.load_config(folder / "scheduler", local_files_only=True)
        super().__init__(folder, PARTS, vae, (FlowMatchEulerDiscreteScheduler, scheduler), device, dtype)
        self.tokens = tokens

    @cached_property
    def id(self) -> str:
        """`flux1-<digest of the files>-<tokens>`."""
        return f"flux1-{self._digest}-{self.tokens}"

    def readable(self, caption: str) -> str:
        """The caption as far as T5's tokens reach, its end mark included. CLIP reads 77 tokens, for the pooled vector alone."""
        ends = [
            end
            for _, end in self._tokenizer(caption, return_offsets_mapping=True, verbose=False)["offset_mapping"][:-1]
        ]
        return caption if len(ends) < self.tokens else caption[: ends[self.tokens - 2]]

    @torch.no_grad()
    def encode_text(self, captions: list[str]) -> dict[str, Tensor]:
        """B captions -> `prompt_embeds` [B, T, D] and `pooled_prompt_embeds` [B, P], on the CPU."""
        text = self._loaded_text()
        rest(self.vae)
        states, pooled = [], []
        with without_warnings():
            for start in range(0, len(captions), CAPTIONS_TOGETHER):
                found = text.encode_prompt(
                    captions[start : start + CAPTIONS_TOGETHER], device=self._device, max_sequence_length=self.tokens
                )
                states.append(found[0].cpu())
                pooled.append(found[1].cpu())
        return {"prompt_embeds": torch.cat(states), "pooled_prompt_embeds": torch.cat(pooled)}

    def _open_text(self) -> Any:
        text = FluxPipeline.from_pretrained(
            self.folder, transformer=None, vae=None, dtype=self._dtype, local_files_only=True
        )
        if self._device.type == "cuda":
            nn.Module.to(text.text_encoder, self._device)
            stream_layers(text.text_encoder_2, self._device)
        return text
