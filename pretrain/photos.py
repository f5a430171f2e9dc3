"""Product photos -> pixels, split and captions in several wordings.

The zip holds pictures of 128 x 128 and ``metadata.jsonl`` with ``file_name, caption, label, split``: "product photo of a
pink t-shirt", "photo of Satsumas on a grocery store shelf", "product packshot of Carrots on white background. ...".
"""

import collections
import io
import json
import math
import random
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

CAPTION = re.compile(
    r"(?:product )?(?:photo|packshot) of (?:an? )?(?P<subject>.+?)(?: on (?P<place>a grocery store shelf|white background))?(?:\.|$)"
)
PLACES = {
    "a grocery store shelf": ("on a grocery store shelf", "on a store shelf", "in a shop"),
    "white background": ("on a white background",),
}


@dataclass(frozen=True)
class Photo:
    """``subject`` as in "pink t-shirt"; ``place`` a key of PLACES or ""; ``split`` is train or photo (held out)."""

    subject: str
    place: str
    label: str
    split: str


def parse_photo(row: dict) -> Photo:
    """Metadata row -> ``Photo``. Raises ValueError on a caption of another form."""
    found = CAPTION.match(row["caption"])
    if found is None:
        raise ValueError(f"{row['file_name']}: caption {row['caption']!r} is not 'photo of ...'")
    split = "train" if row["split"] == "train" else "photo"
    return Photo(found["subject"].lower(), found["place"] or "", row["label"], split)


def read_photos(path: Path) -> tuple[list[Photo], np.ndarray]:
    """-> photos and their pixels, uint8 [N, 3, 128, 128]."""
    with zipfile.ZipFile(path) as archive:
        rows = [json.loads(line) for line in archive.read("metadata.jsonl").splitlines()]
        pixels = np.zeros((len(rows), 3, 128, 128), np.uint8)
        for i, row in enumerate(rows):
            picture = Image.open(io.BytesIO(archive.read(row["file_name"]))).convert("RGB")
            pixels[i] = np.asarray(picture).transpose(2, 0, 1)
    return [parse_photo(row) for row in rows], pixels


def shrink_photos(source: Path, target: Path, per_label: int, held_out: int, quality: int = 60) -> int:
    """Writes at most ``per_label`` training photos of a label and ``held_out`` others, as WebP; returns their number."""
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(target, "w") as small:
        rows = [json.loads(line) for line in archive.read("metadata.jsonl").splitlines()]
        rng, seen, kept = random.Random(0), collections.Counter(), []
        for row in rng.sample(rows, len(rows)):
            key, most = (row["label"], per_label) if row["split"] == "train" else ("held out", held_out)
            if seen[key] >= most:
                continue
            seen[key] += 1
            packed = io.BytesIO()
            Image.open(io.BytesIO(archive.read(row["file_name"]))).save(packed, "WEBP", quality=quality, method=6)
            name = Path(row["file_name"]).with_suffix(".webp").name
            small.writestr(name, packed.getvalue())
            kept.append({**{k: row[k] for k in ("caption", "label", "split", "license", "source")}, "file_name": name})
        small.writestr("metadata.jsonl", "".join(json.dumps(row) + "\n" for row in kept))
    return len(kept)


def photo_caption(photo: Photo, rng: random.Random) -> str:
    """One of several wordings of the same statement."""
    article = "an" if photo.subject[0] in "aeiou" else "a"
    place = f" {rng.choice(PLACES[photo.place])}" if photo.place and rng.random() < 0.8 else ""
    subject = photo.subject
    return rng.choice(
        (
            f"product photo of {article} {subject}{place}",
            f"photo of {article} {subject}{place}",
            f"a photo of {subject}{place}",
            f"{subject}{place}, photo",
            f"{subject}, product photo{place}",
            f"photograph of {subject}{place}",
        )
    )


def draw_photos(photos: Sequence[Photo], split: str, count: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """``count`` draws -> (int32 [count, 2]: photo, mirrored; captions); a label of n photos counts sqrt(n)."""
    rng = random.Random(seed)
    members = [i for i, photo in enumerate(photos) if photo.split == split]
    size = collections.Counter(photos[i].label for i in members)
    chosen = rng.choices(members, [1 / math.sqrt(size[photos[i].label]) for i in members], k=count)
    rows = np.array([(i, rng.random() < 0.5) for i in chosen], np.int32).reshape(count, 2)
    return rows, [photo_caption(photos[i], rng) for i in chosen]
