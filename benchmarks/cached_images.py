"""A data set as encoding would have left it: random latents of several sizes and random text, in the cache's own files."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from loragraft.backbones.load import find_spec
from loragraft.backbones.minilm import TOKENS
from loragraft.data.buckets import nearest_bucket
from loragraft.data.cache import SHARD_SAMPLES, ShardStore, latent_key, text_key
from loragraft.data.dataset import Entry, LatentCache
from loragraft.data.sample import Sample, Shape

FORMATS = ("4:3", "3:4", "16:9", "9:16")
FACTOR, PATCH = 8, 2
"""Pixels of a latent's edge; latents of a token's."""
TEXTS_AT_ONCE = 16


@dataclass(frozen=True)
class CachedImages:
    """What is drawn, and where it lies."""

    root: Path
    base: str
    """A FLUX-shaped one."""
    edge: int = 512
    formats: tuple[str, ...] = FORMATS
    """Width:height of the pictures, as many of each."""
    images: int = 2000
    captions: int = 128

    @property
    def shapes(self) -> list[Shape]:
        """(H, W) of every picture: its format's bucket."""
        sides = [tuple(map(int, text.split(":"))) for text in self.formats]
        buckets = [nearest_bucket(width, height, self.edge, find_spec(self.base).grain) for width, height in sides]
        return [buckets[i % len(buckets)] for i in range(self.images)]

    def open(self) -> LatentCache:
        """What `write` left."""
        latents, texts = self._stores()
        entries = [
            Entry(self._sample(i, shape), shape, self._key(i, shape), (text_key(self._caption(i), latents.encoder_id),))
            for i, shape in enumerate(self.shapes)
        ]
        return LatentCache(latents, texts, entries, text_key("", latents.encoder_id))

    def write(self) -> None:
        """Draws what is not there yet."""
        latents, texts = self._stores()
        config = self._config()
        groups: dict[Shape, list[str]] = {}
        for i, shape in enumerate(self.shapes):
            groups.setdefault(shape, []).append(self._key(i, shape))
        channels = config["in_channels"] // PATCH**2
        for (height, width), keys in groups.items():
            lacking = [key for key in keys if key not in latents]
            for first in range(0, len(lacking), SHARD_SAMPLES):
                chosen = lacking[first : first + SHARD_SAMPLES]
                size = len(chosen), channels, height // FACTOR, width // FACTOR
                latents.write(chosen, {"latents": torch.randn(size)})
        tokens = TOKENS if (external := find_spec(self.base).external) is None else external.t5_tokens
        said = {text_key(text, texts.encoder_id) for text in ("", *map(self._caption, range(self.captions)))}
        lacking = sorted(key for key in said if key not in texts)
        for first in range(0, len(lacking), TEXTS_AT_ONCE):
            chosen = lacking[first : first + TEXTS_AT_ONCE]
            embeds = torch.randn(len(chosen), tokens, config["joint_attention_dim"])
            pooled = torch.randn(len(chosen), config["pooled_projection_dim"])
            texts.write(chosen, {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled})

    def _stores(self) -> tuple[ShardStore, ShardStore]:
        name = f"random-{self.base}"
        return ShardStore(self.root, name, "latents"), ShardStore(self.root, name, "texts")

    def _config(self) -> dict[str, int]:
        spec = find_spec(self.base)
        if spec.external is not None:
            return dict(spec.external.config)
        assert spec.transformer_16bit is not None  # what travels with the package has a folder
        return dict(json.loads((spec.transformer_16bit / "config.json").read_text()))

    def _caption(self, number: int) -> str:
        return f"caption {number % self.captions}"

    def _sample(self, number: int, shape: Shape) -> Sample:
        file = Path(f"{number:04d}.png")
        return Sample(file, self._caption(number), "train", file.stem, "none", size=(shape[1], shape[0]))

    def _key(self, number: int, shape: Shape) -> str:
        return latent_key(hashlib.sha256(str(number).encode()).digest(), shape, f"random-{self.base}")
