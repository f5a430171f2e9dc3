"""The whole line on tiny SD1.5 and SDXL: train, save, draw, load in the stock pipeline, and draw with SDXL-Turbo."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from safetensors import safe_open

from loragraft import cli
from loragraft.adapters.checkpoint import load_adapter
from loragraft.adapters.graft import graft, ungraft
from loragraft.backbones.load import load_backbone
from loragraft.backbones.sampler import build_pipeline, generate_from_text
from loragraft.backbones.spec import Backbone
from loragraft.recipes.schema import WeightsConfig
from loragraft.train import lora

SMALL = (
    "data.count=16", "data.resolution=64", "train.steps=3", "train.batch_size=2", "train.accumulation=1",
    "train.threads=1", "train.save_x=raw", "optim.warmup_steps=0", "sample.steps=1", "train.validate_every=0", "sample.prompts=[promo tile]",
    "data.long_captions=cut", "tracking.mode=disabled",
)  # fmt: skip
Folder = Callable[[str], Path]
Open = Callable[..., Backbone]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("user")


@pytest.fixture
def at_place(place: Path, monkeypatch: pytest.MonkeyPatch, quick_quantizer: None) -> Path:
    monkeypatch.chdir(place)
    monkeypatch.setenv("LORAGRAFT_CACHE", str(place / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return place


@pytest.fixture(scope="module")
def trained(place: Path, unet_folder: Folder, quick_quantizer: None) -> Callable[[str], Path]:
    """Name of a base -> the folder of a run on it, trained once."""
    runs: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in runs:
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(place)
                patch.setenv("LORAGRAFT_CACHE", str(place / "cache"))
                numerics = "16bit" if name == "sd15" else "native"
                given = [f"base={name}", f"numerics={numerics}", *SMALL, f"weights.path={unet_folder(name)}"]
                assert lora.main(["--recipe", "marketing", "--cpu", "--out", f"runs/{name}", *given]) == 0
            runs[name] = place / "runs" / name
        return runs[name]

    return run


@pytest.fixture(scope="module")
def opened(place: Path, unet_folder: Folder, quick_quantizer: None) -> Open:
    """(name, profile) -> the tiny base, drawing 64 px."""

    def load(name: str, profile: str = "native") -> Backbone:
        given = WeightsConfig(path=str(unet_folder(name)))
        backbone = load_backbone(name, profile, "cpu", place / "cache", given)  # type: ignore[arg-type]
        backbone.resolution = 64
        return backbone

    return load


def draw(backbone: Backbone, prompts: list[str], *, steps: int = 3, guidance: float = 2.0, **how: object) -> np.ndarray:
    family, encode = backbone.spec.family, backbone.encoders.encode_text
    pictures = generate_from_text(
        family, build_pipeline(family, backbone.transformer, backbone.encoders), encode(prompts), encode([""]),
        list(range(len(prompts))), resolution=64, steps=steps, guidance=guidance, **how,
    )  # fmt: skip
    return np.stack([np.asarray(picture, dtype=np.float64) for picture in pictures])


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_three_steps_teach_something(name: str, trained: Callable[[str], Path], unet_folder: Folder) -> None:
    run = trained(name)
    adapter = load_adapter(run / "adapter")
    assert adapter.component == "unet"
    assert (adapter.metadata["base"], adapter.metadata["profile"], adapter.metadata["steps"]) == (
        name,
        "16bit" if name == "sd15" else "native",
        3,
    )
    assert any(bool(up.any()) for _, up in adapter.pairs.values()), "nothing was learned"
    assert all(".transformer_blocks." in path for path in adapter.pairs)
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 3 and all(0 < loss < 10 for loss in losses)
    with Image.open(run / "samples" / "step_000003.png") as sheet:
        assert sheet.size == (4 * 64, 64)
    with safe_open(next((run / "adapter").glob("*.safetensors")), "pt") as file:
        assert all(key.startswith("unet.") for key in file.keys())  # noqa: SIM118
        assert all(key.startswith("unet.") for key in json.loads(file.metadata()["lora_adapter_metadata"]))


@pytest.mark.parametrize(("name", "stock"), [("sd15", StableDiffusionPipeline), ("sdxl", StableDiffusionXLPipeline)])
def test_the_stock_pipeline_loads_the_adapter(
    name: str, stock: type, trained: Callable[[str], Path], unet_folder: Folder, opened: Open
) -> None:
    """On the 16-bit base, diffusers' loader and our graft draw the same picture."""
    backbone, adapter = opened(name, "16bit"), load_adapter(trained(name) / "adapter")
    plain = draw(backbone, ["promo tile"])
    loud = {path: (down * 30, up * 30) for path, (down, up) in adapter.pairs.items()}
    graft(backbone.transformer, type(adapter)("loud", adapter.metadata, loud), any_base=True)
    ours = draw(backbone, ["promo tile"])
    ungraft(backbone.transformer, "loud")
    assert np.abs(ours - plain).mean() > 0.5, "the adapter does nothing to see"
    assert np.array_equal(draw(backbone, ["promo tile"]), plain)
    pipeline = stock.from_pretrained(unet_folder(name), dtype=torch.float32)
    pipeline.load_lora_weights(str(trained(name) / "adapter"))
    pipeline.set_adapters(pipeline.get_list_adapters()["unet"], 900.0)
    backbone.transformer = pipeline.unet
    assert np.abs(draw(backbone, ["promo tile"]) - ours).max() <= 1


@pytest.mark.parametrize("profile", ["16bit", "native"])
def test_an_adapter_of_sdxl_draws_on_turbo_unchanged(
    profile: str, trained: Callable[[str], Path], unet_folder: Folder, at_place: Path, opened: Open
) -> None:
    run = trained("sdxl")
    command = ["generate", "--adapter", str(run), "--base", "sdxl-turbo", "--weights", str(unet_folder("sdxl-turbo"))]
    command += ["--profile", profile]
    assert cli.main([*command, "--out", "refused"]) == 2, "it is another base, which must be said"
    assert cli.main([*command, "--out", "fast", "--any-base"]) == 0
    with Image.open("fast/0000.png") as image:
        about = json.loads(image.info["loragraft"])
        assert image.size == (64, 64)
    assert (about["base"], about["steps"], about["guidance"]) == ("sdxl-turbo", 4, 1.0)
    adapter, turbo = load_adapter(run / "adapter"), opened("sdxl-turbo", profile)
    before = turbo.fingerprint()
    graft(turbo.transformer, adapter, any_base=True)
    ungraft(turbo.transformer, adapter.name)
    assert turbo.fingerprint() == before


@pytest.mark.parametrize(
    ("name", "sibling"), [("sdxl-turbo", "base=sdxl,"), ("sd-turbo", "Stable Diffusion 2.1, is no base")]
)
def test_distilled_bases_are_not_trained(
    name: str, sibling: str, at_place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", "--recipe", "marketing", "--cpu", f"base={name}", "weights.random=true"]) == 2
    assert sibling in capsys.readouterr().err
