"""Names, split, weights and pixels of icon records."""

import gzip
import json

import numpy as np
import pytest

icons = pytest.importorskip("icons")


def record(name: str, set_: str = "noto", **changes: object) -> dict:
    circle = '<circle cx="5" cy="5" r="5" fill="#f00"/>'
    base = {"set": set_, "name": name, "caption": f"{name}, noto emoji", "kind": "emoji", "category": None}
    return (
        base | {"tags": ["love"], "license": "MIT", "author": "A", "viewbox": [0, 0, 20, 10], "body": circle} | changes
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [("document-28", "document"), ("mail-notification-flat", "mail notification"), ("100", "100"), ("key", "key")],
)
def test_readable_name_drops_sizes_and_variants(name: str, words: str) -> None:
    assert icons.readable_name(name) == words


def test_split_is_by_name_across_sets_and_holds_whole_styles_out() -> None:
    names = [f"thing {chr(97 + i % 26)}{i}" for i in range(2000)]
    splits = {name: {icons.split_of(icons.parse_icon(record(name, s))) for s in ("noto", "twemoji")} for name in names}
    assert all(len(found) == 1 for found in splits.values())  # one split per name, whatever the set
    share = sum(found == {"name"} for found in splits.values()) / len(names)
    assert 0.02 < share < 0.06
    for style in icons.HELD_OUT_STYLES:
        assert icons.split_of(icons.parse_icon(record("red-heart", style))) == "style"
    assert all(icons.split_of(icons.parse_icon(record(word))) == "train" for word in icons.CORE_WORDS)


def test_weights_balance_names_not_records() -> None:
    many = [icons.parse_icon(record("cup", f"set{i}")) for i in range(9)]
    weights = icons.sampling_weights([*many, icons.parse_icon(record("oboe"))])
    assert sum(weights[:9]) == pytest.approx(3 * weights[9])


def test_render_keeps_aspect_and_straight_alpha() -> None:
    rgba = icons.render(icons.parse_icon(record("disc")), 64)
    assert rgba.shape == (4, 64, 64)
    assert rgba.dtype == np.uint8
    assert rgba[3, :15].max() == 0  # 20 x 10 in a square: empty bands above and below
    assert rgba[3, 32, 16] == 255
    inside = rgba[3] > 0
    assert (rgba[0][inside] >= 250).all()  # not premultiplied: red even where half transparent
    stats = icons.measure(rgba)
    assert stats.solid == pytest.approx(np.pi / 4, abs=0.03)
    assert stats.luminance == pytest.approx(0.299, abs=0.01)
    with pytest.raises(ValueError, match="at 1:"):
        icons.render(icons.parse_icon(record("broken", body="<circle")), 64)


def test_read_keeps_the_last_of_equal_drawings(tmp_path) -> None:
    path = tmp_path / "icons.jsonl.gz"
    with gzip.open(path, "wt") as lines:
        for name in ("document-16", "document-28"):
            lines.write(json.dumps(record(name, caption="document, gradient app icon", body=name)) + "\n")
    (only,) = icons.read_icons([path])
    assert (only.words, only.body) == ("document", "document-28")
