"""The key tables against the models that diffusers builds (meta device) and against its own reading of LDM checkpoints."""

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from torch import nn

from loragraft.adapters.formats.families import UNETS

PUBLISHED: dict[str, dict[str, Any]] = {
    "sd15": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sd2": {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
    "sdxl": {
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "use_linear_projection": True,
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10],
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
"""What the published unet/config.json set apart from the defaults."""


def published_unet(name: str) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**PUBLISHED[name])


@pytest.mark.parametrize("name", PUBLISHED)
def test_layers_are_those_of_diffusers(name: str) -> None:
    """Names, shapes and order."""
    model = published_unet(name)
    built = [(path, tuple(m.weight.shape)) for path, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert list(UNETS[name].layers.items()) == built


@pytest.mark.parametrize("name", PUBLISHED)
def test_ldm_names_are_those_of_diffusers(name: str) -> None:
    """A checkpoint in LDM's names, converted by diffusers: every value arrives where the table says."""
    ldm, config = UNETS[name].ldm_names(), dict(published_unet(name).config)
    checkpoint = {
        f"model.diffusion_model.{theirs}.{kind}": torch.tensor(number)
        for number, theirs in enumerate(ldm.values())
        for kind in ("weight", "bias")
    }
    converted = convert_ldm_unet_checkpoint(checkpoint, config)
    weights = {key.removesuffix(".weight"): int(value) for key, value in converted.items() if key.endswith(".weight")}
    assert weights == {path: number for number, path in enumerate(ldm)}


def test_spellings_shared_by_the_unets_mean_the_same_layer() -> None:
    meaning: dict[str, str] = {}
    for unet in UNETS.values():
        for path, theirs in unet.ldm_names().items():
            for spelling in (path, path.replace(".", "_"), theirs, theirs.replace(".", "_")):
                assert meaning.setdefault(spelling, path) == path
