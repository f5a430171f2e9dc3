"""Which size an image is trained at: the (H, W) bucket of the nearest aspect ratio, at every resolution asked for.

A resolution R has the sizes (H, W) of about R^2 pixels and never more, so that no bucket needs more memory than the square:
W from R in steps of s to R sqrt(MOST_ASPECT), H = R^2 / W rounded down to a multiple of s, and the same lying on the side.
s = 64 from 1024 px on, R / 16 below, rounded up to a multiple of the base's grain (16 where latents are eighths in patches of two,
32 for DC-AE): each resolution has about the same shapes. Aspect ratio buckets: NovelAI, "Novel AI Improvements on Stable Diffusion"
(2022).
"""

import functools
import logging
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from PIL import Image

from loragraft.data.sample import Sample, Shape
from loragraft.recipes.schema import DataConfig

MOST_ASPECT = 2.5
"""Longer side / shorter side of the longest bucket; a longer image is cropped to it."""
LARGE = 512
"""From this edge on, images and captions are cached apart (`encode.py`): T5's embedding of a caption is larger than the
latent of its image, and captions that are shared are then stored once."""
_EXIF_ORIENTATION = 0x0112

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes that a data set's images are encoded at."""

    edges: tuple[int, ...]
    """Resolutions, ascending: edges of squares of that many pixels."""
    buckets: bool
    """Whether an image keeps its aspect ratio, or becomes a square."""
    grain: int = 16
    """Height and width are multiples of it."""

    @classmethod
    def asked(cls, config: DataConfig, native: int, grain: int = 16) -> "Sizes | None":
        """What a recipe asks for on a base of `native` pixels; None for files that become plain squares under LARGE pixels.

        Raises ValueError for an edge that is no multiple of the base's grain.
        """
        edges = tuple(sorted(config.edges(native)))
        for edge in edges:
            if edge % grain:
                below = max(grain, edge // grain * grain)
                raise ValueError(
                    f"this base draws at multiples of {grain} px, and {edge} is none: set data.resolution (or data.resolutions) to "
                    f"{below} or {edge // grain * grain + grain}"
                )
        plain = len(edges) == 1 and edges[0] < LARGE and not config.buckets and not config.streaming
        return None if plain else cls(edges, config.buckets, grain)

    def of(self, sample: Sample) -> list[Shape]:
        """Where a sample goes: one bucket at each resolution that the image fills without being enlarged, or at the smallest.

        A held-out sample goes to the largest of them alone, so that it counts once. Raises ValueError for no image.
        """
        width, height = sample.size or image_size(sample)
        fitting = [self._bucket(width, height, edge) for edge in self.edges]
        filled = [shape for shape in fitting if not is_enlarged((height, width), shape)] or fitting[:1]
        return list(dict.fromkeys(filled if sample.split == "train" else filled[-1:]))

    def _bucket(self, width: int, height: int, edge: int) -> Shape:
        return nearest_bucket(width, height, edge, self.grain) if self.buckets else (edge, edge)


@functools.cache
def bucket_shapes(resolution: int, grain: int = 16) -> tuple[Shape, ...]:
    """The (H, W) of a resolution, widest last (formula above)."""
    step = math.ceil(max(16, min(64, resolution // 256 * 16)) / grain) * grain
    lying = {
        (resolution * resolution // width // step * step, width)
        for width in range(resolution, int(resolution * math.sqrt(MOST_ASPECT)) + 1, step)
    }
    return tuple(sorted(lying | {(w, h) for h, w in lying}, key=lambda shape: (shape[1] / shape[0], shape)))


def nearest_bucket(width: int, height: int, resolution: int, grain: int = 16) -> Shape:
    """The (H, W) whose aspect ratio is nearest to the image's, as a ratio: min |log(W / H) - log(width / height)|."""
    wanted = math.log(width / height)
    return min(bucket_shapes(resolution, grain), key=lambda s: (abs(math.log(s[1] / s[0]) - wanted), -s[0] * s[1]))


def image_size(sample: Sample) -> tuple[int, int]:
    """(width, height) of an image as it is seen, from its header. Raises ValueError naming the file."""
    try:
        with Image.open(sample.image) as opened:
            width, height = opened.size
            lacks = opened.format == "PNG" and "exif" not in opened.info  # getexif would decode all of it to make sure
            turned = not lacks and opened.getexif().get(_EXIF_ORIENTATION, 1) >= 5  # as in ImageOps.exif_transpose
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{sample.image} is not a readable image ({error}); repair it, or take it out") from error
    return (height, width) if turned else (width, height)


def is_enlarged(image: Shape, bucket: Shape) -> bool:
    """Whether an image of (H, W) pixels must grow to fill the bucket."""
    return image[0] < bucket[0] or image[1] < bucket[1]


@dataclass(frozen=True, slots=True)
class BucketReport:
    """What bucket-pure batches make of a training split."""

    counts: dict[Shape, int]
    """Images of each bucket, the fullest first."""
    batch: int
    """Images of one batch over all processes."""
    accumulation: int

    @classmethod
    def of(cls, shapes: Iterable[Shape], batch_size: int, accumulation: int = 1, processes: int = 1) -> "BucketReport":
        counts = Counter(shapes)
        ordered = dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
        return cls(ordered, batch_size * processes, accumulation)

    @property
    def small(self) -> dict[Shape, int]:
        """Buckets with fewer images than a batch: there, a batch shows an image more than once."""
        return {shape: count for shape, count in self.counts.items() if count < self.batch}

    def table(self) -> str:
        """Counts, batches and what becomes of remainders, for people."""
        total = sum(self.counts.values())
        lines = ["bucket (W x H)   images   batches an epoch"]
        lines += [f"{w:6d} x {h:<6d} {n:8,d} {n / self.batch:14.2f}" for (h, w), n in self.counts.items()]
        batches = total / self.batch
        lines.append(
            f"{total:,} images in {len(self.counts)} buckets: an epoch is {batches:,.2f} batches of {self.batch}, "
            f"{batches / self.accumulation:,.2f} steps. Every batch is of one bucket; nothing is dropped, what is left "
            "of a bucket begins its next batch"
        )
        if self.small:
            named = ", ".join(f"{w} x {h} ({n})" for (h, w), n in self.small.items())
            lines.append(
                f"fewer images than a batch, so a batch repeats them: {named}. A smaller train.batch_size, or "
                "data.buckets=false, avoids that"
            )
        return "\n".join(lines)


def warn_enlarged(samples: Sequence[Sample], shapes: Sequence[Shape]) -> None:
    """A warning with the number of images that are smaller than their bucket, and the first of them."""
    small = []
    for sample, shape in zip(samples, shapes, strict=True):
        width, height = sample.size or image_size(sample)
        if is_enlarged((height, width), shape):
            small.append(sample)
    if small:
        _log.warning(
            "%d of %d images are smaller than they are trained at and are enlarged, %s for one; lower data.resolution",
            len(small), len(samples), small[0].image,
        )  # fmt: skip
