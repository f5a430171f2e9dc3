"""Published prompt sets in their own layouts, made small; SVDQuant's subset and seeds; training apart from evaluation."""

import csv
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from loragraft.backbones.bases import list_bases
from loragraft.data.errors import DataError
from loragraft.data.overlap import check_overlap
from loragraft.data.prompt_sets import (
    SVDQUANT_SAMPLING,
    Entry,
    read_prompt_set,
    seed_of,
    split_for_training,
    svdquant_subset,
    write_folder,
)
from loragraft.data.sources import open_source
from loragraft.recipes.schema import DataConfig

SHARED = Path(__file__).parents[3] / "shared" / "data" / "prompts"


def draw(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((48, 48), Image.Resampling.BICUBIC).save(path)


@pytest.fixture
def mjhq(tmp_path: Path) -> Path:
    """Twenty entries, as unpacked."""
    folder = tmp_path / "mjhq"
    table = {
        f"{i * 7919:08x}": {"category": ("animals", "logo")[i % 2], "prompt": f"picture of {i}"} for i in range(20)
    }
    for number, (name, about) in enumerate(table.items()):
        draw(folder / "mjhq30k_imgs" / about["category"] / f"{name}.jpg", number)
    (folder / "meta_data.json").write_text(json.dumps(table))
    return folder


def test_mjhq(mjhq: Path) -> None:
    found = read_prompt_set("mjhq", mjhq)
    assert (found.title, len(found.entries)) == ("MJHQ-30K", 20)
    assert found.entries[3].prompt == "picture of 3" and found.entries[3].category == "logo"
    assert all(entry.image and entry.image.is_file() for entry in found.entries)


def test_sdci(tmp_path: Path) -> None:
    (tmp_path / "sDCI.yaml").write_text(yaml.safe_dump({"sa_1": "A road.", "sa_2": "Two boats: one red."}))
    draw(tmp_path / "sDCI" / "sa_2.jpg", 0)
    first, second = read_prompt_set("sdci", tmp_path).entries
    assert (first.prompt, first.image) == ("A road.", None)
    assert second.image == tmp_path / "sDCI" / "sa_2.jpg"


def test_coco_in_its_three_forms(tmp_path: Path) -> None:
    for folder in ("official", "karpathy", "table"):
        (tmp_path / folder).mkdir()
    name = "COCO_val2014_000000000042"
    notes = [(9, 42, "later"), (3, 42, "A cat sat. "), (5, 7, "A dog.")]
    official = {
        "images": [{"id": 42, "file_name": f"{name}.jpg"}, {"id": 7, "file_name": "COCO_val2014_000000000007.jpg"}],
        "annotations": [{"id": i, "image_id": image, "caption": text} for i, image, text in notes],
    }
    (tmp_path / "official" / "captions_val2014.json").write_text(json.dumps(official))
    draw(tmp_path / "official" / "val2014" / f"{name}.jpg", 0)
    dog, cat = read_prompt_set("coco", tmp_path / "official").entries
    assert (cat.name, cat.prompt, cat.split, dog.prompt) == (name, "A cat sat.", "val2014", "A dog.")
    assert cat.image is not None and dog.image is None

    image = {"filename": f"{name}.jpg", "split": "restval", "sentences": [{"raw": "A cat sat."}, {"raw": "Another."}]}
    (tmp_path / "karpathy" / "dataset_coco.json").write_text(json.dumps({"images": [image]}))
    (entry,) = read_prompt_set("coco", tmp_path / "karpathy").entries
    assert (entry.name, entry.prompt, entry.split) == (name, "A cat sat.", "restval")

    with (tmp_path / "table" / "coco_30k.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image_id", "source", "prompt"], ["000000000042", "coco-30k", "A cat, sat."]])
    draw(tmp_path / "table" / "val2014" / f"{name}.jpg", 0)
    (entry,) = read_prompt_set("coco", tmp_path / "table").entries
    assert (entry.name, entry.prompt, entry.image) == (
        "000000000042",
        "A cat, sat.",
        tmp_path / "table" / "val2014" / f"{name}.jpg",
    )


def test_the_seed_is_svdquants_rolling_hash() -> None:
    assert seed_of("") == 0
    assert seed_of("ab") == 31 * ord("a") + ord("b")
    long = "35c9ca6701e26e0b3fede61f9dcc39d9377d96f3"
    assert seed_of(long) == sum(ord(c) * 31 ** (len(long) - 1 - i) for i, c in enumerate(long)) % (10**9 + 7)


def test_the_subset_is_svdquants(mjhq: Path) -> None:
    entries = read_prompt_set("mjhq", mjhq).entries
    names = list(json.loads((mjhq / "meta_data.json").read_text()))
    random.Random(0).shuffle(names)
    assert [entry.name for entry in svdquant_subset(entries, 7)] == sorted(names[:7])
    with pytest.raises(DataError, match="5000 prompts were asked for, and the set has 20"):
        svdquant_subset(entries)


def test_sampling_is_given_for_bases_that_exist() -> None:
    assert set(SVDQUANT_SAMPLING) <= set(list_bases())


def test_training_leaves_out_what_is_evaluated_and_what_says_the_same(mjhq: Path) -> None:
    entries = list(read_prompt_set("mjhq", mjhq).entries)
    evaluation = svdquant_subset(entries, 5)
    twin = replace(
        next(e for e in entries if e not in evaluation), name="twin", prompt=f" {evaluation[0].prompt.upper()} "
    )
    kept, left = split_for_training([*entries, twin], evaluation)
    assert left == [twin]
    assert {e.name for e in kept} == {e.name for e in entries} - {e.name for e in evaluation}
    with pytest.raises(DataError, match="none is left to train on"):
        split_for_training(entries, entries)


def config(folder: Path) -> DataConfig:
    return DataConfig(folder=str(folder))


def test_a_written_folder_trains_on_the_rest_and_keeps_the_subset_as_test(mjhq: Path, tmp_path: Path) -> None:
    found = read_prompt_set("mjhq", mjhq)
    evaluation = svdquant_subset(found.entries, 6)
    counts = write_folder(found, evaluation, tmp_path / "own")
    assert counts == {"train": 13, "validation": 1, "test": 6, "left out": 0}
    samples = open_source(config(tmp_path / "own"), 32, tmp_path / "cache")
    assert {s.image.stem for s in samples if s.split == "test"} == {entry.name for entry in evaluation}
    assert {s.licence for s in samples} == {"Playground v2.5 Community License"}
    check_overlap(samples, config(tmp_path / "own"), tmp_path / "cache")
    with pytest.raises(DataError, match="exists; give a new folder"):
        write_folder(found, evaluation, tmp_path / "own")


def test_one_picture_in_both_splits_is_an_error_when_training_starts(mjhq: Path, tmp_path: Path) -> None:
    found = read_prompt_set("mjhq", mjhq)
    evaluation = svdquant_subset(found.entries, 6)
    trained = split_for_training(found.entries, evaluation)[0][0]
    assert trained.image and evaluation[0].image
    Image.open(evaluation[0].image).resize((64, 64)).save(trained.image)
    write_folder(found, evaluation, tmp_path / "own")
    samples = open_source(config(tmp_path / "own"), 32, tmp_path / "cache")
    with pytest.raises(DataError, match="held-out images are also in the training split"):
        check_overlap(samples, config(tmp_path / "own"), tmp_path / "cache")


def test_images_that_are_not_here_are_named(mjhq: Path, tmp_path: Path) -> None:
    found = read_prompt_set("mjhq", mjhq)
    bare = replace(found, entries=(replace(found.entries[0], image=None), *found.entries[1:]))
    with pytest.raises(DataError, match=f"1 images of MJHQ-30K are not on this machine: {found.entries[0].name}"):
        write_folder(bare, svdquant_subset(bare.entries, 6), tmp_path / "own")
    assert not (tmp_path / "own").exists()


def spoil_json(folder: Path) -> None:
    (folder / "meta_data.json").write_text("{")


def spoil_keys(folder: Path) -> None:
    (folder / "meta_data.json").write_text('{"a": {"prompt": "x"}}')


def spoil_type(folder: Path) -> None:
    (folder / "meta_data.json").write_text('{"a": {"prompt": null, "category": "logo"}}')


def spoil_table(folder: Path) -> None:
    (folder / "meta_data.json").write_text("[1, 2]")


def spoil_encoding(folder: Path) -> None:
    (folder / "meta_data.json").write_bytes('{"a": {"prompt": "café", "category": "logo"}}'.encode("latin-1"))


def spoil_prompt(folder: Path) -> None:
    (folder / "meta_data.json").write_text('{"a": {"prompt": " ", "category": "logo"}}')


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_json, "is not JSON"),
        (spoil_keys, "'a' has no category and prompt"),
        (spoil_type, "'a' has no category and prompt"),
        (spoil_table, "is no table of names"),
        (spoil_encoding, r"meta_data\.json is not UTF-8"),
        (spoil_prompt, "1 empty prompts of 1: a"),
    ],
)
def test_spoilt_files_are_named(mjhq: Path, spoil: Callable[[Path], Any], message: str) -> None:
    spoil(mjhq)
    with pytest.raises(DataError, match=message):
        read_prompt_set("mjhq", mjhq)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("coco_30k.csv", "coco_id,prompt\n5,a cat\n", r"has no column image_id; found coco_id, prompt"),
        ("coco_30k.csv", "image_id,prompt\n5,a cat\n6\n", r"coco_30k\.csv:3 has no image_id and prompt"),
        ("coco_30k.csv", "", "has no column image_id and prompt"),
        ("coco_30k.csv", "image_id,prompt\n5,a caf\xe9\n", r"coco_30k\.csv is not UTF-8"),
        (
            "captions_val2014.json",
            '{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"id": 1, "image_id": 1, "caption": null}]}',
            "is not a COCO caption file",
        ),
        ("dataset_coco.json", '{"images": [{"filename": "a.jpg", "sentences": [{"raw": 5}]}]}', "not Karpathy's split"),
    ],
)
def test_spoilt_coco_files_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=message):
        read_prompt_set("coco", tmp_path)


def test_wrong_names_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="did you mean mjhq"):
        read_prompt_set("mjhq30k", tmp_path)
    for which in ("mjhq", "sdci", "coco"):
        with pytest.raises(DataError, match=r"does not exist|has none of dataset_coco\.json"):
            read_prompt_set(which, tmp_path)


@pytest.mark.skipif(not (SHARED / "coco_30k.csv").is_file(), reason="the published lists are not on this machine")
def test_the_published_lists_are_read(tmp_path: Path) -> None:
    coco = read_prompt_set("coco", SHARED)
    assert (
        len(coco.entries) == 30_000 and coco.entries[0].prompt == "A bicycle replica with a clock as the front wheel."
    )
    (tmp_path / "meta_data.json").symlink_to(SHARED / "mjhq30k_excerpt_72.json")
    mjhq = read_prompt_set("mjhq", tmp_path)
    assert len(mjhq.entries) == 72 and all(isinstance(entry, Entry) for entry in mjhq.entries)
