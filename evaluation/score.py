"""How far an adapter moved the base into its domain: kernel distance to held-out domain images, before and after.

For N held-out captions, one image each from the base and from base + adapter at the same seeds; both sets are
compared with the held-out images by `kernel_distance` on Lite0 features. Lower is nearer; the distance between two
halves of the held-out images ("floor") is what even a perfect adapter would show.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image

from loragraft.adapters.checkpoint import Adapter
from loragraft.backbones.spec import Backbone
from loragraft.evaluation.features import lite0_features, load_lite0
from loragraft.evaluation.generate import Settings, render
from loragraft.evaluation.metrics import Interval, kernel_distance, kernel_distance_interval
from loragraft.recipes.schema import EvalConfig


@dataclass(frozen=True)
class Score:
    """`kid_lite0_*`: kernel distance on EfficientNet-Lite0 features, not comparable with Inception KID."""

    adapter: str
    split: str
    images: int
    references: int
    steps: int
    seed: int
    kid_lite0_base: Interval
    kid_lite0_adapter: Interval
    kid_lite0_floor: float

    @property
    def improvement(self) -> float:
        """Share of the base's distance that the adapter removed, 1 = all of it."""
        return 1 - self.kid_lite0_adapter.value / self.kid_lite0_base.value

    def to_dict(self) -> dict[str, object]:
        return {**asdict(self), "improvement": self.improvement}

    def table(self) -> str:
        """Markdown."""
        rows = [
            f"| KID (Lite0 features), N = {self.images} against {self.references} held-out images | value | 95 % interval |",
            "|---|---|---|",
        ]
        for label, entry in (("base", self.kid_lite0_base), (f"base + {self.adapter}", self.kid_lite0_adapter)):
            rows.append(f"| {label} | {entry.value:.4f} | {entry.low:.4f} to {entry.high:.4f} |")
        rows.append(f"| floor: two halves of the held-out images | {self.kid_lite0_floor:.4f} | |")
        return "\n".join(rows)


def score_adapter(
    backbone: Backbone, adapter: Adapter, references: Sequence[tuple[Path, str]], config: EvalConfig
) -> Score:
    """`references`: held-out (image, caption) pairs. Raises ValueError with fewer than four of them."""
    if len(references) < 4:
        raise ValueError(
            f"a score needs at least 4 held-out images, and the {config.split} split has {len(references)}"
        )
    settings = [
        Settings(
            prompt=references[i % len(references)][1],
            seed=config.seed + i,
            steps=config.steps,
            guidance=config.guidance,
        )
        for i in range(config.images)
    ]
    pictures = []
    for path, _ in references:
        with Image.open(path) as image:
            pictures.append(image.convert("RGB"))
    network = load_lite0(backbone.device)
    real = lite0_features(network, pictures)
    base = lite0_features(network, render(backbone, [], settings))
    moved = lite0_features(network, render(backbone, [(adapter, 1.0)], settings))
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(config.seed))
    half = len(real) // 2
    return Score(
        adapter=adapter.name,
        split=config.split,
        images=len(settings),
        references=len(references),
        steps=config.steps,
        seed=config.seed,
        kid_lite0_base=kernel_distance_interval(base, real),
        kid_lite0_adapter=kernel_distance_interval(moved, real),
        kid_lite0_floor=kernel_distance(real[order[:half]], real[order[half:]]),
    )
