"""A backbone that draws coloured squares: what is tested is what happens around the drawing."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from loragraft.adapters.checkpoint import Adapter
from loragraft.evaluation.generate import Settings

EDGE = 32


def make_adapter(name: str, seed: int = 0, base_id: str = "b" * 64) -> Adapter:
    """Two layers of rank 2, random."""
    generator = torch.Generator().manual_seed(seed)

    def pair(k: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(2, k, generator=generator), torch.randn(n, 2, generator=generator)

    return Adapter(name, {"base": "squares", "base_id": base_id}, {"one": pair(6, 4), "two": pair(5, 3)})


@dataclass
class Studio:
    """Stands in for `generate.render`: remembers what it drew; `fail_after` images it dies, as a killed process would."""

    drawn: list[tuple[str, int]] = field(default_factory=list)
    fail_after: int = 10**9
    used: Sequence[tuple[Adapter, float]] = ()

    @contextmanager
    def using(
        self, transformer: Any, adapters: Sequence[tuple[Adapter, float]], *, any_base: bool = False
    ) -> Iterator[None]:
        """Stands in for `switching.using`."""
        self.used = adapters
        yield
        self.used = ()

    def __call__(
        self,
        backbone: Any,
        adapters: Sequence[tuple[Adapter, float]],
        settings: Sequence[Settings],
        *,
        batch_size: int = 16,
    ) -> list[Image.Image]:
        pictures = []
        for entry in settings:
            if len(self.drawn) >= self.fail_after:
                raise KeyboardInterrupt
            self.drawn.append((entry.prompt, entry.seed))
            strength = sum(
                float(up.abs().sum()) * weight for a, weight in (*self.used, *adapters) for _, up in a.pairs.values()
            )
            digest = hashlib.sha256(f"{entry.prompt}/{entry.seed}/{strength:.4f}".encode()).digest()
            pixels = np.frombuffer(digest * (EDGE * EDGE * 3 // 32), np.uint8).reshape(EDGE, EDGE, 3)
            pictures.append(Image.fromarray(pixels.copy()))
        return pictures


@pytest.fixture
def studio(monkeypatch: pytest.MonkeyPatch) -> Studio:
    made = Studio()
    monkeypatch.setattr("loragraft.evaluation.image_sets.render", made)
    for module in ("image_sets", "prompt_file"):
        monkeypatch.setattr(f"loragraft.evaluation.{module}.using", made.using)
    return made


@pytest.fixture
def backbone() -> Any:
    """Only what describes the pixels."""
    return SimpleNamespace(
        transformer=None,
        spec=SimpleNamespace(name="squares"),
        resolution=EDGE,
        base_id="b" * 64,
        profile="native",
        encoders=SimpleNamespace(id="enc-1"),
        device=torch.device("cpu"),
    )
