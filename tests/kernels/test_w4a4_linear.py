"""What is particular to the interchange op; what all linear ops share is in test_registry.py."""

import pytest
import torch

from loragraft.kernels.layout import LinearCase, pack_int4
from loragraft.kernels.registry import OPS
from loragraft.kernels.w4a4_linear import w4a4_linear

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
