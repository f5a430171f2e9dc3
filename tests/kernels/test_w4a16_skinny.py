"""Every config of the kernels for few tokens, where Triton runs: on CUDA, or interpreted."""

import pytest
import torch

from loragraft.kernels import w4a16_skinny
from loragraft.kernels.layout import LinearCase, relative_rms, uses_triton
from loragraft.kernels.registry import OPS, cast

W4A16 = next(op for op in OPS if op.name == "w4a16")
CASES = (
    LinearCase(1, 37, 1280, R=0, r=0),
    LinearCase(2, 40, 104, R=20, r=0, bias=False),
    LinearCase(16, 33, 192, R=5, r=0),
)
CONFIGS = [*w4a16_skinny.GEMV_CONFIGS, *w4a16_skinny.SKINNY_CONFIGS]


def operands(case, dtype, device):
    if not uses_triton(torch.empty(0, device=device)):
        pytest.skip("Triton source: needs CUDA or TRITON_INTERPRET=1")
    inputs = cast(W4A16.inputs(case), dtype, device)
    in_float64 = {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    return inputs, W4A16.reference(**in_float64)


def linear(inputs, config=None):
    h_MR = w4a16_skinny.skinny_down(inputs["x"], inputs["lora_down"])
    weights = (inputs[name] for name in ("qweight", "wscale", "wzero"))
    return w4a16_skinny.skinny_linear(inputs["x"], *weights, h_MR, inputs["lora_up"], inputs["bias"], config)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.usefixtures("poison")
def test_every_config_matches_float64(config, case, device, dtype, tolerance):
    if dtype == torch.float32:
        pytest.skip("16-bit x only")
    inputs, expected = operands(case, dtype, device)
    assert relative_rms(linear(inputs, config), expected) < tolerance


def test_zeros_and_scales_of_padding_are_not_read(device):
    """K = 64 of Kp = 128, with infinite scales and NaN zeros behind: any config gives the same finite rows."""
    inputs, expected = operands(LinearCase(2, 33, 64, R=0, r=0), torch.float16, device)
    inputs["wscale"][1], inputs["wzero"][1] = float("inf"), float("nan")
    for config in CONFIGS:
        assert relative_rms(linear(inputs, config), expected) < 1e-3, config


def test_what_the_kernels_take():
    q = torch.zeros(8, 64, dtype=torch.uint8)
    x = torch.zeros(17, 128, dtype=torch.bfloat16)
    assert w4a16_skinny.fits(x[:16], q)
    assert w4a16_skinny.fits(x[:1].half(), q)
    assert not w4a16_skinny.fits(x, q)
    assert not w4a16_skinny.fits(x[:1].float(), q)
    assert not w4a16_skinny.fits(x[:1, :100].contiguous(), q)
    shifted = torch.zeros(8 * 64 + 1, dtype=torch.uint8)[1:].view(8, 64)
    assert not w4a16_skinny.fits(x[:1], shifted)
