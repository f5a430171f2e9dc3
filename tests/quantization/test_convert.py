"""Whole models: nothing is quantized or skipped by accident."""

from collections.abc import Callable

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from loragraft.kernels.layout import relative_rms
from loragraft.quantization.convert import linear_paths, plan_layers, quantize_backbone, quantize_model
from loragraft.quantization.linear import SVDQuantLinear
from loragraft.quantization.settings import QuantSettings

Rules = Callable[..., dict[str, QuantSettings]]
Inputs = Callable[[int], dict[str, Tensor]]
DATA_FREE = QuantSettings(smoothing="weight", rank=2, iterations=1, grid=1)


@pytest.mark.parametrize("numerics", ["w4a8", "w4a4"])
def test_calibrated_flux(
    tiny_flux: FluxTransformer2DModel, flux_rules: Rules, flux_inputs: Inputs, flux_keep: tuple[str, ...], numerics: str
) -> None:
    rules = flux_rules(numerics, rank=8, iterations=2, grid=3)
    plan = plan_layers(tiny_flux, rules, flux_keep)
    before = tiny_flux(**flux_inputs(9)).sample
    seen: list[tuple[int, int, str]] = []

    def run() -> None:
        for seed in range(3):
            tiny_flux(**flux_inputs(seed))

    reports = quantize_backbone(tiny_flux, plan, run, lambda *step: seen.append(step), keep=flux_keep)
    assert [report.path for report in reports] == list(plan) == [path for _, _, path in seen]
    assert seen[-1][:2] == (len(plan), len(plan))
    assert len(plan) == 20
    quantized = {path for path, module in tiny_flux.named_modules() if isinstance(module, SVDQuantLinear)}
    assert quantized == plan.keys()
    assert all(report.output_error < report.rtn_error for report in reports if report.numerics != "w4a16")
    assert relative_rms(tiny_flux(**flux_inputs(9)).sample, before) < 0.1


def test_every_linear_is_planned_or_kept(tiny_flux: FluxTransformer2DModel, flux_rules: Rules) -> None:
    with pytest.raises(ValueError, match=r"8 layer\(s\) are neither planned nor kept: time_text_embed"):
        plan_layers(tiny_flux, flux_rules())
    plan = dict.fromkeys(linear_paths(tiny_flux)[1:], DATA_FREE)
    with pytest.raises(ValueError, match=r"1 layer\(s\) are neither"):
        quantize_model(tiny_flux, plan, {})
    assert not any(isinstance(module, SVDQuantLinear) for module in tiny_flux.modules())


def _pair() -> nn.Module:
    return nn.ModuleDict({"first": nn.Linear(64, 64), "second": nn.Linear(64, 64)})


def test_patterns_that_miss_or_collide() -> None:
    with pytest.raises(ValueError, match=r"'frist' matches no module path.*nearest: first"):
        plan_layers(_pair(), {"frist": DATA_FREE, ".*": DATA_FREE})
    with pytest.raises(ValueError, match="not a regular expression"):
        plan_layers(_pair(), {"(": DATA_FREE})
    with pytest.raises(ValueError, match="'first' is both planned and kept"):
        plan_layers(_pair(), {".*": DATA_FREE}, keep=["first"])
    with pytest.raises(ValueError, match="'first' is claimed by two rules"):
        plan_layers(_pair(), {".*": DATA_FREE, "first": QuantSettings("w4a16")})
    with pytest.raises(ValueError, match=r"plan names 'third'"):
        quantize_model(_pair(), {"third": DATA_FREE}, {}, keep=[".*"])


def test_calibrated_plans_need_statistics() -> None:
    model = _pair()
    plan = {"first": DATA_FREE, "second": QuantSettings()}
    with pytest.raises(ValueError, match=r"no activation statistics for 1 layer.*'second'"):
        quantize_backbone(model, plan, None)
    assert isinstance(model["first"], nn.Linear)  # refused before anything was swapped


def test_bias_free_layers() -> None:
    model = nn.ModuleDict({"only": nn.Linear(64, 32, bias=False)})
    x, weight = torch.randn(8, 64), model["only"].weight.detach()
    quantize_model(model, {"only": DATA_FREE}, {})
    assert model["only"].bias is None
    assert relative_rms(model["only"](x), x @ weight.T) < 0.15
