"""Numbers from images that lie on disk: which statistic of which set, with interval, floor and chance level.

Substitutes do not carry the standard names: `kid_lite0` and `fd_lite0` are the KID and FID formulas on EfficientNet-Lite0
features, `retrieval_minilm_lite0_r5` is recall at 5 between caption and image in the space of `retrieval.py`. None is
comparable with published KID, FID or CLIP figures; they compare sets of one score with one another.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from loragraft.data.images import load_pixels
from loragraft.evaluation.controls import derangement
from loragraft.evaluation.features import FeatureStore
from loragraft.evaluation.image_sets import read_images
from loragraft.evaluation.metrics import (
    chance_at_k,
    frechet_distance,
    kernel_distance_change,
    kernel_distance_interval,
    kernel_distance_paired,
    mean_interval,
    psnr,
    recall_at_k,
    share_interval,
    ssim,
)
from loragraft.evaluation.perceptual import STLPIPS
from loragraft.evaluation.retrieval import Towers

RECALL_AT = 5
MEMORY_QUANTILE = 0.99
GENERATED = "generated"
"""How `FeatureStore` calls images that are read as they are."""


@dataclass(frozen=True)
class Gallery:
    """Captions of images 0..G-1 in the shared space, and which image answers which caption."""

    text_GD: Tensor
    relevant_GG: Tensor
    """[i, j]: image j was asked for by the text of caption i."""

    @property
    def size(self) -> int:
        return len(self.text_GD)

    @property
    def chance(self) -> float:
        """Recall of a random order."""
        return chance_at_k(self.relevant_GG, RECALL_AT)


def gallery_of(captions: Sequence[str], text_GD: Tensor) -> Gallery:
    """Equal captions answer one another."""
    number = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
    label = torch.tensor([number[caption] for caption in captions])
    return Gallery(text_GD, label[:, None] == label[None, :])


def hits(gallery: Gallery, towers: Towers, features_N: Tensor, captions: Tensor | None = None) -> dict[str, Tensor]:
    """Per caption and per image, 1.0 where the partner is among the five most similar; `captions` permutes the texts."""
    text = gallery.text_GD if captions is None else gallery.text_GD[captions]
    similarity = text @ towers.embed_images(features_N[: gallery.size]).T
    return {
        "retrieval_minilm_lite0_r5": recall_at_k(similarity, gallery.relevant_GG, RECALL_AT),
        "retrieval_minilm_lite0_r5_image_to_text": recall_at_k(similarity.T, gallery.relevant_GG, RECALL_AT),
    }


def measure_set(features_N: Tensor, real_MD: Tensor, found: Mapping[str, Tensor]) -> dict[str, Any]:
    """KID and FD to the held-out images, and recall from `hits`."""
    return {
        "images": len(features_N),
        "kid_lite0": asdict(kernel_distance_interval(features_N, real_MD)),
        "fd_lite0": frechet_distance(features_N, real_MD),
        **{name: asdict(share_interval(values)) for name, values in found.items()},
    }


def floors(real_MD: Tensor, found: Mapping[str, Tensor], seed: int) -> dict[str, Any]:
    """What real images score: one half against the other, and their own retrieval."""
    order = torch.randperm(len(real_MD), generator=torch.Generator().manual_seed(seed))
    one, other = real_MD[order[: len(order) // 2]], real_MD[order[len(order) // 2 :]]
    return {"halves": [len(one), len(other)], **measure_set(one, other, found)}


def compare(
    before_ND: Tensor, after_ND: Tensor, real_MD: Tensor, found_before: Mapping[str, Tensor], found_after: Mapping[str, Tensor]
) -> dict[str, Any]:  # fmt: skip
    """Changes from one set to another, image by image at equal prompts and seeds."""
    return {
        "kid_lite0": asdict(kernel_distance_change(before_ND, after_ND, real_MD)),
        **{name: asdict(mean_interval(found_after[name] - found_before[name])) for name in found_before},
    }


def paired(
    before: Sequence[Path], after: Sequence[Path], device: torch.device | str, batch: int = 16
) -> dict[str, Tensor]:
    """Per pair of files: `psnr_db`, `ssim`, `st_lpips`. Raises ValueError for sets of different sizes."""
    if len(before) != len(after):
        raise ValueError(f"pairs need two sets of one size, got {len(before)} and {len(after)} images")
    network = STLPIPS(device)
    rows: dict[str, list[Tensor]] = {"psnr_db": [], "ssim": [], "st_lpips": []}
    for start in range(0, len(before), batch):
        a, b = (as_tensor(read_images(paths[start : start + batch])) for paths in (before, after))
        rows["psnr_db"].append(psnr(a, b))
        rows["ssim"].append(ssim(a, b))
        rows["st_lpips"].append(network(a, b).double())
    return {name: torch.cat(parts) for name, parts in rows.items()}


def measure_pairs(before: Sequence[Path], after: Sequence[Path], store: FeatureStore) -> dict[str, Any]:
    """`paired` with intervals, and KID between the two sets.

    Equal images have infinite PSNR: the mean is then over the others, and `identical` counts them.
    """
    values = paired(before, after, store.device)
    finite = torch.isfinite(values["psnr_db"])
    a, b = (store.of(paths, read_image, GENERATED) for paths in (before, after))
    return {
        "images": len(before),
        "identical": int((~finite).sum()),
        "psnr_db": asdict(mean_interval(values["psnr_db"][finite])) if finite.any() else None,
        "ssim": asdict(mean_interval(values["ssim"])),
        "st_lpips": asdict(mean_interval(values["st_lpips"])),
        "kid_lite0": asdict(kernel_distance_paired(a, b)),
    }


def shuffled(gallery: Gallery, towers: Towers, features_N: Tensor, seed: int) -> dict[str, Any]:
    """Recall when every image is said to show another caption: what the metric gives to a good-looking wrong answer."""
    found = hits(gallery, towers, features_N, derangement(gallery.size, seed))
    return {name: asdict(share_interval(values)) for name, values in found.items()}


@dataclass(frozen=True)
class Memory:
    """Nearest training images of generated and of held-out real images, by cosine of Lite0 features."""

    nearest_N: Tensor
    """Index of the nearest training image, per generated image."""
    similarity_N: Tensor
    held_out_M: Tensor

    def to_dict(self) -> dict[str, Any]:
        threshold = torch.quantile(self.held_out_M, MEMORY_QUANTILE)
        return {
            "cosine_generated_median": float(self.similarity_N.median()),
            "cosine_held_out_median": float(self.held_out_M.median()),
            "cosine_held_out_p99": float(threshold),
            "share_above_p99": asdict(share_interval(self.similarity_N > threshold)),
        }


def memory(generated_ND: Tensor, held_out_MD: Tensor, train_TD: Tensor) -> Memory:
    """A model that copies is nearer to its training set than real images of unseen concepts are."""
    train = torch.nn.functional.normalize(train_TD, dim=1)
    similarity, nearest = (torch.nn.functional.normalize(generated_ND, dim=1) @ train.T).max(1)
    held_out = (torch.nn.functional.normalize(held_out_MD, dim=1) @ train.T).amax(1)
    return Memory(nearest, similarity, held_out)


def as_tensor(pictures: Sequence[Image.Image]) -> Tensor:
    """PIL images of one size -> float32 [B, 3, H, W] in [0, 1]."""
    return (
        torch.from_numpy(np.stack([np.asarray(p.convert("RGB")) for p in pictures])).permute(0, 3, 1, 2).float() / 255
    )


def read_image(path: Path) -> Image.Image:
    """A generated image."""
    return read_images([path])[0]


def reference_reader(resolution: int) -> Callable[[Path], Image.Image]:
    """Reads a data set's image as training sees it: upright, on white, square, at the base's resolution."""

    def read(path: Path) -> Image.Image:
        pixels = ((load_pixels(path, resolution) + 1) * 127.5).round().byte()
        return Image.fromarray(pixels.permute(1, 2, 0).numpy())

    return read
