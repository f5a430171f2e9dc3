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

import gc
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from loragraft.backbones.flux1_encoders import (
    RELEASED,
    KlPictures,
    check_parts,
    digest_of,
    drawn_for,
    random_vae,
    without_warnings,
)
from loragraft.backbones.resting import rest
from loragraft.backbones.unet import UNetFamily
from loragraft.quantization.dialects.assembly import read_json
from loragraft.quantization.tensor_file import CheckpointError

CAPTIONS_TOGETHER = 32
"""Captions in one forward pass of the text models."""


class _UNetPictures(KlPictures):
    """With the scheduler and the parts that the family's pipelines know."""

    def __init__(
        self,
        vae: AutoencoderKL,
        scheduler: tuple[type[Any], Mapping[str, Any]],
        family: UNetFamily,
        device: torch.device,
    ) -> None:
        """scheduler: its class and configuration."""
        super().__init__(vae, scheduler[1], device)
        self._scheduler_class, self.family = scheduler[0], family

    @property
    def pipeline_parts(self) -> dict[str, Any]:
        text = ("text_encoder", "tokenizer", *(("text_encoder_2", "tokenizer_2") if self.family.sized else ()))
        scheduler = self._scheduler_class.from_config(dict(self._scheduler))
        return {"vae": self.vae, "scheduler": scheduler, **dict.fromkeys(text)}


class ClipEncoders(_UNetPictures):
    """From the folder of a diffusers pipeline. Raises CheckpointError where that is incomplete, ValueError for one whose UNet
    predicts something else than the family's."""

    def __init__(
        self, folder: Path, family: UNetFamily, scheduler_class: type[Any], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.folder, self._dtype = folder, dtype
        text = ("text_encoder", "tokenizer", *(("text_encoder_2", "tokenizer_2") if family.sized else ()))
        self._parts = (*text, "vae")
        check_parts(folder, (*self._parts, "scheduler"))
        scheduler = scheduler_class.load_config(folder / "scheduler", local_files_only=True)
        _check_prediction(folder, family, scheduler)
        vae = AutoencoderKL.from_pretrained(folder / "vae", dtype=dtype, local_files_only=True)
        super().__init__(vae, (scheduler_class, scheduler), family, device)
        self._zeros = family.sized and bool(
            read_json(folder / "model_index.json").get("force_zeros_for_empty_prompt", True)
        )
        self._text: Any = None
        self._released = False

    @cached_property
    def id(self) -> str:
        """`clip-<digest of the files>`, and what stands for the empty caption."""
        return f"clip-{digest_of(self.folder, self._parts)}{'-zeros' if self._zeros else ''}"

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder / "tokenizer", local_files_only=True)

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

    def _loaded_text(self) -> Any:
        if self._released:
            raise RuntimeError(RELEASED)
        if self._text is None:
            from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection

            kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
            parts: dict[str, Any] = {}
            try:
                for name in self._parts[:-1]:
                    if name in kinds:
                        model = kinds[name].from_pretrained(
                            self.folder / name, dtype=self._dtype, local_files_only=True
                        )
                        parts[name] = nn.Module.to(model, self._device).eval().requires_grad_(False)
                    else:
                        parts[name] = AutoTokenizer.from_pretrained(self.folder / name, local_files_only=True)
            except OSError as error:
                raise CheckpointError(f"the text encoders of {self.folder} cannot be read: {error}") from error
            own = {**self.family.options, **self.pipeline_parts, **parts, "vae": None}
            self._text = self.family.text_to_image(unet=None, **own)
        return self._text

    def release_text(self) -> None:
        """Frees the text models, and on a GPU what the activations of all encoders held."""
        self._text, self._released = None, True
        rest(self.vae)
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _check_prediction(folder: Path, family: UNetFamily, scheduler: Mapping[str, Any]) -> None:
    found = scheduler.get("prediction_type", "epsilon")
    if found != family.process.prediction:
        raise ValueError(
            f"{folder} is of a UNet that predicts {found} (scheduler/scheduler_config.json), this base's predicts "
            f"{family.process.prediction}: it would be trained and drawn wrongly"
        )


class RandomClipEncoders(_UNetPictures):
    """The shapes without the files. The autoencoder has random weights. There is no text encoder: a caption's embeddings are
    normal numbers drawn from a seed that is its sha256, so equal captions agree and different ones mean nothing."""

    def __init__(
        self,
        vae: Mapping[str, Any],
        scheduler: tuple[type[Any], Mapping[str, Any]],
        family: UNetFamily,
        text: tuple[int, int, int],
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """`text`: (T tokens, D width of a token, P width of the pooled vector, where there is one)."""
        super().__init__(random_vae(vae, seed, dtype), scheduler, family, device)
        self._shape, self._seed, self._released = text, seed, False

    @property
    def id(self) -> str:
        return f"clip-random-{self._seed}-{'x'.join(map(str, self._shape))}"

    def readable(self, caption: str) -> str:
        """All of it."""
        return caption

    def encode_text(self, captions: list[str]) -> dict[str, Tensor]:
        """B captions -> the family's text tensors, N(0, 1), float32 on the CPU."""
        if self._released:
            raise RuntimeError(RELEASED)
        tokens, width, pooled = self._shape
        drawn = torch.stack([drawn_for(caption, self._seed, tokens * width + pooled) for caption in captions])
        parts = (drawn[:, : tokens * width].unflatten(1, (tokens, width)), drawn[:, tokens * width :])
        return dict(zip(self.family.text_keys, parts, strict=False))

    def release_text(self) -> None:
        """There is none to free; the autoencoder leaves the device."""
        self._released = True
        rest(self.vae)
