"""Class images for prior preservation: what the frozen base draws of the class, before any adapter is there.

    <cache root>/prior/<key>/0000.png ...      key = sha256(base id, profile, prompt, steps, guidance, seed)

Each image has a seed of its own and is written atomically, so an interrupted run draws only those that are missing, and
more of them later are only the additional ones. Source: Ruiz et al., "DreamBooth" (2023), section 3.2.
"""

import dataclasses
import hashlib
import json
from pathlib import Path

from tqdm.auto import tqdm

from loragraft.backbones.sampler import generate_images
from loragraft.backbones.spec import Backbone
from loragraft.data.images import png_bytes
from loragraft.data.sources import Sample
from loragraft.disk import write_atomic
from loragraft.recipes.schema import PriorConfig

DRAWN_TOGETHER = 8
"""Images between two writes: what a `kill -9` can lose."""


def prior_samples(config: PriorConfig, backbone: Backbone, cache_root: Path) -> list[Sample]:
    """`config.images` training samples of the class, captioned with its prompt; drawn where the cache lacks them."""
    folder = cache_root / "prior" / _key(config, backbone)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{i:04d}.png" for i in range(config.images)]
    missing = [i for i, file in enumerate(files) if not file.is_file()]
    with tqdm(total=len(missing), desc="drawing the class", unit="image", disable=not missing, leave=False) as bar:
        for start in range(0, len(missing), DRAWN_TOGETHER):
            chosen = missing[start : start + DRAWN_TOGETHER]
            images = generate_images(
                backbone,
                [config.prompt] * len(chosen),
                [config.seed + i for i in chosen],
                steps=config.steps,
                guidance=config.guidance,
                batch_size=DRAWN_TOGETHER,
            )
            for i, image in zip(chosen, images, strict=True):
                write_atomic(files[i], png_bytes(image))
            bar.update(len(chosen))
    backbone.replay.clear()  # training needs the memory
    return [
        Sample(image=file, caption=config.prompt, split="train", concept=config.prompt, licence="drawn by the base")
        for file in files
    ]


def _key(config: PriorConfig, backbone: Backbone) -> str:
    drawn = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("images", "weight")}
    canonical = json.dumps([backbone.base_id, backbone.profile, backbone.resolution, drawn], sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
