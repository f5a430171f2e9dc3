"""Captions to embeddings, for bases whose weights do not travel: from a pipeline's folder, or from a seed.

    FolderEncoders    a base says how its stock pipeline is opened and encodes; it is read with the first caption
    RandomEncoders    the same shapes from a seed: no files, and no text encoder

Both ids are part of every cache key: `<name>-<digest of the files>...` and `<name>-random-<seed>-<shape>`.
"""

import contextlib
import gc
import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKL, SchedulerMixin
from torch import Tensor

from loragraft.backbones.pictures import Pictures, random_vae
from loragraft.backbones.resting import rest
from loragraft.quantization.tensor_file import CheckpointError

RELEASED = "the text encoders were released: encode captions before release_text()"
_WHOLE, _SAMPLES, _SAMPLE = 2**24, 64, 2**16


class FolderEncoders(Pictures, ABC):
    """From the folder of a diffusers pipeline: `encode_text` loads the text encoders when it is first called."""

    tokenizer_part = "tokenizer"
    """The tokenizer whose tokens limit a caption."""

    def __init__(
        self,
        folder: Path,
        parts: Sequence[str],
        vae: AutoencoderKL | AutoencoderDC,
        scheduler: tuple[type[SchedulerMixin], Mapping[str, Any]],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """parts: folders that the id is a digest of, the autoencoder's `vae` among them."""
        super().__init__(vae, scheduler, device, [part for part in parts if part != "vae"])
        self.folder, self._parts, self._dtype = folder, tuple(parts), dtype
        self._text: Any = None
        self._released = False

    @cached_property
    def _digest(self) -> str:
        return digest_of(self.folder, self._parts)

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder / self.tokenizer_part, local_files_only=True)

    @abstractmethod
    def _open_text(self) -> Any:
        """The stock pipeline with its text encoders, ready to encode. Raises OSError where a file is missing."""

    def _loaded_text(self) -> Any:
        """Raises RuntimeError after `release_text`, CheckpointError for files that cannot be read."""
        if self._released:
            raise RuntimeError(RELEASED)
        if self._text is None:
            try:
                self._text = self._open_text()
            except OSError as error:
                raise CheckpointError(f"the text encoders of {self.folder} cannot be read: {error}") from error
        return self._text

    def release_text(self) -> None:
        """Frees the text encoders, and on a GPU what the activations of all encoders held."""
        self._text, self._released = None, True
        rest(self.vae)
        gc.collect()  # accelerate's hooks and the modules point at each other
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


class RandomEncoders(Pictures):
    """A base's shapes without its files. The autoencoder has random weights. There is no text encoder: a caption's embeddings are
    normal numbers drawn from a seed that is its sha256, so equal captions agree and different ones mean nothing."""

    def __init__(
        self,
        name: str,
        autoencoder: tuple[type[Any], Mapping[str, Any]],
        scheduler: tuple[type[SchedulerMixin], Mapping[str, Any]],
        text: tuple[int, ...],
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
        *,
        text_parts: Sequence[str] = ("text_encoder", "tokenizer"),
    ) -> None:
        """name: in the id. `text`: (T tokens, D width of a token), and P, the width of the pooled vector (0: there is none)."""
        made, config = autoencoder
        super().__init__(random_vae(config, seed, dtype, made), scheduler, device, text_parts)
        self._name, self._shape, self._seed, self._released = name, text, seed, False

    @property
    def id(self) -> str:
        """`<name>-random-<seed>-<T>x<D>[x<P>]`."""
        return f"{self._name}-random-{self._seed}-{'x'.join(map(str, self._shape))}"

    def readable(self, caption: str) -> str:
        """All of it."""
        return caption

    def encode_text(self, captions: list[str]) -> dict[str, Tensor]:
        """B captions -> `prompt_embeds` [B, T, D] and, where P > 0, `pooled_prompt_embeds` [B, P]: N(0, 1), float32 on the CPU.

        Raises RuntimeError after `release_text`.
        """
        if self._released:
            raise RuntimeError(RELEASED)
        tokens, width, *pooled = self._shape
        split = tokens * width
        drawn = torch.stack([drawn_for(caption, self._seed, split + sum(pooled)) for caption in captions])
        text = {"prompt_embeds": drawn[:, :split].unflatten(1, (tokens, width))}
        return {**text, "pooled_prompt_embeds": drawn[:, split:]} if any(pooled) else text

    def release_text(self) -> None:
        """There is none to free; the autoencoder leaves the device."""
        self._released = True
        rest(self.vae)


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


def drawn_for(caption: str, seed: int, count: int) -> Tensor:
    """`count` numbers, N(0, 1), that depend on caption and seed."""
    own = int.from_bytes(hashlib.sha256(f"{seed}/{caption}".encode()).digest()[:8], "little") >> 1
    return torch.randn(count, generator=torch.Generator().manual_seed(own))
