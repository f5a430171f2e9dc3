"""Encoders of the bases whose transformer attends to a masked sequence of text tokens (SANA, PixArt-Sigma).

    prompt_embeds            states of the text encoder, padded to T tokens          [B, T, D]
    prompt_attention_mask    1 for a token of the caption, 0 for padding, as floats  [B, T]

Both are cached, and batched as any other text tensor. transformers' and diffusers' own classes compute them: the base's pipeline
encodes. On a GPU nothing of this stays there: the text encoder (T5-XXL 8.9 GiB, Gemma-2 4.9) is copied layer by layer during its
forward pass. `encode_text` loads it when it is first called, so a run that finds all captions in its cache never does.
"""

from bisect import bisect_right
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from loragraft.backbones.flux1_encoders import CAPTIONS_TOGETHER
from loragraft.backbones.pipeline_folder import open_scheduler, variant
from loragraft.backbones.resting import rest, stream_layers
from loragraft.backbones.text_encoders import FolderEncoders, RandomEncoders, check_parts, without_warnings

PARTS = ("text_encoder", "tokenizer", "vae")


class MaskedEncoders(FolderEncoders):
    """From the folder of a diffusers pipeline. Raises CheckpointError where that is incomplete."""

    name: str
    """In the id."""
    pipeline: type[DiffusionPipeline]
    """The stock pipeline, whose `encode_prompt` encodes."""
    autoencoder: type[Any]
    tokens: int
    """T."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        check_parts(folder, (*PARTS, "scheduler"))
        vae = self.autoencoder.from_pretrained(
            folder / "vae", dtype=dtype, variant=variant(folder / "vae"), local_files_only=True
        )
        super().__init__(folder, PARTS, vae, open_scheduler(folder), device, dtype)

    @cached_property
    def id(self) -> str:
        """`<name>-<digest of the files>-<tokens>`."""
        return f"{self.name}-{self._digest}-{self.tokens}"

    def readable(self, caption: str) -> str:
        """The caption as far as the transformer's T tokens reach."""
        return self._cut(caption, before="", tokens=self.tokens, end_marks=1)

    def _cut(self, caption: str, before: str, tokens: int, end_marks: int) -> str:
        """What of `caption` is among the first `tokens` tokens of `before` + caption, stripped and in lower case as the pipeline
        makes it; the last `end_marks` of them stand for no letters."""
        lowered = caption.lower().strip()
        found = self._tokenizer(before + lowered, return_offsets_mapping=True, verbose=False)["offset_mapping"]
        ends = [end for _, end in found[: len(found) - end_marks]]
        room = tokens - end_marks
        if len(ends) <= room:
            return caption
        # A letter may become two in lower case.
        lengths = list(accumulate(len(letter.lower()) for letter in caption))
        indent = len(caption.lower()) - len(caption.lower().lstrip())
        kept = max(0, ends[room - 1] - len(before)) + indent
        return caption[: bisect_right(lengths, kept)]

    def encode_text(self, captions: list[str]) -> dict[str, Tensor]:
        """B captions -> `prompt_embeds` [B, T, D] and `prompt_attention_mask` [B, T], on the CPU."""
        text = self._loaded_text()
        rest(self.vae)
        states, masks = [], []
        with without_warnings("diffusers.pipelines"):
            for start in range(0, len(captions), CAPTIONS_TOGETHER):
                found, mask = self._encode(text, captions[start : start + CAPTIONS_TOGETHER])
                states.append(found.cpu())
                masks.append(mask.to("cpu", found.dtype))
        return {"prompt_embeds": torch.cat(states), "prompt_attention_mask": torch.cat(masks)}

    @torch.no_grad()
    def _encode(self, text: Any, captions: list[str]) -> tuple[Tensor, Tensor]:
        """(states, mask) of a few captions, as `text`, the pipeline, makes them."""
        found = text.encode_prompt(
            captions, do_classifier_free_guidance=False, device=self._device, max_sequence_length=self.tokens
        )
        return found[0], found[1]

    def _open_text(self) -> Any:
        text: Any = self.pipeline.from_pretrained(
            self.folder, transformer=None, vae=None, dtype=self._dtype,
            variant=variant(self.folder / "text_encoder"), local_files_only=True,
        )  # fmt: skip
        if self._device.type == "cuda":
            stream_layers(text.text_encoder, self._device)
        return text


class RandomMaskedEncoders(RandomEncoders):
    """With a mask: a caption has a token for each of its words and two marks."""

    def encode_text(self, captions: list[str]) -> dict[str, Tensor]:
        """B captions -> `prompt_embeds` [B, T, D], N(0, 1), and `prompt_attention_mask` [B, T], float32 on the CPU."""
        states = super().encode_text(captions)["prompt_embeds"]
        said = torch.tensor([len(caption.split()) + 2 for caption in captions])
        mask = (torch.arange(states.shape[1]) < said.unsqueeze(1)).float()
        return {"prompt_embeds": states, "prompt_attention_mask": mask}
