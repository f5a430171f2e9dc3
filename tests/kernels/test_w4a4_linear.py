"""What is particular to the interchange op; what all linear ops share is in test_registry.py."""

import pytest
import torch

from loragraft.kernels.layout import LinearCase, pack_int4, padded, relative_rms
from loragraft.kernels.registry import OPS, cast
from loragraft.kernels.w4a4_linear import dequantize_w4a4, w4a4_linear

W4A4 = next(op for op in OPS if op.name == "w4a4")


def test_one_output_by_hand(device):
    """Two groups: x = 7 then 14, so a = 1 then 2 and all codes are 7; q = -8 then 3; y = 64 * 7 * (-8 w0 + 2 * 3 w1)."""
    q = torch.tensor([[-8] * 64 + [3] * 64], dtype=torch.int8)
    x = torch.tensor([[7.0] * 64 + [14.0] * 64])
    y = w4a4_linear(
        x.to(device), pack_int4(q).to(device), torch.tensor([[0.5], [0.25]], dtype=torch.bfloat16, device=device), None,
        torch.zeros(0, 128, device=device), torch.zeros(1, 0, device=device), None, hadamard=False,
    )  # fmt: skip
    assert y.item() == 64 * 7 * (-8 * 0.5 + 2 * 3 * 0.25)


def test_int8_dgrad_is_refused_with_its_reason():
    with pytest.raises(ValueError, match="one weight scale per row"):
        w4a4_linear(**W4A4.inputs(LinearCase(7, 40, 128)), dgrad="int8")


def test_scales_must_be_one_per_group_of_64():
    inputs = W4A4.inputs(LinearCase(7, 40, 256))
    with pytest.raises(ValueError, match="wscale has shape"):
        w4a4_linear(**{**inputs, "wscale": inputs["wscale"][:2]})


def unsigned_layer(device, M=77, N=40, K=320):
    """Inputs of an unsigned layer whose bias makes up for the shift, beside the weight that they stand for."""
    case = LinearCase(M, N, K, unsigned=True)
    inputs = cast(W4A4.inputs(case), torch.float32, device)
    weight = dequantize_w4a4(inputs["qweight"], inputs["wscale"])[:, :K] / inputs["smooth"]
    x = torch.nn.functional.gelu(torch.randn(M, K, generator=torch.Generator().manual_seed(4)), approximate="tanh")
    bias = inputs["bias"] - 0.171875 * weight.sum(dim=1)
    return inputs | {"x": x.to(device)}, weight, bias


def test_the_compensated_bias_takes_the_shift_out_again(device):
    """With it the layer answers for the x that came in: half the error of signed codes, without it far off."""
    inputs, weight, bias = unsigned_layer(device)
    down = torch.cat([inputs["lora_down"], inputs["adapter_down"]])
    up = torch.cat([inputs["lora_up"], inputs["adapter_up"]], dim=1)
    exact = inputs["x"] @ weight.T + inputs["x"] @ down.T @ up.T + inputs["bias"]
    unsigned = relative_rms(w4a4_linear(**{**inputs, "bias": bias}), exact)
    signed = relative_rms(w4a4_linear(**{**inputs, "unsigned": False}), exact)
    assert unsigned < 0.75 * signed
    assert relative_rms(w4a4_linear(**inputs), exact) > 3 * unsigned


def test_codes_kept_by_an_unsigned_layer_rebuild_the_unshifted_x(device):
    """dA from the codes is within the 8-bit error of dA from x itself; a shifted x would be off by far more."""
    inputs, _, _ = unsigned_layer(device)
    gradients = {}
    for save_x in ("raw", "quantized"):
        leaves = {name: inputs[name].clone().requires_grad_() for name in ("x", "adapter_down", "adapter_up")}
        y = w4a4_linear(**{**inputs, **leaves}, save_x=save_x)
        gradients[save_x] = torch.autograd.grad(y.square().sum(), list(leaves.values()))
    assert torch.equal(gradients["raw"][0], gradients["quantized"][0])
    assert 1e-4 < relative_rms(gradients["quantized"][1], gradients["raw"][1]) < 2e-2
    assert torch.equal(gradients["raw"][2], gradients["quantized"][2])


def test_padding_columns_of_an_unsigned_layer_count_for_nothing(device):
    inputs = cast(W4A4.inputs(LinearCase(5, 40, 100, unsigned=True)), torch.float32, device)
    cleared = inputs["qweight"].clone()
    cleared[:, 100 // 2 : padded(100) // 2] = 0
    assert torch.equal(w4a4_linear(**inputs), w4a4_linear(**{**inputs, "qweight": cleared}))


def test_two_layers_side_by_side_are_one_layer(device):
    """Signed columns up to 128, unsigned ones from there: the sum of the two layers, also with their own branches."""
    signed = cast(W4A4.inputs(LinearCase(7, 40, 128, r=0), seed=1), torch.float32, device)
    unsigned = cast(W4A4.inputs(LinearCase(7, 40, 192, r=0, bias=False, unsigned=True), seed=2), torch.float32, device)
    joined = {
        "x": torch.cat([signed["x"], unsigned["x"]], dim=1),
        "qweight": torch.cat([signed["qweight"], unsigned["qweight"]], dim=1),
        "wscale": torch.cat([signed["wscale"], unsigned["wscale"]]),
        "smooth": torch.cat([signed["smooth"], unsigned["smooth"]]),
        "lora_down": torch.block_diag(signed["lora_down"], unsigned["lora_down"]),
        "lora_up": torch.cat([signed["lora_up"], unsigned["lora_up"]], dim=1),
    }
    y = w4a4_linear(**joined, bias=signed["bias"], hadamard=False, unsigned=True, unsigned_from=128)
    assert relative_rms(y, w4a4_linear(**signed) + w4a4_linear(**unsigned)) < 1e-6
    with pytest.raises(ValueError, match="unsigned_from = 100"):
        w4a4_linear(**joined, bias=None, hadamard=False, unsigned=True, unsigned_from=100)
    with pytest.raises(ValueError, match="unsigned_from = 128, must be 0 or, with unsigned"):
        w4a4_linear(**joined, bias=None, hadamard=False, unsigned_from=128)


def test_unsigned_and_rotation_exclude_each_other():
    with pytest.raises(ValueError, match="unsigned=True with hadamard=True"):
        w4a4_linear(**{**W4A4.inputs(LinearCase(7, 40, 128, unsigned=True)), "hadamard": True})


@pytest.mark.not_interpreted
def test_opcheck_unsigned(device):
    inputs = cast(W4A4.inputs(LinearCase(7, 40, 192, unsigned=True)), torch.float32, device)
    names = ("x", "qweight", "wscale", "smooth", "lora_down", "lora_up", "bias", "adapter_down", "adapter_up")
    for name in ("x", "adapter_down", "adapter_up"):
        inputs[name].requires_grad_()
    torch.library.opcheck(
        torch.ops.loragraft.w4a4_linear.default, (*(inputs[name] for name in names), False, "quantized", True, 64)
    )
