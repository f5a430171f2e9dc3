"""Stable Diffusion's encoders: CLIP text models for captions, a 4-channel autoencoder (f8) for pictures.

    SD1.5       prompt_embeds = CLIP-L's last states                                             [B, 77, 768]
    SD 2        prompt_embeds = OpenCLIP-H's last states (its last layer is left out)            [B, 77, 1024]
    SDXL        prompt_embeds = CLIP-L's and OpenCLIP-bigG's last states but one, side by side   [B, 77, 768 + 1280]
                pooled_prompt_embeds = bigG's projected vector                                   [B, 1280]
    latents = mean of the posterior * scale                                                      [B, 4, H/8, W/8]

SDXL was trained with zeros for the caption that is left out: where its pipeline says so (`force_zeros_for_empty_prompt`), the
empty caption's tensors are zeros, in training and when drawing. transformers' and diffusers' own classes compute everything. The
text models come to the GPU with the first caption and leave it with `release_text`. Source of the conventions: diffusers' pipelines.
"""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from loragraft.backbones.resting import rest
from loragraft.backbones.text_encoders import FolderEncoders, check_parts, without_warnings
from loragraft.backbones.unet import UNetFamily
from loragraft.quantization.dialects.assembly import read_json

CAPTIONS_TOGETHER = 32
"""Captions in one forward pass of the text models."""


def text_parts(family: UNetFamily) -> tuple[str, ...]:
    """Of the family's pipelines: one text model, or two."""
    return ("text_encoder", "tokenizer", *(("text_encoder_2", "tokenizer_2") if family.sized else ()))


class ClipEncoders(FolderEncoders):
    """From the folder of a diffusers pipeline. Raises CheckpointError where that is incomplete, ValueError for one whose UNet
    predicts something else than the family's."""

    def __init__(
        self, folder: Path, family: UNetFamily, scheduler_class: type[Any], device: torch.device, dtype: torch.dtype
    ) -> None:
        parts = (*text_parts(family), "vae")
        check_parts(folder, (*parts, "scheduler"))
        scheduler = scheduler_class.load_config(folder / "scheduler", local_files_only=True)
        _check_prediction(folder, family, scheduler)
        vae = AutoencoderKL.from_pretrained(folder / "vae", dtype=dtype, local_files_only=True)
        super().__init__(folder, parts, vae, (scheduler_class, scheduler), device, dtype)
        self.family = family
        self._zeros = family.sized and bool(
            read_json(folder / "model_index.json").get("force_zeros_for_empty_prompt", True)
        )

    @cached_property
    def id(self) -> str:
        """`clip-<digest of the files>`, and what stands for the empty caption."""
        return f"clip-{self._digest}{'-zeros' if self._zeros else ''}"

    def readable(self, caption: str) -> str:
        """The caption as far as 77 tokens reach, marks included."""
        found = self._tokenizer(
            caption, return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False
        )  # fmt: skip
        marks = found["special_tokens_mask"]
        ends = [end for (_, end), mark in zip(found["offset_mapping"], marks, strict=True) if not mark]
        room = self._tokenizer.model_max_length - sum(marks)
        return caption if len(ends) <= room else caption[: ends[room - 1]]

    @torch.no_grad()
    def encode_text(self, captions: list[str]) -> dict[str, Tensor]:
        """B captions -> `prompt_embeds` [B, 77, D], of SDXL also `pooled_prompt_embeds` [B, 1280], on the CPU."""
        text = self._loaded_text()
        rest(self.vae)
        found: dict[str, list[Tensor]] = {key: [] for key in self.family.text_keys}
        with without_warnings("diffusers.pipelines"):
            for start in range(0, len(captions), CAPTIONS_TOGETHER):
                together = captions[start : start + CAPTIONS_TOGETHER]
                states, _, *pooled = text.encode_prompt(
                    together, device=self._device, num_images_per_prompt=1, do_classifier_free_guidance=False
                )
                for key, tensor in zip(self.family.text_keys, (states, *pooled[:1]), strict=True):
                    found[key].append(tensor.cpu())
        tensors = {key: torch.cat(parts) for key, parts in found.items()}
        if self._zeros:
            empty = torch.tensor([not caption for caption in captions])
            tensors = {key: t.masked_fill(empty.view(-1, *[1] * (t.dim() - 1)), 0) for key, t in tensors.items()}
        return tensors

    def _open_text(self) -> Any:
        from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection

        kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
        parts: dict[str, Any] = {}
        for name in text_parts(self.family):
            if name in kinds:
                model = kinds[name].from_pretrained(self.folder / name, dtype=self._dtype, local_files_only=True)
                parts[name] = nn.Module.to(model, self._device).eval().requires_grad_(False)
            else:
                parts[name] = AutoTokenizer.from_pretrained(self.folder / name, local_files_only=True)
        own = {**self.family.options, **self.pipeline_parts, **parts, "vae": None}
        return self.family.text_to_image(unet=None, **own)


def _check_prediction(folder: Path, family: UNetFamily, scheduler: Mapping[str, Any]) -> None:
    found = scheduler.get("prediction_type", "epsilon")
    if found != family.process.prediction:
        raise ValueError(
            f"{folder} is of a UNet that predicts {found} (scheduler/scheduler_config.json), this base's predicts "
            f"{family.process.prediction}: it would be trained and drawn wrongly"
        )
