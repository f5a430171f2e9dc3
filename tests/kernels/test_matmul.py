import pytest
import torch

from loragraft.kernels.layout import relative_rms
from loragraft.kernels.matmul import CASES, matmul


def random_pair(M, N, K, dtype, device):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(M, K, generator=generator), torch.randn(K, N, generator=generator)
    return a.to(device, dtype), b.to(device, dtype)


@pytest.mark.parametrize(("M", "N", "K"), CASES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.usefixtures("poison")
def test_matches_float64_whatever_the_strides(M, N, K, transposed, device, dtype, tolerance):
    a, b = random_pair(M, N, K, dtype, device)
    expected = a.double() @ b.double()
    if transposed:
        a, b = a.T.contiguous().T, b.T.contiguous().T
    assert relative_rms(matmul(a, b), expected) < tolerance
    assert matmul(a, b).dtype == dtype
    assert matmul(a, b, out_dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.usefixtures("poison")
def test_codes_with_scales(groups, device, dtype, tolerance):
    generator = torch.Generator().manual_seed(1)
    a, _ = random_pair(5, 1, 77, dtype, device)
    codes = torch.randint(-127, 128, (77, 192), generator=generator).to(device, torch.int8)
    scale = torch.rand(77, groups, generator=generator).to(device)
    expected = a.double() @ (codes * scale.double().repeat_interleave(192 // groups, dim=1))
    assert relative_rms(matmul(a, codes, scale), expected) < tolerance


def test_empty_results(device):
    a, b = random_pair(5, 0, 7, torch.float32, device)
    assert matmul(a, b).shape == (5, 0)


@pytest.mark.not_interpreted
def test_opcheck(device):
    a, b = random_pair(7, 5, 64, torch.float32, device)
    torch.library.opcheck(torch.ops.loragraft.matmul.default, (a, b, None, torch.float32))


def test_shapes_must_fit():
    with pytest.raises(ValueError, match=r"\[M, K\] and \[K, N\]"):
        matmul(torch.zeros(2, 3), torch.zeros(2, 3))
