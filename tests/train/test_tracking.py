"""What Weights & Biases refuses is a sentence."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb

from loragraft.recipes.load import load_recipe
from loragraft.train import tracking


class Refused:
    """A tracker whose run W&B does not open."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def start(self) -> None:
        raise wandb.Error("permission denied")


def test_a_run_that_is_not_opened_says_why_and_what_needs_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "WandBTracker", Refused)
    folder: Any = SimpleNamespace(recipe_hash="a", path=tmp_path)
    accelerator: Any = SimpleNamespace(is_main_process=True)
    base: Any = None
    with pytest.raises(
        ValueError, match=r"tracking.mode=online: .*permission denied.*tracking.mode=offline needs neither"
    ):
        tracking.Tracking.start(load_recipe("marketing", ["tracking.mode=online"]), base, folder, accelerator)


@pytest.mark.parametrize(
    ("name", "artifact"),
    [("marketing", "marketing-adapter"), ("my style+2", "my-style-2-adapter"), ("Лето", "lora-adapter")],
)
def test_every_name_of_a_recipe_gives_an_artifact(tmp_path: Path, name: str, artifact: str) -> None:
    logged: list[wandb.Artifact] = []
    tracker: Any = SimpleNamespace(run=SimpleNamespace(log_artifact=logged.append))
    (tmp_path / "adapter.safetensors").write_bytes(b"x")
    tracking.Tracking(tracker, name).log_adapter(tmp_path / "adapter.safetensors")
    assert [(made.name, made.description) for made in logged] == [(artifact, name)]
