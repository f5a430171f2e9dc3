"""What the picker offers: runs, published folders and files; what cannot be read is said, not raised."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from loragraft.demo.catalogue import Catalogue
from loragraft.quantization.tensor_file import write_tensors
from loragraft.zoo.entry import Status
from loragraft.zoo.places import open_place
from loragraft.zoo.publish import publish


def test_runs_published_folders_single_runs_and_files(runs: Any, tmp_path: Path) -> None:
    (tmp_path / "unfinished").mkdir()
    shutil.copytree(runs.folder / "ours", tmp_path / "ours")
    zoo = tmp_path / "zoo"
    publish(tmp_path / "ours", open_place(str(zoo)))
    publish(tmp_path / "ours", open_place(str(zoo)), version="1.10.0")
    publish(tmp_path / "ours", open_place(str(zoo)), version="1.11.0")
    open_place(str(zoo)).set_status("ours", "1.11.0", Status(yanked="wrong data"))
    assert Catalogue([zoo]).listing().adapters["ours"].parent.name == "1.10.0", "the newest that is not yanked"
    file = runs.folder / "second" / "adapter" / "pytorch_lora_weights.safetensors"
    for place in (tmp_path, zoo, tmp_path / "ours", tmp_path / "ours" / "adapter"):
        listing = Catalogue([place]).listing()
        assert (list(listing.adapters), listing.problems) == (["ours"], ()), place
    assert Catalogue([file]).listing().adapters == {"second": file}
    assert list(Catalogue([runs.folder]).listing().adapters) == ["foreign", "ours", "second"]


def test_a_damaged_zoo_is_told_and_the_rest_stays(runs: Any, tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text("[")
    listing = Catalogue([tmp_path, runs.folder / "ours"]).listing()
    assert list(listing.adapters) == ["ours"]
    assert "is not the JSON that a zoo writes" in listing.problems[0]


def test_loose_files_of_other_trainers(tmp_path: Path) -> None:
    """A folder as ComfyUI's models/loras; a pickle there is not looked at, a refused file is told."""
    name = "lora_unet_double_blocks_0_img_attn_proj"
    factors = {f"{name}.lora_down.weight": torch.ones(2, 8), f"{name}.lora_up.weight": torch.ones(8, 2)}
    write_tensors(tmp_path / "style.safetensors", factors, {})
    write_tensors(tmp_path / "odd.safetensors", {"x": torch.ones(1)}, {})
    (tmp_path / "old.pt").write_bytes(b"PK")
    listing = Catalogue([tmp_path]).listing()
    assert list(listing.adapters) == ["style"]
    (problem,) = listing.problems
    assert "odd.safetensors: 1 tensor(s) are no part of a LoRA" in problem


def test_one_name_in_two_places_is_told_apart(runs: Any, tmp_path: Path) -> None:
    shutil.copytree(runs.folder / "ours", tmp_path / "ours")
    catalogue = Catalogue([runs.folder, tmp_path])
    labels = [label for label in catalogue.listing().adapters if label.startswith("ours")]
    assert labels == sorted([f"ours ({runs.folder / 'ours'})", f"ours ({tmp_path / 'ours'})"])
    assert [catalogue.load(label).name for label in labels] == labels  # both can be grafted at once


def test_damage_and_absence_are_told_and_the_rest_stays(runs: Any, tmp_path: Path) -> None:
    shutil.copytree(runs.folder / "ours", tmp_path / "ours")
    broken = tmp_path / "broken" / "adapter" / "pytorch_lora_weights.safetensors"
    broken.parent.mkdir(parents=True)
    broken.write_bytes((tmp_path / "ours" / "adapter" / broken.name).read_bytes()[:1000])
    listing = Catalogue([tmp_path, tmp_path / "nowhere"]).listing()
    assert list(listing.adapters) == ["ours"]
    damaged, absent = listing.problems
    assert str(broken) in damaged
    assert "nowhere: no such folder" in absent


def test_an_adapter_trained_meanwhile_appears_and_a_changed_one_is_read_again(runs: Any, tmp_path: Path) -> None:
    catalogue = Catalogue([tmp_path])
    assert catalogue.listing().adapters == {}
    shutil.copytree(runs.folder / "ours", tmp_path / "new")
    first = catalogue.load("ours")
    second = runs.folder / "second" / "adapter" / "pytorch_lora_weights.safetensors"
    shutil.copy(second, tmp_path / "new" / "adapter" / second.name)
    assert catalogue.load("second").pairs.keys() == first.pairs.keys()
    with pytest.raises(ValueError, match="'ours' is not in the folders any more"):
        catalogue.load("ours")
