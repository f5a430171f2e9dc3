"""Encoders of the bases whose transformer attends to a masked sequence of text tokens (SANA, PixArt-Sigma).

    prompt_embeds            states of the text encoder, padded to T tokens          [B, T, D]
    prompt_attention_mask    1 for a token of the caption, 0 for padding, as floats  [B, T]

Both are cached, and batched as any other text tensor. transformers' and diffusers' own classes compute them: the base's pipeline
encodes. On a GPU nothing of this stays there: the text encoder (T5-XXL 8.9 GiB, Gemma-2 4.9) is copied layer by layer during its
forward pass. `encode_text` loads it when it is first called, so a run that finds all captions in its cache never does.
"""

import gc
from bisect import bisect_right
from collections.abc import Mapping
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor

from loragraft.backbones.flux1_encoders import (
    CAPTIONS_TOGETHER,
    RELEASED,
    check_parts,
    digest_of,
    drawn_for,
    random_vae,
    without_warnings,
)
from loragraft.backbones.pictures import Pictures
from loragraft.backbones.pipeline_folder import open_scheduler, variant
from loragraft.backbones.resting import rest, stream_layers
from loragraft.quantization.tensor_file import CheckpointError

PARTS = ("text_encoder", "tokenizer", "vae")


class MaskedEncoders(Pictures):
    """From the folder of a diffusers pipeline. Raises CheckpointError where that is incomplete."""

    name: str
    """In the id."""
    pipeline: type[DiffusionPipeline]
    """The stock pipeline, whose `encode_prompt` encodes."""
    autoencoder: type[Any]
    tokens: int
    """T."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        self.folder, self._dtype = folder, dtype
        check_parts(folder, (*PARTS, "scheduler"))
        vae = self.autoencoder.from_pretrained(
            folder / "vae", dtype=dtype, variant=variant(folder / "vae"), local_files_only=True
        )
        super().__init__(vae, open_scheduler(folder), device)
        self._text: Any = None
        self._released = False

    @cached_property
    def id(self) -> str:
        """`<name>-<digest of the files>-<tokens>`."""
        return f"{self.name}-{digest_of(self.folder, PARTS)}-{self.tokens}"

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder / "tokenizer", local_files_only=True)

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

    def _loaded_text(self) -> Any:
        if self._released:
            raise RuntimeError(RELEASED)
        if self._text is None:
            try:
                text: Any = self.pipeline.from_pretrained(
                    self.folder, transformer=None, vae=None, dtype=self._dtype,
                    variant=variant(self.folder / "text_encoder"), local_files_only=True,
                )  # fmt: skip
            except OSError as error:
                raise CheckpointError(f"the text encoder of {self.folder} cannot be read: {error}") from error
            if self._device.type == "cuda":
                stream_layers(text.text_encoder, self._device)
            self._text = text
        return self._text

    def release_text(self) -> None:
        """Frees the text encoder, and on a GPU what the activations of both encoders held."""
        self._text, self._released = None, True
        rest(self.vae)
        gc.collect()  # accelerate's hooks and the modules point at each other
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


class RandomMaskedEncoders(Pictures):
    """The shapes without the files. The autoencoder has random weights. There is no text encoder: a caption's embeddings are
    normal numbers drawn from a seed that is its sha256, and it has a token for each of its words and two marks."""

    def __init__(
        self,
        name: str,
        autoencoder: tuple[type[Any], Mapping[str, Any]],
        scheduler: tuple[type[SchedulerMixin], Mapping[str, Any]],
        text: tuple[int, int],
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """`text`: (T tokens, D width of a token)."""
        super().__init__(random_vae(autoencoder[1], seed, dtype, autoencoder[0]), scheduler, device)
        self._name, self._shape, self._seed, self._released = name, text, seed, False

    @property
    def id(self) -> str:
        return f"{self._name}-random-{self._seed}-{'x'.join(map(str, self._shape))}"

    def readable(self, caption: str) -> str:
        """All of it."""
        return caption

    def encode_text(self, captions: list[str]) -> dict[str, Tensor]:
        """B captions -> `prompt_embeds` [B, T, D], N(0, 1), and `prompt_attention_mask` [B, T], float32 on the CPU."""
        if self._released:
            raise RuntimeError(RELEASED)
        tokens, width = self._shape
        states = torch.stack([drawn_for(caption, self._seed, tokens * width) for caption in captions])
        said = torch.tensor([len(caption.split()) + 2 for caption in captions])
        mask = (torch.arange(tokens) < said.unsqueeze(1)).float()
        return {"prompt_embeds": states.unflatten(1, (tokens, width)), "prompt_attention_mask": mask}

    def release_text(self) -> None:
        """There is none to free; the autoencoder leaves the device."""
        self._released = True
        rest(self.vae)
