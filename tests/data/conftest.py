"""Pixels of a drawing, for the tests of the domains."""

from collections.abc import Callable
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from loragraft.data.domains import render
from loragraft.data.icon_art import COLOURS


@pytest.fixture
def share_of() -> Callable[[str, str], float]:
    """(svg, colour name) -> share of the pixels that show that colour."""

    def measure(svg: str, colour: str) -> float:
        image = np.asarray(Image.open(BytesIO(render(svg, 128))).convert("RGB")).reshape(-1, 3).astype(int)
        assert len(image) == 128 * 128
        wanted = [int(COLOURS[colour][i : i + 2], 16) for i in (1, 3, 5)]
        return float((np.abs(image - wanted).max(1) < 8).mean())

    return measure
