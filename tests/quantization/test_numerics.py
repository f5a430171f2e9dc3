"""Conversion between numerics: what it keeps, what it costs, and what it says about it."""

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from loragraft.kernels.layout import relative_rms
from loragraft.quantization.calibrate import ActivationStats
from loragraft.quantization.checkpoint import quantized_layers, recorded_base_id
from loragraft.quantization.linear import SVDQuantLinear
from loragraft.quantization.numerics import (
    conversion_table,
    convert_numerics,
    sign_activations,
    to_signed,
    to_w4a4,
    to_w4a8,
)
from loragraft.quantization.settings import QuantSettings

OutlierLayer = tuple[nn.Linear, ActivationStats]


def _layer(outlier_layer: OutlierLayer, settings: QuantSettings) -> SVDQuantLinear:
    return SVDQuantLinear.from_linear(*outlier_layer, settings)[0]


def _unsigned(outlier_layer: OutlierLayer, first: int) -> tuple[SVDQuantLinear, SVDQuantLinear]:
    """(signed layer, the same with unsigned columns from `first` on and the bias for them)."""
    layer = _layer(outlier_layer, QuantSettings("w4a4", rank=8, iterations=1))
    residual = (layer.dequantized_codes(torch.float32) / layer.smooth.float())[:, first:]
    tensors = dict(layer.named_buffers()) | {"bias": layer.bias - 0.171875 * residual.sum(dim=1)}
    return layer, SVDQuantLinear(256, 192, "w4a4", tensors, act_unsigned=True, unsigned_from=first)


def test_w4a8_of_a_w4a4_layer(outlier_layer: OutlierLayer) -> None:
    """The codes change, the branch, smoothing and bias do not; INT8 activations more than make up for the second rounding."""
    layer, x = _layer(outlier_layer, QuantSettings("w4a4", rank=8)), outlier_layer[1].samples_SK
    converted = to_w4a8(layer)
    assert (converted.numerics, converted.hadamard) == ("w4a8", False)
    for name in ("smooth", "lora_down", "lora_up", "bias"):
        assert torch.equal(getattr(converted, name), getattr(layer, name)), name
    added = relative_rms(converted.dequantized_weight(), layer.dequantized_weight())
    assert 0 < added < 0.1
    exact = x @ layer.dequantized_weight().T + layer.bias
    assert relative_rms(converted(x), exact) < relative_rms(layer(x), exact)


@pytest.mark.parametrize("rotated", [False, True])
def test_w4a4_of_a_w4a8_layer(outlier_layer: OutlierLayer, rotated: bool) -> None:
    layer = _layer(outlier_layer, QuantSettings("w4a8", rank=8, smoothing="hadamard" if rotated else "calibrated"))
    converted = to_w4a4(layer)
    assert (converted.numerics, converted.hadamard) == ("w4a4", False)
    assert 0 < relative_rms(converted.dequantized_weight(), layer.dequantized_weight()) < 0.15
    assert to_w4a8(layer).hadamard == layer.hadamard


@pytest.mark.parametrize("first", [0, 64])
def test_signed_activations_are_the_same_function_without_rounding(outlier_layer: OutlierLayer, first: int) -> None:
    layer, unsigned = _unsigned(outlier_layer, first)
    signed = to_signed(unsigned)
    assert not signed.act_unsigned
    assert torch.equal(signed.qweight, unsigned.qweight)
    assert relative_rms(signed.bias, layer.bias) < 1e-6
    x = outlier_layer[1].samples_SK.clone()
    x[:, first:] = torch.nn.functional.gelu(x[:, first:], approximate="tanh")
    assert torch.equal(to_signed(unsigned)(x), signed(x))
    assert relative_rms(signed(x), layer(x)) < 1e-6
    converted = to_w4a8(unsigned)
    assert relative_rms(converted(x), x @ layer.dequantized_weight().T + layer.bias) < 0.05


def test_a_model_and_its_table(tiny_flux: FluxTransformer2DModel, quantized_flux: FluxTransformer2DModel) -> None:
    before, seen = recorded_base_id(quantized_flux), []
    original = {path: layer.dequantized_weight() for path, layer in quantized_layers(quantized_flux).items()}
    assert convert_numerics(quantized_flux, "w4a8") == []
    assert sign_activations(quantized_flux) == []
    assert recorded_base_id(quantized_flux) == before
    report = convert_numerics(quantized_flux, "w4a4", lambda *step: seen.append(step))
    assert recorded_base_id(quantized_flux) != before
    layers = quantized_layers(quantized_flux)
    assert {c.path for c in report} == {path for path, layer in layers.items() if layer.numerics == "w4a4"}
    assert {layer.numerics for layer in layers.values()} == {"w4a4", "w4a16"}
    assert seen[-1] == (len(report), len(report), report[-1].path)
    for change in report:
        assert (change.before, change.after) == ("w4a8", "w4a4")
        assert change.weight_error == relative_rms(layers[change.path].dequantized_weight(), original[change.path])
        assert change.output_before < change.output_after  # INT4 activations for INT8 ones
    table = conversion_table(report).splitlines()
    assert len(table) == len(report) + 2
    assert table[1].startswith(report[0].path)
    assert table[-1].startswith(f"{len(report)} layers: mean added weight error ")
    assert table[-1].endswith("against what the codes before stood for, not the 16-bit weights)")


def test_layers_that_go_together_get_one_smoothing_factor(quantized_flux: FluxTransformer2DModel) -> None:
    """Rounded once: the added error is about that of the conversion alone, and a second run has nothing to do."""
    groups = [[f"transformer_blocks.0.attn.to_{name}" for name in "qkv"], ["single_transformer_blocks.0.proj_out"]]
    original = {path: quantized_flux.get_submodule(path) for path in groups[0]}
    report = {c.path: c for c in convert_numerics(quantized_flux, "w4a4", together=groups)}
    layers = [quantized_flux.get_submodule(path) for path in groups[0]]
    mean = torch.stack([layer.smooth.float().log() for layer in original.values()]).mean(0).exp().bfloat16()
    assert all(torch.equal(layer.smooth, mean) for layer in layers)
    assert not torch.equal(original[groups[0][0]].smooth, mean)
    for path, layer in original.items():
        alone = relative_rms(to_w4a4(layer).dequantized_weight(), layer.dequantized_weight())
        assert report[path].weight_error < 1.3 * alone
    assert convert_numerics(quantized_flux, "w4a4", together=groups) == []
    mlp = quantized_flux.get_submodule("single_transformer_blocks.0.proj_mlp")
    apart = [["single_transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.proj_mlp"]]
    assert {c.path for c in convert_numerics(quantized_flux, "w4a4", together=apart)} == set(apart[0])
    assert quantized_flux.get_submodule("single_transformer_blocks.0.proj_mlp") is not mlp


def test_unsigned_layers_are_listed(quantized_flux: FluxTransformer2DModel) -> None:
    convert_numerics(quantized_flux, "w4a4")
    path = "transformer_blocks.0.ff.net.2"
    layer = quantized_flux.get_submodule(path)
    tensors = dict(layer.named_buffers())
    quantized_flux.transformer_blocks[0].ff.net[2] = SVDQuantLinear(512, 128, "w4a4", tensors, act_unsigned=True)
    (change,) = sign_activations(quantized_flux)
    assert (change.path, change.before, change.after, change.weight_error) == (path, "w4a4u", "w4a4", 0.0)
    assert change.output_before < change.output_after


def test_adapters_come_off_first(quantized_flux: FluxTransformer2DModel) -> None:
    layer = quantized_flux.get_submodule("transformer_blocks.0.attn.to_q")
    layer.set_branch(torch.zeros(6, 128), torch.zeros(128, 6))
    with pytest.raises(ValueError, match="carry grafts"):
        convert_numerics(quantized_flux, "w4a4")
    assert {m.numerics for m in quantized_layers(quantized_flux).values()} == {"w4a8", "w4a16"}
    with pytest.raises(ValueError, match="numerics 'w2a2'"):
        convert_numerics(quantized_flux, "w2a2")  # type: ignore[arg-type]
