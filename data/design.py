"""The `design` domain: styles of graphic design applied to Font Awesome Free's solid icons (CC BY 4.0).

App icons with long shadows, die-cut stickers, blueprints, Bauhaus posters and duotone patterns, each of one concept, in
named colours, without words. Drawing: `design_art.py`. Building: `domains.py`.
"""

from loragraft.data.design_art import SHAPES, Sheet, draw
from loragraft.data.dice import Dice
from loragraft.data.domains import Composition, Domain
from loragraft.data.icon_art import ATTRIBUTION, GRADIENTS, PLAIN, article, surface
from loragraft.data.icon_concepts import CONCEPTS

STYLE_WEIGHTS = {"app icon": 3, "sticker": 3, "blueprint": 2, "Bauhaus poster": 3, "duotone pattern": 3}
STICKERS = ("red", "orange", "green", "teal", "blue", "navy", "purple", "pink")
PASTELS = ("light yellow", "light pink", "light blue", "light green", "light purple", "light orange")
BLUEPRINTS = (("white", "blue"), ("white", "navy"), ("light blue", "navy"), ("yellow", "navy"), ("yellow", "blue"))
"""Line and paper."""
INKS = ("navy", "black", "purple")
ACCENTS = ("red", "orange", "yellow", "teal", "pink")
DUOTONES = (
    ("yellow", "purple"),
    ("yellow", "navy"),
    ("yellow", "red"),
    ("yellow", "black"),
    ("pink", "navy"),
    ("orange", "navy"),
    ("white", "red"),
    ("white", "blue"),
    ("white", "teal"),
    ("white", "green"),
    ("white", "pink"),
    ("white", "purple"),
)
"""Glyph and ground of the first field."""


def sheet(concept: str, dice: Dice) -> Sheet:
    """Draw style and colours for one image of the concept."""
    style = dice.weighted(STYLE_WEIGHTS)
    icon = dice.pick(CONCEPTS[concept])
    glyph, accent, shape = "white", "", ""
    if style == "app icon":
        first, second = dice.pick(GRADIENTS) if dice.chance(0.7) else (dice.pick(PLAIN),) * 2
    else:
        if style == "sticker":
            glyph, first = dice.pick(STICKERS), dice.pick(PASTELS)
        elif style == "blueprint":
            glyph, first = dice.pick(BLUEPRINTS)
        elif style == "Bauhaus poster":
            glyph, first, accent, shape = dice.pick(INKS), "cream", dice.pick(ACCENTS), dice.pick(SHAPES)
        else:
            glyph, first = dice.pick(DUOTONES)
        second = first
    return Sheet(style=style, icon=icon, glyph=glyph, first=first, second=second, accent=accent, shape=shape)


def caption(concept: str, made: Sheet, dice: Dice) -> str:
    """What a person would write; at most 30 MiniLM tokens. Thing and colours first, the style after them."""
    outline = "outline icon" if made.style == "blueprint" else "icon"
    thing = f"{made.glyph} {concept} {outline} on {surface(made.first, made.second)}"
    details = {
        "app icon": ["app icon with long shadow", "app icon"],
        "sticker": ["sticker with white outline", "sticker"],
        "blueprint": ["blueprint", "blueprint with grid"],
        "Bauhaus poster": [
            f"{made.accent} {made.shape}, Bauhaus poster",
            f"Bauhaus poster with {article(made.accent)} {made.shape}",
        ],
        "duotone pattern": ["duotone pattern", "duotone pattern of four"],
    }
    return f"{thing}, {dice.pick(details[made.style])}"


def short_caption(concept: str, made: Sheet, dice: Dice) -> str:
    """The same request, typed in a hurry: style and thing, sometimes a colour."""
    colour = {"sticker": made.glyph, "Bauhaus poster": made.accent}.get(made.style, made.first)
    return dice.pick(
        [
            f"{made.style}, {concept}",
            f"{concept}, {made.style}",
            f"{concept} {made.style}",
            f"{colour} {made.style}, {concept}",
        ]
    )


def compose(concept: str, dice: Dice) -> Composition:
    """One image of the concept."""
    made = sheet(concept, dice)
    return Composition(svg=draw(made), caption=caption(concept, made, dice), short=short_caption(concept, made, dice))


DOMAIN = Domain(
    name="design",
    version=1,
    licence="CC-BY-4.0",
    attribution=ATTRIBUTION,
    concepts=tuple(CONCEPTS),
    compose=compose,
)
