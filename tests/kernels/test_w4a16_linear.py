"""What is particular to the weight-only op; what all linear ops share is in test_registry.py."""

import pytest
import torch

from loragraft.kernels.layout import LinearCase, pack_int4
from loragraft.kernels.registry import OPS
from loragraft.kernels.w4a16_linear import w4a16_linear

W4A16 = next(op for op in OPS if op.name == "w4a16")


def test_one_output_by_hand_ignores_the_padding(device):
    """K = 64 of Kp = 128: y = sum_k x (5 * 0.5 - 2), whatever codes and scales the padded group holds."""
    codes = torch.tensor([[5] * 64 + [15] * 64], dtype=torch.uint8)
    wscale = torch.tensor([[0.5], [float("inf")]], dtype=torch.bfloat16, device=device)
    wzero = torch.tensor([[-2.0], [float("nan")]], dtype=torch.bfloat16, device=device)
    empty = torch.zeros(0, 64, device=device), torch.zeros(1, 0, device=device)
    x = torch.arange(64.0, device=device)[None]
    y = w4a16_linear(x, pack_int4(codes).to(device), wscale, wzero, *empty, None)
    assert y.item() == pytest.approx(0.5 * 63 * 32)


def test_scales_must_be_one_per_group_of_64():
    inputs = W4A16.inputs(LinearCase(7, 40, 256))
    with pytest.raises(ValueError, match="wzero has shape"):
        w4a16_linear(**{**inputs, "wzero": inputs["wzero"][:2]})
