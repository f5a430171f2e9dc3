"""FLUX's key table against the model that diffusers builds and its own reading of BFL's checkpoints; which family a file is of."""

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from torch import nn

from loragraft.adapters.formats.families import UNETS, Family, Target, family_of, kernel_of, names_for
from loragraft.quantization.dialects.flux_names import flux_linears, flux_norms

DEV = {"num_layers": 19, "num_single_layers": 38, "guidance_embeds": True}
"""The published transformer/config.json of FLUX.1-dev; what it leaves at the defaults is left."""


def test_flux_is_the_model_of_diffusers() -> None:
    """Every linear and every norm of the heads, by path."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(**DEV)
    linears = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    norms = {name for name in model.state_dict() if ".norm_" in name}
    table = flux_linears(DEV)
    assert {path for paths in table.values() for path in paths} == linears
    assert sum(len(paths) for paths in table.values()) == len(linears) == 504
    assert set(flux_norms(DEV).values()) == norms


def test_flux_rows_are_where_diffusers_puts_them() -> None:
    """A checkpoint in BFL's names whose every row knows its number, with FLUX.1's heights and one column."""
    heights = {"qkv": 9216, "linear1": 21504}
    checkpoint, number = {}, 0
    for theirs in flux_linears(DEV):
        height = heights.get(theirs.rpartition(".")[2], 4)
        for kind in ("weight", "bias"):
            rows = torch.arange(number, number + height, dtype=torch.float64)
            checkpoint[f"{theirs}.{kind}"] = rows[:, None] if kind == "weight" else rows
        number += height
    for theirs in flux_norms(DEV):
        checkpoint[theirs] = torch.zeros(1)
    converted = convert_flux_transformer_checkpoint_to_diffusers(dict(checkpoint))
    sizes = {4: [3072, 3072, 3072, 12288], 3: [3072, 3072, 3072]}
    for theirs, paths in flux_linears(DEV).items():
        rows = checkpoint[f"{theirs}.weight"]
        exchanged = names_for([]).layers[theirs].exchanged
        rows = torch.cat(rows.chunk(2)[::-1]) if exchanged else rows
        for path, part in zip(paths, rows.split(sizes.get(len(paths), [len(rows)])), strict=True):
            assert torch.equal(converted[f"{path}.weight"], part), path


def test_one_lookup_for_every_spelling() -> None:
    names = names_for(["transformer_blocks.30.attn.to_q", "single_transformer_blocks_99_proj_mlp"])
    target = Target(("transformer_blocks.30.attn.to_out.0",))
    for spelling in (
        "double_blocks.30.img_attn.proj",
        "double_blocks_30_img_attn_proj",
        "transformer_blocks_30_attn_to_out_0",
    ):
        assert names.find(spelling) == target
    assert names.find("single_transformer_blocks_99_proj_mlp") is not None
    assert names.find("double_blocks_31_img_attn_proj") is None
    assert names.find_norm("single_blocks_0_norm_key_norm") == "single_transformer_blocks.0.attn.norm_k"
    assert names.find("output_blocks.2.1.conv") == Target(("up_blocks.0.upsamplers.0.conv",))


TO_Q, TO_K = (
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",
)


@pytest.mark.parametrize(
    ("shapes", "family"),
    [
        ({TO_Q: (640, 640), TO_K: (768, 640)}, Family("sd15", True)),
        ({TO_Q: (640, 640), TO_K: (1024, 640)}, Family("sd2", True)),
        ({TO_Q: (640, 640), TO_K: (2048, 640)}, Family("sdxl", True)),
        ({"down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": (64, 64)}, Family("sd15", False, ("sd2",))),
        ({"transformer_blocks.0.attn.to_q": (3072, 3072)}, Family("flux", True)),
        ({"transformer_blocks.0.attn.to_q": (256, 256), "single_transformer_blocks.0.proj_mlp": (256, 1024)}, Family("flux", False)),
        ({"transformer_blocks.0.attn.to_q": (1536, 1536)}, Family("", False)),
        ({"transformer_blocks.0.attn1.to_q": (1152, 1152)}, Family("", False)),
        ({"up_blocks.0.resnets.1.conv1": (2560 * 9, 1280)}, Family("sd15", True, ("sdxl", "sd2"))),
    ],
)  # fmt: skip
def test_family(shapes: dict[str, tuple[int, int]], family: Family) -> None:
    """By names and sizes; SD 3 (width 1536) and PixArt are neither, though some names are FLUX's."""
    assert family_of(shapes) == family


def test_kernels() -> None:
    """proj_in is a convolution in SD 1.5 and a linear in SDXL: without a known family nothing is said."""
    path, unknown = "down_blocks.1.attentions.0.proj_in", Family("", False)
    assert kernel_of(path, Family("sd15", True)) == (1, 1)
    assert kernel_of(path, Family("sdxl", True)) is None
    assert kernel_of(path, unknown) is None
    assert kernel_of(path, Family("sd15", True, ("sd2",))) is None
    assert kernel_of("up_blocks.0.resnets.0.conv1", unknown) == (3, 3)
    assert kernel_of("transformer_blocks.0.attn.to_q", unknown) is None
    assert set(UNETS) == {"sd15", "sd2", "sdxl"}
