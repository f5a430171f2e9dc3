"""What the icon domains share: Font Awesome's solid icons, colours, lettering, and words about them.

Canvas: 128 x 128 units, SVG as text. Letters are Font Awesome's own letter icons, so no font is needed.
"""

import json
from functools import cache
from pathlib import Path

import fontawesomefree

_SOLID = {
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
    "white": "#ffffff",
    "cream": "#f7ecd4",
}


def _lightened(colour: str, mix: float = 0.72) -> str:
    """Mixed with white."""
    return "#" + "".join(f"{round(int(colour[i : i + 2], 16) * (1 - mix) + 255 * mix):02x}" for i in (1, 3, 5))


COLOURS = _SOLID | {
    f"light {name}": _lightened(_SOLID[name]) for name in ("red", "orange", "yellow", "green", "blue", "purple", "pink")
}

GRADIENTS = (
    ("red", "orange"),
    ("pink", "red"),
    ("pink", "purple"),
    ("purple", "pink"),
    ("blue", "purple"),
    ("purple", "navy"),
    ("blue", "navy"),
    ("teal", "blue"),
    ("green", "teal"),
    ("teal", "green"),
    ("orange", "pink"),
    ("red", "purple"),
    ("navy", "black"),
)
"""Pairs that look well together, light to dark; white is legible on every one."""
PLAIN = ("red", "blue", "green", "purple", "navy", "black", "teal", "pink")
"""Single colours on which white is legible."""

ATTRIBUTION = """# Attribution

The images in this folder are composed from icons of **Font Awesome Free 6.6.0**, Copyright 2024 Fonticons, Inc.
(https://fontawesome.com), licensed under CC BY 4.0 (https://creativecommons.org/licenses/by/4.0/).

Changes: the icons were recoloured, scaled and placed on generated backgrounds, where there is lettering it is itself
set in Font Awesome's letter icons. The composed images are offered under CC BY 4.0 as well.
"""

_LETTER_ICONS = {"%": "percent", "-": "minus"}
_TRACKING = 72  # between two letters, in Font Awesome's units; a capital is 448 high
_WEIGHT = 44  # added to the stroke of a letter, which is 64


def article(words: str) -> str:
    """`words` after `a` or `an`, by the first sound."""
    vowel = words.startswith(("a", "e", "i", "o", "u", "hour")) and not words.startswith("eu")
    return f"{'an' if vowel else 'a'} {words}"


def surface(first: str, second: str) -> str:
    """A background in words: `a red background`, `a red to orange gradient background`."""
    return article(first if first == second else f"{first} to {second} gradient") + " background"


@cache
def icons() -> dict[str, tuple[float, float, str]]:
    """Icon name -> (width, height, path data) of Font Awesome's solid style."""
    root = Path(fontawesomefree.__file__).parent / "static" / "fontawesomefree" / "metadata" / "icon-families.json"
    families = json.loads(root.read_text(encoding="utf-8"))
    solid = {name: entry["svgs"]["classic"].get("solid") for name, entry in families.items()}
    return {name: (icon["width"], icon["height"], icon["path"]) for name, icon in solid.items() if icon}


def glyph(icon: str, x: float, y: float, size: float, fill: str, stroke: str = "none", line: float = 0) -> str:
    """The icon centred at (x, y), as large as fits a box of height `size` and width 1.2 `size`.

    fill, stroke: SVG paints; line: width of the stroke in canvas units, half of it outside the shape.
    """
    width, height, path = icons()[icon]
    scale = size / max(width / 1.2, height)
    left, top = x - width * scale / 2, y - height * scale / 2
    outline = f' stroke="{stroke}" stroke-width="{line / scale:.1f}" stroke-linejoin="round"' if line else ""
    return f'<path transform="translate({left:.2f} {top:.2f}) scale({scale:.5f})" fill="{fill}"{outline} d="{path}"/>'


def word(text: str, x: float, y: float, height: float, fill: str, max_width: float) -> str:
    """`text` in heavy capitals of that height, centred at (x, y); smaller where it would not fit `max_width`."""
    letters = [icons()[_LETTER_ICONS.get(letter, letter.lower())] for letter in text]
    narrow = [0.62 if letter == "-" else 1.0 for letter in text]
    widths = [width * squeeze + _TRACKING for squeeze, (width, _, _) in zip(narrow, letters, strict=True)]
    scale = min(height / (448 + _WEIGHT), max_width / (sum(widths) - _TRACKING + _WEIGHT))
    cursor = x - (sum(widths) - _TRACKING) * scale / 2
    parts = []
    for advance, squeeze, (_, box, path) in zip(widths, narrow, letters, strict=True):
        place = f"translate({cursor:.2f} {y - box / 2 * scale:.2f}) scale({scale * squeeze:.5f} {scale:.5f})"
        parts.append(f'<path transform="{place}" d="{path}"/>')
        cursor += advance * scale
    return f'<g fill="{fill}" stroke="{fill}" stroke-width="{_WEIGHT}" stroke-linejoin="round">{"".join(parts)}</g>'


def document(body: str, ground: str, first: str, second: str, *, slope: tuple[int, int] = (1, 1)) -> str:
    """A whole SVG over `ground` (an SVG paint). Paint `url(#g)` is the gradient first -> second along `slope`."""
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 128 128">'
        f'<defs><linearGradient id="g" x1="0" y1="0" x2="{slope[0]}" y2="{slope[1]}">'
        f'<stop offset="0.1" stop-color="{COLOURS[first]}"/><stop offset="0.9" stop-color="{COLOURS[second]}"/>'
        f'</linearGradient></defs><rect width="128" height="128" fill="{ground}"/>{body}</svg>'
    )
