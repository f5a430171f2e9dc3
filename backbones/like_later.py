"""The first block of a class gets what it gets in the form in which later blocks get it: else it is compiled for itself.

Blocks of a class share compiled code as long as their inputs look alike. The first of a list gets an embedding that needs no
gradient, or tensors apart where later blocks get slices of one; left so, FLUX.1's two kinds of block are compiled as four.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

PASSED_ON = {
    "FluxTransformerBlock": ("encoder_hidden_states", "hidden_states"),
    "FluxSingleTransformerBlock": ("encoder_hidden_states", "hidden_states"),
}
"""Per class of block, the arguments that one block computes for the next; `hidden_states` alone if not named here."""
SLICED = frozenset({"FluxSingleTransformerBlock"})
"""Classes of block that return these as slices of one tensor [B, S, D], in this order along S; compiled ones do so in passes without
gradients alone (`compiled.compile_blocks`)."""


class LikeLater:
    """A forward pre-hook of the first block of its class: what blocks pass on looks as the later ones get it, values unchanged.

    It lies in memory as a block's output does. It needs a gradient if a block's output would: the first block's layers then
    compute one that nothing reads, which is less than one block's share of a step.
    """

    def __init__(self, block: nn.Module) -> None:
        kind = type(block).__name__
        self._names, self._sliced = PASSED_ON.get(kind, ("hidden_states",)), kind in SLICED
        self._places = {name: i for i, name in enumerate(list(inspect.signature(type(block).forward).parameters)[1:])}

    def __call__(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = [kwargs[name] if name in kwargs else args[self._places[name]] for name in self._names]
        if self._sliced and not torch.is_grad_enabled():
            made = torch.cat(given, dim=1).split([x.shape[1] for x in given], dim=1)
        else:
            made = tuple(x.contiguous() for x in given)
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in block.parameters()):
            made = tuple(x if x.requires_grad else _NeedsGradient.apply(x, _anchor()) for x in made)
        changed = dict(zip(self._names, made, strict=True))
        by_place = {place: name for name, place in self._places.items()}
        args = tuple(changed.get(by_place[i], x) if i in by_place else x for i, x in enumerate(args))
        return args, {name: changed.get(name, x) for name, x in kwargs.items()}


def _anchor() -> torch.Tensor:
    return torch.empty(0, requires_grad=True)


class _NeedsGradient(torch.autograd.Function):
    """x itself, which needs a gradient because `anchor` does; neither gets one."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, None]:
        return None, None


def hook_first_blocks(blocks: Sequence[nn.Module]) -> None:
    """Hooks the first of each class, in the order in which they run; once, however often this is called."""
    first: dict[type[nn.Module], nn.Module] = {}
    for block in blocks:
        first.setdefault(type(block), block)
    for block in first.values():
        if not any(isinstance(hook, LikeLater) for hook in block._forward_pre_hooks.values()):
            block.register_forward_pre_hook(LikeLater(block), with_kwargs=True)
