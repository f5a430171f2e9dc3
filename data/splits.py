"""Which concept belongs to train, validation and test: a pure function of names and a seed."""

import hashlib
from collections.abc import Iterable
from typing import Literal

Split = Literal["train", "validation", "test"]

SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def split_concepts(
    concepts: Iterable[str], seed: int, validation_fraction: float, test_fraction: float
) -> dict[str, Split]:
    """Order the distinct concepts by sha256(seed, concept); the first go to test, the next to validation.

    A concept is in one split only, and neither input order nor machine matters. Shares are rounded; with five concepts
    or more, a share above 0 gets at least one.
    """
    ranked = sorted(set(concepts), key=lambda concept: hashlib.sha256(f"{seed}/{concept}".encode()).digest())
    least = 1 if len(ranked) >= 5 else 0
    test = max(least, round(len(ranked) * test_fraction)) if test_fraction else 0
    validation = max(least, round(len(ranked) * validation_fraction)) if validation_fraction else 0
    return {
        concept: "test" if rank < test else "validation" if rank < test + validation else "train"
        for rank, concept in enumerate(ranked)
    }
