"""`loragraft generate` on a CPU: adapters side by side, the base beside them, and what is refused at once."""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from loragraft.adapters.checkpoint import write_adapter
from loragraft.backbones.load import load_backbone
from loragraft.cli import main
from loragraft.evaluation.generate import Settings, save_image
from loragraft.evaluation.generate_command import _weights, add_options
from loragraft.quantization.checkpoint import quantized_layers


@pytest.fixture
def adapters(tmp_path: Path) -> list[str]:
    backbone = load_backbone("pocket", "native", "cpu", tmp_path / "cache")
    made = []
    for seed, name in enumerate(("one", "other")):
        random, pairs = torch.Generator().manual_seed(seed), {}
        for path, layer in quantized_layers(backbone.transformer).items():
            down = torch.randn(4, layer.in_features, generator=random) / layer.in_features**0.5
            pairs[path] = down, 0.3 * torch.randn(layer.out_features, 4, generator=random)
        about = {"base": "pocket", "base_id": backbone.base_id, "profile": "native", "name": name}
        write_adapter(pairs, tmp_path / name, about)
        made.append(str(tmp_path / name))
    return made


def test_two_adapters_and_the_base_beside_them(
    adapters: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    how = ["--prompt", "a red star", "--steps", "1", "--guidance", "1", "--resolution", "64"]
    given = [
        part for path, weight in zip(adapters, ("0.5", "1"), strict=True) for part in ("--adapter", f"{path}@{weight}")
    ]
    assert main(["generate", *given, *how, "--compare", "--out", str(tmp_path / "both")]) == 0
    assert main(["generate", *how, "--out", str(tmp_path / "base")]) == 0
    with Image.open(tmp_path / "both" / "0000.png") as image, Image.open(tmp_path / "base" / "0000.png") as base:
        about = json.loads(image.info["loragraft"])
        assert about["adapters"] == [{"name": "one", "weight": 0.5}, {"name": "other", "weight": 1.0}]
        assert image.tobytes() != base.tobytes()
        alone = base.convert("RGB").tobytes()
    with Image.open(tmp_path / "both" / "before_after.png") as sheet:
        pixels = sheet.convert("RGB")
    spots = ((x, y) for y in range(pixels.height - 63) for x in range(12))
    found = [spot for spot in spots if pixels.crop((*spot, spot[0] + 64, spot[1] + 64)).tobytes() == alone]
    assert len(found) == 1, "beside it stands what the base alone draws, to the bit"


def test_a_picture_is_the_old_one_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped by ctrl-C the command says that files appear whole or not at all."""
    backbone: Any = SimpleNamespace(spec=SimpleNamespace(name="pocket"), base_id="ab", profile="native")
    picture, file, write = Image.new("RGB", (8, 8)), tmp_path / "0000.png", Path.write_bytes
    save_image(picture, file, Settings(prompt="a"), backbone, [])
    before = file.read_bytes()

    def stopped(path: Path, content: bytes) -> None:
        write(path, content[:20])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", stopped)
    with pytest.raises(KeyboardInterrupt):
        save_image(picture, file, Settings(prompt="b"), backbone, [])
    assert [path.name for path in tmp_path.iterdir()] == ["0000.png"]
    assert file.read_bytes() == before


def test_compiling_is_refused_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("loragraft.backbones.load.load_backbone", lambda *_: pytest.fail("loaded"))
    assert main(["generate", "--compile", "--prompt", "a", "--steps", "1"]) == 2
    assert "--compile needs a CUDA GPU" in capsys.readouterr().err


def test_encoders_without_weights_are_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("loragraft.backbones.load.load_backbone", lambda *_: pytest.fail("loaded"))
    assert main(["generate", "--prompt", "a", "--encoders", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "weights.path is empty" in capsys.readouterr().err


def test_options_of_weights_are_added_to_those_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("extends: marketing\nbase: flux1-dev\nweights: {path: a/b}\n")
    parser = argparse.ArgumentParser()
    add_options(parser)
    given = parser.parse_args(["--adapter", f"{tmp_path}@0.5", "--encoders", "c/d", "--allow-download"])
    found = _weights(given, external=True)
    assert (found.path, found.encoders, found.allow_download) == ("a/b", "c/d", True)


def test_a_folder_that_nothing_may_be_written_into_is_refused_before_anything_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("loragraft.backbones.load.load_backbone", lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr("os.access", lambda place, _: Path(place) != tmp_path)  # root may write everywhere
    assert main(["generate", "--prompt", "a", "--out", str(tmp_path / "a" / "b")]) == 2
    assert f"nothing may be written into {tmp_path}" in capsys.readouterr().err


@pytest.mark.parametrize("seed", ["-1", str(2**64 - 1)])
def test_a_seed_that_no_generator_takes_is_refused(seed: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--prompt", "a", "--per-prompt", "2", "--seed", seed]) == 2
    assert f"--seed {seed}: it is at least 0, and that of the last image below 2^64" in capsys.readouterr().err
