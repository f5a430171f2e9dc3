"""The simulated allocator: sizes by hand from the rules of CUDACachingAllocator.cpp, and no byte lost over many requests."""

import random

import pytest

from loragraft.train.allocator import MIB, CachingAllocator


@pytest.mark.parametrize(
    ("nbytes", "allocated", "reserved"),
    [
        (1, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (9 * MIB, 9 * MIB, 20 * MIB),
        (27 * MIB, 28 * MIB, 28 * MIB),  # the rest of 1 MiB is too small to be split off
        (28 * MIB + 1, 28 * MIB + 512, 30 * MIB),  # a rest above 1 MiB is split off
    ],
)
def test_one_request(nbytes: int, allocated: int, reserved: int) -> None:
    allocator = CachingAllocator()
    allocator.release(allocator.allocate(nbytes))
    assert allocator.allocated == 0
    assert allocator.peak_allocated == allocated
    assert allocator.reserved == reserved


def test_segments_are_shared_and_joined_again() -> None:
    allocator = CachingAllocator()
    blocks = [allocator.allocate(4 * MIB) for _ in range(5)]
    assert allocator.reserved == 20 * MIB
    for block in blocks[1::2] + blocks[::2]:
        allocator.release(block)
    whole = allocator.allocate(20 * MIB)  # only one joined block is as large
    assert allocator.reserved == 20 * MIB
    allocator.release(whole)
    allocator.empty_cache()
    assert allocator.reserved == 0


def test_the_smallest_block_that_fits_is_taken() -> None:
    allocator = CachingAllocator()
    large, small = allocator.allocate(64 * MIB), allocator.allocate(32 * MIB)
    allocator.release(large)
    allocator.release(small)
    allocator.allocate(30 * MIB)
    assert allocator.allocate(64 * MIB) is not None
    assert allocator.reserved == 96 * MIB


def test_expandable_segments_split_every_rest() -> None:
    allocator = CachingAllocator(expandable=True)
    first = allocator.allocate(27 * MIB)
    assert allocator.allocated == 27 * MIB
    assert allocator.reserved == 40 * MIB
    allocator.allocate(27 * MIB)
    assert allocator.reserved == 60 * MIB  # 13 MiB were left at the end
    allocator.release(first)
    allocator.allocate(20 * MIB)
    assert allocator.reserved == 60 * MIB


@pytest.mark.parametrize("expandable", [False, True])
def test_nothing_is_lost(expandable: bool) -> None:
    chance, allocator, held = random.Random(0), CachingAllocator(expandable=expandable), []
    for _ in range(3000):
        if held and chance.random() < 0.5:
            allocator.release(held.pop(chance.randrange(len(held))))
        else:
            held.append(allocator.allocate(chance.choice((100, 5000, MIB // 2, 3 * MIB, 12 * MIB, 50 * MIB))))
        assert allocator.allocated == sum(block.size for block in held if block is not None)
        free = sum(size for pool in allocator._free.values() for size, _ in pool)
        assert allocator.reserved == allocator.allocated + free
