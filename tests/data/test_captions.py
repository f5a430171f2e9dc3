"""Template, trigger, tag shuffling and several captions: what is said, how often, and always the same."""

import json
from pathlib import Path

import pytest
from PIL import Image

from loragraft.data.captions import dressed, with_variants
from loragraft.data.sample import Sample
from loragraft.data.sources import DataError, open_source
from loragraft.recipes.load import RecipeError, load_recipe
from loragraft.recipes.schema import DataConfig

TAGS = "sks, cat, red hat, table, window, night, rain, close-up"


def _config(**options: object) -> DataConfig:
    return DataConfig(folder="photos", **options)  # type: ignore[arg-type]


def _sample(caption: str = TAGS, captions: tuple[str, ...] = (), split: str = "train", name: str = "a.png") -> Sample:
    return Sample(Path(name), caption, split, "c", "CC0-1.0", captions=captions)  # type: ignore[arg-type]


def test_tags_are_shuffled_behind_those_that_are_kept() -> None:
    config = _config(shuffle_tags=True, keep_tags=2, caption_variants=6)
    said = with_variants(_sample(), config).said
    assert said[0] == TAGS, "the first as it was written"
    assert len(said) == 6
    for caption in said:
        assert caption.split(", ")[:2] == ["sks", "cat"]
        assert sorted(caption.split(", ")) == sorted(TAGS.split(", "))
    assert with_variants(_sample(), config).said == said
    assert with_variants(_sample(name="b.png"), config).said[1:] != said[1:]
    assert with_variants(_sample(), _config(shuffle_tags=True, keep_tags=2, caption_variants=6, seed=1)).said != said


def test_equal_orders_count_once_and_held_out_captions_stay() -> None:
    config = _config(shuffle_tags=True, caption_variants=64)
    assert sorted(with_variants(_sample("a, b, c"), config).said) == ["a, b, c", "a, c, b"]
    assert with_variants(_sample("no tags"), config).said == ("no tags",)
    assert with_variants(_sample(split="validation"), config).said == (TAGS,)
    assert with_variants(_sample(captions=("x", "y"), split="test", caption="x"), _config()).said == ("x",)


def test_every_caption_of_an_image_is_used() -> None:
    three = _sample("x, y, z", captions=("x, y, z", "u, v, w", "x, y, z", "t"))
    assert with_variants(three, _config()).said == ("x, y, z", "u, v, w", "t")
    said = with_variants(three, _config(shuffle_tags=True, caption_variants=2)).said
    assert len(said) >= 3, "an order of each at least"
    assert {tuple(sorted(caption.split(", "))) for caption in said} == {("x", "y", "z"), ("u", "v", "w"), ("t",)}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "a cat"),
        ({"trigger": "sks"}, "sks, a cat"),
        ({"caption_template": "a photo of {caption}"}, "a photo of a cat"),
        ({"caption_template": "a photo of {caption}", "trigger": "sks"}, "sks, a photo of a cat"),
        ({"caption_template": "photo, sks, {caption}", "trigger": "sks"}, "photo, sks, a cat"),
    ],
)
def test_template_and_trigger(options: dict[str, object], expected: str) -> None:
    assert dressed("a cat", _config(**options)) == expected
    assert dressed("", _config(**options)) == ""


def test_the_trigger_in_a_template_is_replaced_when_the_recipe_is_read() -> None:
    template = 'data.caption_template="{caption}, in {trigger} style"'
    recipe = load_recipe("marketing", [template, "data.trigger=sks"])
    assert recipe.data.caption_template == "{caption}, in sks style"
    with pytest.raises(RecipeError, match=r"says \{trigger\}, but data.trigger is empty"):
        load_recipe("marketing", [template])
    with pytest.raises(RecipeError, match=r"has no \{caption\}, so all images would say the same; .* data.caption"):
        load_recipe("marketing", ["data.caption_template=a cat"])
    with pytest.raises(RecipeError, match="begins with a brace or a bracket stands in quotes"):
        load_recipe("marketing", [template.replace('"', "")])


def test_a_list_of_captions_in_metadata(tmp_path: Path) -> None:
    rows = [["a red cat", " ", "cat"], "a dog", ["one bird"]]
    for i in range(3):
        Image.new("RGB", (8, 8), (i * 90, 0, 0)).save(tmp_path / f"{i}.png")
    entries = [{"file_name": f"{i}.png", "text": text, "split": "train"} for i, text in enumerate(rows)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, entries)))
    config = DataConfig(folder=str(tmp_path), caption_template="photo of {caption}")
    samples = open_source(config, 8, tmp_path / "cache")
    assert [s.said for s in samples] == [
        ("photo of a red cat", "photo of cat"),
        ("photo of a dog",),
        ("photo of one bird",),
    ]
    assert samples[0].concept == "a red cat"
    entries[1]["text"] = ["a dog", 7]  # type: ignore[list-item]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, entries)))
    with pytest.raises(DataError, match=r"metadata\.jsonl:2: text must be text or a list of texts, not \['a dog', 7\]"):
        open_source(config, 8, tmp_path / "cache")


def test_pocket_recipes_say_what_they_said(tmp_path: Path) -> None:
    samples = open_source(DataConfig(domain="marketing", count=6, short_captions=0.5), 16, tmp_path)
    assert {s.captions for s in samples} == {()}
