"""Sets of generated images on disk: described, keyed, rendered where they are missing.

    <root>/<key>/<name>/0000.png, 0001.png, ...        key = 16 hex digits over everything that an image depends on

Image i has prompt `prompts[i % len(prompts)]` and seed `seed + i`, so the first N images of a larger set are the set of N.
The key leaves out the number of images and the device: a set may be begun on one machine, copied, and finished or
measured on another. Every file is written under a temporary name and renamed: a killed process loses the batch in flight.
"""

import hashlib
import json
import platform
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from loragraft.adapters.checkpoint import Adapter
from loragraft.adapters.switching import using
from loragraft.backbones.spec import Backbone
from loragraft.disk import write_atomic
from loragraft.evaluation.generate import Settings, encode_png, render
from loragraft.quantization.checkpoint import base_id

BATCH = {"cpu": 16, "cuda": 64}
"""Images per batch; also what a killed process loses at most."""


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """One set to draw: `count` images, with one adapter grafted or none."""

    name: str
    prompts: tuple[str, ...]
    count: int
    seed: int
    steps: int
    guidance: float
    adapter: Adapter | None = None
    weight: float = 1.0

    def settings(self, index: int) -> Settings:
        """Prompt, seed, steps and guidance of image `index`."""
        prompt = self.prompts[index % len(self.prompts)]
        return Settings(prompt=prompt, seed=self.seed + index, steps=self.steps, guidance=self.guidance)

    def folder(self, root: Path, backbone: Backbone) -> Path:
        """Where the images lie."""
        described = {
            "prompts": self.prompts,
            "seed": self.seed,
            "steps": self.steps,
            "guidance": self.guidance,
            "adapter": adapter_hash(self.adapter) if self.adapter else None,
            "weight": self.weight if self.adapter else None,
            "base_id": backbone.base_id,
            "profile": backbone.profile,
            "encoders": backbone.encoders.id,
            "resolution": backbone.resolution,
        }
        return root / hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16] / self.name


def adapter_hash(adapter: Adapter) -> str:
    """sha256 (hex) over paths, dtypes, shapes and bytes of the factors; file names and metadata do not matter."""
    return base_id({f"{path}.{k}": pair[k] for path, pair in adapter.pairs.items() for k in (0, 1)})


def present(folder: Path, count: int) -> list[Path]:
    """The images 0, 1, 2, ... of a set, up to `count` or to the first that is missing."""
    found = []
    for index in range(count):
        path = folder / f"{index:04d}.png"
        if not path.exists():
            break
        found.append(path)
    return found


def render_missing(backbone: Backbone, wanted: Sequence[ImageSet], root: Path) -> dict[str, Path]:
    """Draws what is not there yet; returns set name -> folder. Raises ValueError for an adapter of another base."""
    folders = {entry.name: entry.folder(root, backbone) for entry in wanted}
    if len(folders) != len(wanted):
        raise ValueError(f"two image sets have one name: {', '.join(entry.name for entry in wanted)}")
    missing = {
        entry.name: [i for i in range(entry.count) if not (folders[entry.name] / f"{i:04d}.png").exists()]
        for entry in wanted
    }
    if backbone.device.type == "cuda" and any(missing.values()):
        _compile(backbone, wanted)
    share = min(1, 128**2 / backbone.resolution**2)  # `BATCH` is of small images; of large ones each takes long
    batch = max(16, int(BATCH.get(backbone.device.type, 16) * share))
    with tqdm(total=sum(map(len, missing.values())), desc="rendering", unit="image") as bar:
        for entry in wanted:
            indices, folder = missing[entry.name], folders[entry.name]
            folder.mkdir(parents=True, exist_ok=True)
            bar.set_postfix_str(entry.name)
            grafts = [(entry.adapter, entry.weight)] if entry.adapter else []
            with using(backbone.transformer, grafts if indices else []):
                for start in range(0, len(indices), batch):
                    chunk = indices[start : start + batch]
                    settings = [entry.settings(i) for i in chunk]
                    images = render(backbone, [], settings, batch_size=batch)
                    _write(folder, backbone, grafts, zip(chunk, images, settings, strict=True))
                    bar.update(len(chunk))
    return folders


def _write(
    folder: Path,
    backbone: Backbone,
    adapters: Sequence[tuple[Adapter, float]],
    drawn: Iterable[tuple[int, Image.Image, Settings]],
) -> None:
    extra = {"device": device_name(backbone.device), "torch": torch.__version__}
    for i, image, setting in drawn:
        write_atomic(folder / f"{i:04d}.png", encode_png(image, setting, backbone, adapters, extra))


def _compile(backbone: Backbone, wanted: Sequence[ImageSet]) -> None:
    """Where all of the sets, drawn already or not, repay it: a set that is finished later is finished as it was begun."""
    from loragraft.backbones.compiled import compile_to_draw

    first = wanted[0]
    compile_to_draw(backbone, sum(s.count for s in wanted), first.steps, backbone.spec.guided(first.guidance))


def seconds_per_image(backbone: Backbone, entry: ImageSet) -> float:
    """Of a whole batch of the set's first images, encoders included; another one of the same size goes first."""
    count = min(entry.count, BATCH[backbone.device.type])
    grafts = [(entry.adapter, entry.weight)] if entry.adapter else []
    settings = [entry.settings(index) for index in range(count)]
    with using(backbone.transformer, grafts):
        for _ in range(2):
            began = time.perf_counter()
            render(backbone, [], settings, batch_size=count)
            seconds = time.perf_counter() - began
    return seconds / count


def device_name(device: torch.device) -> str:
    """The accelerator's name, or the machine type of a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {platform.machine()}"


def read_images(paths: Sequence[Path]) -> list[Image.Image]:
    """RGB pictures. Raises ValueError naming a file that cannot be decoded to its end."""
    pictures = []
    for path in paths:
        try:
            with Image.open(path) as image:
                pictures.append(image.convert("RGB"))
        except (OSError, SyntaxError, ValueError) as error:  # what PIL's decoders raise
            raise ValueError(f"{path} is not a readable image ({error}); delete it and score again") from error
    return pictures


def rendered_on(paths: Sequence[Path]) -> list[str]:
    """The devices and torch versions that drew these files, from their own text chunks."""
    found = set()
    for path in paths:
        with Image.open(path) as image:
            about: dict[str, Any] = json.loads(image.info.get("loragraft", "{}"))
            found.add(f"{about.get('device', 'unknown')}, torch {about.get('torch', 'unknown')}")
    return sorted(found)
