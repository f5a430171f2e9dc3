"""The drawings of the marketing domain: one function per layout, all on a canvas of 128 x 128 units, as SVG text.

The grammar is the same everywhere, so that a small model can learn it: one big glyph in one colour on a surface whose
gradient runs from top left to bottom right, and at most one short word on a ribbon. Letters are Font Awesome's own
letter icons, so no font is needed.
"""

import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import fontawesomefree

COLOURS = {
    "red": "#e8262c",
    "orange": "#ff8a00",
    "yellow": "#ffd21f",
    "green": "#1fa64a",
    "teal": "#0fb5ae",
    "blue": "#1f6feb",
    "navy": "#14235c",
    "purple": "#7b2ff2",
    "pink": "#ff4fa0",
    "black": "#16161a",
    "gold": "#d9a520",
    "white": "#ffffff",
}

_LETTER_ICONS = {"%": "percent", "-": "minus", "+": "plus", "!": "exclamation"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Design:
    """One image, before it is drawn. Colours are keys of COLOURS."""

    layout: str
    icon: str
    glyph: str
    first: str
    second: str
    ribbon: str
    text: str


@cache
def _icons() -> dict[str, tuple[float, float, str]]:
    """Icon name -> (width, height, path data) of Font Awesome's solid style."""
    root = Path(fontawesomefree.__file__).parent / "static" / "fontawesomefree" / "metadata" / "icon-families.json"
    families = json.loads(root.read_text(encoding="utf-8"))
    solid = {name: entry["svgs"]["classic"].get("solid") for name, entry in families.items()}
    return {name: (icon["width"], icon["height"], icon["path"]) for name, icon in solid.items() if icon}


def _glyph(icon: str, x: float, y: float, size: float, colour: str) -> str:
    """The icon centred at (x, y), as large as fits a box of height `size` and width 1.2 `size`."""
    width, height, path = _icons()[icon]
    scale = size / max(width / 1.2, height)
    left, top = x - width * scale / 2, y - height * scale / 2
    return f'<path transform="translate({left:.2f} {top:.2f}) scale({scale:.5f})" fill="{COLOURS[colour]}" d="{path}"/>'


def _word(text: str, x: float, y: float, height: float, colour: str, max_width: float) -> str:
    """`text` in capitals of that height, centred at (x, y); narrower when it would not fit `max_width`."""
    glyphs = [_icons()[_LETTER_ICONS.get(letter, letter.lower())] for letter in text]
    narrow = [0.62 if letter == "-" else 1.0 for letter in text]
    widths = [width * squeeze + 60 for squeeze, (width, _, _) in zip(narrow, glyphs, strict=True)]  # 60: tracking
    # Font Awesome's capitals are 448 units high in a box of 512.
    scale = min(height / 448, max_width / (sum(widths) - 60))
    cursor = x - (sum(widths) - 60) * scale / 2
    parts = []
    for advance, squeeze, (_, box, path) in zip(widths, narrow, glyphs, strict=True):
        place = f"translate({cursor:.2f} {y - box / 2 * scale:.2f}) scale({scale * squeeze:.5f} {scale:.5f})"
        parts.append(f'<path transform="{place}" d="{path}"/>')
        cursor += advance * scale
    fill = COLOURS[colour]
    return f'<g fill="{fill}" stroke="{fill}" stroke-width="26" stroke-linejoin="round">{"".join(parts)}</g>'


def _ink(ribbon: str) -> str:
    """The colour of a word on a ribbon: the one that is legible."""
    return "black" if ribbon in ("yellow", "gold") else "white"


def _ribbon(design: Design, y: float, width: float) -> str:
    """A band with notched ends across (64, y), and its word."""
    if not design.text:
        return ""
    left, right, top, bottom = 64 - width / 2, 64 + width / 2, y - 14, y + 14
    band = (
        f'<path fill="{COLOURS[design.ribbon]}" d="M{left} {top}H{right}l-7 14 7 14H{left}l7 -14z"/>'
        f'<path fill="#000000" fill-opacity="0.18" d="M{left} {bottom}H{right}l-1.5 -3H{left + 1.5}z"/>'
    )
    return band + _word(design.text, 64, y - 0.5, 17, _ink(design.ribbon), width - 30)


def _tile(design: Design) -> str:
    glyph_y, size = (47, 66) if design.text else (64, 80)
    return (
        '<rect x="6" y="6" width="116" height="116" rx="24" fill="url(#g)"/>'
        + _glyph(design.icon, 64, glyph_y, size, design.glyph)
        + _ribbon(design, 99, 124)
    )


def _badge(design: Design) -> str:
    points = 20
    corners = []
    for i in range(2 * points):
        radius = 61 if i % 2 == 0 else 53
        angle = math.pi * i / points
        corners.append(f"{64 + radius * math.sin(angle):.2f},{64 - radius * math.cos(angle):.2f}")
    glyph_y, size = (53, 52) if design.text else (64, 60)
    return (
        f'<polygon points="{" ".join(corners)}" fill="url(#g)" stroke="url(#g)" stroke-width="3" '
        'stroke-linejoin="round"/><circle cx="64" cy="64" r="46" fill="none" stroke="#ffffff" stroke-width="2.5"/>'
        + _glyph(design.icon, 64, glyph_y, size, design.glyph)
        + _ribbon(design, 101, 112)
    )


def _button(design: Design) -> str:
    """A card in the first colour whose lower edge carries a pill with the call to action."""
    ribbon = COLOURS[design.ribbon]
    pill = (
        f'<rect x="20" y="89" width="88" height="34" rx="17" fill="{ribbon}" stroke="#ffffff" stroke-width="4"/>'
        + _word(design.text, 64, 106, 17, _ink(design.ribbon), 66)
    )
    return (
        '<rect x="6" y="6" width="116" height="100" rx="14" fill="url(#g)"/>'
        + _glyph(design.icon, 64, 47, 66, design.glyph)
        + pill
    )


def _coupon(design: Design) -> str:
    """A ticket with a notch at each side; the stub under the dashed line carries the word."""
    line = 88 if design.text else 0
    notch = line or 64
    outline = (
        f"M18 6H110a10 10 0 0 1 10 10V{notch - 9}a9 9 0 0 0 0 18V112a10 10 0 0 1 -10 10H18a10 10 0 0 1 -10 -10V{notch + 9}"
        f"a9 9 0 0 0 0 -18V16a10 10 0 0 1 10 -10z"
    )
    dashes = 'fill="none" stroke="#ffffff" stroke-width="2.5" stroke-dasharray="6 4.5"'
    if design.text:
        inner = f'<path d="M21 {line}H107" {dashes}/>' + _word(design.text, 64, 105.5, 21, design.glyph, 84)
        return f'<path d="{outline}" fill="url(#g)"/>' + inner + _glyph(design.icon, 64, 47, 64, design.glyph)
    frame = f'<rect x="20" y="14" width="88" height="100" rx="5" {dashes}/>'
    return f'<path d="{outline}" fill="url(#g)"/>' + frame + _glyph(design.icon, 64, 64, 68, design.glyph)


def _tag(design: Design) -> str:
    """A hanging price tag: cut upper corners, a hole and a loop of string."""
    outline = "M42 18H86L112 46V112a10 10 0 0 1 -10 10H26a10 10 0 0 1 -10 -10V46z"
    string = '<path d="M64 29C58 14 78 12 70 2" fill="none" stroke="#7a7a86" stroke-width="3" stroke-linecap="round"/>'
    glyph_y, size = (65, 50) if design.text else (80, 64)
    body = f'<path d="{outline}" fill="url(#g)" stroke="url(#g)" stroke-width="4" stroke-linejoin="round"/>'
    hole = '<circle cx="64" cy="28" r="5.5" fill="#ffffff"/>'
    return body + hole + string + _glyph(design.icon, 64, glyph_y, size, design.glyph) + _ribbon(design, 107, 112)


LAYOUTS = {"promo tile": _tile, "badge": _badge, "button": _button, "coupon": _coupon, "sale tag": _tag}


def draw(design: Design) -> str:
    """The design as an SVG document of 128 x 128 units on white."""
    first, second = COLOURS[design.first], COLOURS[design.second]
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 128 128">'
        '<defs><linearGradient id="g" x1="0" y1="0" x2="1" y2="1">'
        f'<stop offset="0.1" stop-color="{first}"/><stop offset="0.9" stop-color="{second}"/></linearGradient></defs>'
        f'<rect width="128" height="128" fill="#ffffff"/>{LAYOUTS[design.layout](design)}</svg>'
    )
