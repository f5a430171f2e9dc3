"""left^T right over many rows, against float64."""

import pytest
import torch

from loragraft.kernels.layout import relative_rms
from loragraft.kernels.row_product import CASES, row_product


def operands(M, r, C, dtype, device):
    random = torch.Generator().manual_seed(0)
    left = torch.randn(M, r, generator=random).to(device, dtype)
    return left, torch.randn(M, C, generator=random).to(device, dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.usefixtures("poison")
def test_float_operands(case, device, dtype, tolerance):
    left, right = operands(*case, dtype, device)
    expected = left.double().T @ right.double()
    assert relative_rms(row_product(left, right), expected) < tolerance


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.usefixtures("poison")
def test_codes_with_a_scale_per_token(case, device, dtype, tolerance):
    left, right = operands(*case, torch.float32, device)
    codes = (right * 40).round().clamp(-127, 127).to(torch.int8)
    scale = right.abs().amax(1, keepdim=True) / 127
    expected = left.to(dtype).double().T @ (codes.double() * scale.double())
    assert relative_rms(row_product(left.to(dtype), codes, scale), expected) < tolerance


def test_strided_left_and_the_same_bits_twice(device):
    left, right = operands(300, 24, 192, torch.float32, device)
    part = left[:, -16:]
    assert torch.equal(row_product(part, right), row_product(part.contiguous(), right))
    assert torch.equal(row_product(part, right), row_product(part, right))


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="rows contiguous"):
        row_product(torch.zeros(4, 2), torch.zeros(5, 3))


@pytest.mark.not_interpreted
def test_opcheck(device):
    left, right = operands(7, 3, 40, torch.float32, device)
    torch.library.opcheck(torch.ops.loragraft.row_product.default, (left, right, None))


@pytest.mark.not_interpreted
def test_compiles_without_a_graph_break(device):
    left, right = operands(7, 3, 40, torch.float32, device)
    compiled = torch.compile(row_product, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(left, right), row_product(left, right))
