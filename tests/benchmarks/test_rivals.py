"""What the rivals that need no extra package compute, and how the others refuse."""

import importlib
import json

import pytest
import torch

# RMS error against bf16 on Gaussian weights and activations: 3.8 % (fp8) and 1.0 % (int8) seen.
BOUNDS = {"bf16": 0.0, "fp8": 0.06, "fp8_matmul": 0.06, "int8": 0.02}


@pytest.fixture(scope="module")
def rivals(benchmark_module):
    return benchmark_module("rivals")


def operands():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 128, generator=generator).bfloat16()
    return x, torch.randn(64, 128, generator=generator).bfloat16()


@pytest.mark.parametrize("name", BOUNDS)
def test_close_to_bf16(rivals, name):
    x, weight = operands()
    layer, expected = rivals.build(name, weight), (x @ weight.T).float()
    for _ in range(2):
        y = layer(x)
        assert y.dtype == torch.bfloat16
        assert (y.float() - expected).norm() <= BOUNDS[name] * expected.norm()


def test_a_cached_quantization_notices_another_x(rivals):
    x, weight = operands()
    layer = rivals.build("fp8_matmul", weight)
    layer(x)
    assert torch.equal(layer(2 * x), rivals.build("fp8", weight)(2 * x))


def test_gpl_code_stays_out_of_this_process(rivals):
    with pytest.raises(rivals.RivalError, match="process of its own"):
        rivals.build("sdnq", operands()[1])


@pytest.mark.parametrize(("name", "package"), [("nf4", "bitsandbytes"), ("comfy_kitchen", "comfy_kitchen")])
def test_a_missing_package_is_named(rivals, name, package, monkeypatch):
    def refuse(module):
        raise ImportError(f"No module named {module!r}")

    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(rivals.RivalError, match=f"pip install {package}"):
        rivals.build(name, operands()[1])


def test_shapes_that_do_not_fit_are_refused(rivals):
    with pytest.raises(rivals.RivalError, match="K % 16"):
        rivals.build("fp8", torch.randn(64, 100).bfloat16())


def test_a_process_of_its_own_reports_rows(rivals):
    rows = rivals.alone("int8", [(17, 64, 128), (32, 64, 100)])
    assert rows[0]["error"] < BOUNDS["int8"]
    assert "refused" in rows[1]
    assert json.dumps(rows)


def test_a_process_that_fails_says_why(rivals):
    with pytest.raises(rivals.RivalError, match="status 2"):
        rivals.alone("nobody", [(1, 8, 8)])
