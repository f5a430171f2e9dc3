"""What the benchmarks on `pocket` share: settings of a run, pictures that one draws and another finds, times taken alone."""

import argparse
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

from loragraft.adapters.checkpoint import Adapter
from loragraft.recipes.load import load_recipe


@pytest.fixture(scope="module")
def runs(benchmark_module: Callable[..., ModuleType]) -> ModuleType:
    return benchmark_module("pocket_runs")


@pytest.fixture
def args(tmp_path: Path) -> argparse.Namespace:
    return argparse.Namespace(work=tmp_path, images=2, threads=1, overrides=["train.steps=7"])


def test_every_benchmark_asks_for_the_same_run(
    runs: ModuleType, args: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(runs.subprocess, "run", lambda command, check: commands.append(command))
    runs.train_run(args, "design", "nf4")
    (command,) = commands
    folder = args.work / "runs" / "design" / "nf4"
    assert command[1].endswith("train/lora.py")
    assert command[command.index("--out") + 1] == str(folder) == str(runs.run_folder(args.work, "design", "nf4"))
    recipe = load_recipe("design", runs.settings_of(args, "nf4"))
    assert (recipe.numerics, recipe.train.steps, recipe.train.validate_every) == ("nf4", 7, runs.VALIDATE_EVERY)
    with pytest.raises(ValueError, match="numerics"):
        runs.train_run(args, "design", "int5")
    assert len(commands) == 1


def test_adapters_are_drawn_where_they_were_not_trained(
    runs: ModuleType, args: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe("marketing", ["data.count=20"])
    pairs = {"layer": (torch.ones(1, 2), torch.ones(2, 1))}
    monkeypatch.setattr(runs, "open_run", lambda run: (Adapter(run.name, {"base_id": f"{run.name}'s"}, pairs), recipe))
    monkeypatch.setattr(runs, "held_out", lambda recipe: [argparse.Namespace(caption="a heart")])
    monkeypatch.setattr(runs, "load_backbone", lambda base, on, *_: argparse.Namespace(base_id=f"{on}'s"))
    drawn: list[Any] = []
    monkeypatch.setattr(runs, "draw", lambda work, recipe, on, backbone, sets: drawn.extend(sets))
    runs.render_on(args, "marketing", "native", ["none", "native", "16bit"])
    bare, own, moved = drawn
    assert (bare.name, bare.adapter) == ("none", None)
    assert own.adapter.base_id == moved.adapter.base_id == "native's"
    assert moved.adapter.pairs is pairs
    assert (moved.prompts, moved.seed, moved.steps) == (bare.prompts, bare.seed, bare.steps)
    monkeypatch.setattr(runs, "held_out", lambda recipe: [])
    with pytest.raises(ValueError, match=r"raise data\.count"):
        runs.render_on(args, "marketing", "native", ["none"])


def test_pictures_are_found_by_what_they_show(
    runs: ModuleType, args: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def render_missing(backbone: object, sets: list[str], root: Path) -> dict[str, Path]:
        for name in sets:
            (root / "key" / name).mkdir(parents=True)
            Image.new("RGB", (2, 2)).save(root / "key" / name / "0000.png")
        return {name: root / "key" / name for name in sets}

    with pytest.raises(FileNotFoundError, match="run the stage `render` first"):
        runs.pictures(args, "marketing", "native", "none")
    monkeypatch.setattr(runs, "render_missing", render_missing)
    runs.draw(args.work, "marketing", "native", None, ["none"])
    with pytest.raises(ValueError, match="1 of 2 pictures"):
        runs.pictures(args, "marketing", "native", "none")
    args.images = 1
    assert runs.pictures(args, "marketing", "native", "none") == [args.work / "images" / "key" / "none" / "0000.png"]


def test_devices_come_from_the_summaries(runs: ModuleType, tmp_path: Path) -> None:
    for numerics, device in (("16bit", "H100"), ("native", "cpu"), ("nf4", "cpu")):
        folder = runs.run_folder(tmp_path, "marketing", numerics)
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text(json.dumps({"device": device}))
    assert runs.trained_on(tmp_path, "marketing", ["16bit", "native", "nf4"]) == ["H100", "cpu"]


def test_times_are_taken_one_after_the_other(runs: ModuleType, tmp_path: Path) -> None:
    inside, most = [0], [0]

    def measure() -> None:
        with runs.alone(tmp_path / "work"):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.02)
            inside[0] -= 1

    threads = [threading.Thread(target=measure) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most[0], inside[0]) == (1, 0)
