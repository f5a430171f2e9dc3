"""The same picture twice: within the training split a warning, in a training and a held-out split an error.

"The same" is equal bytes, or a near-duplicate: perceptual hashes (64 signs of the lowest 8 x 8 frequencies of a 32 x 32
luminance, DCT-II, against their median; Zauner, "Implementation and benchmarking of perceptual image hash functions",
2010) at most `MOST_BITS` apart, and then thumbnails that differ by at most `MOST_RMS`. The hash finds candidates quickly;
the thumbnails decide, colours included, since simple pictures share a hash easily.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from loragraft.data.errors import DataError
from loragraft.data.images import load_pixels
from loragraft.data.sources import Sample
from loragraft.disk import write_atomic
from loragraft.recipes.schema import DataConfig

VERSION = 2
"""Part of the stored result's key: raise it whenever other pairs would be found."""
EDGE = 32
MOST_BITS = 8
MOST_RMS = 8.0
"""Root mean square over pixels and channels, in levels of 0 .. 255: re-encoding and resizing stay below 4."""
_ROWS_AT_ONCE = 256

_log = logging.getLogger(__name__)
_N = np.arange(EDGE)
_COSINES = np.cos(np.pi / EDGE * (_N + 0.5) * np.arange(8)[:, None])


def check_overlap(samples: Sequence[Sample], config: DataConfig, cache_root: Path) -> None:
    """Raises DataError where a held-out image is also in the training split, unless `data.allow_overlap`.

    Of a stream, whose images are gone, only equal bytes are found. A generated domain is exempt: its layouts are
    near-duplicates on purpose, and its concepts are split. What was found is kept in `cache_root`/overlap, by the bytes of all
    images.
    """
    if config.domain is not None:
        return
    leaks, repeats = find_overlap(samples, cache_root, streamed=config.streaming)
    if repeats:
        _log.warning("%d pairs of training images are the same or almost: %s", len(repeats), _listed(repeats))
    if leaks and config.allow_overlap:
        _log.warning("%d held-out images are also trained on (data.allow_overlap): %s", len(leaks), _listed(leaks))
    elif leaks:
        raise DataError(
            f"{len(leaks)} held-out images are also in the training split, the same or almost: {_listed(leaks)}. Validation "
            "and score would be too good. Take one of each pair out, or give both the same `concept` in metadata.jsonl, "
            "which puts them in one split, or accept it with data.allow_overlap=true"
        )


def find_overlap(
    samples: Sequence[Sample], cache_root: Path, *, streamed: bool = False
) -> tuple[list[tuple[Sample, Sample]], list[tuple[Sample, Sample]]]:
    """(pairs of a training and a held-out sample, pairs of training samples) with the same picture, or almost; of
    `streamed` ones the bytes are compared alone."""
    members: dict[str, list[Sample]] = {}
    for sample in samples:
        digest = sample.digest.hex() or hashlib.sha256(sample.image.read_bytes()).hexdigest()
        members.setdefault(digest, []).append(sample)
    images = {digest: group[0].image for digest, group in members.items()}
    near = [] if streamed else _near_pairs(images, cache_root)
    leaks: list[tuple[Sample, Sample]] = []
    repeats: list[tuple[Sample, Sample]] = []
    for one, other in [*((digest, digest) for digest in sorted(members)), *near]:
        alike = [*members[one], *(members[other] if other != one else [])]
        trained = [sample for sample in alike if sample.split == "train"]
        held_out = [sample for sample in alike if sample.split != "train"]
        if trained and held_out:
            leaks.append((trained[0], held_out[0]))
        if len(trained) > 1:
            repeats.append((trained[0], trained[1]))
    return leaks, repeats


def perceptual_hash(thumbnail: npt.NDArray[np.float32]) -> np.uint64:
    """64 bits of a thumbnail [3, 32, 32] in [-1, 1] (formula above). A flat picture gives 0."""
    luminance = np.tensordot(np.array([0.299, 0.587, 0.114]), thumbnail, 1)
    low = _COSINES @ luminance @ _COSINES.T
    low[0, 0] = 0  # the mean says nothing about the picture
    signs = low > np.median(low) + 1e-3  # the sign of rounding noise would be random
    return np.packbits(signs).view(np.uint64)[0]


def _near_pairs(images: dict[str, Path], cache_root: Path) -> list[tuple[str, str]]:
    """Pairs of keys whose images are near-duplicates, each once, in sorted order."""
    if len(images) < 2:
        return []
    digests = sorted(images)
    key = hashlib.sha256(json.dumps([VERSION, digests]).encode()).hexdigest()
    stored = cache_root / "overlap" / f"{key[:24]}.json"
    if stored.is_file():
        return [(one, other) for one, other in json.loads(stored.read_text())]
    thumbnails = np.stack([load_pixels(images[digest], EDGE).numpy() for digest in digests])
    hashes = np.array([perceptual_hash(thumbnail) for thumbnail in thumbnails])
    levels = np.round((thumbnails.reshape(len(digests), -1) + 1) * 127.5).astype(np.int16)
    pairs = []
    for start in range(0, len(digests), _ROWS_AT_ONCE):
        rows = hashes[start : start + _ROWS_AT_ONCE, None]
        for i, j in np.argwhere(np.bitwise_count(rows ^ hashes[None, :]) <= MOST_BITS):
            row = start + int(i)
            if row < j and np.sqrt(np.mean(np.square((levels[row] - levels[j]).astype(np.float32)))) <= MOST_RMS:
                pairs.append((digests[row], digests[int(j)]))
    stored.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(stored, json.dumps(pairs).encode())
    return pairs


def _listed(pairs: Sequence[tuple[Sample, Sample]]) -> str:
    shown = [f"{a.image.name} ({a.split}) and {b.image.name} ({b.split})" for a, b in pairs[:3]]
    return "; ".join(shown) + (f"; and {len(pairs) - 3} more" if len(pairs) > 3 else "")
