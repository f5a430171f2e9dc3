"""Which samples batch `number` shows: a pure function of the seed and the number, so a resumed run needs no sampler state.

A batch is of one bucket, since its latents are stacked. Every bucket of n_b samples walks over them by itself, endlessly, a
new permutation every epoch: batch j of a bucket holds the positions j B .. j B + B - 1 of its walk, and position p lies in
epoch p // n_b. So each sample is shown once before any of its bucket is shown again; nothing is dropped, and what is left of
an epoch opens the bucket's next batch.

Buckets are visited in proportion to their sizes. Over a cycle of N = sum n_b batches, which shows every sample B times,
visit j of bucket b comes at the time (j + u_bj) / n_b, u uniform in [0, 1): the order is random, and at any moment every
bucket has had its share of the visits to within about one. One bucket is the walk alone.
"""

import functools
import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch

from loragraft.data.sample import Shape


class Draw(NamedTuple):
    """The samples of one batch."""

    indices: list[int]
    epochs: list[int]
    """How often each of them has been shown before."""

    def part(self, mine: slice) -> "Draw":
        """What one of several processes takes of it."""
        return Draw(self.indices[mine], self.epochs[mine])


class BatchOrder:
    """Number -> `Draw` of `batch_size` samples, those of one shape. Raises ValueError where there are no samples."""

    def __init__(self, shapes: Sequence[Shape], batch_size: int, seed: int) -> None:
        """shapes: (H, W) of every sample."""
        if not shapes:
            raise ValueError("no samples to draw batches from")
        self.buckets: dict[Shape, list[int]] = {shape: [] for shape in sorted(set(shapes))}
        for index, shape in enumerate(shapes):
            self.buckets[shape].append(index)
        self.batch_size, self.seed = batch_size, seed
        self._members = list(self.buckets.values())
        self._seeds = [seed] if len(self.buckets) == 1 else [_mixed(seed, f"{h}x{w}") for h, w in self.buckets]

    def __call__(self, number: int) -> Draw:
        """Batch `number`, counted from 0. With accumulation, it counts the small batches."""
        bucket, visit = 0, number
        if len(self._members) > 1:
            cycle, place = divmod(number, sum(map(len, self._members)))
            buckets, visits = _visits(tuple(map(len, self._members)), self.seed, cycle)
            bucket = int(buckets[place])
            visit = cycle * len(self._members[bucket]) + int(visits[place])
        members, seed = self._members[bucket], self._seeds[bucket]
        walked = batch_indices(visit, self.batch_size, len(members), seed)
        first = visit * self.batch_size
        return Draw([members[i] for i in walked], [p // len(members) for p in range(first, first + self.batch_size)])


def batch_indices(step: int, batch_size: int, n: int, seed: int) -> list[int]:
    """Indices of batch `step` (counted from 0) of an endless walk over n samples, a new permutation every epoch.

    Position p = step * batch_size + i lies in epoch p // n. A pure function, so a resumed run needs no sampler state.
    With accumulation or several processes, `step` counts their small batches. Raises ValueError for n < 1.
    """
    if n < 1:
        raise ValueError("no samples to draw batches from")
    positions = range(step * batch_size, (step + 1) * batch_size)
    return [_permutation(n, seed, position // n)[position % n] for position in positions]


def pure_chunks(shapes: Sequence[Shape], most: int) -> list[list[int]]:
    """All indices in chunks of one shape and at most `most`, shapes in the order in which they appear."""
    groups: dict[Shape, list[int]] = {}
    for index, shape in enumerate(shapes):
        groups.setdefault(shape, []).append(index)
    return [group[i : i + most] for group in groups.values() for i in range(0, len(group), most)]


@functools.lru_cache(maxsize=64)
def _permutation(n: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(_mixed(seed, str(epoch)))
    order: list[int] = torch.randperm(n, generator=generator).tolist()
    return order


@functools.lru_cache(maxsize=2)
def _visits(sizes: tuple[int, ...], seed: int, cycle: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(bucket, number of its visit within the cycle), both int64 [N], in the order of the cycle's batches."""
    generator = torch.Generator().manual_seed(_mixed(seed, f"visits/{cycle}"))
    jitter = [torch.rand(n, generator=generator, dtype=torch.float64) for n in sizes]
    visits = [torch.arange(n) for n in sizes]
    times = torch.cat([(visit + u) / n for visit, u, n in zip(visits, jitter, sizes, strict=True)])
    order = torch.argsort(times, stable=True)
    buckets = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return buckets[order], torch.cat(visits)[order]


def _mixed(seed: int, what: str) -> int:
    digest = hashlib.sha256(f"{seed}/{what}".encode()).digest()[:8]
    return int.from_bytes(digest, "little") >> 1  # manual_seed wants 63 bits
