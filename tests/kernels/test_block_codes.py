"""Codes of an image in blocks: bit for bit what the formula says, and windows that are the convolution's."""

import pytest
import torch
import torch.nn.functional as F

from loragraft.kernels.block_codes import blocks_of, blocks_reference, quantize_blocks, windows_of
from loragraft.kernels.layout import apply_hadamard, relative_rms
from loragraft.kernels.taps import Window

WINDOWS = (
    Window(2, 16, 8, 3, 1, 1),
    Window(1, 6, 5, 3, 2, 1),
    Window(1, 8, 32, 3, 2, 1),
    Window(1, 7, 7, 3, 2, 0),
    Window(1, 4, 4, 2, 2, 0),
    Window(1, 9, 5, 3, 1, 2),
    Window(3, 2, 1, 1, 1, 0),
)
"""Some with blocks of one output, some with several blocks an image."""


def image(window, channels, device):
    generator = torch.Generator().manual_seed(window.height)
    x_MC = torch.randn(window.pixels, channels, generator=generator) * torch.rand(window.pixels, 1, generator=generator)
    return x_MC.to(device)


def scale_by_definition(x_MC, window):
    """The largest |x| of every block's patch / 127, pixel by pixel."""
    blocks, C = blocks_of(window), x_MC.shape[1]
    x = x_MC.cpu().view(window.batch, window.height, window.width, C)
    scale = torch.empty(window.batch, *window.out_size)
    reach = [(n - 1) * window.stride + window.kernel for n in (blocks.rows, blocks.columns)]
    reach[1] = -(-reach[1] // window.stride) * window.stride  # whole phases
    for i in range(0, window.out_height, blocks.rows):
        for j in range(0, window.out_width, blocks.columns):
            top, left = i * window.stride - window.padding, j * window.stride - window.padding
            patch = x[:, max(top, 0) : top + reach[0], max(left, 0) : left + reach[1]]
            most = patch.abs().amax((1, 2, 3)) / 127
            scale[:, i : i + blocks.rows, j : j + blocks.columns] = most[:, None, None]
    return scale.view(-1, 1)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("channels", [64, 72])
@pytest.mark.usefixtures("poison")
def test_codes_are_the_formulas(window, channels, device):
    x_MC, blocks = image(window, channels, device), blocks_of(window)
    codes, scale = quantize_blocks(x_MC, None, False, blocks)
    expected, expected_scale = blocks_reference(x_MC.cpu(), blocks)
    assert torch.equal(scale.cpu(), expected_scale)
    assert torch.equal(scale.cpu(), scale_by_definition(x_MC, window))
    assert codes.shape == (blocks.code_rows, 64 if channels == 64 else 128)
    # x * (127 / max) and x / (max / 127) may round to neighbours, where they lie next to a tie
    difference = (codes.cpu().int() - expected.int()).abs()
    assert difference.max() <= 1
    assert difference.count_nonzero() <= 1e-3 * difference.numel()


@pytest.mark.parametrize("hadamard", [False, True])
@pytest.mark.usefixtures("poison")
def test_smoothing_and_rotation_come_first(hadamard, device):
    window = WINDOWS[0]
    x_MC, blocks, smooth = image(window, 64, device), blocks_of(window), torch.rand(64, device=device) + 0.5
    rotated = apply_hadamard(x_MC / smooth) if hadamard else x_MC / smooth
    codes, scale = quantize_blocks(x_MC, smooth, hadamard, blocks)
    expected, expected_scale = blocks_reference(rotated, blocks)
    assert relative_rms(scale, expected_scale) < 1e-6
    assert (codes.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.usefixtures("poison")
def test_windows_are_what_a_convolution_multiplies(window, device):
    blocks, k = blocks_of(window), window.kernel
    x_MC = torch.randint(-127, 128, (window.pixels, 64), generator=torch.Generator().manual_seed(0)).float()
    x_MC[:, 0] = 127  # every block's scale is 1
    codes, scale = quantize_blocks(x_MC.to(device), None, False, blocks)
    assert torch.equal(scale.cpu(), torch.ones(window.out_pixels, 1))
    matrix = windows_of(codes, blocks).cpu()
    x = x_MC.view(window.batch, window.height, window.width, 64).permute(0, 3, 1, 2)
    expected = (
        F.unfold(x, k, padding=window.padding, stride=window.stride).unflatten(1, (64, k * k)).permute(0, 3, 2, 1)
    )
    assert torch.equal(matrix[:, : k * k * 64].float(), expected.reshape(-1, k * k * 64))
    assert not matrix[:, k * k * 64 :].any()


def test_an_image_of_zeros_has_scale_one(device):
    codes, scale = quantize_blocks(torch.zeros(16, 64, device=device), None, False, blocks_of(Window(1, 4, 4, 3, 1, 1)))
    assert not codes.any()
    assert torch.equal(scale, torch.ones_like(scale))


def test_blocks_divide_the_output():
    sizes = ((128, 128), (64, 32), (112, 144), (36, 28), (37, 5))
    found = [(blocks.rows, blocks.columns) for size in sizes if (blocks := blocks_of(Window(1, *size, 3, 1, 1)))]
    assert found == [(8, 64), (8, 32), (8, 16), (4, 4), (1, 1)]
    large = blocks_of(Window(2, 128, 128, 3, 1, 1))
    assert large.code_rows * 64 * 8 == 2 * 128 * 128 * 10 * 66
