"""The 16-bit weights behind a quantized base, or why there are none."""

from pathlib import Path

import pytest
import torch

from loragraft.backbones.load import find_spec, load_16bit
from loragraft.backbones.original_weights import open_original
from loragraft.recipes.schema import WeightsConfig

PATH = "transformer_blocks.0.attn.to_q"


def test_pockets_are_those_that_travel_with_it(tmp_path: Path) -> None:
    spec = find_spec("pocket")
    read = open_original(spec, WeightsConfig(), tmp_path)
    assert torch.equal(read(PATH), load_16bit(spec).get_submodule(PATH).get_parameter("weight"))
    with pytest.raises(ValueError, match=rf"lack '{PATH}x.weight'; nearest: {PATH}.weight"):
        read(f"{PATH}x")


def test_a_pipelines_are_read_from_its_files(flux_folder: Path, tmp_path: Path) -> None:
    spec = find_spec("flux1-dev")
    read = open_original(spec, WeightsConfig(path=str(flux_folder)), tmp_path)
    assert read(PATH).dtype == torch.bfloat16
    assert read(PATH).shape == (128, 128)


def test_int4_and_random_weights_have_none(flux_folder: Path, flux_cache: Path, tmp_path: Path) -> None:
    spec = find_spec("flux1-dev")
    (int4,) = (flux_cache / "bases").glob("flux1-dev-native-*")
    with pytest.raises(
        ValueError, match=r"holds INT4 alone: give 16-bit weights, weights.path=FOLDER.*adapter.init=default"
    ):
        open_original(spec, WeightsConfig(path=str(int4), encoders=str(flux_folder)), tmp_path)
    with pytest.raises(ValueError, match="random weights lost nothing: give 16-bit weights"):
        open_original(spec, WeightsConfig(random=True), tmp_path)
    with pytest.raises(ValueError, match="do not travel with the package"):
        open_original(spec, WeightsConfig(), tmp_path)
