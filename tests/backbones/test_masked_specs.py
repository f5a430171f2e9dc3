"""SANA's and PixArt-Sigma's specs: true shapes, size of their INT4 files, whose checkpoint is whose, defaults of recipes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from safetensors.torch import load_file
from torch import nn

from loragraft.backbones.architectures import PIXART, PIXART_ONCE, open_model
from loragraft.backbones.load import find_spec, load_backbone
from loragraft.backbones.skeleton import meta_transformer, plan_architecture
from loragraft.backbones.spec import BaseSpec
from loragraft.backbones.stable_diffusion import SDXL_VAE
from loragraft.quantization.checkpoint import quantized_layers
from loragraft.quantization.conv import SVDQuantConv2d
from loragraft.quantization.ledger import build_ledger
from loragraft.quantization.settings import QuantSettings
from loragraft.recipes.load import load_recipe
from loragraft.recipes.schema import WeightsConfig

SANA_06B, SANA_16B, PIXART_SIGMA = (find_spec(name) for name in ("sana-06b", "sana_16b", "pixart-sigma"))


def skeleton(spec: BaseSpec, rank: int | None = 32) -> nn.Module:
    """On meta; rank None leaves it in 16 bits."""
    assert spec.external is not None
    plan = None if rank is None else lambda m: plan_architecture(spec, QuantSettings(rank=rank), m)
    return meta_transformer(spec.transformer_class, spec.external.config, plan)


@pytest.mark.parametrize(
    ("spec", "parameters", "w4a8"),
    [(SANA_06B, 591_747_872, 280), (SANA_16B, 1_604_462_752, 200), (PIXART_SIGMA, 610_856_096, 280)],
)
def test_the_true_shapes(spec: BaseSpec, parameters: int, w4a8: int) -> None:
    """Published sizes: 0.59 B, 1.60 B, 0.61 B. One adaLN for all blocks; ten layers of a SANA block, two of them convolutions."""
    assert sum(p.numel() for p in skeleton(spec, None).parameters()) == parameters
    counts = build_ledger(skeleton(spec)).to_dict()["layers"]
    assert (counts["w4a8"], counts["w4a16"]) == (w4a8, 1)


def file_bytes(model: nn.Module) -> int:
    """Tensors of the INT4 file, 16-bit ones at 2 bytes a value."""
    quantized = {
        id(layer): sum(buffer.nbytes for buffer in layer.buffers()) for layer in quantized_layers(model).values()
    }
    plain = sum(parameter.numel() for parameter in model.parameters())  # quantized layers have buffers alone
    return sum(quantized.values()) + 2 * plain


@pytest.mark.parametrize(
    ("spec", "expected", "limit", "plain"),
    [(SANA_06B, 0.382, 0.40, 1.18), (SANA_16B, 0.979, 1.05, 3.21), (PIXART_SIGMA, 0.393, 0.42, 1.22)],
)
def test_the_int4_file_is_as_small_as_was_asked(spec: BaseSpec, expected: float, limit: float, plain: float) -> None:
    """GB at rank 32, with the cross-attention's keys and values in INT4."""
    size = file_bytes(skeleton(spec)) / 1e9
    assert size == pytest.approx(expected, abs=0.0006) and size <= limit
    whole = sum(p.numel() for p in skeleton(spec, None).parameters()) * 2 / 1e9
    assert whole == pytest.approx(plain, abs=0.005)


def test_every_convolution_of_sana_but_the_depthwise_and_the_first_carries_the_profile() -> None:
    rows = {row.path: row for row in build_ledger(skeleton(SANA_16B)).rows if row.kind != "linear"}
    left = {path: row.kind for path, row in rows.items() if row.backend == "torch"}
    assert left.pop("patch_embed.proj") == "conv 1x1"
    assert left == {f"transformer_blocks.{i}.ff.conv_depth": "depthwise 3x3" for i in range(20)}
    point = rows["transformer_blocks.0.ff.conv_point"]
    assert (point.out_features, point.in_features, point.numerics) == (2240, 5600, "w4a8")
    layer = skeleton(SANA_16B).get_submodule("transformer_blocks.0.ff.conv_point")
    assert isinstance(layer, SVDQuantConv2d)
    codes = layer.state_dict()["qweight"]
    assert tuple(codes.shape) == (2240, 5632 // 2), "5600 is no multiple of a group: padded"


def test_the_true_autoencoder_of_pixart_is_sdxls() -> None:
    encoders = PIXART_SIGMA.external.random_encoders(0, torch.device("cpu"), torch.float32)  # type: ignore[union-attr]
    assert sum(p.numel() for p in encoders.pipeline_parts["vae"].parameters()) == 83_653_863
    assert encoders.encode_images(torch.zeros(1, 3, 32, 32)).shape == (1, 4, 4, 4)
    assert encoders.encode_text(["a"])["prompt_embeds"].shape == (1, 300, 4096)
    assert SDXL_VAE["scaling_factor"] == 0.13025


@pytest.mark.parametrize(
    ("change", "spec", "expected"),
    [
        ({"guidance_embeds": True}, SANA_16B, "SANA-Sprint"),
        ({"in_channels": 16}, SANA_06B, "16 input channels"),
        ({"cross_attention_dim": 1152}, SANA_16B, "did you mean base=sana-06b"),
        ({"cross_attention_dim": 2240}, SANA_06B, "did you mean base=sana-16b"),
        ({"out_channels": 4}, PIXART_SIGMA, "4 input and 4 output channels"),
        ({"use_additional_conditions": True}, PIXART_SIGMA, "PixArt-alpha"),
    ],
)
def test_another_models_configuration_is_refused(change: dict[str, object], spec: BaseSpec, expected: str) -> None:
    assert spec.external is not None
    spec.external.check(spec.external.config, "here")
    with pytest.raises(ValueError, match=expected):
        spec.external.check({**spec.external.config, **change}, "here")


def test_pixart_is_read_under_the_class_that_it_was_published_as(pixart_folder: Path, tmp_path: Path) -> None:
    """Its first configuration file has neither the class nor `use_additional_conditions`, which 1024 px would imply."""
    folder = shutil.copytree(pixart_folder, tmp_path / "published")
    file = folder / "transformer" / "config.json"
    config = json.loads(file.read_text())
    del config["use_additional_conditions"]
    file.write_text(json.dumps({**config, "_class_name": PIXART_ONCE, "num_vector_embeds": None}))
    _, found, settled = open_model(folder)
    assert found is PIXART
    assert settled["_class_name"] == "PixArtTransformer2DModel" and settled["use_additional_conditions"] is False


def test_a_published_pixart_is_quantized_and_opened(pixart_folder: Path, tmp_path: Path, quick_quantizer: None) -> None:
    folder = shutil.copytree(pixart_folder, tmp_path / "published")
    file = folder / "transformer" / "config.json"
    config = json.loads(file.read_text())
    del config["use_additional_conditions"]
    file.write_text(json.dumps({**config, "_class_name": PIXART_ONCE}))
    weights = WeightsConfig(path=str(folder))
    backbone = load_backbone("pixart-sigma", "native", "cpu", tmp_path / "cache", weights)
    assert backbone.ledger.to_dict()["layers"] == {"w4a8": 20, "fp32": 6, "w4a16": 1}
    (written,) = (tmp_path / "cache" / "bases").rglob("*.safetensors")
    assert not any("resolution_embedder" in name for name in load_file(written))


@pytest.mark.parametrize("spec", [SANA_06B, SANA_16B, PIXART_SIGMA], ids=lambda spec: spec.name)
def test_a_recipe_that_names_the_base_gets_its_defaults(spec: BaseSpec) -> None:
    recipe = load_recipe("marketing", [f"base={spec.name}"])
    assert recipe.sample.steps == recipe.eval.steps == spec.steps == 20
    assert recipe.sample.guidance == recipe.eval.guidance == spec.guidance == 4.5
    assert recipe.train.checkpointing == "block" and recipe.train.text_dropout == 0.1
    assert isinstance(spec.family.scheduler(), DPMSolverMultistepScheduler)
    assert spec.family.image_to_image is None and spec.family.inpaint is None


def test_a_transformer_in_one_variant_is_read_in_16_bits_and_quantized(
    sana_folder: Path, tmp_path: Path, quick_quantizer: None
) -> None:
    """SANA is published as `diffusion_pytorch_model.bf16.safetensors` too."""
    folder = shutil.copytree(sana_folder, tmp_path / "published")
    plain = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    plain.rename(plain.with_name("diffusion_pytorch_model.bf16.safetensors"))
    for profile in ("16bit", "native"):
        opened = [
            load_backbone("sana-16b", profile, "cpu", tmp_path / "cache", WeightsConfig(path=str(place)))  # type: ignore[arg-type]
            for place in (folder, sana_folder)
        ]
        assert opened[0].base_id == opened[1].base_id
