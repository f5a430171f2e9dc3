"""The drawings of the marketing domain: one function per layout, on a canvas of 128 x 128 units, as SVG text.

The grammar is the same everywhere, so that a small model can learn it: one big glyph in one colour on a surface whose
gradient runs from top left to bottom right, and at most one short word in large, heavy capitals on a ribbon.
"""

import math
from dataclasses import dataclass

from loragraft.data.icon_art import COLOURS, document, glyph, word


@dataclass(frozen=True, kw_only=True, slots=True)
class Promotion:
    """One image, before it is drawn. Colours are keys of COLOURS."""

    layout: str
    icon: str
    glyph: str
    first: str
    second: str
    ribbon: str
    text: str


def _centre(made: Promotion, y: float, size: float) -> str:
    return glyph(made.icon, 64, y, size, COLOURS[made.glyph])


def _ink(ribbon: str) -> str:
    """The colour of a word on a ribbon: the one that is legible."""
    return COLOURS["black" if ribbon in ("yellow", "orange") else "white"]


def _ribbon(made: Promotion, y: float) -> str:
    """A band with notched ends across (64, y), 36 high, and its word."""
    if not made.text:
        return ""
    left, right, top, bottom = 1, 127, y - 18, y + 18
    band = (
        f'<path fill="{COLOURS[made.ribbon]}" d="M{left} {top}H{right}l-6 18 6 18H{left}l6 -18z"/>'
        f'<path fill="#000000" fill-opacity="0.2" d="M{left} {bottom}H{right}l-1 -3.5H{left + 1}z"/>'
    )
    return band + word(made.text, 64, y - 1, 25, _ink(made.ribbon), 104)


def _tile(made: Promotion) -> str:
    body = '<rect x="6" y="6" width="116" height="116" rx="24" fill="url(#g)"/>'
    y, size = (44, 60) if made.text else (64, 80)
    return body + _centre(made, y, size) + _ribbon(made, 98)


def _badge(made: Promotion) -> str:
    points = 20
    corners = []
    for i in range(2 * points):
        radius = 61 if i % 2 == 0 else 53
        angle = math.pi * i / points
        corners.append(f"{64 + radius * math.sin(angle):.2f},{64 - radius * math.cos(angle):.2f}")
    y, size = (50, 48) if made.text else (64, 60)
    return (
        f'<polygon points="{" ".join(corners)}" fill="url(#g)" stroke="url(#g)" stroke-width="3" '
        'stroke-linejoin="round"/><circle cx="64" cy="64" r="46" fill="none" stroke="#ffffff" stroke-width="2.5"/>'
        + _centre(made, y, size)
        + _ribbon(made, 99)
    )


def _button(made: Promotion) -> str:
    """A card whose lower edge carries a pill with the call to action."""
    pill = (
        f'<rect x="10" y="84" width="108" height="40" rx="20" fill="{COLOURS[made.ribbon]}" stroke="#ffffff" '
        'stroke-width="4"/>' + word(made.text, 64, 104, 24, _ink(made.ribbon), 84)
    )
    return '<rect x="6" y="6" width="116" height="100" rx="14" fill="url(#g)"/>' + _centre(made, 44, 60) + pill


def _coupon(made: Promotion) -> str:
    """A ticket with a notch at each side; the stub under the dashed line carries the word."""
    line = 80
    notch = line if made.text else 64
    outline = (
        f"M18 6H110a10 10 0 0 1 10 10V{notch - 9}a9 9 0 0 0 0 18V112a10 10 0 0 1 -10 10H18a10 10 0 0 1 -10 -10V{notch + 9}"
        f"a9 9 0 0 0 0 -18V16a10 10 0 0 1 10 -10z"
    )
    dashes = 'fill="none" stroke="#ffffff" stroke-width="2.5" stroke-dasharray="6 4.5"'
    if made.text:
        inner = f'<path d="M21 {line}H107" {dashes}/>' + word(made.text, 64, 101, 28, COLOURS[made.glyph], 94)
        return f'<path d="{outline}" fill="url(#g)"/>' + inner + _centre(made, 43, 58)
    frame = f'<rect x="20" y="14" width="88" height="100" rx="5" {dashes}/>'
    return f'<path d="{outline}" fill="url(#g)"/>' + frame + _centre(made, 64, 68)


def _tag(made: Promotion) -> str:
    """A hanging price tag: cut upper corners, a hole and a loop of string."""
    outline = "M42 18H86L112 46V112a10 10 0 0 1 -10 10H26a10 10 0 0 1 -10 -10V46z"
    string = '<path d="M64 29C58 14 78 12 70 2" fill="none" stroke="#7a7a86" stroke-width="3" stroke-linecap="round"/>'
    y, size = (60, 46) if made.text else (78, 64)
    body = f'<path d="{outline}" fill="url(#g)" stroke="url(#g)" stroke-width="4" stroke-linejoin="round"/>'
    hole = '<circle cx="64" cy="28" r="5.5" fill="#ffffff"/>'
    return body + hole + string + _centre(made, y, size) + _ribbon(made, 105)


LAYOUTS = {"promo tile": _tile, "badge": _badge, "button": _button, "coupon": _coupon, "sale tag": _tag}


def draw(made: Promotion) -> str:
    """The promotion as an SVG document on white."""
    return document(LAYOUTS[made.layout](made), COLOURS["white"], made.first, made.second)
