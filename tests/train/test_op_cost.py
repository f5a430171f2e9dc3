"""Which unit an op of torch's keeps busy, from real calls on fake tensors, and which ops of ours compute gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from loragraft.train.op_cost import OURS, OpCost, Part, cost_of

aten = torch.ops.aten


def _cost(func: Any, *args: Any) -> OpCost:
    out = func(*args)
    return cost_of(
        func, args, {}, [leaf for leaf in (out if isinstance(out, tuple) else (out,)) if isinstance(leaf, Tensor)]
    )


def _part(func: Any, *args: Any) -> Part:
    (part,) = _cost(func, *args).parts
    return part


def test_convolutions_with_a_kernel_a_channel_are_a_unit_of_their_own() -> None:
    with FakeTensorMode():
        x, dense, depthwise = torch.ones(1, 16, 8, 8), torch.ones(16, 16, 3, 3), torch.ones(16, 1, 3, 3)
        where = None, [1, 1], [1, 1], [1, 1], False, [0, 0]
        assert _part(aten.convolution.default, x, dense, *where, 1).unit == "conv"
        part = _part(aten.convolution.default, x, depthwise, *where, 16)
        assert (part.unit, part.flops) == ("depthwise", 2 * 9 * x.numel())
        gradient = _part(aten.convolution_backward.default, x, x, depthwise, *where, 16, [True, False, False])
        assert (gradient.unit, gradient.flops) == ("depthwise_backward", part.flops)
        assert _part(aten.convolution_backward.default, x, x, dense, *where, 1, [True, False, False]).unit == "conv"


def test_float32_products_large_and_in_batches() -> None:
    with FakeTensorMode():
        left = torch.ones(4, 8, 8)
        assert _part(aten.bmm.default, left, left).unit == "batched32"
        assert _part(aten.mm.default, left[0], left[0]).unit == "gemm32"
        assert _part(aten.bmm.default, left.bfloat16(), left.bfloat16()).unit == "gemm"


def test_a_group_norm_counts_its_values_and_still_fuses() -> None:
    with FakeTensorMode():
        x = torch.ones(1, 32, 8, 8)
        cost = _cost(aten.native_group_norm.default, x, None, None, 1, 32, 64, 8, 1e-5)
    assert (cost.parts[0].unit, cost.parts[0].flops) == ("group_norm", x.numel())
    assert cost.fusible


def test_w4a16_of_many_tokens_waits_for_its_groups() -> None:
    """Two tiles of tokens by three of outputs; few tokens are bound by memory."""

    def parts(tokens: int) -> list[tuple[str, int, int]]:
        x, y = torch.ones(tokens, 64).bfloat16(), torch.ones(tokens, 192).bfloat16()
        args = (
            x,
            torch.ones(192, 64, dtype=torch.uint8),
            None,
            None,
            torch.ones(8, 64),
            torch.ones(192, 8),
            None,
            None,
            None,
        )
        cost = cost_of(torch.ops.loragraft.w4a16_linear.default, args, {}, [y, y[:, :8]])
        return [(part.unit, part.flops, part.tiles) for part in cost.parts]

    branch = 2 * 8 * (192 + 64)
    assert parts(77) == [("weight_only", 2 * 77 * 192 * 64, 6), ("gemm", 77 * branch, 0)]
    assert parts(16) == [("gemm", 16 * (2 * 192 * 64 + branch), 0)]


@pytest.mark.parametrize("name", ["w4a8_linear", "w4a8_conv", "w4a16_linear", "quantize_activation"])
def test_layers_of_ours_are_forward(name: str) -> None:
    assert OpCost(OURS + name, ()).forward


@pytest.mark.parametrize(
    "name", ["w4a8_dgrad", "w4a8_conv_dgrad", "conv_adapter_gradients", "adapter_gradients", "w4a16_dx", "adamw8bit"]
)
def test_gradients_of_ours_and_ops_of_torch_are_not(name: str) -> None:
    assert not OpCost(OURS + name, ()).forward
    assert not OpCost(f"aten::{name}", ()).forward
