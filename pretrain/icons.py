"""Icon records -> names, split, sampling weights and RGBA pixels.

A record is one JSON line: ``set, name, caption, kind, category, tags, license, author, viewbox [x, y, w, h], body``
(the inside of an SVG element). The second comma part of ``caption`` names the drawing style ("glossy 3d emoji").
Held out: whole styles (``HELD_OUT_STYLES``) and about 4 % of the names, by hash, across all sets, so that no held-out
name is seen in any style.
"""

import collections
import gzip
import hashlib
import io
import json
import math
import multiprocessing
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image

SIZES = (112, 88, 64)  # rendered edge in pixels; placed on the canvas without resampling
HELD_OUT_STYLES = ("streamline-kameleon-color", "streamline-stickies-color")
MONOCHROME_SET = "mdi"

# Words of objects that marketing and shop pictures need: sampled twice as often, and never held out by name.
CORE_WORDS = frozenset(
    "cart basket bag shopping gift megaphone bullhorn loudspeaker heart star rocket trophy medal tag percent discount "
    "sale coupon ticket store shop wallet coin money credit dollar bank cash receipt barcode camera phone mobile "
    "envelope mail email letter bell calendar clock chart graph target bullseye lightbulb bulb globe truck delivery "
    "package box key lock shield search magnifying comment chat speech thumbs handshake briefcase building house home "
    "book bookmark certificate gem diamond crown fire clipboard folder file pencil pen scissors paperclip pin map "
    "compass laptop computer printer shirt shoe glasses watch music cake coffee pizza car bicycle airplane tree flower "
    "sun moon cloud umbrella cat dog fish bird apple banana".split()
)
PEOPLE_WORDS = frozenset("man men woman women person people family couple kiss flag skin mage vampire elf".split())
# Monochrome icons that carry no object: letters, codes, brands.
DROPPED_MONOCHROME = re.compile(
    r"^(alpha|numeric|roman|language|code|facebook|google|microsoft|apple|linkedin|twitter|firefox|opera|git|gitlab|"
    r"android|amazon|adobe|ubuntu|linux|nintendo|sony|steam|slack|skype|spotify|twitch|vimeo|whatsapp|wikipedia|"
    r"wordpress|xamarin|youtube|zodiac|syllabary|ideogram|abjad|unity|unreal|vuejs|vuetify|react|angular|bootstrap|"
    r"dropbox|evernote|instagram|pinterest|reddit|snapchat|tailwind|visualstudio|vs|docker|kubernetes|jquery|npm|nuxt|"
    r"office|onedrive|onepassword|origin|patreon|playstation|plex|powershell|salesforce|sass|tumblr|waze|yahoo|yammer)"
    r"(-|$)|format-|-off(-|$)|arrow-.*-bold|-variant"
)


@dataclass(frozen=True)
class Icon:
    """One drawing. ``words`` is the readable name; ``style`` the style words; ``glyph`` marks single-colour drawings."""

    set: str
    words: str
    style: str
    tags: tuple[str, ...]
    glyph: bool
    license: str
    author: str
    viewbox: tuple[float, ...]
    body: str


@dataclass(frozen=True)
class Stats:
    """Of the opaque pixels: ``luminance`` mean in [0, 1]; ``solid`` share of the bounding box that is opaque."""

    luminance: float
    solid: float


def readable_name(name: str) -> str:
    """``document-28`` -> ``document``, ``mail-notification-flat`` -> ``mail notification``: no sizes, no variant marks."""
    words = name.replace("_", "-").split("-")
    while len(words) > 1 and (words[-1].isdigit() or words[-1] in ("flat", "outline", "solid", "color")):
        words.pop()
    return " ".join(word for word in words if word)


def parse_icon(record: dict) -> Icon:
    """Record -> ``Icon``. Raises KeyError naming the missing key."""
    parts = record["caption"].split(", ")
    style = parts[1] if len(parts) > 1 else record["kind"]
    return Icon(
        set=record["set"],
        words=readable_name(record["name"]),
        style=f"flat {style}" if record["name"].endswith("-flat") and "flat" not in style else style,
        tags=tuple(tag for tag in record["tags"] if len(tag) > 2),
        glyph=record["set"] == MONOCHROME_SET,
        license=record["license"],
        author=record["author"],
        viewbox=tuple(record["viewbox"]),
        body=record["body"],
    )


def read_icons(paths: Iterable[Path]) -> list[Icon]:
    """All icons of the JSON-lines files (gzip), one per (set, readable name, style): the last, which is the largest."""
    icons: dict[tuple[str, str, str], Icon] = {}
    for path in paths:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                icon = parse_icon(json.loads(line))
                icons[icon.set, icon.words, icon.style] = icon
    return list(icons.values())


def material_records(folder: Path) -> Iterable[dict]:
    """Material Design Icons (Pictogrammers, Apache-2.0), as the PyPI package mkdocs-material carries them, as records."""
    for path in sorted(folder.glob("*.svg")):
        text = path.read_text(encoding="utf-8")
        if DROPPED_MONOCHROME.search(path.stem):
            continue
        body = re.fullmatch(r"<svg[^>]*viewBox=\"0 0 24 24\"[^>]*>(.*)</svg>\s*", text, re.S)
        if body is None:
            raise ValueError(f"{path}: not a 24 x 24 icon; remove it or widen the pattern in material_records")
        style = "outline glyph icon" if "outline" in path.stem else "solid glyph icon"
        yield {
            "set": MONOCHROME_SET,
            "name": path.stem,
            "caption": f"{path.stem.replace('-', ' ')}, {style}",
            "kind": "icon",
            "category": None,
            "tags": [],
            "license": "Apache-2.0",
            "author": "Pictogrammers",
            "viewbox": [0, 0, 24, 24],
            "body": body[1],
        }


def split_of(icon: Icon) -> str:
    """``style`` (held-out style), ``name`` (held-out name, 4 %) or ``train``."""
    if icon.set in HELD_OUT_STYLES:
        return "style"
    if CORE_WORDS.isdisjoint(icon.words.split()):
        digest = hashlib.sha256(icon.words.encode()).digest()
        if int.from_bytes(digest[:4], "big") % 25 == 0:
            return "name"
    return "train"


def sampling_weights(icons: Sequence[Icon]) -> list[float]:
    """Weight per record so that a name drawn in n styles counts sqrt(n), not n.

    Core objects x2, and x4 under a short name (what people type: "rocket", "coffee cup"); other names of more than
    three words x0.5; people and flags x0.3.
    """
    count = collections.Counter(icon.words for icon in icons)
    weights = []
    for icon in icons:
        words = icon.words.split()
        core = not CORE_WORDS.isdisjoint(words)
        weight = (4.0 if len(words) <= 2 else 2.0) if core else (1.0 if len(words) <= 3 else 0.5)
        weight *= 1.0 if PEOPLE_WORDS.isdisjoint(words) else 0.3
        weights.append(weight / math.sqrt(count[icon.words]))
    return weights


def render(icon: Icon, size: int) -> np.ndarray:
    """Icon -> uint8 [4, size, size], straight (not premultiplied) RGBA, aspect kept. Raises ValueError on bad SVG."""
    box = " ".join(f"{value:g}" for value in icon.viewbox)
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box}" '
        f'width="{size}" height="{size}">{icon.body}</svg>'
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True))
    return np.ascontiguousarray(np.asarray(Image.open(io.BytesIO(png)).convert("RGBA")).transpose(2, 0, 1))


def measure(rgba: np.ndarray) -> Stats:
    """``Stats`` of straight RGBA uint8 [4, S, S]; an empty picture has solid 0."""
    opaque = rgba[3] > 127
    if not opaque.any():
        return Stats(0.0, 0.0)
    luminance = np.tensordot((0.299, 0.587, 0.114), rgba[:3] / 255.0, 1)
    rows, columns = np.where(opaque.any(1))[0], np.where(opaque.any(0))[0]
    area = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
    return Stats(float(luminance[opaque].mean()), float(opaque.sum() / area))


def _render_all(icon: Icon) -> tuple[list[np.ndarray], Stats]:
    pixels = [render(icon, size) for size in SIZES]
    return pixels, measure(pixels[0])


def render_icons(icons: Sequence[Icon], processes: int | None = None) -> tuple[list[np.ndarray], list[Stats]]:
    """-> one uint8 [N, 4, S, S] per size of ``SIZES``, and N stats; in ``processes`` (default: all CPUs) processes."""
    pixels = [np.zeros((len(icons), 4, size, size), np.uint8) for size in SIZES]
    stats: list[Stats] = []
    # fork: the icons are shared, not pickled; call this before CUDA starts
    with multiprocessing.get_context("fork").Pool(processes or os.cpu_count()) as pool:
        for index, (pictures, stat) in enumerate(pool.imap(_render_all, icons, chunksize=64)):
            for target, picture in zip(pixels, pictures, strict=True):
                target[index] = picture
            stats.append(stat)
    return pixels, stats
