"""The design domain's drawings: each style shows the colours that its caption names."""

from collections.abc import Callable

import pytest

from loragraft.data.design import (
    ACCENTS,
    BLUEPRINTS,
    DUOTONES,
    INKS,
    PASTELS,
    STICKERS,
    STYLE_WEIGHTS,
    caption,
    sheet,
)
from loragraft.data.design_art import SHAPES, STYLES, Sheet, draw
from loragraft.data.dice import Dice
from loragraft.data.icon_art import COLOURS
from loragraft.data.icon_concepts import CONCEPTS

Share = Callable[[str, str], float]


def _sheet(style: str, glyph: str, first: str, accent: str = "", shape: str = "") -> str:
    return draw(Sheet(style=style, icon="heart", glyph=glyph, first=first, second=first, accent=accent, shape=shape))


@pytest.mark.parametrize(
    ("svg", "shares"),
    [
        (_sheet("app icon", "white", "blue"), {"white": 0.1, "blue": 0.2}),
        (_sheet("sticker", "red", "light blue"), {"red": 0.1, "white": 0.05, "light blue": 0.3}),
        (_sheet("blueprint", "white", "blue"), {"white": 0.05, "blue": 0.4}),
        (_sheet("duotone pattern", "yellow", "purple"), {"yellow": 0.4, "purple": 0.4}),
        *((_sheet("Bauhaus poster", "navy", "cream", "red", s), {"navy": 0.2, "red": 0.12, "cream": 0.2}) for s in SHAPES),
    ],
)  # fmt: skip
def test_styles_show_their_colours(svg: str, shares: dict[str, float], share_of: Share) -> None:
    for colour, least in shares.items():
        assert share_of(svg, colour) > least, colour


def test_palette_and_styles_are_complete() -> None:
    pairs = {colour for pair in (*BLUEPRINTS, *DUOTONES) for colour in pair}
    assert pairs | set(STICKERS) | set(PASTELS) | set(INKS) | set(ACCENTS) <= set(COLOURS)
    assert set(STYLE_WEIGHTS) == set(STYLES)


def test_caption_says_the_thing_first_and_then_the_style() -> None:
    dice = Dice("captions")
    styles = set()
    for concept in list(CONCEPTS)[:80]:
        made = sheet(concept, dice)
        text = caption(concept, made, dice)
        assert text.startswith(f"{made.glyph} {concept} ")
        assert made.style in text
        assert all(colour in text for colour in (made.first, made.second, made.accent, made.shape))
        styles.add(made.style)
    assert styles == set(STYLES)
