"""Sizes of the INT4 files at the true shapes, from the configurations alone."""

import pytest

from loragraft.backbones.file_size import base_bytes
from loragraft.backbones.load import find_spec, list_bases

SIZES = {
    "flux1-dev": (6.9, 23.8),
    "sdxl": (2.1, 5.1),
    "sd15": (0.6, 1.7),
    "sana-16b": (1.05, 3.2),
    "pixart-sigma": (0.42, 1.2),
}
"""Base -> (most GB that its INT4 file may take, GB of its 16-bit file)."""


@pytest.mark.parametrize("name", [name for name in SIZES if name in list_bases()])
def test_files_are_as_small_as_promised(name: str) -> None:
    most, plain = SIZES[name]
    spec = find_spec(name)
    assert base_bytes(spec, "native") <= most * 1e9
    assert base_bytes(spec, None) == pytest.approx(plain * 1e9, abs=0.05e9)


def test_a_base_that_travels_with_the_package_has_a_file() -> None:
    with pytest.raises(ValueError, match="travel with the package"):
        base_bytes(find_spec("pocket"), "native")
