"""`pocket` as it ships: it loads in every profile's form, its ledger is complete, its encoders keep their word."""

from pathlib import Path

import numpy as np
import pytest
import torch

from loragraft.backbones import load
from loragraft.backbones.load import find_spec, list_bases, load_backbone
from loragraft.backbones.sampler import generate_images
from loragraft.backbones.spec import Backbone


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return load_backbone("pocket", "native", "cpu", tmp_path_factory.mktemp("cache"))


def test_an_unknown_base_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="Did you mean 'pocket'"):
        find_spec("poket")
    assert "pocket" in list_bases()


def test_the_ledger_lists_every_linear_and_nothing_fell_back(backbone: Backbone) -> None:
    counts = backbone.ledger.to_dict()["layers"]
    assert counts == {"w4a8": 61, "w4a16": 11, "fp32": 8}
    assert {row.backend for row in backbone.ledger.rows} == {"reference", "torch"}


def test_on_its_device_the_ledger_says_what_runs_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is made while the model waits on the CPU."""
    waiting = load_backbone("pocket", "native", "cpu", tmp_path, wait=True)
    monkeypatch.setattr("loragraft.quantization.ledger.uses_triton", lambda x: True)  # as on a GPU
    waiting.onto_device()
    assert {row.backend for row in waiting.ledger.rows} == {"triton", "torch"}


def test_a_card_that_has_no_kernel_is_refused_when_the_base_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[set[str]] = []
    monkeypatch.setattr(load, "check_card", lambda numerics, device: asked.append(set(numerics)))
    load_backbone("pocket", "native", "cpu", tmp_path)
    assert asked == [{"w4a8", "w4a16", "fp32"}]


def test_nothing_of_the_base_can_train(backbone: Backbone) -> None:
    assert not any(p.requires_grad for p in backbone.transformer.parameters())


def test_int4_is_the_16bit_model_nearly(backbone: Backbone, tmp_path: Path) -> None:
    """One velocity: the quantized transformer is within a few per cent of the 16-bit one."""
    full = load_backbone("pocket", None, "cpu", tmp_path)
    generator = torch.Generator().manual_seed(0)
    text = backbone.encoders.encode_text(["a red heart icon", "a shopping cart"])
    inputs = {
        "hidden_states": torch.randn(2, 64, 64, generator=generator),
        "timestep": torch.tensor([0.3, 0.8]),
        "encoder_hidden_states": text["prompt_embeds"],
        "pooled_projections": text["pooled_prompt_embeds"],
        "img_ids": torch.zeros(64, 3),
        "txt_ids": torch.zeros(32, 3),
    }
    with torch.no_grad():
        (a,), (b,) = (m.transformer(**inputs, return_dict=False) for m in (full, backbone))
    error = float((a - b).norm() / a.norm())
    assert 0 < error < 0.1
    assert full.base_id != backbone.base_id


def test_encoders_shapes_and_identity(backbone: Backbone) -> None:
    encoders = backbone.encoders
    latents = encoders.encode_images(torch.zeros(2, 3, 128, 128))
    assert latents.shape == (2, 16, 16, 16)
    text = encoders.encode_text(["one", "two words"])
    assert text["prompt_embeds"].shape == (2, 32, 384)
    assert torch.allclose(text["pooled_prompt_embeds"].norm(dim=-1), torch.ones(2))
    assert (text["prompt_embeds"][0, 3:] == 0).all(), "padding is not zero"
    assert encoders.id.startswith("pocket-vae-")


def test_an_image_depends_on_its_own_seed_alone(backbone: Backbone) -> None:
    both = generate_images(backbone, ["a star", "a house"], [7, 8], steps=2)
    alone = generate_images(backbone, ["a house"], [8], steps=2)[0]
    first, second = (np.asarray(image, dtype=np.float64) for image in (both[1], alone))
    # Sums in another order now and then round an activation code the other way; that must stay invisible.
    assert np.abs(first - second).mean() < 1
    other = np.asarray(both[0], dtype=np.float64)
    assert np.abs(first - other).mean() > 5


def test_released_text_encoder_refuses(tmp_path: Path) -> None:
    encoders = find_spec("pocket").load_encoders(torch.device("cpu"), torch.float32)
    encoders.release_text()
    with pytest.raises(RuntimeError, match="released"):
        encoders.encode_text(["x"])


def test_readable_is_what_the_encoder_reads_and_the_rest_is_announced(
    backbone: Backbone, caplog: pytest.LogCaptureFixture
) -> None:
    encoders = backbone.encoders
    assert encoders.readable("white heart icon") == "white heart icon"
    words = [f"word{i}" for i in range(20)]  # two word pieces each: 15 fit beside the two specials
    long = " ".join(words)
    assert encoders.readable(long) == " ".join(words[:15])
    for key, value in encoders.encode_text([long]).items():
        assert torch.equal(value, encoders.encode_text([encoders.readable(long)])[key])
    generate_images(backbone, [long], [0], steps=1, guidance=1)
    assert "its end is lost: 'word15 word16 word17 word18 word19'" in caplog.text


def test_the_bases_to_compare_with_round_less(tmp_path: Path) -> None:
    """`16bit` quantizes nothing; `weight-only` is made on first use, W4A16 throughout, with the branch and without smoothing."""
    full = load_backbone("pocket", "16bit", "cpu", tmp_path)
    assert full.profile is None
    assert set(full.ledger.to_dict()["layers"]) == {"fp32"}
    made = load_backbone("pocket", "weight-only", "cpu", tmp_path)
    assert made.profile == "weight-only"
    assert made.ledger.to_dict()["layers"] == {"w4a16": 72, "fp32": 8}
    assert {row.rank for row in made.ledger.rows if row.numerics == "w4a16"} == {0, 16}  # adaLN has no branch
    assert [folder.name.rpartition("-")[0] for folder in (tmp_path / "bases").iterdir()] == ["pocket-weight-only"]
