"""The shared space: features, file, and the shipped weights."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loragraft.evaluation.retrieval import (
    IMAGE_WIDTH,
    TEXT_WIDTH,
    WEIGHTS,
    Towers,
    load_towers,
    pack_state,
    text_features,
    unpack_state,
)


def encode(captions: list[str]) -> dict[str, torch.Tensor]:
    """Two real tokens per caption, thirty of padding."""
    states = torch.zeros(len(captions), 32, 384)
    for row, caption in enumerate(captions):
        generator = torch.Generator().manual_seed(len(caption))
        states[row, :2] = torch.randn(2, 384, generator=generator)
    return {"prompt_embeds": states, "pooled_prompt_embeds": torch.nn.functional.normalize(states.sum(1), dim=-1)}


def test_text_features_encode_each_caption_once_and_leave_out_padding() -> None:
    seen: list[str] = []

    def counting(captions: list[str]) -> dict[str, torch.Tensor]:
        seen.extend(captions)
        return encode(captions)

    features = text_features(counting, ["a", "bb", "a"], batch_size=1)
    assert seen == ["a", "bb"]
    assert features.shape == (3, TEXT_WIDTH)
    assert torch.equal(features[0], features[2])
    tokens = torch.nn.functional.normalize(encode(["bb"])["prompt_embeds"][0, :2], dim=-1)
    expected = torch.nn.functional.normalize(tokens.mean(0), dim=0)
    assert torch.allclose(features[1, 384:], expected, atol=1e-6)


def test_towers_come_back_from_their_file(tmp_path: Path) -> None:
    torch.manual_seed(0)  # 4 numbers of length 1: some random weights round to more than the tolerance
    towers = Towers(8, 4)
    towers.image_mean.fill_(0.5)
    file = tmp_path / "towers.safetensors"
    header = {"loragraft": json.dumps({"hidden": 8, "shared": 4, "date": "2026-01-01"})}
    save_file(pack_state(towers.state_dict()), file, header)
    loaded, about = load_towers(file)
    assert about["date"] == "2026-01-01"
    images = torch.randn(3, IMAGE_WIDTH, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(loaded.embed_images(images), towers.embed_images(images), atol=1e-2)
    assert loaded.embed_text(torch.randn(2, TEXT_WIDTH)).norm(dim=1).tolist() == pytest.approx([1, 1])


def test_int8_storage_costs_hardly_anything() -> None:
    torch.manual_seed(0)
    state = Towers(16, 8).state_dict()
    stored = unpack_state(pack_state(state))
    assert stored.keys() == state.keys()
    for name, tensor in state.items():
        assert (stored[name] - tensor).norm() <= 6e-3 * tensor.norm() + 1e-6, name


def test_missing_towers_name_the_command(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"pretrain/retrieval\.py"):
        load_towers(tmp_path / "none.safetensors")


def test_the_shipped_towers_are_small_and_say_what_they_are() -> None:
    _, about = load_towers()
    assert WEIGHTS.stat().st_size <= 350_000
    assert {"date", "training_pairs", "held_out", "license"} <= about.keys()
    held_out = about["held_out"]["icons, held-out names"]
    assert held_out["pairs"] >= 900
    assert held_out["r5_text_to_image"] > 20 * held_out["chance"]
