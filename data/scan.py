"""A look at a whole data set before a run: what cannot be read, is there twice, is too small, or says more than is read.

Nothing is encoded and nothing raises: each finding is a sentence with a count and the first file names.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from loragraft.data.overlap import find_overlap
from loragraft.data.sources import Sample

SHOWN = 3


@dataclass(frozen=True)
class Scan:
    """What was found."""

    splits: dict[str, int]
    """Split -> samples."""
    sizes: dict[str, int]
    """Width x height -> images, most frequent first."""
    findings: tuple[str, ...]


def scan_samples(
    samples: Sequence[Sample],
    resolution: int,
    cache_root: Path,
    *,
    readable: Callable[[str], str] | None = None,
    per_step: int = 1,
) -> Scan:
    """Looks at every image and caption.

    readable: a caption as far as the text encoder reads it; None where no tokenizer is at hand. per_step: samples of one
    optimizer step, over all processes.
    """
    sizes: Counter[tuple[int, int]] = Counter()
    corrupt, tiny = [], []
    for sample in samples:
        try:
            size = _decoded_size(sample.image)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            corrupt.append(f"{sample.image.name} ({error})")
            continue
        sizes[size] += 1
        if min(size) < resolution:
            tiny.append(f"{sample.image.name} ({size[0]}x{size[1]})")
    cut = [] if readable is None else [s.image.name for s in samples if readable(s.caption) != s.caption]
    splits: Counter[str] = Counter(sample.split for sample in samples)
    findings = [
        *_found(corrupt, "cannot be read"),
        *_found(tiny, f"have an edge below {resolution} pixels and are enlarged"),
        *_found([s.image.name for s in samples if not s.caption.strip()], "have no caption"),
        *_found(cut, "have a caption longer than the text encoder reads (data.long_captions)"),
        *([] if corrupt else _repeats(samples, cache_root)),
    ]
    if splits["train"] < per_step:
        findings.append(
            f"a step takes {per_step} samples (batch x accumulation x processes) and the training split has {splits['train']}: "
            "each is seen several times in a step"
        )
    ordered = {f"{width}x{height}": count for (width, height), count in sizes.most_common()}
    return Scan(dict(splits), ordered, tuple(findings))


def _decoded_size(path: Path) -> tuple[int, int]:
    """(width, height) as a viewer shows it; decoded to the end, JPEG at an eighth of its size, which is quick."""
    with Image.open(path) as image:
        width, height = image.size
        turned = image.getexif().get(0x0112, 1) >= 5  # EXIF orientations 5 to 8 lie on their side
        image.draft("RGB", (max(1, width // 8), max(1, height // 8)))
        image.load()
    return (height, width) if turned else (width, height)


def _repeats(samples: Sequence[Sample], cache_root: Path) -> Iterable[str]:
    leaks, repeats = find_overlap(samples, cache_root)
    yield from _found([f"{a.image.name} = {b.image.name}" for a, b in leaks], "are in training and held out, or almost")
    yield from _found(
        [f"{a.image.name} = {b.image.name}" for a, b in repeats], "are there twice in training, or almost"
    )


def _found(names: Sequence[str], what: str) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return [f"{len(names)} images {what}: {', '.join(names[:SHOWN])}{more}"]
