"""Sums over taps and their adjoint against torch's convolution, and the padding behind taps."""

import pytest
import torch
import torch.nn.functional as F

from loragraft.kernels.layout import relative_rms
from loragraft.kernels.taps import Window, pad_taps, spread_taps, sum_taps, tap_columns, trim_taps

WINDOWS = (
    Window(2, 5, 6, 3, 1, 1),
    Window(1, 6, 5, 3, 2, 1),
    Window(1, 7, 7, 3, 2, 0),
    Window(1, 4, 4, 2, 2, 0),
    Window(3, 2, 1, 1, 1, 0),
)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("rank", [1, 5, 24])
@pytest.mark.usefixtures("poison")
def test_one_product_and_a_sum_are_the_convolution(window, rank, device):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(window.batch, 8, window.height, window.width, generator=generator).to(device)
    kernel = torch.randn(rank, 8, window.kernel, window.kernel, generator=generator).to(device)
    columns = kernel.permute(2, 3, 0, 1).reshape(-1, 8)  # (tap, rank)
    e_MTR = x.permute(0, 2, 3, 1).reshape(-1, 8) @ columns.T
    h_PR = sum_taps(e_MTR, rank, window)
    expected = F.conv2d(x, kernel, None, window.stride, window.padding)
    assert expected.shape[2:] == (window.out_height, window.out_width)
    assert relative_rms(h_PR, expected.permute(0, 2, 3, 1).reshape(-1, rank)) < 1e-6
    assert h_PR.stride(0) % 8 == 0


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.usefixtures("poison")
def test_spreading_is_the_adjoint_of_summing(window, device):
    generator = torch.Generator().manual_seed(1)
    e = torch.randn(window.pixels, window.taps * 3, generator=generator).to(device)
    g = torch.randn(window.out_pixels, 3, generator=generator).to(device)
    spread = spread_taps(g, window)
    assert spread.shape == (window.taps, window.pixels, 3)
    left = (sum_taps(e, 3, window) * g).sum()
    assert left.item() == pytest.approx((e.view(-1, window.taps, 3).transpose(0, 1) * spread).sum().item(), rel=1e-4)


def test_no_rank_is_no_work(device):
    assert sum_taps(torch.empty(30, 0, device=device), 0, Window(1, 5, 6, 3, 1, 1)).shape == (30, 0)


def test_taps_are_padded_to_groups():
    assert [tap_columns(channels) for channels in (1, 64, 65, 320)] == [64, 64, 128, 320]
    matrix = torch.randn(2, 9 * 48)
    padded = pad_taps(matrix, 48)
    assert padded.shape == (2, 9 * 64)
    assert torch.equal(padded.view(2, 9, 64)[:, 4, :48], matrix.view(2, 9, 48)[:, 4])
    assert not padded.view(2, 9, 64)[..., 48:].any()
    assert torch.equal(trim_taps(F.pad(padded, (0, 64)), 48, 9), matrix)
    assert pad_taps(matrix, 432) is not matrix  # one tap of 432 channels
    whole = torch.randn(2, 9 * 64)
    assert pad_taps(whole, 64) is whole
