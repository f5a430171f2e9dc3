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


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_fp8_without_gradients(
    backend: str | None, frozen_linears: ModuleType, rivals: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As images are drawn: everything bf16, no autocast, one graph; the same bits as with gradients."""
    for name, module in ((frozen_linears.__name__, frozen_linears), ("rivals", rivals)):
        monkeypatch.setitem(sys.modules, name, module)
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(shape, generator=generator).bfloat16() for shape in ((64, 128), (64,), (2, 24, 128)))
    layer = frozen_linears.frozen_linear("fp8", weight, bias)
    call = layer if backend is None else torch.compile(layer, backend=backend, fullgraph=True)
    with torch.no_grad():
        y = call(x)
    assert (y.dtype, y.shape, y.requires_grad) == (torch.bfloat16, (2, 24, 64), False)
    assert torch.equal(y, layer(x.clone().requires_grad_()))
    exact = x.float() @ weight.float().T + bias
    assert (y.float() - exact).norm() < 0.06 * exact.norm()


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_nf4_without_gradients(backend: str | None, frozen_linears: ModuleType) -> None:
    """bitsandbytes' product is one op of the graph, for one row too; rounding to NF4 costs 9 % of y."""
    pytest.importorskip("bitsandbytes", reason="NF4's package is not installed")
    generator = torch.Generator().manual_seed(0)
    weight, bias = (torch.randn(shape, generator=generator).bfloat16() for shape in ((64, 128), (64,)))
    layer = frozen_linears.frozen_linear("nf4", weight, bias)
    call = layer if backend is None else torch.compile(layer, backend=backend, fullgraph=True)
    for rows in (1, 24):
        x = torch.randn(rows, 128, generator=generator).bfloat16()
        with torch.no_grad():
            y = call(x)
        exact = x.float() @ weight.float().T + bias
        assert (y.float() - exact).norm() < 0.14 * exact.norm()


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
