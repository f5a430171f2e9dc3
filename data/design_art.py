"""The drawings of the design domain: one function per style, on a canvas of 128 x 128 units, as SVG text.

Five surfaces that have nothing in common but their icons: an app icon with a long shadow, a die-cut sticker, a
blueprint, a Bauhaus poster in overprinted inks, a duotone pattern. Shapes are few and large.
"""

from dataclasses import dataclass

from loragraft.data.icon_art import COLOURS, document, glyph

SHAPES = ("circle", "half circle", "square")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sheet:
    """One image, before it is drawn. Colours are keys of COLOURS."""

    style: str
    icon: str
    glyph: str
    first: str
    """The ground; of an app icon, the upper end of its gradient."""
    second: str
    """The lower end of the gradient; equal to `first` elsewhere."""
    accent: str
    """Colour of a poster's shape."""
    shape: str
    """A poster's shape, one of SHAPES."""


def _blur(name: str, deviation: float) -> str:
    return (
        f'<filter id="{name}" x="-50%" y="-50%" width="200%" height="200%">'
        f'<feGaussianBlur stdDeviation="{deviation}"/></filter>'
    )


def _app_icon(made: Sheet) -> str:
    """A rounded square on light grey; the white glyph's shadow falls to the lower right up to the edge."""
    tile = 'x="10" y="8" width="108" height="108" rx="27"'
    steps = "".join(f'<use href="#s" x="{i * 1.5}" y="{i * 1.5}"/>' for i in range(1, 44))
    return (
        f'<defs>{_blur("b", 3.5)}<clipPath id="t"><rect {tile}/></clipPath>'
        f'<g id="s">{glyph(made.icon, 64, 62, 66, "#000000")}</g></defs>'
        '<rect x="13" y="17" width="102" height="104" rx="27" fill="#26304a" opacity="0.45" filter="url(#b)"/>'
        f'<rect {tile} fill="url(#g)"/><g clip-path="url(#t)"><g opacity="0.2">{steps}</g></g>'
        + glyph(made.icon, 64, 62, 66, COLOURS[made.glyph])
    )


def _sticker(made: Sheet) -> str:
    """The glyph with a thick white outline that casts a soft shadow on a pastel ground."""
    shadow = glyph(made.icon, 64, 69, 74, "#1c2440", "#1c2440", 21)
    return (
        f'<defs>{_blur("b", 3)}</defs><g opacity="0.45" filter="url(#b)">{shadow}</g>'
        + glyph(made.icon, 64, 64, 74, "#ffffff", "#ffffff", 22)
        + glyph(made.icon, 64, 64, 74, "#ffffff", "#ffffff", 12)  # a wide stroke leaves the middle of small holes open
        + glyph(made.icon, 64, 64, 74, COLOURS[made.glyph])
    )


def _blueprint(made: Sheet) -> str:
    """The outline alone, in a thin line on squared paper within a frame."""
    ink = COLOURS[made.glyph]
    grid = "".join(f"M{i} 0V128M0 {i}H128" for i in range(16, 128, 16))
    return (
        f'<path d="{grid}" stroke="{ink}" stroke-opacity="0.28" stroke-width="1"/>'
        f'<rect x="6" y="6" width="116" height="116" fill="none" stroke="{ink}" stroke-width="2.5"/>'
        + glyph(made.icon, 64, 64, 82, "none", ink, 5)
    )


def _poster(made: Sheet) -> str:
    """Two inks on cream: a large shape, a dark glyph across it, and a foot of both inks."""
    shapes = {
        "circle": '<circle cx="64" cy="57" r="49"/>',
        "half circle": '<path d="M5 94a59 59 0 0 1 118 0z"/>',
        "square": '<rect x="20" y="12" width="88" height="88"/>',
    }
    ink = COLOURS[made.glyph]
    return (
        f'<g fill="{COLOURS[made.accent]}">{shapes[made.shape]}<rect x="96" y="112" width="32" height="16"/></g>'
        f'<rect x="0" y="112" width="96" height="16" fill="{ink}"/>' + glyph(made.icon, 64, 58, 78, ink)
    )


def _pattern(made: Sheet) -> str:
    """Four times the same glyph in two colours that change places from field to field."""
    ground, ink = COLOURS[made.first], COLOURS[made.glyph]
    fields = f'<path d="M64 0H128V64H64zM0 64H64V128H0z" fill="{ink}"/>'
    glyphs = [
        glyph(made.icon, 32 + 64 * column, 32 + 64 * row, 46, ink if row == column else ground)
        for row in (0, 1)
        for column in (0, 1)
    ]
    return fields + "".join(glyphs)


STYLES = {
    "app icon": _app_icon,
    "sticker": _sticker,
    "blueprint": _blueprint,
    "Bauhaus poster": _poster,
    "duotone pattern": _pattern,
}


def draw(made: Sheet) -> str:
    """The sheet as an SVG document."""
    ground = "#eef1f6" if made.style == "app icon" else COLOURS[made.first]
    return document(STYLES[made.style](made), ground, made.first, made.second, slope=(0, 1))
