"""A look at a whole data set before a run: what cannot be read, is there twice, is too small, or says more than is read.

Nothing is encoded and nothing raises: each finding is a sentence with a count and the first file names. Some of them training
refuses, others it warns of.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from loragraft.data.overlap import find_overlap
from loragraft.data.sources import LeftOut, Sample
from loragraft.recipes.schema import DataConfig

SHOWN = 3


@dataclass(frozen=True)
class Scan:
    """What was found."""

    splits: dict[str, int]
    """Split -> samples."""
    sizes: dict[str, int]
    """Width x height -> images, most frequent first."""
    refused: tuple[str, ...]
    """What training stops at."""
    noted: tuple[str, ...]
    """What it takes as it is."""


def scan_samples(
    samples: Sequence[Sample],
    resolution: int,
    cache_root: Path,
    *,
    readable: Callable[[str], str] | None = None,
    per_step: int = 1,
    left_out: LeftOut | None = None,
    config: DataConfig | None = None,
) -> Scan:
    """Looks at every image and caption.

    readable: a caption as far as the text encoder reads it; None where no tokenizer is at hand. per_step: samples of one
    optimizer step, over all processes. left_out: what `open_source` could not make a sample of. config: says which of captions
    that are too long and images on both sides of a split it accepts; without it neither.
    """
    left_out = LeftOut() if left_out is None else left_out
    sizes: Counter[tuple[int, int]] = Counter()
    corrupt = [f"{path.name} ({reason})" for path, reason in left_out.unreadable]
    tiny: list[str] = []
    whole: list[Sample] = []
    for sample in samples:
        try:
            size = _decoded_size(sample.image)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            corrupt.append(f"{sample.image.name} ({error})")
            continue
        whole.append(sample)
        sizes[size] += 1
        if min(size) < resolution:
            tiny.append(f"{sample.image.name} ({size[0]}x{size[1]})")
    mute = [path.name for path in left_out.without_caption]
    mute += [sample.image.name for sample in samples if not sample.caption.strip()]
    cut = [] if readable is None else [s.image.name for s in samples if readable(s.caption) != s.caption]
    splits: Counter[str] = Counter(sample.split for sample in samples)
    leaks, repeats = find_overlap(whole, cache_root)
    too_long = _found(cut, "have a caption longer than the text encoder reads (data.long_captions)")
    both = _found(_pairs(leaks), "are in training and held out, or almost")
    refused = [*_found(corrupt, "cannot be read"), *_found(mute, "have no caption")]
    noted = _found(tiny, f"have an edge below {resolution} pixels and are enlarged")
    noted += _found(_pairs(repeats), "are there twice in training, or almost")
    (noted if config is not None and config.long_captions == "cut" else refused).extend(too_long)
    (noted if config is not None and config.allow_overlap else refused).extend(both)
    noted += _found(
        [path.name for path in left_out.not_read], "are of a kind that is not read, and left out until converted"
    )
    if config is not None and not config.caption and len(samples) > 1 and len({s.caption for s in samples}) == 1:
        noted.append(f"all {len(samples)} images have the same caption, {samples[0].caption!r}")
    if splits["train"] < per_step:
        noted.append(
            f"a step takes {per_step} samples (batch x accumulation x processes) and the training split has {splits['train']}: "
            "each is seen several times in a step"
        )
    ordered = {f"{width}x{height}": count for (width, height), count in sizes.most_common()}
    return Scan(dict(splits), ordered, tuple(refused), tuple(noted))


def _decoded_size(path: Path) -> tuple[int, int]:
    """(width, height) as a viewer shows it; decoded to the end, JPEG at an eighth of its size, which is quick."""
    with Image.open(path) as image:
        width, height = image.size
        turned = image.getexif().get(0x0112, 1) >= 5  # EXIF orientations 5 to 8 lie on their side
        image.draft("RGB", (max(1, width // 8), max(1, height // 8)))
        image.load()
    return (height, width) if turned else (width, height)


def _pairs(pairs: Iterable[tuple[Sample, Sample]]) -> list[str]:
    return [f"{a.image.name} = {b.image.name}" for a, b in pairs]


def _found(names: Sequence[str], what: str) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return [f"{len(names)} images {what}: {', '.join(names[:SHOWN])}{more}"]
