"""The marketing domain's drawings and words."""

from collections import Counter
from collections.abc import Callable

import pytest

from loragraft.data.dice import Dice
from loragraft.data.icon_art import COLOURS, GRADIENTS, PLAIN
from loragraft.data.icon_concepts import CONCEPTS
from loragraft.data.marketing import DOMAIN, RIBBONS, WORDS, caption, promotion, short_caption
from loragraft.data.marketing_art import LAYOUTS, Promotion, draw

Share = Callable[[str, str], float]


@pytest.mark.parametrize(
    ("layout", "text"),
    [(layout, text) for layout in LAYOUTS for text in ("", *WORDS) if text or layout != "button"],
)
def test_layouts_show_their_colours(layout: str, text: str, share_of: Share) -> None:
    svg = draw(
        Promotion(layout=layout, icon="heart", glyph="white", first="navy", second="navy", ribbon="yellow", text=text)
    )
    assert share_of(svg, "navy") > 0.2
    assert share_of(svg, "white") > 0.2  # glyph and ground
    carries_ribbon = text and layout != "coupon"
    assert (share_of(svg, "yellow") > 0.08) == bool(carries_ribbon)


def test_words_are_large(share_of: Share) -> None:
    """Ink of the word on its ribbon: at least 3 % of the picture, or nothing could learn it at 128 px."""
    for text in WORDS:
        tile = Promotion(
            layout="promo tile", icon="heart", glyph="white", first="red", second="red", ribbon="yellow", text=text
        )
        assert share_of(draw(tile), "black") > 0.03, text


def test_palette_is_complete() -> None:
    assert {c for pair in GRADIENTS for c in pair} | set(PLAIN) | set(RIBBONS) <= set(COLOURS)


def test_caption_says_the_thing_first_and_then_what_is_drawn() -> None:
    dice = Dice("captions")
    for concept in list(CONCEPTS)[:60]:
        made = promotion(concept, dice)
        text = caption(concept, made, dice)
        assert text.startswith(f"{made.glyph} {concept} icon on a")
        assert (made.text in text) if made.text else not any(word in text for word in WORDS)
        assert made.first in text and made.second in text
        short = short_caption(concept, made, dice)
        assert concept in short and made.text in short


def test_a_good_third_carry_a_word_and_both_words_are_common() -> None:
    words = Counter(next((word for word in WORDS if word in p.caption), "") for p in DOMAIN.pictures(1200, 0, 0.1, 0.1))
    assert 0.45 < words[""] / 1200 < 0.65
    assert all(words[word] > 200 for word in WORDS)
