"""Gradients are added to `.grad` several at a time, in one launch."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

ADDED_TOGETHER = 16
"""Gradients that wait for one launch to add them to `.grad`: enough that launches do not matter, few enough that memory does not."""


class GatheredGradients:
    """While it is open, backward passes add to `.grad` many gradients at a time; the sums are those of one at a time, to the bit.

    Autograd launches a kernel for each parameter: 836 in a step of FLUX.1, a tenth of a graph's nodes. With `.grad` taken away it
    keeps the new gradient instead, and what waits is added to what was taken away. Up to `ADDED_TOGETHER` gradients wait.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        """parameters: each with a dense `.grad`, which keeps its place in memory."""
        self.parameters = parameters
        self._sums: dict[Tensor, Tensor] = {}
        self._waiting: dict[Tensor, None] = {}  # a parameter that two paths reach comes twice, and waits once

    def __enter__(self) -> None:
        for parameter in self.parameters:
            assert parameter.grad is not None
            self._sums[parameter], parameter.grad = parameter.grad, None
        self._hooks = [p.register_post_accumulate_grad_hook(self._take) for p in self.parameters]

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._add()
        for parameter, total in self._sums.items():
            parameter.grad = total
        self._sums = {}

    def _take(self, parameter: Tensor) -> None:
        self._waiting[parameter] = None
        if len(self._waiting) == ADDED_TOGETHER:
            self._add()

    def _add(self) -> None:
        if self._waiting:
            new = [parameter.grad for parameter in self._waiting if parameter.grad is not None]
            torch._foreach_add_([self._sums[parameter] for parameter in self._waiting], new)
        for parameter in self._waiting:
            parameter.grad = None
        self._waiting = {}
