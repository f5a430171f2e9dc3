"""What an adapter has to beat, and what it should leave alone."""

import torch

from loragraft.adapters.checkpoint import Adapter

GENERAL_PROMPTS = (
    "red heart",
    "blue car",
    "white camera icon on a navy background",
    "shopping cart",
    "yellow light bulb",
    "green leaf",
    "a cat face",
    "house",
    "coffee cup",
    "gift box",
    "trophy",
    "envelope",
    "bar chart",
    "globe",
    "smartphone",
    "umbrella",
    "slice of pizza",
    "bicycle",
    "purple flower",
    "black key icon on a yellow background",
    "white star on a green background",
    "white bell on a red background",
    "white truck icon on a blue to teal gradient background",
    "white rocket icon on a navy background",
    "blue credit card icon",
    "small red star at the top left",
    "large sun, glossy 3d emoji",
    "dog face, flat emoji",
    "music note",
    "map pin",
    "open book",
    "white padlock on a purple to pink gradient background",
)
"""What `pocket` draws without any adapter: icons and emoji, one thing each. Shown in no domain's style."""


def untrained_like(adapter: Adapter, seed: int) -> Adapter:
    """The adapter's paths, ranks and strengths with random directions: A, B ~ N(0, 1), scaled so that at every layer

        |B' A'| = |B A|   (Frobenius)

    What this one scores is owed to disturbing the base that much, not to training.
    """
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for path, (down, up) in sorted(adapter.pairs.items()):
        random_down = torch.randn(down.shape, generator=generator)
        random_up = torch.randn(up.shape, generator=generator)
        wanted, drawn = product_norm(down, up), product_norm(random_down, random_up)
        pairs[path] = random_down, random_up * (wanted / drawn)
    return Adapter("untrained", dict(adapter.metadata), pairs)


def product_norm(down_RK: torch.Tensor, up_NR: torch.Tensor) -> float:
    """|B A| (Frobenius) from two r x r matrices: |B A|^2 = tr(B^T B A A^T); a convolution's A [r, C, k, k] is a matrix too."""
    down, up = down_RK.double().flatten(1), up_NR.double().flatten(1)
    return float(((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt())


def derangement(count: int, seed: int) -> torch.Tensor:
    """A permutation of 0..count-1 that leaves nothing in its place: a random cycle. `count` at least 2."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    shuffled = torch.empty(count, dtype=torch.long)
    shuffled[order] = order.roll(1)
    return shuffled
