"""FLUX.1's encoders: T5-XXL and CLIP-L for captions, a 16-channel autoencoder (f8) for pictures.

    prompt_embeds = T5(caption padded to T tokens), padding included as FLUX.1 was trained     [B, T, 4096], T = 512 or 256
    pooled_prompt_embeds = CLIP-L's pooled output of the first 77 tokens                        [B, 768]
    latents = (mean of the posterior - shift) * scale                                          [B, 16, H/8, W/8]

transformers' and diffusers' own classes compute them. On a GPU nothing of this stays there: T5 (8.9 GiB) is copied layer by
layer during its forward pass, the autoencoder is there only while pictures are encoded or decoded. `encode_text` loads the text
encoders when it is first called, so a run that finds all captions in its cache never does. Source of the conventions: diffusers'
FluxPipeline.
"""

import contextlib
import gc
import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from torch import Tensor, nn

from loragraft.backbones.resting import rest, rest_between_calls, stream_layers
from loragraft.quantization.tensor_file import CheckpointError

CAPTIONS_TOGETHER = 8
"""Captions in one forward pass of T5, whose attention takes most of 2.4 GiB at 512 tokens."""
PARTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae")
RELEASED = "the text encoders were released: encode captions before release_text()"
_WHOLE, _SAMPLES, _SAMPLE = 2**24, 64, 2**16


class KlPictures:
    """The half of `Encoders` that an AutoencoderKL does."""

    def __init__(self, vae: AutoencoderKL, scheduler: Mapping[str, Any], device: torch.device) -> None:
        """scheduler: its configuration."""
        self.vae, self._scheduler, self._device = vae, scheduler, device
        vae.eval().requires_grad_(False)
        vae.enable_slicing()  # one picture at a time: at 1024 px each takes 1.5 GiB of activations
        vae.enable_tiling()  # takes effect above the size that it was trained at
        rest_between_calls(vae, device)

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> (mean - shift) * scale, [B, C, H/8, W/8]: about unit variance.

        The autoencoder stays on the device for the next picture; it leaves before captions are encoded, and with
        `release_text`.
        """
        mean = self.vae.encode(pixels.to(self._device, self.vae.dtype)).latent_dist.mode()
        latents: Tensor = (mean - (self.vae.config.shift_factor or 0.0)) * self.vae.config.scaling_factor
        return latents

    @property
    def pipeline_parts(self) -> dict[str, Any]:
        return {
            "vae": self.vae,
            "scheduler": FlowMatchEulerDiscreteScheduler.from_config(dict(self._scheduler)),
            "text_encoder": None,
            "tokenizer": None,
            "text_encoder_2": None,
            "tokenizer_2": None,
        }


class Flux1Encoders(KlPictures):
    """From the folder of a diffusers pipeline. Raises CheckpointError where that is incomplete."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype, tokens: int) -> None:
        self.folder, self.tokens, self._dtype = folder, tokens, dtype
        check_parts(folder, (*PARTS, "scheduler"))
        vae = AutoencoderKL.from_pretrained(folder / "vae", dtype=dtype, local_files_only=True)
        scheduler = FlowMatchEulerDiscreteScheduler.load_config(folder / "scheduler", local_files_only=True)
        super().__init__(vae, scheduler, device)
        self._text: FluxPipeline | None = None
        self._released = False

    @cached_property
    def id(self) -> str:
        """`flux1-<digest of the files>-<tokens>`."""
        return f"flux1-{digest_of(self.folder, PARTS)}-{self.tokens}"

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder / "tokenizer_2", local_files_only=True)

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

    def _loaded_text(self) -> FluxPipeline:
        if self._released:
            raise RuntimeError(RELEASED)
        if self._text is None:
            try:
                text = FluxPipeline.from_pretrained(
                    self.folder, transformer=None, vae=None, dtype=self._dtype, local_files_only=True
                )
            except OSError as error:
                raise CheckpointError(f"the text encoders of {self.folder} cannot be read: {error}") from error
            if self._device.type == "cuda":
                nn.Module.to(text.text_encoder, self._device)
                stream_layers(text.text_encoder_2, self._device)
            self._text = text
        return self._text

    def release_text(self) -> None:
        """Frees both text encoders, and on a GPU what the activations of all encoders held."""
        self._text, self._released = None, True
        rest(self.vae)
        gc.collect()  # accelerate's hooks and the modules point at each other
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def check_parts(folder: Path, parts: Sequence[str]) -> None:
    """Raises CheckpointError naming the folders of a pipeline that are not there."""
    missing = [part for part in parts if not (folder / part).is_dir()]
    if missing:
        raise CheckpointError(f"the pipeline {folder} lacks {', '.join(missing)}: fetch it again")


def digest_of(folder: Path, parts: Sequence[str]) -> str:
    """16 hex digits over the files of a pipeline's parts: names, sizes, small ones whole, of large ones 64 samples of 64 KiB."""
    digest = hashlib.sha256()
    for file in sorted(file for part in parts for file in (folder / part).rglob("*") if file.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder)} {size}\n".encode())
        with file.open("rb") as content:
            if size <= _WHOLE:
                digest.update(content.read())
                continue
            for i in range(_SAMPLES):
                content.seek(i * (size - _SAMPLE) // (_SAMPLES - 1))
                digest.update(content.read(_SAMPLE))
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def without_warnings(pipelines: str = "diffusers.pipelines.flux") -> Iterator[None]:
    """diffusers and transformers warn of every caption that is longer than CLIP's 77 tokens; what is longer than is read is
    `readable`'s matter."""
    loggers = [logging.getLogger(name) for name in (pipelines, "transformers.tokenization_utils_base")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


class RandomFlux1Encoders(KlPictures):
    """FLUX.1's shapes without its files. The autoencoder has random weights. There is no text encoder: a caption's embeddings
    are normal numbers drawn from a seed that is its sha256, so equal captions agree and different ones mean nothing."""

    def __init__(
        self,
        vae: Mapping[str, Any],
        scheduler: Mapping[str, Any],
        text: tuple[int, int, int],
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """`text`: (T tokens, D width of a token, P width of the pooled vector)."""
        super().__init__(random_vae(vae, seed, dtype), scheduler, device)
        self._shape, self._seed, self._released = text, seed, False

    @property
    def id(self) -> str:
        return f"flux1-random-{self._seed}-{'x'.join(map(str, self._shape))}"

    def readable(self, caption: str) -> str:
        """All of it."""
        return caption

    def encode_text(self, captions: list[str]) -> dict[str, Tensor]:
        """B captions -> `prompt_embeds` [B, T, D] and `pooled_prompt_embeds` [B, P], N(0, 1), float32 on the CPU."""
        if self._released:
            raise RuntimeError(RELEASED)
        tokens, width, pooled = self._shape
        both = torch.stack([drawn_for(caption, self._seed, tokens * width + pooled) for caption in captions])
        return {
            "prompt_embeds": both[:, : tokens * width].unflatten(1, (tokens, width)),
            "pooled_prompt_embeds": both[:, tokens * width :],
        }

    def release_text(self) -> None:
        """There is none to free; the autoencoder leaves the device."""
        self._released = True
        rest(self.vae)


def random_vae(config: Mapping[str, Any], seed: int, dtype: torch.dtype, made: type[Any] = AutoencoderKL) -> Any:
    """The shapes of an autoencoder of class `made` with values from `seed`; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        random = made.from_config(dict(config))
    nn.Module.to(random, dtype=dtype)
    return random


def drawn_for(caption: str, seed: int, count: int) -> Tensor:
    """`count` numbers, N(0, 1), that depend on caption and seed."""
    own = int.from_bytes(hashlib.sha256(f"{seed}/{caption}".encode()).digest()[:8], "little") >> 1
    return torch.randn(count, generator=torch.Generator().manual_seed(own))
