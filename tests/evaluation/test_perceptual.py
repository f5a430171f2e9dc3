"""ST-LPIPS: against the value that its authors publish, and against what the written layers gave when they matched it."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from loragraft.evaluation.perceptual import PACKAGE, STLPIPS

README_VALUE = 0.7777554988861084
"""ex_p0.png against ex_ref.png, from the README of github.com/abhijay9/ShiftTolerant-LPIPS."""
SHIFTED, INVERTED = 0.0018384, 0.499137
IMAGES = os.environ.get("STLPIPS_IMAGES", "")


@pytest.fixture(scope="module")
def distance() -> STLPIPS:
    return STLPIPS()


def scene(shift: int = 0) -> Tensor:
    """A disc and a bar on a gradient, 64 px; deterministic to the last bit."""
    axis = torch.arange(64, dtype=torch.float32)
    down, across = axis[:, None].expand(64, 64), axis[None, :].expand(64, 64)
    picture = torch.stack([down / 64, across / 64, (down + across) / 128])
    picture = torch.where((down - 24) ** 2 + (across - 28 - shift) ** 2 < 150, torch.tensor(0.875), picture)
    return torch.where((down > 44) & (down < 50), torch.tensor(0.125), picture)[None]


@pytest.mark.skipif(not IMAGES, reason="set STLPIPS_IMAGES to the folder `imgs` of the authors' repository")
def test_the_authors_value() -> None:
    pictures = [np.asarray(Image.open(Path(IMAGES) / name).convert("RGB")) for name in ("ex_p0.png", "ex_ref.png")]
    a, b = (torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255 for picture in pictures)
    assert float(STLPIPS()(a, b)) == pytest.approx(README_VALUE, abs=2e-6)


def test_values_of_the_implementation_that_matched_it(distance: STLPIPS) -> None:
    """The example images are not shipped, so these pin the same code on pictures made here."""
    assert float(distance(scene(), scene(1))) == pytest.approx(SHIFTED, rel=1e-4)
    assert float(distance(scene(), 1 - scene())) == pytest.approx(INVERTED, rel=1e-4)


def test_equal_images_are_at_zero_and_order_does_not_matter(distance: STLPIPS) -> None:
    noisy = (scene() + 0.2 * torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    assert distance(torch.cat([scene(), noisy]), torch.cat([scene(), noisy])).tolist() == [0, 0]
    assert float(distance(scene(), noisy)) == pytest.approx(float(distance(noisy, scene())), rel=1e-6)
    assert float(distance(scene(), scene(1))) < float(distance(scene(), noisy)), "a shift of a pixel is a small thing"


def test_a_batch_is_its_images(distance: STLPIPS) -> None:
    a, b = torch.cat([scene(), scene(3)]), torch.cat([1 - scene(), scene()])
    one_by_one = [float(distance(a[i : i + 1], b[i : i + 1])) for i in range(2)]
    assert distance(a, b).tolist() == pytest.approx(one_by_one, rel=1e-5)


def test_none_of_the_packages_code_is_imported(distance: STLPIPS) -> None:
    assert [name for name in sys.modules if name.partition(".")[0] == PACKAGE] == []


def test_refuses_what_it_cannot_see(distance: STLPIPS) -> None:
    with pytest.raises(ValueError, match="two batches"):
        distance(scene(), scene()[:, :2])
    with pytest.raises(ValueError, match="at least 32 pixels"):
        distance(scene()[..., :16, :16], scene()[..., :16, :16])


def test_missing_weights_name_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loragraft.evaluation.perceptual.PACKAGE", "no_such_package")
    with pytest.raises(FileNotFoundError, match="pip install stlpips-pytorch"):
        STLPIPS()
