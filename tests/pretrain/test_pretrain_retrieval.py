"""The retrieval projection: it learns a relation that generalises, repeats itself, and resumes its features."""

from dataclasses import replace
from pathlib import Path

import pytest
import retrieval
import torch
from PIL import Image
from retrieval import Featuriser, Pairs, TrainSettings, batches, evaluate, train

SETTINGS = replace(TrainSettings(), hidden=32, shared=16, epochs=30, batch=64)


def related(count: int, seed: int) -> Pairs:
    """Captions and images that share eight hidden numbers; the maps are the same for every seed."""
    fixed = torch.Generator().manual_seed(99)
    to_text, to_image = torch.randn(8, 768, generator=fixed), torch.randn(8, 1280, generator=fixed)
    hidden = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
    return Pairs(
        torch.nn.functional.normalize(hidden @ to_text, dim=1), hidden @ to_image, [f"{seed}/{i}" for i in range(count)]
    )


def test_unseen_pairs_are_found_and_the_same_seed_gives_the_same_towers() -> None:
    towers = train([related(256, 0), related(128, 1)], SETTINGS, seed=0)
    found = evaluate(towers, related(100, 2), 100)
    assert found["chance"] == pytest.approx(0.05)
    assert found["r5_text_to_image"] > 0.5
    assert found["r5_image_to_text"] > 0.5
    again = train([related(256, 0), related(128, 1)], SETTINGS, seed=0)
    assert all(
        torch.equal(a, b) for a, b in zip(towers.state_dict().values(), again.state_dict().values(), strict=True)
    )


def test_the_shipped_shape_stays_under_its_limit() -> None:
    settings = TrainSettings()
    packed = retrieval.pack_state(retrieval.Towers(settings.hidden, settings.shared).state_dict())
    assert sum(tensor.nbytes for tensor in packed.values()) + 4096 < retrieval.LIMIT_BYTES


def test_batches_go_through_everything_before_they_repeat() -> None:
    drawn = list(batches(10, 4, 5, seed=1))
    assert [len(batch) for batch in drawn] == [4] * 5
    assert len(set(torch.cat(drawn[:2]).tolist())) == 8
    assert [len(batch) for batch in batches(3, 8, 2, seed=1)] == [3, 3]


def test_features_resume_part_by_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def pictures(start: int, stop: int) -> list[Image.Image]:
        asked.append((start, stop))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return [Image.new("RGB", (8, 8), (i % 256, 0, 0)) for i in range(start, stop)]

    monkeypatch.setattr(retrieval, "PART", 4)
    monkeypatch.setattr(retrieval, "load_lite0", lambda _: "lite0")
    monkeypatch.setattr(retrieval, "MiniLMEncoder", lambda: "minilm")
    monkeypatch.setattr(
        retrieval, "lite0_features", lambda _, images: torch.tensor([[float(i.getpixel((0, 0))[0])] for i in images])
    )
    monkeypatch.setattr(retrieval, "text_features", lambda _, captions: torch.tensor([[float(c)] for c in captions]))
    captions = [str(i) for i in range(10)]
    with pytest.raises(KeyboardInterrupt):
        Featuriser(tmp_path).pairs("x", captions, pictures, "key")
    found = Featuriser(tmp_path).pairs("x", captions, pictures, "key")
    assert asked == [(0, 4), (4, 8), (4, 8), (8, 10)], "the first part was not made again"
    assert found.text.flatten().tolist() == found.images.flatten().tolist() == list(range(10))
    Featuriser(tmp_path).pairs("x", captions, pictures, "another key")
    assert asked[4:] == [(0, 4), (4, 8), (8, 10)]
