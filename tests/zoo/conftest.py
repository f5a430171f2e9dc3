"""Fixtures: a finished run without training, and places to publish it to."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import huggingface_hub
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from loragraft.adapters.checkpoint import load_adapter, write_adapter
from loragraft.evaluation.image_sets import adapter_hash

BASE_ID = "ab" * 32


def write_run(folder: Path, name: str = "marketing", seed: int = 0, *, score: bool = True, width: int = 96) -> Path:
    """The files that training, drawing and scoring leave, with two random pairs of rank 4; returns `folder`."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {
        f"transformer_blocks.0.attn.{path}": (
            torch.randn(4, width, generator=generator),
            torch.randn(width, 4, generator=generator),
        )
        for path in ("to_q", "to_k")
    }
    about = {
        "name": name,
        "base": "pocket",
        "base_id": BASE_ID,
        "profile": "native",
        "created": "2026-01-02T03:04:05+00:00",
        "recipe_hash": "cd" * 32,
        "data_fingerprint": "ef" * 32,
        "steps": 7,
        "recipe": {"data": {"domain": "marketing", "trigger": "promo tile"}, "sample": {"prompts": ["a promo tile"]}},
        "versions": {"loragraft": "0.1.0"},
    }
    file = write_adapter(pairs, folder / "adapter", about)
    settings = {
        "prompt": "promo tile: rocket",
        "steps": 2,
        "guidance": 3.0,
        "base_id": BASE_ID,
        "adapters": [{"name": name, "weight": 1.0}],
    }
    draw(folder / "images" / "0000.png", settings, seed)
    draw(folder / "images" / "0001.png", {**settings, "adapters": []}, seed)
    draw(folder / "samples" / "step_000007.png", {}, seed)
    if score:
        (folder / "score.json").write_text(json.dumps(score_of(adapter_hash(load_adapter(file)))))
    return folder


def draw(path: Path, settings: dict[str, Any], seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    info = PngInfo()
    if settings:
        info.add_text("loragraft", json.dumps(settings))
    Image.new("RGB", (8, 8), (255, seed, 0)).save(path, pnginfo=info)


def score_of(of: str) -> dict[str, Any]:
    """The part of a score.json that a zoo reads."""
    return {
        "adapter_hash": of,
        "images": 64,
        "references": 32,
        "split": "test",
        "seed": 1,
        "steps": 12,
        "guidance": 3.0,
        "rendered_on": ["cpu, x86_64, torch 2.13.0"],
        "device": "cpu, x86_64",
        "sets": {
            "base": {"kid_lite0": {"value": 0.24, "low": 0.22, "high": 0.26}, "fd_lite0": 229.0},
            "adapter": {"kid_lite0": {"value": 0.05, "low": 0.04, "high": 0.06}, "fd_lite0": 96.0},
        },
    }


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """(name, seed, ...) -> a finished run folder."""

    def make(name: str = "marketing", seed: int = 0, **options: Any) -> Path:
        return write_run(tmp_path / f"run-{name}-{seed}", name, seed, **options)

    return make


@pytest.fixture
def loopback_module(module_of: Callable[[Path, str], ModuleType]) -> ModuleType:
    return module_of(Path(__file__).with_name("loopback_hub.py"), "zoo_loopback_hub")


@pytest.fixture
def hub(loopback_module: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A Hub on this machine, and huggingface_hub pointed to it: as alice, with an empty cache, without waiting for retries."""
    for name, value in (
        ("HF_HUB_OFFLINE", False),
        ("HF_HUB_DISABLE_XET", True),
        ("HF_HUB_CACHE", str(tmp_path / "hub-cache")),
    ):
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    with loopback_module.LoopbackHub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", "hf_alice")
        yield server
