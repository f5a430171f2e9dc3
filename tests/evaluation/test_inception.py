"""Resizing against its definition, and what reaches the network, on a stand-in with the published file's parts."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from loragraft.evaluation.inception import EDGE, FEATURES, Inception, resized


class Layers(nn.Module):
    """2048 of the numbers that come in."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)[:, :2048]


class Network(nn.Module):
    """The published file's interface."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = Layers()

    def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert return_features
        return self.layers(torch.nn.functional.interpolate(img, (32, 32)))


@pytest.fixture
def network(tmp_path: Path) -> Inception:
    path = tmp_path / "net.pt"
    torch.jit.script(Network()).save(str(path))
    return Inception(path)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_clean_shrinks_with_a_low_pass_filter_and_the_old_way_aliases() -> None:
    """A chequerboard of single pixels is grey from afar."""
    board = (np.indices((598 * 2, 598 * 2)).sum(0) % 2 * 255).astype(np.uint8)
    image = Image.fromarray(board).convert("RGB")
    clean, old = resized(image, "clean")[:, 8:-8, 8:-8], resized(image, "legacy-pytorch")
    assert float((clean - 127.5).abs().max()) < 1
    fine = noise(1024, 1024)
    assert float(resized(fine, "legacy-pytorch").std()) > 2 * float(resized(fine, "clean").std())
    assert tuple(old.shape) == (3, EDGE, EDGE)


def test_legacy_pytorch_is_bilinear_at_half_pixel_centres() -> None:
    image = noise(40, 30)
    x = np.asarray(image, np.float64)

    def at(row: int, column: int, band: int) -> float:
        places = [((i + 0.5) * n / EDGE - 0.5, n) for i, n in ((row, 30), (column, 40))]
        (top, dy), (left, dx) = ((int(max(p, 0)), max(p, 0) - int(max(p, 0))) for p, _ in places)
        bottom, right = min(top + 1, 29), min(left + 1, 39)
        upper = x[top, left, band] * (1 - dx) + x[top, right, band] * dx
        lower = x[bottom, left, band] * (1 - dx) + x[bottom, right, band] * dx
        return float(upper * (1 - dy) + lower * dy)

    got = resized(image, "legacy-pytorch")
    for row, column, band in ((0, 0, 0), (150, 77, 1), (298, 298, 2), (13, 290, 0)):
        assert float(got[band, row, column]) == pytest.approx(at(row, column, band), abs=1e-3)


def test_clean_keeps_what_8_bits_would_round() -> None:
    values = resized(noise(64, 64), "clean")
    assert float((values - values.round()).abs().mean()) > 0.1


def test_scaling_of_each_variant(network: Inception) -> None:
    white = Image.new("RGB", (20, 24), "white")
    assert torch.allclose(network([white], "clean"), torch.tensor(127 / 128, dtype=torch.float64))
    assert torch.allclose(network([white], "legacy-pytorch"), torch.tensor(1.0, dtype=torch.float64))
    assert torch.allclose(network([white], "legacy-tensorflow"), torch.tensor(255.0, dtype=torch.float64))


def test_images_of_several_sizes_in_one_batch(network: Inception) -> None:
    images = [noise(64, 48), noise(30, 80, seed=1)]
    for how in ("clean", "legacy-pytorch", "legacy-tensorflow"):
        both = network(images, how)
        assert both.shape == (2, FEATURES) and both.dtype == torch.float64
        assert torch.equal(both[1:], network(images[1:], how))


def test_other_networks_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    torch.jit.script(Layers()).save(str(path))
    with pytest.raises(ValueError, match="no part `layers`"):
        Inception(path)
    path.write_bytes(b"no archive")
    with pytest.raises(ValueError, match="no TorchScript file"):
        Inception(path)
