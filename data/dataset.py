"""Encoded samples in memory's reach: `LatentCache` -> `LatentDataset` of a split -> batches."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor
from torch.utils.data import Dataset

from loragraft.data.cache import ShardStore
from loragraft.data.sample import Sample, Shape
from loragraft.data.splits import Split

Item = dict[str, Tensor | str]


class Batch(TypedDict, total=False):
    """Stacked samples; bf16. Beside these keys it holds the base's text tensors (`text_of`)."""

    latents: Tensor
    """[B, C, h, w], scaled as the denoiser wants them."""
    caption: list[str]


@dataclass(frozen=True, slots=True)
class Entry:
    """A sample at one size, as it lies in the cache. A sample at several resolutions has several."""

    sample: Sample
    shape: Shape
    """(H, W) of its pixels."""
    key: str
    """Of its latents, or of everything where image and caption are cached together."""
    texts: tuple[str, ...] = ()
    """Keys of its captions' embeddings where they are cached apart."""

    def variant(self, epoch: int) -> int:
        """Which of its captions epoch `epoch` shows: all in turn, each sample beginning elsewhere."""
        return (int(self.key[:8], 16) + epoch) % len(self.texts)


class LatentDataset(Dataset[Item]):
    """Samples of one split. Rows are read from disk on demand (the page cache keeps them), so it pickles for workers."""

    def __init__(self, store: ShardStore, texts: ShardStore | None, entries: Sequence[Entry]) -> None:
        self.store, self.texts = store, texts
        self.entries = list(entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Item:
        return self.item(index, 0)

    @property
    def samples(self) -> list[Sample]:
        """The sample of every entry."""
        return [entry.sample for entry in self.entries]

    @property
    def shapes(self) -> list[Shape]:
        """(H, W) of every entry's pixels."""
        return [entry.shape for entry in self.entries]

    def item(self, index: int, epoch: int) -> Item:
        """Sample `index` as epoch `epoch` shows it."""
        entry = self.entries[index]
        item: Item = {**self.store.read(entry.key)}
        if self.texts is None:
            return {**item, "caption": entry.sample.caption}
        variant = entry.variant(epoch)
        return {**item, **self.texts.read(entry.texts[variant]), "caption": entry.sample.said[variant]}

    def batch(self, indices: Sequence[int], epochs: Sequence[int] = ()) -> Batch:
        """The samples at `indices`, each as its epoch (0 unless given) shows it, collated; all must be of one shape."""
        return collate([self.item(i, e) for i, e in zip(indices, epochs or [0] * len(indices), strict=True)])


class LatentCache:
    """All samples of a run, encoded. `empty` holds the text tensors of the empty prompt, without batch dimension."""

    def __init__(self, store: ShardStore, texts: ShardStore | None, entries: Sequence[Entry], empty_key: str) -> None:
        """texts: where captions lie that are cached apart from their images."""
        self.store, self.texts = store, texts
        self.entries = list(entries)
        self.empty = (texts or store).read(empty_key)

    def __len__(self) -> int:
        return len(self.entries)

    def split(self, name: Split) -> LatentDataset:
        """The samples of a split, in the source's order; it may be empty."""
        return LatentDataset(self.store, self.texts, [e for e in self.entries if e.sample.split == name])

    @property
    def fingerprint(self) -> str:
        """See `fingerprint_of`."""
        return fingerprint_of(self.entries)


def fingerprint_of(entries: Iterable[Entry]) -> str:
    """sha256 (hex) over keys and splits: the same data under the same encoder, whatever its order."""
    lines = sorted(f"{'+'.join((entry.key, *entry.texts))} {entry.sample.split}" for entry in entries)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def text_of(batch: Batch) -> dict[str, Tensor]:
    """The text tensors of a batch, under the names that the base's `encode_text` gave them."""
    return {key: value for key, value in batch.items() if key != "latents" and isinstance(value, Tensor)}


def collate(items: Sequence[Item]) -> Batch:
    """Stack the tensors of the items and list their captions."""
    batch: dict[str, object] = {}
    for name, first in items[0].items():
        values = [item[name] for item in items]
        batch[name] = torch.stack([v for v in values if isinstance(v, Tensor)]) if isinstance(first, Tensor) else values
    return Batch(**batch)  # type: ignore[typeddict-item]
