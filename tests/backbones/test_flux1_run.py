"""The whole line on a tiny FLUX.1 [dev]: pipeline folder, encode, train, save, draw, publish, and draw with [schnell]."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from loragraft import cli
from loragraft.adapters.checkpoint import load_adapter
from loragraft.backbones import flow
from loragraft.backbones.flux1_encoders import Flux1Encoders
from loragraft.backbones.spec import Backbone
from loragraft.train import lora

SMALL = (
    "base=flux1-dev", "data.count=24", "data.resolution=64", "train.steps=2", "train.batch_size=2", "train.threads=1",
    "train.save_x=raw", "optim.warmup_steps=0", "sample.steps=1", "sample.prompts=[promo tile]", "tracking.mode=disabled",
)  # fmt: skip


@pytest.fixture(scope="module")
def place(flux_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("user")


@pytest.fixture
def at_place(place: Path, flux_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    monkeypatch.setenv("LORAGRAFT_CACHE", str(flux_cache))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return place


@pytest.fixture(scope="module")
def events(flux_folder: Path, place: Path, flux_cache: Path) -> list[str]:
    """Trains runs/tiny once; what happened, in order."""
    seen: list[str] = []

    def noting(name: str, function: object) -> object:
        def noted(*args: object, **kwargs: object) -> object:
            seen.append(name)
            return function(*args, **kwargs)  # type: ignore[operator]

        return noted

    def guided(transformer: nn.Module, latents: object, times: object, text: object, guidance: object = None) -> object:
        seen.append(f"step at {guidance}" if torch.is_grad_enabled() else "validation")
        return velocity(transformer, latents, times, text, guidance)  # type: ignore[arg-type]

    velocity = flow.predict_velocity
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("LORAGRAFT_CACHE", str(flux_cache))
        patch.setattr(flow, "predict_velocity", guided)
        patch.setattr(Flux1Encoders, "encode_text", noting("text", Flux1Encoders.encode_text))
        patch.setattr(Flux1Encoders, "encode_images", noting("images", Flux1Encoders.encode_images))
        patch.setattr(Flux1Encoders, "release_text", noting("release", Flux1Encoders.release_text))
        patch.setattr(Backbone, "onto_device", noting("device", Backbone.onto_device))
        given = ["--recipe", "marketing", "--cpu", "--out", "runs/tiny", *SMALL, f"weights.path={flux_folder}"]
        assert lora.main(given) == 0
    return seen


def test_encoders_have_the_device_before_the_transformer(events: list[str]) -> None:
    moved = events.index("device")
    assert events.index("release") < moved < events.index("validation") < events.index("step at 1.0")
    assert {"text", "images"} <= set(events[:moved]) and not {"text", "images"} & set(events[moved:])
    assert events.count("step at 1.0") == 2, "a training step saw another guidance, or none"


def test_the_run_has_its_own_resolution(events: list[str], at_place: Path) -> None:
    with Image.open("runs/tiny/samples/step_000002.png") as sheet:
        assert sheet.size == (4 * 64, 64)


def test_the_adapter_says_its_base_and_nothing_local(events: list[str], at_place: Path, flux_folder: Path) -> None:
    adapter = load_adapter(Path("runs/tiny/adapter"))
    about = adapter.metadata
    assert (about["base"], about["profile"]) == ("flux1-dev", "native")
    assert about["recipe"]["weights"]["path"] == flux_folder.name
    assert str(flux_folder.parent) not in json.dumps(about)
    assert any(bool(up.any()) for _, up in adapter.pairs.values()), "nothing was learned"
    assert not any(".norm" in path for path in adapter.pairs)


def test_generate_finds_the_weights_of_the_run(events: list[str], at_place: Path) -> None:
    assert cli.main(["generate", "--adapter", "runs/tiny", "--out", "drawn", "--compare", "--seed", "3"]) == 0
    with Image.open("drawn/0000.png") as image:
        about = json.loads(image.info["loragraft"])
        assert image.size == (64, 64)
    assert (about["base"], about["guidance"], about["true_guidance"], about["steps"]) == ("flux1-dev", 3.5, 1.0, 1)
    assert Path("drawn/before_after.png").exists()


def test_generate_on_schnell_takes_schnells_steps(events: list[str], at_place: Path, schnell_folder: Path) -> None:
    command = ["generate", "--adapter", "runs/tiny", "--base", "flux1-schnell", "--out", "fast", "--any-base"]
    assert cli.main(command) == 2, "schnell has no weights yet"
    assert cli.main([*command, "--weights", str(schnell_folder)]) == 0
    with Image.open("fast/0000.png") as image:
        about = json.loads(image.info["loragraft"])
    assert (about["base"], about["steps"]) == ("flux1-schnell", 4)


def test_a_negative_prompt_without_a_second_pass_is_refused(
    events: list[str], at_place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", "--adapter", "runs/tiny", "--negative-prompt", "blurry", "--steps", "1"]
    assert cli.main(command) == 2
    assert "true_guidance above 1" in capsys.readouterr().err
    assert cli.main([*command, "--true-guidance", "2"]) == 0


def test_schnell_is_not_trained(at_place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--recipe", "marketing", "--cpu", "base=flux1-schnell", "weights.random=true"]) == 2
    assert "Train on base=flux1-dev" in capsys.readouterr().err


def test_random_weights_and_a_path_exclude_each_other(at_place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--recipe", "marketing", "--random-weights", "base=flux1-dev", "weights.path=x/y"]) == 2
    assert "exclude each other" in capsys.readouterr().err
