"""Encoded samples in memory's reach: `LatentCache` -> `LatentDataset` of a split -> batches in a stateless order."""

import functools
import hashlib
from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor
from torch.utils.data import Dataset

from loragraft.data.cache import ShardStore
from loragraft.data.sources import Sample
from loragraft.data.splits import Split

Item = dict[str, Tensor | str]


class Batch(TypedDict, total=False):
    """Stacked samples; bf16. A base may add text tensors of its own."""

    latents: Tensor
    """[B, C, h, w], scaled as the transformer wants them."""
    prompt_embeds: Tensor
    """[B, T, D]"""
    pooled_prompt_embeds: Tensor
    """[B, P]"""
    caption: list[str]


class LatentDataset(Dataset[Item]):
    """Samples of one split. Rows are read from disk on demand (the page cache keeps them), so it pickles for workers."""

    def __init__(self, store: ShardStore, keys: Sequence[str], samples: Sequence[Sample]) -> None:
        self.store = store
        self.keys = list(keys)
        self.samples = list(samples)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Item:
        return {**self.store.read(self.keys[index]), "caption": self.samples[index].caption}

    def batch(self, indices: Sequence[int]) -> Batch:
        """The samples at `indices`, collated."""
        return collate([self[index] for index in indices])


class LatentCache:
    """All samples of a run, encoded. `empty` holds the text tensors of the empty prompt, without batch dimension."""

    def __init__(self, store: ShardStore, keys: Sequence[str], samples: Sequence[Sample], empty_key: str) -> None:
        self.store = store
        self.keys = list(keys)
        self.samples = list(samples)
        self.empty = store.read(empty_key)

    def __len__(self) -> int:
        return len(self.keys)

    def split(self, name: Split) -> LatentDataset:
        """The samples of a split, in the source's order; it may be empty."""
        chosen = [i for i, sample in enumerate(self.samples) if sample.split == name]
        return LatentDataset(self.store, [self.keys[i] for i in chosen], [self.samples[i] for i in chosen])

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over keys and splits: the same data under the same encoder, whatever its order."""
        lines = sorted(f"{key} {sample.split}" for key, sample in zip(self.keys, self.samples, strict=True))
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def batch_indices(step: int, batch_size: int, n: int, seed: int) -> list[int]:
    """Indices of batch `step` (counted from 0) of an endless walk over n samples, a new permutation every epoch.

    Position p = step * batch_size + i lies in epoch p // n. A pure function, so a resumed run needs no sampler state.
    With accumulation or several processes, `step` counts their small batches. Raises ValueError for n < 1.
    """
    if n < 1:
        raise ValueError("no samples to draw batches from")
    positions = range(step * batch_size, (step + 1) * batch_size)
    return [_permutation(n, seed, position // n)[position % n] for position in positions]


@functools.lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> list[int]:
    mixed = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()[:8]
    generator = torch.Generator().manual_seed(int.from_bytes(mixed, "little") >> 1)  # manual_seed wants 63 bits
    order: list[int] = torch.randperm(n, generator=generator).tolist()
    return order


def collate(items: Sequence[Item]) -> Batch:
    """Stack the tensors of the items and list their captions."""
    batch: dict[str, object] = {}
    for name, first in items[0].items():
        values = [item[name] for item in items]
        batch[name] = torch.stack([v for v in values if isinstance(v, Tensor)]) if isinstance(first, Tensor) else values
    return Batch(**batch)  # type: ignore[typeddict-item]
