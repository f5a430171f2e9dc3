"""Early stop: counts as said, saves the best adapter, and resumes to the same one, bit for bit."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from loragraft import cli
from loragraft.recipes.load import RecipeError, load_recipe
from loragraft.train.early_stop import EarlyStop

LOSSES = [5.0, 4.0, 3.0, 3.5, 3.2, 2.0, 1.0]
"""After each step; with patience 2 the run ends at step 5 and keeps step 3."""


def test_counts_and_keeps_the_best() -> None:
    early, parameter = EarlyStop(2), nn.Parameter(torch.zeros(2))
    for step, loss in enumerate(LOSSES, start=1):
        assert not early.exhausted
        with torch.no_grad():
            parameter.fill_(step)
        early.observe(loss, step, [parameter])
        if early.exhausted:
            break
    assert (step, early.best_step, early.best_loss) == (5, 3, 3.0)
    early.restore([parameter])
    assert parameter.tolist() == [3.0, 3.0]
    again = EarlyStop(2)
    again.load(early.state())
    assert again == early


def test_a_tie_is_no_improvement_and_nan_is_none() -> None:
    early, parameter = EarlyStop(2), nn.Parameter(torch.zeros(1))
    for step, loss in enumerate([1.0, 1.0, float("nan")], start=1):
        early.observe(loss, step, [parameter])
    assert early.exhausted
    assert early.best_step == 1


def test_without_patience_nothing_is_kept() -> None:
    early, parameter = EarlyStop(0), nn.Parameter(torch.ones(1))
    for step, loss in enumerate([1.0, 2.0, 3.0]):
        early.observe(loss, step, [parameter])
    assert not early.exhausted
    assert early.best == []
    early.restore([parameter])
    assert parameter.tolist() == [1.0]


def test_patience_needs_validations() -> None:
    with pytest.raises(RecipeError, match=r"train\.patience counts validations, and train\.validate_every is 0"):
        load_recipe("marketing", ["train.patience=2", "train.validate_every=0"])


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i in range(6):
        Image.new("RGB", (24, 24), (40 * i, 200 - 30 * i, 90)).save(folder / f"thing {'abcdef'[i]}.png")
    return folder


def _train(photos: Path, out: str, *overrides: str) -> int:
    recipe = ["extends: _base", f"data: {{folder: '{photos}', test_fraction: 0.0}}", "sample: {prompts: [x], steps: 1}"]
    Path("mine.yaml").write_text("\n".join(recipe))
    options = ["train.steps=20", "train.batch_size=2", "train.validate_every=1", "train.checkpoint_every=1"]
    options += [
        "train.threads=1",
        "data.resolution=64",
        "optim.schedule=constant",
        "optim.warmup_steps=1",
        "tracking.mode=disabled",
    ]
    return cli.main(["train", "--recipe", "./mine.yaml", "--cpu", "--out", out, *options, *overrides])


def test_stopped_and_resumed_equal_a_run_that_ends_at_the_best_step(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORAGRAFT_CACHE", str(tmp_path / "cache"))
    current, dying = Path("whole"), [0]

    def scripted(*args: object) -> float:
        metrics = current / "metrics.jsonl"
        step = len(metrics.read_text().splitlines()) + 1 if metrics.exists() else 0
        if step == dying[0] > 0:
            dying[0] = 0
            raise KeyboardInterrupt
        return LOSSES[max(step - 1, 0)]

    with monkeypatch.context() as patch:
        patch.setattr("loragraft.train.loop.validation_loss", scripted)
        assert _train(photos, "whole", "train.patience=2") == 0
        current, dying = Path("broken"), [5]  # while the step that ends the run is being validated
        assert _train(photos, "broken", "train.patience=2") == 130
        assert not (tmp_path / "broken" / "summary.json").exists()
        assert _train(photos, "broken", "train.patience=2") == 0
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert (summary["steps"], summary["best_step"], summary["stopped_early"]) == (5, 3, True)
    assert summary["validation_loss_end"] == 3.0
    assert _train(photos, "short", "train.steps=3") == 0
    tensors = [
        load_file(tmp_path / run / "adapter" / "pytorch_lora_weights.safetensors")
        for run in ("whole", "broken", "short")
    ]
    for name, expected in tensors[2].items():
        assert torch.equal(tensors[0][name], expected)
        assert torch.equal(tensors[1][name], expected)


def test_patience_without_a_validation_split_is_an_error(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORAGRAFT_CACHE", str(tmp_path / "cache"))
    assert _train(photos, "run", "train.patience=2", "data.validation_fraction=0") != 0
    assert "train.patience needs held-out images" in capsys.readouterr().err
