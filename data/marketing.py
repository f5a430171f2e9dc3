"""The `marketing` domain: promotional images composed from Font Awesome Free's solid icons (CC BY 4.0).

Promo tiles, round badges, call-to-action cards, coupons and sale tags. Each shows one concept, in named colours, with
at most one short word; its caption says all of that. Drawing: `marketing_art.py`. Building: `domains.py`.
"""

from loragraft.data.dice import Dice
from loragraft.data.domains import Composition, Domain
from loragraft.data.icon_art import ATTRIBUTION, GRADIENTS, PLAIN, surface
from loragraft.data.icon_concepts import CONCEPTS
from loragraft.data.marketing_art import Promotion, draw

DARK = ("navy", "black", "purple")
WORDS = ("SALE", "-50%")
"""Two words, large, on every third image: letters must be seen hundreds of times before anything learns them."""
RIBBONS = ("yellow", "red", "orange", "black")
LAYOUT_WEIGHTS = {"promo tile": 4, "badge": 2, "button": 2, "coupon": 2, "sale tag": 2}
NAMES = {"button": "call-to-action card"}


def promotion(concept: str, dice: Dice) -> Promotion:
    """Draw layout, colours and word for one image of the concept."""
    layout = dice.weighted(LAYOUT_WEIGHTS)
    first, second = dice.pick(GRADIENTS) if dice.chance(0.7) else (dice.pick(PLAIN),) * 2
    yellow_fits = first in DARK and second in DARK
    return Promotion(
        layout=layout,
        icon=dice.pick(CONCEPTS[concept]),
        glyph="yellow" if yellow_fits and dice.chance(0.5) else "white",
        first=first,
        second=second,
        ribbon=dice.pick([colour for colour in RIBBONS if colour not in (first, second)]),
        text=dice.pick(WORDS) if layout == "button" or dice.chance(0.35) else "",  # a button always says something
    )


def caption(concept: str, made: Promotion, dice: Dice) -> str:
    """What a person would write; at most 30 MiniLM tokens.

    The thing and its colours come first and in one piece, as in any icon's caption, and the layout is said after them:
    what a base knows of things then stays in reach, and the words for the layout are what is new.
    """
    thing = f"{made.glyph} {concept} icon on {surface(made.first, made.second)}"
    if not made.text:
        carrier = dice.pick(["", "", ", no text"])
    elif made.layout == "coupon":
        carrier = f", {made.text} in {made.glyph}"
    else:
        carrier = f", {made.ribbon} {made.text} {'button' if made.layout == 'button' else 'ribbon'}"
    layout = NAMES.get(made.layout, made.layout)
    return dice.pick([f"{thing}, {layout}{carrier}", f"{thing}{carrier}, {layout}"])


def short_caption(concept: str, made: Promotion, dice: Dice) -> str:
    """The same request, typed in a hurry: layout and thing, the word if there is one, sometimes the colour."""
    layout = NAMES.get(made.layout, made.layout)
    word = f", {made.text}" if made.text else ""  # left out, it would teach that anything may carry a word
    return dice.pick(
        [f"{layout}, {concept}{word}", f"{concept}, {layout}{word}", f"{made.first} {layout}, {concept}{word}"]
    )


def compose(concept: str, dice: Dice) -> Composition:
    """One image of the concept."""
    made = promotion(concept, dice)
    return Composition(svg=draw(made), caption=caption(concept, made, dice), short=short_caption(concept, made, dice))


DOMAIN = Domain(
    name="marketing",
    version=5,
    licence="CC-BY-4.0",
    attribution=ATTRIBUTION,
    concepts=tuple(CONCEPTS),
    compose=compose,
)
