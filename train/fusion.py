"""What a compiler's fused kernels move through memory: torch's own ops between products join, and values inside a join stay there.

A tensor costs its bytes
    once       written, if an op that is not fused reads it, or a fused one after such an op
    a group    read, by all fused ops between one op that is not fused and the next

An estimate: Inductor also computes again in the backward pass what is cheap, and moves ops past others that need nothing of them.
Source: Ansel et al., "PyTorch 2" (2024), section 4.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from loragraft.train.op_cost import OpCost, Part

Storage = tuple[int, int]
"""Key of a storage, and the bytes of it that an op takes."""


@dataclass
class _Value:
    """A storage: whether a fused op made it and in which group, whether it was written, which group read it last."""

    fused: bool
    group: int
    written: bool = False
    read_by: int = -1


class Fusion:
    """Follows ops in order; `ops` is phase -> one op for every group of fused ones, and every op that is not fused."""

    def __init__(self) -> None:
        self.ops: dict[str, Counter[OpCost]] = {}
        self._values: dict[int, _Value] = {}
        self._group = self._bytes = 0

    def op(self, phase: str, cost: OpCost, read: Iterable[Storage], made: Iterable[int], *, fuses: bool) -> None:
        """The next op of `phase`: what it reads and makes, or changes."""
        for key, nbytes in read:
            value = self._values.setdefault(key, _Value(False, -1))  # of before the step
            if value.fused and not value.written and not (fuses and value.group == self._group):
                value.written = True
                self._bytes += nbytes
            if fuses and not (value.fused and value.group == self._group) and value.read_by != self._group:
                value.read_by = self._group
                self._bytes += nbytes
        if not fuses:
            self.close(phase)
            if cost.parts:
                self.ops.setdefault(phase, Counter())[cost] += 1
        for key in made:
            self._values[key] = _Value(fuses, self._group)

    def dies(self, key: int) -> None:
        """A storage is gone; its key may come again."""
        self._values.pop(key, None)

    def close(self, phase: str) -> None:
        """Ends a group of fused ops."""
        if self._bytes:
            self.ops.setdefault(phase, Counter())[OpCost("fused", (Part("memory", 0, self._bytes),))] += 1
        self._bytes, self._group = 0, self._group + 1
