"""Runs ops of ours with Triton's interpreter and prints, a line each, the op, what `launches_of` says, and what it launched.

Started by test_launches.py with TRITON_INTERPRET=1: Triton decides when a kernel is decorated.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

from loragraft.kernels.layout import LinearCase
from loragraft.kernels.registry import OPS, ConvCase
from loragraft.kernels.w4a8_conv import w4a8_conv
from loragraft.train.launches import launches_of
from loragraft.train.op_cost import OURS
from loragraft.train.optim import AdamW8bit

launched = 0
execute = GridExecutor.__call__


def counted(self: GridExecutor, *args: Any, **kwargs: Any) -> Any:
    global launched
    launched += 1
    return execute(self, *args, **kwargs)


class Printer(TorchDispatchMode):
    """Sees the ops of ours, those of the backward pass too, and not what they call in turn."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before, name = launched, func._schema.name
        out = func(*args, **(kwargs or {}))
        if name.startswith(OURS):
            own = name.removeprefix(OURS)
            print(own, sum(launches_of(own, args)), launched - before)
        return out


def trained(tensors: dict[str, Any]) -> dict[str, Any]:
    """x and the adapter require gradients."""
    for name in ("x", "adapter_down", "adapter_up"):
        if isinstance(tensors.get(name), Tensor):
            tensors[name].requires_grad_()
    return tensors


def main() -> None:
    GridExecutor.__call__ = counted
    ops = {op.name: op for op in OPS}
    few, many, bare = LinearCase(5, 16, 64, R=8, r=8), LinearCase(20, 16, 64, R=8, r=0), LinearCase(2, 16, 64, R=0, r=0)
    calls: list[tuple[str, LinearCase, dict[str, Any]]] = [
        ("w4a8", few, {}), ("w4a8", few, {"dgrad": "int8"}), ("w4a8", few, {"smooth": None, "shares_input": True}),
        ("w4a4", few, {}), ("w4a4", few, {"save_x": "raw"}), ("w4a4", many, {}),
        ("w4a16", few, {}), ("w4a16", many, {}), ("w4a16", bare, {}),
    ]  # fmt: skip
    torch.manual_seed(0)
    with Printer():
        for name, case, options in calls:
            inputs = ops[name].inputs(case)
            half = {
                key: value.bfloat16()
                if name == "w4a16" and isinstance(value, Tensor) and value.is_floating_point()
                else value
                for key, value in inputs.items()
            }
            ops[name].apply(**trained({**half, **options})).sum().backward()
        for image in (ConvCase(1, 64, 4, 4, 16), ConvCase(1, 64, 4, 4, 16, r=0)):
            options = trained({**image.inputs(), **image.options})
            w4a8_conv(**options).sum().backward()
        factor = torch.nn.Parameter(torch.zeros(4, 8))
        factor.grad = torch.ones_like(factor)
        AdamW8bit([factor], lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0).step()


if __name__ == "__main__":
    main()
