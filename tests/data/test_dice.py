"""Draws: the same numbers for ever, and fair."""

from collections import Counter

import pytest

from loragraft.data.dice import Dice

PINNED = [45, 10, 10, 42, 85, 9, 25, 19]
PINNED_ORDER = list("efbcad")


def test_the_numbers_never_change() -> None:
    """Written down once: another machine or Python that gives others would change data sets and prompts."""
    assert [Dice("loragraft").below(100) for _ in range(2)] == [PINNED[0]] * 2
    dice = Dice("loragraft")
    assert [dice.below(100) for _ in range(8)] == PINNED
    assert Dice("loragraft").shuffled("abcdef") == PINNED_ORDER


def test_draws_are_fair() -> None:
    dice = Dice("fair")
    picks = Counter(dice.pick("abcd") for _ in range(4000))
    assert all(abs(picks[letter] - 1000) < 120 for letter in "abcd")
    weighted = Counter(dice.weighted({"a": 3, "b": 1}) for _ in range(4000))
    assert abs(weighted["a"] - 3000) < 120
    assert abs(sum(dice.chance(0.2) for _ in range(4000)) - 800) < 120
    assert not any(dice.chance(0.0) for _ in range(50)) and all(dice.chance(1.0) for _ in range(50))
    first = Counter(dice.shuffled("abc")[0] for _ in range(3000))
    assert all(abs(first[letter] - 1000) < 120 for letter in "abc")


def test_nothing_to_draw_from_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one thing"):
        Dice("x").pick([])
