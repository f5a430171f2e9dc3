"""CUDA's caching allocator, simulated: what `max_memory_allocated` and `max_memory_reserved` would read.

A request is rounded to 512 B. Up to 1 MiB it comes out of segments of 2 MiB, below 10 MiB out of segments of 20 MiB, above out
of a segment of its own size in steps of 2 MiB. The smallest free block that fits is taken and split; in the large pool a rest of
up to 1 MiB stays with the block and counts as allocated (27 MiB, a FLUX activation at 1024 px, take 28). Freed blocks join
their free neighbours. With expandable segments each pool is one segment that grows at its end, and every rest is split off.
Source: PyTorch, c10/cuda/CUDACachingAllocator.cpp (`round_size`, `get_free_block`, `get_allocation_size`, `should_split`).
"""

import bisect
from dataclasses import dataclass

MIB = 2**20
ROUND = 512
SMALL = MIB
SMALL_SEGMENT, LARGE_SEGMENT = 2 * MIB, 20 * MIB
MIN_OWN_SEGMENT, ROUND_SEGMENT = 10 * MIB, 2 * MIB


@dataclass(eq=False, slots=True)
class Block:
    """A piece of a segment, linked to its neighbours there."""

    address: int
    size: int
    small: bool
    free: bool = True
    before: "Block | None" = None
    after: "Block | None" = None


class CachingAllocator:
    """`allocate` and `release` blocks; `allocated`, `reserved` and their peaks are in bytes."""

    def __init__(self, *, expandable: bool = False) -> None:
        self.expandable = expandable
        self.allocated = self.peak_allocated = self.reserved = self.peak_reserved = 0
        self._free: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
        self._blocks: dict[int, Block] = {}
        self._last: dict[bool, Block | None] = {True: None, False: None}
        self._next_address = 0

    def allocate(self, nbytes: int) -> Block | None:
        """A block for a tensor of `nbytes`; None for an empty one."""
        if nbytes <= 0:
            return None
        size = -(-nbytes // ROUND) * ROUND
        small = size <= SMALL
        block = self._best_fit(size, small) or self._grow(size, small)
        rest = block.size - size
        if rest >= ROUND if small or self.expandable else rest > SMALL:
            self._split(block, size)
        block.free = False
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block

    def release(self, block: Block | None) -> None:
        """Gives a block back to its pool."""
        if block is None:
            return
        self.allocated -= block.size
        block.free = True
        if block.after is not None and block.after.free:
            block = self._join(block, block.after)
        if block.before is not None and block.before.free:
            block = self._join(block.before, block)
        self._offer(block)

    def empty_cache(self) -> None:
        """Gives segments back that are wholly free (`torch.cuda.empty_cache`)."""
        for small in (True, False):
            for size, address in list(self._free[small]):
                block = self._blocks[address]
                if block.before is None and block.after is None and not self.expandable:
                    self._withdraw(block)
                    del self._blocks[address]
                    self.reserved -= size

    def _best_fit(self, size: int, small: bool) -> Block | None:
        free = self._free[small]
        place = bisect.bisect_left(free, (size, -1))
        return self._blocks[free.pop(place)[1]] if place < len(free) else None

    def _grow(self, size: int, small: bool) -> Block:
        if self.expandable:
            return self._extend(size, small)
        if small:
            segment = SMALL_SEGMENT
        else:
            segment = LARGE_SEGMENT if size < MIN_OWN_SEGMENT else -(-size // ROUND_SEGMENT) * ROUND_SEGMENT
        return self._new_block(segment, small)

    def _extend(self, size: int, small: bool) -> Block:
        """A free block of at least `size` at the end of the pool's one segment."""
        step = SMALL_SEGMENT if small else LARGE_SEGMENT
        last = self._last[small]
        there = last.size if last is not None and last.free else 0
        block = self._new_block(-(-(size - there) // step) * step, small)
        if last is not None:
            last.after, block.before = block, last
            if last.free:
                self._withdraw(last)
                block = self._join(last, block)
        self._last[small] = block
        return block

    def _new_block(self, size: int, small: bool) -> Block:
        block = Block(self._next_address, size, small)
        self._next_address += size
        self._blocks[block.address] = block
        self.reserved += size
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return block

    def _split(self, block: Block, size: int) -> None:
        rest = Block(block.address + size, block.size - size, block.small, before=block, after=block.after)
        if block.after is not None:
            block.after.before = rest
        block.after, block.size = rest, size
        self._blocks[rest.address] = rest
        if self._last[block.small] is block:
            self._last[block.small] = rest
        self._offer(rest)

    def _join(self, one: Block, other: Block) -> Block:
        for block in (one, other):
            self._withdraw(block)
        one.size += other.size
        one.after = other.after
        if other.after is not None:
            other.after.before = one
        if self._last[one.small] is other:
            self._last[one.small] = one
        del self._blocks[other.address]
        return one

    def _offer(self, block: Block) -> None:
        bisect.insort(self._free[block.small], (block.size, block.address))

    def _withdraw(self, block: Block) -> None:
        free = self._free[block.small]
        place = bisect.bisect_left(free, (block.size, block.address))
        if place < len(free) and free[place] == (block.size, block.address):
            free.pop(place)
