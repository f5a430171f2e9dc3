"""The frozen layers that stand beside ours in training carry LoRA, compiled and under autocast."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn


@pytest.fixture(scope="module")
def frozen_linears(benchmark_module: Any) -> ModuleType:
    return benchmark_module("frozen_linears", "rivals")


@pytest.fixture(scope="module")
def rivals(benchmark_module: Any) -> ModuleType:
    return benchmark_module("rivals")


@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_lora_over_fp8(
    dtype: torch.dtype,
    backend: str | None,
    frozen_linears: ModuleType,
    rivals: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """float32 x is what layer norms make under autocast. Rounding to e4m3 costs 4 % of y, dequantized rows 3 % of dx."""
    for name, module in ((frozen_linears.__name__, frozen_linears), ("rivals", rivals)):
        monkeypatch.setitem(sys.modules, name, module)  # the compiler imports what it traces
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    weight, bias, x, dy = draw(64, 128).bfloat16(), draw(64), draw(2, 24, 128).to(dtype), draw(2, 24, 64).bfloat16()
    model = nn.Sequential(frozen_linears.frozen_linear("fp8", weight, bias))
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["0"], init_lora_weights=False), model)
    factors = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(factors) == 2
    for factor in factors.values():
        factor.data = factor.data.float()
    call = model if backend is None else torch.compile(model, backend=backend, fullgraph=True)
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = call(x)
    dx, *adapter = torch.autograd.grad(y, [x, *factors.values()], dy.to(y.dtype))
    assert dx.dtype == dtype
    down, up = (factor.detach() for factor in factors.values())
    scale = model[0].scaling["default"]
    dense = weight.float() + scale * up @ down
    for found, expected in ((y, x.detach().float() @ dense.T + bias), (dx, dy.float() @ dense)):
        assert (found.float() - expected).norm() < 0.06 * expected.norm()
    rows, answers = x.detach().float().flatten(0, 1), dy.float().flatten(0, 1)
    for found, expected in zip(
        adapter, (scale * up.T @ answers.T @ rows, scale * answers.T @ rows @ down.T), strict=True
    ):
        assert (found - expected).norm() < 0.02 * expected.norm()


def test_a_layer_that_sdnq_leaves_alone_is_an_error(
    frozen_linears: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = ModuleType("sdnq.training")
    training.sdnq_training_post_load_quant = lambda model, **_: model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sdnq", ModuleType("sdnq"))
    monkeypatch.setitem(sys.modules, "sdnq.training", training)
    for name in ("SDNQ_USE_TORCH_COMPILE", "SDNQ_USE_OPENVINO_MM"):
        monkeypatch.setenv(name, "0")
    with pytest.raises(frozen_linears.RivalError, match=r"unquantized \(N, K = \(16, 32\)\)"):
        frozen_linears.frozen_linear("sdnq", torch.zeros(16, 32), None)
