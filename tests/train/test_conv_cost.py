"""What preflight counts of a quantized convolution: the ops that run, and the memory that they hold beside their results."""

import importlib

import pytest
import torch
from torch import Tensor, nn

from loragraft.kernels.taps import Window, tap_columns
from loragraft.quantization.conv import SVDQuantConv2d
from loragraft.quantization.settings import QuantSettings
from loragraft.train import op_cost
from loragraft.train.memory import worth_keeping
from loragraft.train.op_cost import OpCost, cost_of, workspace

B, C, N, EDGE, R = 2, 72, 40, 10, 4


@pytest.fixture(scope="module")
def seen() -> dict[str, tuple[OpCost, list[int]]]:
    """Op -> (cost, workspace) of a forward and a backward pass with an adapter of rank 2."""
    found: dict[str, tuple[OpCost, list[int]]] = {}
    settings = QuantSettings(rank=R, smoothing="weight", iterations=1, grid=1)
    layer, _ = SVDQuantConv2d.from_conv(nn.Conv2d(C, N, 3, padding=1), None, settings)
    down = layer.adapter_columns(torch.randn(2, C, 3, 3)).requires_grad_()
    up = torch.zeros(N, 2, requires_grad=True)

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if func._schema.name.startswith("loragraft::"):
                results = [t for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, Tensor)]
                cost = cost_of(func, args, kwargs or {}, results)
                found[cost.name.removeprefix("loragraft::")] = cost, workspace(func, args, results)
            return out

    with Recorder():
        layer(torch.randn(B, C, EDGE, EDGE, requires_grad=True), down, up).square().mean().backward()
    return found


def test_every_op_has_a_formula(seen: dict[str, tuple[OpCost, list[int]]]) -> None:
    assert {"w4a8_conv", "w4a8_conv_dgrad", "conv_adapter_gradients"} <= seen.keys()
    assert all(cost.modelled for cost, _ in seen.values())


def test_operations_are_those_of_the_convolution(seen: dict[str, tuple[OpCost, list[int]]]) -> None:
    P = B * EDGE * EDGE
    (forward,) = (part.flops for part in seen["w4a8_conv"][0].parts if part.unit == "int8")
    (backward,) = (part.flops for part in seen["w4a8_conv_dgrad"][0].parts if part.unit == "conv")
    assert forward == backward == 2 * P * N * 9 * C


def test_hopper_writes_no_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    wide, narrow = Window(1, 32, 32, 3, 1, 1), Window(1, 32, 20, 3, 1, 1)
    assert op_cost._writes_windows(wide)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert not op_cost._writes_windows(wide)
    assert op_cost._writes_windows(narrow), "20 columns are divided into fours"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    assert op_cost._writes_windows(wide)


def test_workspace_by_hand(seen: dict[str, tuple[OpCost, list[int]]]) -> None:
    width, pixels = tap_columns(C), B * EDGE * EDGE
    assert width == 128
    space = seen["w4a8_conv"][1]
    assert space[-1] == pixels * 9 * width, "windows"
    assert space[-4] == B * 25 * 4 * 4 * width, "codes of 25 blocks of 2 x 2 outputs"
    assert space[-5] == pixels * 9 * (R + 2) * 4, "the branch before its sum over taps"
    assert seen["w4a8_conv_dgrad"][1][:2] == [N * 9 * width * 4, N * 9 * C * 4], "W_eff with and without padding"
    assert seen["conv_adapter_gradients"][1][:2] == [pixels * 2 * 4, 9 * pixels * 2 * 4]


def test_selective_checkpointing_keeps_convolutions() -> None:
    importlib.import_module("loragraft.kernels.attention")  # one of the ops that are kept
    decided = worth_keeping(None, torch.ops.loragraft.w4a8_conv.default, *(torch.empty(2, 64), torch.empty(8, 64)))
    assert decided.name == "MUST_SAVE"
