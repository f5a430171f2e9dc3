"""What the convolution's ops cost, read off one forward and backward pass."""

import importlib
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loragraft.kernels.registry import ConvCase
from loragraft.kernels.w4a8_conv import w4a8_conv
from loragraft.train.memory import worth_keeping
from loragraft.train.op_cost import OpCost, cost_of, workspace


class _Costs(TorchDispatchMode):
    """Costs and workspaces of our ops by name."""

    def __init__(self) -> None:
        super().__init__()
        self.costs: dict[str, OpCost] = {}
        self.spaces: dict[str, list[int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name.startswith("loragraft::"):
            tensors = [leaf for leaf in tree_leaves(results) if isinstance(leaf, Tensor)]
            self.costs[name] = cost_of(func, args, kwargs or {}, tensors)
            self.spaces[name] = workspace(func, args, tensors)
        return results


def test_forward_and_backward_are_modelled() -> None:
    case = ConvCase(2, 64, 6, 6, 32, stride=2, R=8, r=4)
    inputs = case.inputs()
    leaves = {name: inputs[name].clone().requires_grad_() for name in ("x", "adapter_down", "adapter_up")}
    with _Costs() as seen:
        w4a8_conv(**{**inputs, **leaves}, **case.options).sum().backward()
    assert {
        "loragraft::w4a8_conv",
        "loragraft::w4a8_conv_dgrad",
        "loragraft::conv_adapter_gradients",
    } <= seen.costs.keys()
    assert all(cost.modelled for cost in seen.costs.values())
    M, P, K, N = 2 * 36, 2 * 9, 9 * 64, 32
    units = {part.unit: part for part in seen.costs["loragraft::w4a8_conv"].parts}
    assert units["int8"].flops == 2 * P * N * K
    assert sum(p.flops for p in seen.costs["loragraft::w4a8_conv"].parts if p.unit == "gemm") == (
        2 * M * K * 12 + 2 * P * N * 12
    )
    conv = next(part for part in seen.costs["loragraft::w4a8_conv_dgrad"].parts if part.unit == "conv")
    assert conv.flops == 2 * P * N * K
    assert seen.spaces["loragraft::w4a8_conv"][0] == max(M * 9 * 12 * 4, N * 640)
    assert seen.spaces["loragraft::w4a8_conv_dgrad"] == [N * K * 4]
    assert seen.spaces["loragraft::conv_adapter_gradients"][0] == 9 * M * 4 * 4


def test_selective_checkpointing_keeps_convolutions() -> None:
    importlib.import_module("loragraft.kernels.attention")  # one of the ops that are kept
    decided = worth_keeping(None, torch.ops.loragraft.w4a8_conv.default, *(torch.empty(2, 64), torch.empty(8, 64)))
    assert decided.name == "MUST_SAVE"
