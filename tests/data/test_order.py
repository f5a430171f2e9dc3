"""The order of bucket-pure batches: stateless, every sample once an epoch, buckets in proportion, the same over processes."""

from collections import Counter

import pytest
import torch

from loragraft.data.order import BatchOrder, batch_indices, pure_chunks

WIDE, SQUARE, TALL = (64, 128), (96, 96), (128, 64)


def _shapes(wide: int, square: int, tall: int) -> list[tuple[int, int]]:
    """Shuffled, so that no bucket is a range of indices."""
    shapes = [WIDE] * wide + [SQUARE] * square + [TALL] * tall
    order = torch.randperm(len(shapes), generator=torch.Generator().manual_seed(1)).tolist()
    return [shapes[i] for i in order]


def test_one_bucket_is_the_plain_walk() -> None:
    order = BatchOrder([SQUARE] * 10, 3, seed=5)
    for number in range(40):
        draw = order(number)
        assert draw.indices == batch_indices(number, 3, 10, 5)
        assert draw.epochs == [(number * 3 + i) // 10 for i in range(3)]


@pytest.mark.parametrize(("counts", "batch_size"), [((40, 17, 9), 4), ((7, 1, 30), 3), ((5, 2, 3), 8), ((1, 1, 1), 2)])
def test_batches_are_pure_and_a_bucket_repeats_nothing_before_all_of_it_was_shown(
    counts: tuple[int, int, int], batch_size: int
) -> None:
    shapes = _shapes(*counts)
    order = BatchOrder(shapes, batch_size, seed=3)
    walks: dict[tuple[int, int], list[int]] = {}
    for number in range(3 * len(shapes)):
        draw = order(number)
        (shape,) = {shapes[i] for i in draw.indices}
        walk = walks.setdefault(shape, [])
        size = shapes.count(shape)
        assert draw.epochs == [(len(walk) + i) // size for i in range(batch_size)]
        walk += draw.indices
    for shape, walk in walks.items():
        members = [i for i, s in enumerate(shapes) if s == shape]
        epochs = [walk[i : i + len(members)] for i in range(0, len(walk) - len(members) + 1, len(members))]
        assert all(sorted(epoch) == members for epoch in epochs)
    shown = Counter(i for walk in walks.values() for i in walk)
    assert set(shown.values()) == {3 * batch_size}, "three cycles show every sample three times a batch's size"


def test_buckets_are_visited_in_proportion_at_any_moment_and_in_no_regular_order() -> None:
    shapes = _shapes(600, 250, 150)
    order = BatchOrder(shapes, 4, seed=0)
    visited: Counter[tuple[int, int]] = Counter()
    sequence = []
    for number in range(1, 1500):
        shape = shapes[order(number - 1).indices[0]]
        visited[shape] += 1
        sequence.append(shape)
        for bucket in (WIDE, SQUARE, TALL):
            assert abs(visited[bucket] - number * shapes.count(bucket) / len(shapes)) <= 2
    assert len({tuple(sequence[i : i + 10]) for i in range(0, 1490, 10)}) > 60


def test_an_epoch_shows_every_sample_once_but_for_what_is_left_of_a_batch() -> None:
    shapes, batch_size = _shapes(120, 60, 20), 4
    order = BatchOrder(shapes, batch_size, seed=2)
    for epochs in (1, 2, 3):
        shown = Counter(i for number in range(epochs * len(shapes) // batch_size) for i in order(number).indices)
        wrong = sum(abs(shown[i] - epochs) for i in range(len(shapes)))
        assert wrong <= 3 * 2 * batch_size, "each bucket is within two batches of its share"
        assert max(shown.values()) - min(shown[i] for i in range(len(shapes))) <= 2


def test_stateless_and_seeded() -> None:
    shapes = _shapes(20, 11, 6)
    forward = [BatchOrder(shapes, 4, seed=1)(number) for number in range(80)]
    order = BatchOrder(shapes, 4, seed=1)
    assert [order(number) for number in reversed(range(80))] == forward[::-1]
    assert [BatchOrder(shapes, 4, seed=2)(number) for number in range(80)] != forward
    with pytest.raises(ValueError, match="no samples"):
        BatchOrder([], 4, seed=1)


def test_processes_share_one_batch_of_one_bucket() -> None:
    shapes = _shapes(20, 11, 6)
    order = BatchOrder(shapes, 6, seed=1)  # two processes of three
    for number in range(60):
        draw = order(number)
        parts = [draw.part(slice(rank, None, 2)) for rank in (0, 1)]
        assert len({shapes[i] for part in parts for i in part.indices}) == 1
        assert [i for pair in zip(*(part.indices for part in parts), strict=True) for i in pair] == draw.indices


def test_chunks_of_one_shape() -> None:
    assert pure_chunks([SQUARE] * 5, 2) == [[0, 1], [2, 3], [4]]
    assert pure_chunks([WIDE, TALL, WIDE, WIDE], 2) == [[0, 2], [3], [1]]
