"""SANA in one file, with its authors' key names or diffusers'."""

import dataclasses
from pathlib import Path

import pytest
import torch
from diffusers import SanaTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from loragraft.backbones.load import find_spec, load_backbone
from loragraft.backbones.single_file import as_folder
from loragraft.quantization.tensor_file import CheckpointError
from loragraft.recipes.schema import WeightsConfig

TOP = {
    "patch_embed.proj": "x_embedder.proj", "time_embed.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_embed.emb.timestep_embedder.linear_2": "t_embedder.mlp.2", "time_embed.linear": "t_block.1",
    "caption_projection.linear_1": "y_embedder.y_proj.fc1", "caption_projection.linear_2": "y_embedder.y_proj.fc2",
    "caption_norm": "attention_y_norm", "proj_out": "final_layer.linear",
}  # fmt: skip
INSIDE = {
    "attn1.to_out.0": "attn.proj", "attn2.to_q": "cross_attn.q_linear", "attn2.to_out.0": "cross_attn.proj",
    "ff.conv_inverted": "mlp.inverted_conv.conv", "ff.conv_depth": "mlp.depth_conv.conv", "ff.conv_point": "mlp.point_conv.conv",
}  # fmt: skip


def original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as NVlabs' checkpoints hold them: q, k and v in one, buffers that diffusers computes."""
    named = {"pos_embed": torch.zeros(1), "y_embedder.y_embedding": torch.zeros(1)}
    for name, tensor in state.items():
        path, _, kind = name.rpartition(".")
        if name == "scale_shift_table":
            named["final_layer.scale_shift_table"] = tensor
        elif path in TOP:
            named[f"{TOP[path]}.{kind}"] = tensor
        elif name.endswith("scale_shift_table"):
            named[name.replace("transformer_blocks", "blocks")] = tensor
        else:
            _, block, inside = path.split(".", 2)
            if inside in INSIDE:
                named[f"blocks.{block}.{INSIDE[inside]}.{kind}"] = tensor
            elif inside.endswith("to_v"):
                whole = (
                    ("attn1.to_q", "attn1.to_k", "attn1.to_v") if "attn1" in inside else ("attn2.to_k", "attn2.to_v")
                )
                into = "attn.qkv" if "attn1" in inside else "cross_attn.kv_linear"
                parts = [state[f"transformer_blocks.{block}.{part}.{kind}"] for part in whole]
                named[f"blocks.{block}.{into}.{kind}"] = torch.cat(parts)
    return named


@pytest.fixture(scope="module")
def state(sana_folder: Path) -> dict[str, Tensor]:
    return load_file(sana_folder / "transformer" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_a_file_becomes_the_folder_that_it_would_have_been(
    layout: str, state: dict[str, Tensor], sana_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = find_spec("sana-16b")
    assert spec.external is not None
    config = SanaTransformer2DModel.load_config(sana_folder / "transformer")
    tiny = dataclasses.replace(spec, external=dataclasses.replace(spec.external, config=config))
    monkeypatch.setattr("loragraft.backbones.load.find_spec", lambda _: tiny)
    file = tmp_path / "sana.safetensors"
    save_file(original(state) if layout == "original" else state, file)
    weights = WeightsConfig(path=str(file), encoders=str(sana_folder))
    found = load_backbone("sana-16b", "16bit", "cpu", tmp_path, weights)
    whole = load_backbone("sana-16b", "16bit", "cpu", tmp_path, WeightsConfig(path=str(sana_folder)))
    assert found.base_id == whole.base_id


def test_what_is_no_sana_is_refused(state: dict[str, Tensor], tmp_path: Path) -> None:
    spec = find_spec("sana-16b")
    assert spec.external is not None
    save_file({"lora.weight": torch.ones(2, 2)}, tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match="holds no SANA transformer"):
        as_folder(spec, spec.external, tmp_path / "lora.safetensors", tmp_path)
