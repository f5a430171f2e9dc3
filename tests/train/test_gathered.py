"""Gradients added several at a time are those added one at a time."""

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from loragraft.train.gathered import ADDED_TOGETHER, GatheredGradients


class Launches(TorchDispatchMode):
    """Counts what adds in place."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.add_.Tensor, torch.ops.aten._foreach_add_.List):
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_gathered_gradients_are_the_sums_of_one_at_a_time() -> None:
    """The first parameter is reached twice (a checkpoint that is reentrant runs a backward pass of its own), the last never; each
    `.grad` keeps its place."""
    draw = torch.Generator().manual_seed(0)
    one_at_a_time = [nn.Parameter(torch.randn(3, 5, generator=draw)) for _ in range(ADDED_TOGETHER + 9)]
    gathered = copy.deepcopy(one_at_a_time)
    places = [torch.randn(3, 5, generator=draw) for _ in gathered]
    for one, other, place in zip(one_at_a_time, gathered, places, strict=True):
        one.grad, other.grad = place.clone(), place

    def loss(parameters: list[nn.Parameter]) -> torch.Tensor:
        total = sum((p.sin() * (i + 1) for i, p in enumerate(parameters[:-1])), start=torch.zeros(3, 5))
        again = checkpoint(lambda x: x * parameters[0], total, use_reentrant=True)
        return (again + parameters[0].square()).sum()

    for _ in range(2):
        loss(one_at_a_time).backward()
        with Launches() as launched, GatheredGradients(gathered):
            loss(gathered).backward()
        assert launched.counts["_foreach_add_"] == 2
        assert launched.counts["add_"] <= 1, "where two paths meet"
    assert all(parameter.grad is place for parameter, place in zip(gathered, places, strict=True))
    assert all(torch.equal(place, one.grad) for place, one in zip(places[1:], one_at_a_time[1:], strict=True))
    torch.testing.assert_close(places[0], one_at_a_time[0].grad)  # three terms, in another order


def test_gradients_are_back_after_an_error() -> None:
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = place = torch.ones(2)
    with pytest.raises(RuntimeError, match="does not require grad"), GatheredGradients([parameter]):
        torch.ones(2).sum().backward()
    assert parameter.grad is place
    parameter.sum().backward()
    assert place.tolist() == [2, 2]
