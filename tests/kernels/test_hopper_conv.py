"""Tiles of the Hopper convolution; its results only where there is a Hopper."""

import pytest
import torch

from loragraft.kernels.hopper import on_hopper
from loragraft.kernels.hopper_conv import HOPPER_CONFIGS, stages, tile_pixels, tile_shape
from loragraft.kernels.hopper_gemm import SHARED_BYTES
from loragraft.kernels.layout import pack_words, padded, relative_rms
from loragraft.kernels.taps import Window
from loragraft.kernels.w4a8_conv import w4a8_conv, w4a8_conv_reference


def test_tiles_cover_an_image_with_little_waste():
    assert tile_shape(128, 128, 128) == (1, 128)
    assert tile_shape(64, 64, 128) == (2, 64)
    assert tile_shape(32, 32, 64) == (2, 32)
    high, wide = tile_shape(152, 104, 128)  # 832 x 1216 px: 13 x 10 tiles, 1.05 of the pixels
    assert (high * wide, -(-152 // high) * -(-104 // wide) * 128) == (128, 16640)


def test_small_tiles_where_large_ones_leave_the_card_idle():
    assert tile_pixels(Window(1, 64, 64, 3, 1, 1), 640, 132) == 64  # 160 large tiles: two rounds for 28 of them
    assert tile_pixels(Window(1, 128, 128, 3, 1, 1), 320, 132) == 128  # 384: three rounds
    assert tile_pixels(Window(1, 32, 32, 3, 1, 1), 1280, 132) == 128  # 80: one round either way


@pytest.mark.parametrize("pixels", [64, 128])
def test_stages_fit_into_shared_memory(pixels):
    steps = stages(pixels)
    used = steps * (pixels * 128 + 2 * 64 * 64) + 2 * 64 * pixels * 2 + 2 * 2 * pixels * 4
    assert used <= SHARED_BYTES < used + pixels * 128 + 2 * 64 * 64
    assert steps >= 8


@pytest.mark.gpu
@pytest.mark.parametrize("config", HOPPER_CONFIGS)
@pytest.mark.parametrize(
    ("height", "width", "C", "N", "R"), [(8, 9, 64, 64, 0), (17, 24, 320, 200, 20), (40, 33, 640, 320, 48)]
)
def test_matches_float64(config, height, width, C, N, R):
    if not on_hopper(torch.empty(0, device="cuda"), torch.bfloat16):
        pytest.skip("needs an sm_90 device")
    KP = padded(9 * C)
    scale = torch.randint(6, 16, (KP // 64, N), dtype=torch.uint8)
    inputs = {
        "x": torch.randint(-126, 127, (2, C, height, width)).float(),
        "qweight": torch.randint(0, 256, (N, KP // 2), dtype=torch.uint8),
        "row_scale": torch.rand(N) / (60 * (9 * C) ** 0.5) + 1e-5,
        "group_words": pack_words(scale, torch.full_like(scale, 8), 64),
        "lora_down": torch.randn(R, 9 * C) / (9 * C) ** 0.5,
        "lora_up": torch.randn(N, R),
        "bias": torch.randn(N),
    }
    inputs["x"][:, 0] = 127  # on the grid of every pixel, in bfloat16 too
    halves = {
        k: v.cuda().bfloat16() if k in ("x", "lora_down", "lora_up", "bias") else v.cuda() for k, v in inputs.items()
    }
    wide = {k: v.double() if v.is_floating_point() else v for k, v in halves.items()}
    expected = w4a8_conv_reference(**wide, smooth=None, kernel=3, padding=1)
    assert relative_rms(w4a8_conv(**halves, smooth=None, kernel=3, padding=1, config=config), expected) < 5e-3
