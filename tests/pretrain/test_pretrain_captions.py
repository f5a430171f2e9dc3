"""Scenes say in words what they paint."""

import random
import re

import pytest
import torch

captions = pytest.importorskip("captions")
composite = pytest.importorskip("composite")
icons = pytest.importorskip("icons")

ICON = icons.Icon("noto", "red heart", "noto emoji", ("love", "valentine"), False, "MIT", "A", (0, 0, 8, 8), "")
STATS = icons.Stats(0.4, 0.8)


def scenes(count: int = 600, seed: int = 5) -> list[tuple[dict[str, int], str]]:
    rows, texts = captions.draw_scenes([ICON], [STATS], [1.0], [0], count, seed)
    return [
        (dict(zip(captions.FIELDS, row.tolist(), strict=True)), text) for row, text in zip(rows, texts, strict=True)
    ]


def nearest(colour: tuple[int, ...]) -> str:
    return min(
        captions.COLOURS, key=lambda n: sum((a - b) ** 2 for a, b in zip(captions.COLOURS[n], colour, strict=True))
    )


def test_same_seed_same_scenes_and_many_variants() -> None:
    assert scenes() == scenes()
    assert scenes(seed=6) != scenes()
    assert len({text for _, text in scenes()}) > 400


def test_captions_name_background_tint_place_and_size() -> None:
    seen = {"solid": 0, "gradient": 0, "tint": 0, "side": 0}
    for scene, text in scenes():
        ground = tuple(scene[f"a_{c}"] for c in ("red", "green", "blue"))
        if scene["background"] != captions.SOLID:
            seen["gradient"] += 1
            assert "gradient background" in text
        elif ground != (255, 255, 255):
            seen["solid"] += 1
            named = re.search(r"(light )?(\w+) background", text)
            assert named is not None
            assert named[1] or nearest(ground) == named[2]
        if scene["tint"] != captions.ORIGINAL:
            seen["tint"] += 1
            colour = tuple(scene[f"tint_{c}"] for c in ("red", "green", "blue"))
            assert nearest(colour) in text or "light" in text
        assert ("top" in text) == (scene["top"] < 10 and scene["size"] != 0)
        assert ("right" in text) == (scene["left"] + captions.SIZES[scene["size"]] > 118 and scene["size"] != 0)
        seen["side"] += "at the" in text
        assert not ("small" in text and scene["size"] != 2)
    assert min(seen.values()) > 20


def test_composite_paints_what_the_row_says() -> None:
    glyphs = [torch.zeros(1, 4, s, s, dtype=torch.uint8) for s in captions.SIZES]
    for pixels in glyphs:
        pixels[:, 3] = 255  # a black square
    row = [0, 2, 4, 60, captions.HORIZONTAL, 255, 0, 0, 0, 0, 255, captions.SILHOUETTE, 255, 255, 255]
    plain = [0, 0, 8, 8, captions.SOLID, 20, 155, 150, 20, 155, 150, captions.ORIGINAL, 0, 0, 0]
    tinted, original = composite.composite(glyphs, torch.tensor([row, plain], dtype=torch.int32))
    assert tinted.shape == (3, 128, 128)
    assert torch.equal(tinted[:, 4:68, 60:124], torch.ones(3, 64, 64))
    assert tinted[0, 0, 0] == 1  # red on the left ...
    assert tinted[2, 127, 127] == 1  # ... blue on the right
    assert torch.equal(original[:, 8:120, 8:120], -torch.ones(3, 112, 112))
    assert original[:, 0, 0].tolist() == pytest.approx([20 / 127.5 - 1, 155 / 127.5 - 1, 150 / 127.5 - 1], abs=1e-5)


def test_shaded_tint_keeps_inner_structure() -> None:
    rgba = torch.zeros(1, 4, 8, 8)
    rgba[:, 3] = 1
    rgba[:, :3, :, 4:] = 1  # left black, right white
    for mode, opaque in ((captions.LIGHT_OPAQUE, 1), (captions.DARK_OPAQUE, 0)):
        _, alpha = composite.tint(rgba, torch.tensor([mode]), torch.ones(1, 3))
        halves = alpha[0, 0, 0, 0].item(), alpha[0, 0, 0, 7].item()
        assert halves[opaque] == 1
        assert halves[1 - opaque] == pytest.approx(0.25)


def test_busy_pictures_are_pictures() -> None:
    made = composite.shapes(4, torch.Generator().manual_seed(0))
    assert made.shape == (4, 3, 128, 128)
    assert made.min() >= 0
    assert made.max() <= 1
    assert torch.equal(made, composite.shapes(4, torch.Generator().manual_seed(0)))


def test_articles() -> None:
    rng = random.Random(0)
    assert captions.article("orange car") == "an orange car"
    assert captions.phrase(ICON, "car", "orange", rng)
