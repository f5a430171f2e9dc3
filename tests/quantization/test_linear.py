"""`SVDQuantLinear`: what it computes, what it keeps when it is moved, what it refuses."""

import pytest
import torch
from torch import nn

from loragraft.kernels.act_quant import dequantize_activation, quantize_activation, smooth_and_rotate
from loragraft.kernels.layout import relative_rms
from loragraft.quantization.calibrate import ActivationStats
from loragraft.quantization.linear import SVDQuantLinear
from loragraft.quantization.settings import Numerics, QuantSettings

OutlierLayer = tuple[nn.Linear, ActivationStats]
ALL: tuple[Numerics, ...] = ("w4a8", "w4a4", "w4a16")


def _layer(outlier_layer: OutlierLayer, numerics: Numerics) -> SVDQuantLinear:
    linear, stats = outlier_layer
    return SVDQuantLinear.from_linear(linear, stats, QuantSettings(numerics, rank=8, iterations=1))[0]


@pytest.mark.parametrize("numerics", ALL)
def test_forward_is_the_formula(outlier_layer: OutlierLayer, numerics: Numerics) -> None:
    """Rounded inputs times the dequantized residual, plus the branch on raw x, in float64."""
    layer, x = _layer(outlier_layer, numerics), outlier_layer[1].samples_SK
    x_rounded = x.double()
    if numerics != "w4a16":
        codes, scale = quantize_activation(x, layer.smooth, layer.hadamard, 8 if numerics == "w4a8" else 4)
        rotated = dequantize_activation(codes, scale, torch.float64)[:, : layer.in_features]
        x_rounded = smooth_and_rotate(rotated, None, layer.hadamard) * layer.smooth.double()
    branch = layer.lora_up.double() @ layer.lora_down.double()
    residual = layer.dequantized_weight(torch.float64) - branch
    expected = x_rounded @ residual.T + x.double() @ branch.T + layer.bias.double()
    assert relative_rms(layer(x), expected) < 1e-5
    assert relative_rms(layer(x.to(torch.bfloat16)), expected) < 1e-2
    assert layer(x.view(4, 64, -1)).shape == (4, 64, layer.out_features)


@pytest.mark.parametrize("numerics", ALL)
def test_casting_the_model_leaves_the_layer_alone(outlier_layer: OutlierLayer, numerics: Numerics) -> None:
    layer = _layer(outlier_layer, numerics)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    model = nn.Sequential(layer, nn.Linear(4, 4))
    for cast in (model.to(torch.float64), model.half(), model.bfloat16()):
        for name, buffer in cast[0].named_buffers():
            assert buffer.dtype == before[name].dtype
            assert torch.equal(buffer, before[name])
    assert model[1].weight.dtype == torch.bfloat16
    assert all(buffer.device.type == "meta" for buffer in model.to("meta")[0].buffers())


def test_bytes(outlier_layer: OutlierLayer) -> None:
    N, K, G, R = 192, 256, 4, 8
    codes, branch, bias = N * K // 2, 2 * R * (N + K), 4 * N
    assert _layer(outlier_layer, "w4a8").nbytes == codes + 4 * N + 2 * G * N + 2 * K + branch + bias
    assert _layer(outlier_layer, "w4a4").nbytes == codes + 2 * G * N + 2 * K + branch + bias
    assert _layer(outlier_layer, "w4a16").nbytes == codes + 4 * G * N + branch + bias


@pytest.mark.parametrize("numerics", ALL)
def test_empty_takes_the_state_of_its_like(outlier_layer: OutlierLayer, numerics: Numerics) -> None:
    layer = _layer(outlier_layer, numerics)
    empty = SVDQuantLinear.empty(256, 192, numerics, rank=8, bias=True, hadamard=layer.hadamard)
    assert all(buffer.is_meta for buffer in empty.buffers())
    empty.load_state_dict(layer.state_dict(), strict=True, assign=True)
    x = outlier_layer[1].samples_SK
    assert torch.equal(empty(x), layer(x))
    assert list(layer.parameters()) == []


def test_branch_can_be_exchanged(outlier_layer: OutlierLayer) -> None:
    layer, x = _layer(outlier_layer, "w4a8"), outlier_layer[1].samples_SK
    before, down, up = layer(x), layer.lora_down, layer.lora_up
    layer.set_branch(torch.cat([down, torch.zeros(3, 256)]), torch.cat([up, torch.ones(192, 3)], dim=1))
    assert (layer.rank, layer.base_rank) == (11, 8)
    assert relative_rms(layer(x), before) < 1e-5
    layer.set_branch(down, up)
    assert torch.equal(layer(x), before)
    with pytest.raises(ValueError, match=r"needs \(3, 256\), \(192, 3\)"):
        layer.set_branch(torch.zeros(3, 255), torch.zeros(192, 3))
    with pytest.raises(ValueError, match="one floating-point dtype"):
        layer.set_branch(torch.zeros(3, 256), torch.zeros(192, 3, dtype=torch.float64))


def test_wrong_tensors_are_named(outlier_layer: OutlierLayer) -> None:
    tensors = dict(_layer(outlier_layer, "w4a8").state_dict())
    with pytest.raises(ValueError, match=r"missing \['row_scale'\]"):
        SVDQuantLinear(256, 192, "w4a8", {k: v for k, v in tensors.items() if k != "row_scale"})
    with pytest.raises(ValueError, match=r"not expected \['wscale'\]"):
        SVDQuantLinear(256, 192, "w4a8", tensors | {"wscale": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"row_scale: torch.bfloat16"):
        SVDQuantLinear(256, 192, "w4a8", tensors | {"row_scale": tensors["row_scale"].bfloat16()})
    with pytest.raises(ValueError, match=r"group_scale.*expected torch.uint8 \(2, 192\)"):
        SVDQuantLinear(256, 192, "w4a8", tensors, group_size=128)


def test_an_unsigned_layer_answers_for_the_x_that_came_in(outlier_layer: OutlierLayer) -> None:
    """x after tanh-GELU, the bias less 0.171875 times the row sums of the residual: the weight's answer, below signed error."""
    layer = _layer(outlier_layer, "w4a4")
    x = torch.nn.functional.gelu(outlier_layer[1].samples_SK, approximate="tanh")
    branch = layer.lora_up.float() @ layer.lora_down.float()
    residual = layer.dequantized_weight() - branch
    tensors = dict(layer.named_buffers()) | {"bias": layer.bias - 0.171875 * residual.sum(dim=1)}
    unsigned = SVDQuantLinear(256, 192, "w4a4", tensors, act_unsigned=True)
    expected = x @ layer.dequantized_weight().T + layer.bias
    assert relative_rms(unsigned(x), expected) < 0.75 * relative_rms(layer(x), expected)
    assert "act_unsigned" in repr(unsigned)
    with pytest.raises(ValueError, match="act_unsigned is for w4a4"):
        SVDQuantLinear(256, 192, "w4a8", dict(_layer(outlier_layer, "w4a8").named_buffers()), act_unsigned=True)


def test_sixteen_bit_scales_may_be_float16(outlier_layer: OutlierLayer) -> None:
    """Imported files store them so; float32 stays refused."""
    layer = _layer(outlier_layer, "w4a4")
    halves = {n: t.half() if n in ("wscale", "smooth") else t for n, t in layer.named_buffers()}
    half, x = SVDQuantLinear(256, 192, "w4a4", halves), outlier_layer[1].samples_SK
    assert relative_rms(half(x), layer(x)) < 1e-5  # these bf16 values are float16 values too
    with pytest.raises(ValueError, match=r"wscale: torch\.float32"):
        SVDQuantLinear(256, 192, "w4a4", halves | {"wscale": layer.wscale.float()})
