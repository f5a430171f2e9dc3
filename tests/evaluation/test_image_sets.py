"""Sets on disk: the key, resuming, and what an image says about itself."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from loragraft.evaluation.image_sets import ImageSet, adapter_hash, present, read_images, render_missing, rendered_on

from .conftest import Studio, make_adapter

SET = ImageSet(name="base", prompts=("a", "b", "c"), count=40, seed=5, steps=2, guidance=3.0)


def test_prompts_repeat_and_seeds_do_not(studio: Studio, backbone: Any, tmp_path: Path) -> None:
    folder = render_missing(backbone, [replace(SET, count=5)], tmp_path)["base"]
    assert studio.drawn == [("a", 5), ("b", 6), ("c", 7), ("a", 8), ("b", 9)]
    assert [path.name for path in present(folder, 9)] == [f"{i:04d}.png" for i in range(5)]


def test_a_killed_render_loses_its_batch_and_nothing_else(studio: Studio, backbone: Any, tmp_path: Path) -> None:
    studio.fail_after = 20  # batches of 16: the second one dies
    with pytest.raises(KeyboardInterrupt):
        render_missing(backbone, [SET], tmp_path)
    folder = SET.folder(tmp_path, backbone)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(before) == [f"{i:04d}.png" for i in range(16)]
    studio.fail_after, studio.drawn = 10**9, []
    render_missing(backbone, [SET], tmp_path)
    assert [seed for _, seed in studio.drawn] == [5 + i for i in range(16, 40)], "what was there is not drawn again"
    assert all((folder / name).read_bytes() == content for name, content in before.items())
    assert len(present(folder, 40)) == 40


def test_a_hole_is_filled_and_ends_what_counts_as_present(studio: Studio, backbone: Any, tmp_path: Path) -> None:
    folder = render_missing(backbone, [SET], tmp_path)["base"]
    (folder / "0007.png").unlink()
    assert len(present(folder, 40)) == 7
    studio.drawn = []
    render_missing(backbone, [SET], tmp_path)
    assert studio.drawn == [("b", 12)]


def test_the_key_is_everything_that_pixels_depend_on(backbone: Any, tmp_path: Path) -> None:
    adapter = make_adapter("mine")
    plain, moved = SET.folder(tmp_path, backbone), replace(SET, adapter=adapter).folder(tmp_path, backbone)
    other = [
        replace(SET, prompts=("a", "b")),
        replace(SET, seed=6),
        replace(SET, steps=3),
        replace(SET, guidance=4.0),
        replace(SET, adapter=adapter),
        replace(SET, adapter=adapter, weight=0.5),
        replace(SET, adapter=make_adapter("mine", seed=1)),
    ]
    bases = [{"base_id": "c" * 64}, {"profile": "interchange"}, {"encoders": SimpleNamespace(id="enc-2")}]
    folders = [entry.folder(tmp_path, backbone) for entry in other]
    folders += [SET.folder(tmp_path, SimpleNamespace(**{**vars(backbone), **change})) for change in bases]
    assert len({plain, *folders}) == 1 + len(other) + len(bases)
    elsewhere = SimpleNamespace(**{**vars(backbone), "device": SimpleNamespace(type="cuda")})
    assert SET.folder(tmp_path, elsewhere) == plain, "a set may be begun on one device and finished on another"
    assert replace(SET, count=7).folder(tmp_path, backbone) == plain, "the first N images of a set are the set of N"
    renamed = replace(adapter, name="other", metadata={})
    assert adapter_hash(renamed) == adapter_hash(adapter)
    assert replace(SET, adapter=renamed).folder(tmp_path, backbone) == moved


def test_two_sets_of_one_name_are_refused(studio: Studio, backbone: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one name"):
        render_missing(backbone, [SET, SET], tmp_path)


def test_images_say_where_they_were_drawn_and_damage_is_named(studio: Studio, backbone: Any, tmp_path: Path) -> None:
    folder = render_missing(backbone, [replace(SET, count=4)], tmp_path)["base"]
    (origin,) = rendered_on(present(folder, 4))
    assert "cpu" in origin
    assert "torch" in origin
    damaged = folder / "0001.png"
    damaged.write_bytes(damaged.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"0001\.png is not a readable image .* delete it and score again"):
        read_images(present(folder, 4))
    Image.new("RGB", (4, 4)).save(folder / "0002.png")
    assert rendered_on([folder / "0002.png"]) == ["unknown, torch unknown"]
