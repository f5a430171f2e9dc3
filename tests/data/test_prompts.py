"""Evaluation prompts: enough, different, about test concepts only, the same everywhere."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from loragraft import cli
from loragraft.data.domains import DOMAINS, domain
from loragraft.data.prompts import evaluation_prompts, prompts_id
from loragraft.data.sources import DataError
from loragraft.data.splits import split_concepts
from loragraft.recipes.load import load_recipe
from loragraft.recipes.schema import DataConfig

NOWHERE = Path("/nonexistent")  # a domain's prompts need no cache


@pytest.mark.parametrize("name", DOMAINS)
def test_enough_prompts_about_test_concepts_only(name: str) -> None:
    config = load_recipe(name).data
    prompts = evaluation_prompts(config, 256, NOWHERE)
    assert len(prompts) == 256
    assert len({p.long for p in prompts}) == len({p.short for p in prompts}) == 256
    splits = split_concepts(domain(name).concepts, config.seed, config.validation_fraction, config.test_fraction)
    assert {splits[p.concept] for p in prompts} == {"test"}
    assert {p.concept for p in prompts} == {concept for concept, split in splits.items() if split == "test"}
    assert all(p.concept in p.long and p.concept in p.short for p in prompts)
    trained = {p.caption for p in domain(name).pictures(config.count, config.seed, 0.1, 0.1) if p.split == "train"}
    assert not trained & {p.long for p in prompts}


def test_a_longer_list_starts_with_the_shorter_and_has_another_id() -> None:
    config = DataConfig(domain="design")
    few, many = evaluation_prompts(config, 20, NOWHERE), evaluation_prompts(config, 40, NOWHERE)
    assert many[:20] == few
    assert prompts_id(few) != prompts_id(many)
    assert prompts_id(few) == prompts_id(evaluation_prompts(config, 20, NOWHERE))
    assert evaluation_prompts(DataConfig(domain="design", seed=1), 20, NOWHERE) != few


def test_another_process_with_another_hash_seed_prints_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["prompts", "marketing", "--count", "200"]) == 0
    here = capsys.readouterr()
    lines = [json.loads(line) for line in here.out.splitlines()]
    assert len(lines) == 200
    assert set(lines[0]) == {"long", "short", "concept"}
    assert "200 prompts, sha256 " in here.err
    command = [sys.executable, "-m", "loragraft.cli", "prompts", "marketing", "--count", "200"]
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    there = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert there.stdout == here.out
    assert there.stderr.splitlines()[-1] == here.err.splitlines()[-1]


def test_the_trigger_comes_first() -> None:
    (prompt,) = evaluation_prompts(DataConfig(domain="design", trigger="in my style"), 1, NOWHERE)
    assert prompt.long.startswith("in my style, ")
    assert prompt.short.startswith("in my style, ")


def test_a_folder_asks_for_the_captions_of_its_test_images(tmp_path: Path) -> None:
    for i, word in enumerate("abcdefghij"):
        Image.new("RGB", (8, 8), (i * 20, 0, 0)).save(tmp_path / f"{word}.png")
        (tmp_path / f"{word}.txt").write_text(f"thing {word}")
    config = DataConfig(folder=str(tmp_path), test_fraction=0.3)
    prompts = evaluation_prompts(config, 256, tmp_path / "cache")
    assert len(prompts) == 3
    assert all(p.long.startswith("thing ") and p.short == "" for p in prompts)
    with pytest.raises(DataError, match=r"raise data\.test_fraction"):
        evaluation_prompts(DataConfig(folder=str(tmp_path), test_fraction=0.0), 3, tmp_path / "cache")


def test_impossible_requests_are_errors() -> None:
    with pytest.raises(DataError, match=r"gave only .* different prompts"):
        evaluation_prompts(DataConfig(domain="design", test_fraction=0.01), 900, NOWHERE)
    with pytest.raises(DataError, match="has no concept"):
        evaluation_prompts(DataConfig(domain="design", test_fraction=0.0), 3, NOWHERE)
    with pytest.raises(DataError, match="give 1 or more"):
        evaluation_prompts(DataConfig(domain="design"), 0, NOWHERE)
