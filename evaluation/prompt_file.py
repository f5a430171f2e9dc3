"""Many images from a list of prompts with names and seeds, such as `loragraft prompts mjhq --from DIR` prints; resumable.

    OUT/<name>.png          each under a temporary name first: a killed run loses one batch, and the same command goes on
    OUT/<name>.png says     prompt, seed, steps, guidance, base, adapters, as every image of ours; `loragraft measure` reads it

Time is the median over batches after the first of seconds per image, encoders and decoder included; memory is torch's own count.
"""

import json
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from loragraft.adapters.checkpoint import Adapter
from loragraft.adapters.switching import using
from loragraft.backbones.spec import Backbone
from loragraft.disk import write_atomic
from loragraft.evaluation.generate import Settings, encode_png, render

GIB = 2**30
EXAMPLE = '{"name": "a", "prompt": "a red bicycle", "seed": 0}'
"""One line of a prompt file."""


@dataclass(frozen=True, slots=True)
class Line:
    """One image to draw."""

    name: str
    prompt: str
    seed: int


@dataclass(frozen=True, slots=True)
class Cost:
    """What drawing took; None = not measured."""

    drawn: int
    seconds_per_image: float | None
    peak_gib: float | None

    @property
    def as_row(self) -> str:
        """Ready for `loragraft measure --row`."""
        found = {"seconds_per_image": self.seconds_per_image, "peak_gib": self.peak_gib}
        return " ".join(f"{key}={value:.3f}" for key, value in found.items() if value is not None)


def read_lines(path: Path) -> list[Line]:
    """JSON lines with `name`, `prompt` and `seed`. Raises ValueError naming the line, and for names that are no file names."""
    found: dict[str, Line] = {}
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            entry = json.loads(text)
            line = Line(str(entry["name"]), str(entry["prompt"]), int(entry["seed"]))
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            why = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(
                f"{path}:{number} must be an object with name, prompt and seed, such as {EXAMPLE} ({why})"
            ) from error
        if not re.fullmatch(r"\w[\w.-]*", line.name):
            raise ValueError(f"{path}:{number}: the name {line.name!r} cannot name a file; use letters, digits, _ . -")
        if line.name in found:
            raise ValueError(f"{path}:{number}: the name {line.name!r} comes twice")
        found[line.name] = line
    if not found:
        raise ValueError(f"{path} holds no prompt")
    return list(found.values())


def draw_lines(
    backbone: Backbone,
    adapters: Sequence[tuple[Adapter, float]],
    lines: Sequence[Line],
    settings: Settings,
    out: Path,
    *,
    any_base: bool = False,
    batch: int = 8,
) -> Cost:
    """Draws what is missing in `out`, `settings` giving all but prompt and seed.

    Raises ValueError where an image is there that was drawn otherwise: two settings in one folder would be measured as one.
    """
    out.mkdir(parents=True, exist_ok=True)
    missing = []
    for line in lines:
        path = out / f"{line.name}.png"
        if path.exists():
            _check_same(path, replace(settings, prompt=line.prompt, seed=line.seed), backbone, adapters)
        else:
            missing.append(line)
    on_gpu = backbone.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(backbone.device)
    seconds: list[float] = []
    with (
        using(backbone.transformer, adapters if missing else [], any_base=any_base),
        tqdm(total=len(missing), desc="rendering", unit="image") as bar,
    ):
        for start in range(0, len(missing), batch):
            wanted = [replace(settings, prompt=line.prompt, seed=line.seed) for line in missing[start : start + batch]]
            began = time.perf_counter()
            images = render(backbone, [], wanted, batch_size=batch)
            seconds.append((time.perf_counter() - began) / len(images))
            for line, image, own in zip(missing[start : start + batch], images, wanted, strict=True):
                write_atomic(out / f"{line.name}.png", encode_png(image, own, backbone, adapters))
            bar.update(len(images))
    peak = torch.cuda.max_memory_allocated(backbone.device) / GIB if on_gpu and missing else None
    return Cost(len(missing), statistics.median(seconds[1:]) if len(seconds) > 1 else None, peak)


def _check_same(path: Path, wanted: Settings, backbone: Backbone, adapters: Sequence[tuple[Adapter, float]]) -> None:
    with Image.open(path) as image:
        about = json.loads(image.info.get("loragraft", "{}"))
        size = image.size
    expected = {
        **asdict(wanted),
        "base_id": backbone.base_id,
        "profile": backbone.profile,
        "adapters": [{"name": adapter.name, "weight": weight} for adapter, weight in adapters],
    }
    other = [key for key, value in expected.items() if about.get(key) != value]
    if size != (backbone.resolution, backbone.resolution):
        other.append("resolution")
    if other:
        raise ValueError(f"{path} was drawn with another {', '.join(other)}; give another --out")
