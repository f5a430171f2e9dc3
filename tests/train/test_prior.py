"""Prior preservation: class images drawn once by the base, half of every batch, weighted; and the recipe that uses it."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from loragraft import cli
from loragraft.backbones.flow import FLUX_LIKE, flow_loss
from loragraft.backbones.replay import Replay
from loragraft.recipes.load import RecipeError, load_recipe
from loragraft.recipes.schema import PriorConfig
from loragraft.train.batches import Batches
from loragraft.train.prior import prior_samples

BASE = SimpleNamespace(base_id="b" * 64, profile="native", resolution=16, replay=Replay())
EMPTY = {"prompt_embeds": torch.zeros(3, 5), "pooled_prompt_embeds": torch.zeros(5)}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Replaces the base by one whose image is its seed; records the seeds that were drawn."""
    seeds: list[int] = []

    def draw(backbone: object, prompts: list[str], asked: list[int], **options: object) -> list[Image.Image]:
        if 13 in asked and seeds.count(-1) == 0:
            seeds.append(-1)
            raise KeyboardInterrupt
        seeds.extend(asked)
        return [Image.new("RGB", (16, 16), (seed, 0, 0)) for seed in asked]

    monkeypatch.setattr("loragraft.train.prior.generate_images", draw)
    return seeds


def test_class_images_are_drawn_once_and_an_interruption_keeps_what_is_there(tmp_path: Path, drawn: list[int]) -> None:
    config = PriorConfig(prompt="mug icon", images=12, seed=3)
    with pytest.raises(KeyboardInterrupt):
        prior_samples(config, BASE, tmp_path)  # type: ignore[arg-type]
    samples = prior_samples(config, BASE, tmp_path)  # type: ignore[arg-type]
    assert drawn == [*range(3, 11), -1, *range(11, 15)]
    assert [Image.open(s.image).getpixel((0, 0))[0] for s in samples] == list(range(3, 15))  # type: ignore[index]
    assert {(s.caption, s.split) for s in samples} == {("mug icon", "train")}
    more = PriorConfig(prompt="mug icon", images=14, seed=3, weight=0.5)
    assert [s.image for s in prior_samples(more, BASE, tmp_path)][:12] == [s.image for s in samples]  # type: ignore[arg-type]
    assert drawn[-2:] == [15, 16]
    other = SimpleNamespace(base_id="c" * 64, profile="native", resolution=16, replay=Replay())
    assert prior_samples(config, other, tmp_path)[0].image != samples[0].image  # type: ignore[arg-type]


class Dataset:
    """Samples whose latents are all one number."""

    def __init__(self, *values: float) -> None:
        self.values = values
        self.shapes = [(4, 4) for _ in values]

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.item(index, 0)

    def item(self, index: int, epoch: int) -> dict[str, torch.Tensor]:
        return {"latents": torch.full((2, 4, 4), self.values[index]), **EMPTY}


def _batches(batch_size: int, rank: int = 0, world: int = 1) -> Batches:
    recipe = load_recipe("personal", [f"train.batch_size={batch_size}", "data.prior.weight=0.25"])
    spec = SimpleNamespace(family=FLUX_LIKE)
    backbone: Any = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32, spec=spec)
    accelerator: Any = SimpleNamespace(process_index=rank, num_processes=world)
    return Batches(Dataset(0, 1, 2, 3, 4), EMPTY, recipe, backbone, accelerator, Dataset(100, 101, 102))  # type: ignore[arg-type]


@pytest.mark.parametrize("batch_size", [2, 5, 8])
def test_half_of_a_batch_shows_the_class_at_its_weight(batch_size: int) -> None:
    batches = _batches(batch_size)
    seen: list[float] = []
    for step in range(15):
        values = next(batches(step))[0].mean((1, 2, 3))
        assert batches.weights is not None
        assert torch.equal(values >= 100, batches.weights == 0.25)
        assert int((values >= 100).sum()) == batch_size // 2
        seen += values.tolist()
    assert set(seen) == {0, 1, 2, 3, 4, 100, 101, 102}


def test_two_processes_share_the_batch_of_one() -> None:
    whole = _batches(8)
    parts = [_batches(4, rank, 2) for rank in (0, 1)]
    expected = next(whole(3))[0]
    found = [next(part(3))[0] for part in parts]
    assert torch.equal(torch.stack(found, dim=1).flatten(0, 1), expected)
    assert whole.weights is not None and parts[0].weights is not None and parts[1].weights is not None
    assert torch.equal(torch.stack([p.weights for p in parts], dim=1).flatten(), whole.weights)  # type: ignore[misc]


def test_weights_scale_each_sample_of_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loragraft.backbones.flow.predict_velocity", lambda model, x, *_: torch.zeros_like(x))
    latents = torch.stack([torch.full((2, 4, 4), 1.0), torch.full((2, 4, 4), 3.0)])
    noise, times = torch.zeros_like(latents), torch.zeros(2)

    def loss(weights: torch.Tensor | None) -> float:
        return float(flow_loss(torch.nn.Identity(), latents, noise, times, {}, weights))

    assert loss(None) == loss(torch.ones(2)) == 5.0
    assert loss(torch.tensor([1.0, 0.5])) == pytest.approx((1 + 0.5 * 9) / 2)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i in range(5):
        Image.effect_mandelbrot((40, 40), (-2 + i / 8, -1.5, 1 + i / 8, 1.5), 20 + 9 * i).convert("RGB").save(
            folder / f"IMG_{i:04d}.png"
        )
    return folder


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], r"images of your own: .*\n.*data\.folder=\./photos data\.trigger=.* data\.prior\.prompt="),
        (["data.folder=PHOTOS"], r"data\.prior\.prompt is empty: say what kind of thing"),
        (["data.folder=PHOTOS/nowhere", "data.prior.prompt=mug icon"], "does not exist"),
    ],
)
def test_what_is_missing_is_said_before_a_run_folder_is_made(
    overrides: list[str], message: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    given = [override.replace("PHOTOS", str(photos)) for override in overrides]
    assert cli.main(["train", "--recipe", "personal", *given]) != 0
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "runs").exists()


def test_a_batch_of_one_cannot_hold_both() -> None:
    with pytest.raises(RecipeError, match=r"train\.batch_size must be at least 2 with data\.prior\.images"):
        load_recipe("personal", ["train.batch_size=1"])


def test_the_personal_recipe_trains(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORAGRAFT_CACHE", str(tmp_path / "cache"))
    small = ["train.steps=2", "train.batch_size=2", "train.threads=1", "data.prior.images=2", "data.prior.steps=2"]
    mine = [f"data.folder={photos}", "data.trigger=sks mug", "data.prior.prompt=mug icon", "sample.steps=2"]
    assert cli.main(["train", "--recipe", "personal", "--cpu", "tracking.mode=disabled", *mine, *small]) == 0
    assert len(list((tmp_path / "cache" / "prior").glob("*/*.png"))) == 2
    assert json.loads((tmp_path / "runs" / "personal" / "summary.json").read_text())["steps"] == 2
    stored = load_recipe(str(tmp_path / "runs" / "personal" / "recipe.yaml"))
    assert stored.data.prior == PriorConfig(prompt="mug icon", images=2, steps=2)
    assert stored.data.caption == "sks mug"
    assert stored.sample.prompts[0] == "sks mug"
