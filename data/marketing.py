"""The `marketing` domain: promotional images composed from Font Awesome Free's solid icons (CC BY 4.0).

Promo tiles, round badges, call-to-action buttons, coupons and sale tags. Each shows one concept, in named colours, with
at most one short word; its caption says all of that. Concepts are dealt out evenly; everything else is drawn from a
seeded generator, so the same options give the same images. Drawing: `marketing_art.py`. Building: `domains.py`.
"""

import random
from collections.abc import Iterator

from loragraft.data.domains import Domain, Picture
from loragraft.data.marketing_art import Design, draw
from loragraft.data.marketing_concepts import CONCEPTS
from loragraft.data.splits import split_concepts

# Gradients that look like a shop window, light to dark; white is legible on every one.
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
PLAIN = ("red", "blue", "green", "purple", "navy", "black", "teal", "pink")
DARK = ("navy", "black", "purple")
WORDS = ("SALE", "NEW", "FREE", "HOT", "-50%", "-20%")
CALLS = ("BUY", "SHOP", "SALE", "FREE")
RIBBONS = ("yellow", "red", "orange", "black", "teal", "gold")
LAYOUT_WEIGHTS = {"promo tile": 4, "badge": 2, "button": 2, "coupon": 2, "sale tag": 2}

ATTRIBUTION = """# Attribution

The images in this folder are composed from icons of **Font Awesome Free 6.6.0**, Copyright 2024 Fonticons, Inc.
(https://fontawesome.com), licensed under CC BY 4.0 (https://creativecommons.org/licenses/by/4.0/).

Changes: the icons were recoloured, scaled and placed on generated backgrounds with generated lettering, which is itself
set in Font Awesome's letter icons. The composed images are offered under CC BY 4.0 as well.
"""


def design(concept: str, rng: random.Random) -> Design:
    """Draw layout, colours and word for one image of the concept."""
    layout = rng.choices(list(LAYOUT_WEIGHTS), weights=list(LAYOUT_WEIGHTS.values()))[0]
    first, second = rng.choice(GRADIENTS) if rng.random() < 0.7 else (rng.choice(PLAIN),) * 2
    yellow_fits = first in DARK and second in DARK
    words = CALLS if layout == "button" else WORDS  # a button always says something
    text = rng.choice(words) if layout == "button" or rng.random() < 0.55 else ""
    return Design(
        layout=layout,
        icon=rng.choice(CONCEPTS[concept]),
        glyph="yellow" if yellow_fits and rng.random() < 0.5 else "white",
        first=first,
        second=second,
        ribbon=rng.choice([colour for colour in RIBBONS if colour not in (first, second)]),
        text=text,
    )


def caption(concept: str, made: Design, rng: random.Random) -> str:
    """What a person would write; at most 30 MiniLM tokens.

    The thing and its colours come first and in one piece, as in any icon's caption, and the layout is said after them:
    what a base knows of things then stays in reach, and the words for the layout are what is new.
    """
    plain = made.first == made.second
    surface = f"{_article(made.first)} {made.first}" + ("" if plain else f" to {made.second} gradient") + " background"
    thing = f"{made.glyph} {concept} icon on {surface}"
    layout = "call-to-action card" if made.layout == "button" else made.layout
    if not made.text:
        carrier = rng.choice(["", "", ", no text"])
    elif made.layout == "coupon":
        carrier = f", {made.text} in {made.glyph}"
    else:
        carrier = f", {made.ribbon} {made.text} {'button' if made.layout == 'button' else 'ribbon'}"
    return rng.choice([f"{thing}, {layout}{carrier}", f"{thing}{carrier}, {layout}"])


def _article(name: str) -> str:
    """`a` or `an`, by the first sound."""
    return "an" if name.startswith(("a", "e", "i", "o", "u", "hour")) and not name.startswith("eu") else "a"


def pictures(count: int, seed: int, validation_fraction: float, test_fraction: float) -> Iterator[Picture]:
    """`count` pictures, their concepts dealt out evenly and split so that no concept is in two splits."""
    splits = split_concepts(CONCEPTS, seed, validation_fraction, test_fraction)
    rng = random.Random(f"marketing/{seed}")
    order: list[str] = []
    for index in range(count):
        if not order:
            order = rng.sample(list(CONCEPTS), len(CONCEPTS))
        concept = order.pop()
        made = design(concept, rng)
        yield Picture(
            name=f"{index:06d}",
            svg=draw(made),
            caption=caption(concept, made, rng),
            concept=concept,
            split=splits[concept],
        )


DOMAIN = Domain(name="marketing", version=3, licence="CC-BY-4.0", attribution=ATTRIBUTION, pictures=pictures)
