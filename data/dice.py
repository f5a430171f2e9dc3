"""Seeded draws that are the same on every machine and in every Python: sha256 of a seed and a counter, nothing else.

`random.Random` promises this for `random()` alone; its `choice`, `sample` and `shuffle` have changed between versions.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")


class Dice:
    """An endless sequence of draws; the n-th one depends on (seed, n) only."""

    def __init__(self, seed: str) -> None:
        self._seed = seed
        self._drawn = 0

    def below(self, n: int) -> int:
        """Uniform over 0 .. n - 1 (bias under n / 2^64). Raises ValueError for n < 1."""
        if n < 1:
            raise ValueError(f"no number is below {n}: draw from at least one thing")
        digest = hashlib.sha256(f"{self._seed}/{self._drawn}".encode()).digest()
        self._drawn += 1
        return int.from_bytes(digest[:8], "big") % n

    def chance(self, share: float) -> bool:
        """True in that share of the draws, to one part in a million."""
        return self.below(1_000_000) < share * 1_000_000

    def pick(self, options: Sequence[T]) -> T:
        """One of the options, all equally likely."""
        return options[self.below(len(options))]

    def weighted(self, weights: Mapping[str, int]) -> str:
        """A key, as often as its weight says."""
        number = self.below(sum(weights.values()))
        for key, weight in weights.items():
            number -= weight
            if number < 0:
                return key
        raise AssertionError("weights are not negative")

    def shuffled(self, things: Sequence[T]) -> list[T]:
        """All things in a new order (Fisher and Yates)."""
        order = list(things)
        for last in range(len(order) - 1, 0, -1):
            other = self.below(last + 1)
            order[last], order[other] = order[other], order[last]
        return order
