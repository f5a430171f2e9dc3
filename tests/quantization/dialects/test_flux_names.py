"""FLUX under ComfyUI's names: fused layers and exchanged halves, against diffusers' own converter, there and back."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from torch import Tensor

from loragraft.kernels.layout import relative_rms
from loragraft.quantization.checkpoint import quantized_layers
from loragraft.quantization.dialects.assembly import assemble
from loragraft.quantization.dialects.comfyui import open_comfyui, save_comfyui
from loragraft.quantization.dialects.flux_names import EXCHANGED, exchange_halves, flux_linears, flux_norms, fuse_rows
from loragraft.quantization.linear import SVDQuantLinear
from loragraft.quantization.names import replace_module
from loragraft.quantization.tensor_file import CheckpointError, read_tensors, write_tensors

DOUBLE, SINGLE = "transformer_blocks.0.attn", "single_transformer_blocks.0"


@pytest.mark.parametrize("guidance", [False, True])
def test_names_are_those_of_diffusers_converter(guidance: bool) -> None:
    """A 16-bit model under the names of this module, converted by diffusers, is the model again."""
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=32, guidance_embeds=guidance, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    state = dict(model.state_dict())
    theirs = {name: state.pop(ours) for name, ours in flux_norms(model.config).items()}
    for name, paths in flux_linears(model.config).items():
        for leaf in ("weight", "bias"):
            rows = torch.cat([state.pop(f"{path}.{leaf}") for path in paths])
            theirs[f"{name}.{leaf}"] = exchange_halves(rows) if name == EXCHANGED else rows
    assert state == {}
    converted = _converted(theirs, model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(converted[name], tensor), name


def _converted(theirs: dict[str, Tensor], model: FluxTransformer2DModel) -> dict[str, Tensor]:
    """diffusers' converter with its constant width of 3072 put to the model's, as it splits linear1 by it."""
    source = inspect.getsource(convert_flux_transformer_checkpoint_to_diffusers)
    assert source.count("inner_dim = 3072") == 1
    scope: dict[str, Any] = dict(vars(inspect.getmodule(convert_flux_transformer_checkpoint_to_diffusers)))
    exec(source.replace("inner_dim = 3072", f"inner_dim = {model.inner_dim}"), scope)
    return scope["convert_flux_transformer_checkpoint_to_diffusers"](dict(theirs))


def _instead(model: FluxTransformer2DModel, path: str, **tensors: Tensor) -> None:
    layer = model.get_submodule(path)
    given = dict(layer.named_buffers()) | tensors
    replace_module(model, path, SVDQuantLinear(layer.in_features, layer.out_features, "w4a4", given))


@pytest.fixture
def fusable(interchange_flux: FluxTransformer2DModel) -> FluxTransformer2DModel:
    """One smoothing factor for every group that ComfyUI fuses; q, k, v also share lora_down, as Nunchaku's files have it."""
    for paths in flux_linears(interchange_flux.config).values():
        if len(paths) > 1:
            first = interchange_flux.get_submodule(paths[0])
            for path in paths[1:]:
                shared = {} if path.endswith("proj_mlp") else {"lora_down": first.lora_down}
                _instead(interchange_flux, path, smooth=first.smooth, **shared)
    return interchange_flux


@pytest.mark.parametrize("layout", ["row-major", "tile-packed"])
def test_roundtrip(
    fusable: FluxTransformer2DModel, tmp_path: Path, layout: Any, same_model: Callable[..., None]
) -> None:
    path = save_comfyui(fusable, tmp_path / "flux.safetensors", layout=layout, names="flux")
    tensors, _ = read_tensors(path)
    assert {"double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.proj_up", "img_in.weight"} <= tensors.keys()
    assert not any(name.startswith(("transformer_blocks", "single_transformer")) for name in tensors)
    assert tensors["double_blocks.0.txt_attn.qkv.proj_down"].shape == (128, 16)
    assert tensors["single_blocks.0.linear1.proj_down"].shape == (128, 32)  # of q, k, v together, and of the MLP
    read = assemble(open_comfyui(path))
    for name, layer in quantized_layers(fusable).items():
        for leaf, tensor in layer.named_buffers():
            if leaf != "wzero":  # rounded to the center that the file stores
                assert torch.equal(getattr(read.get_submodule(name), leaf), tensor), (name, leaf)
    for name, tensor in fusable.state_dict().items():
        if name.rpartition(".")[0] not in quantized_layers(fusable):
            assert torch.equal(read.state_dict()[name], tensor), name
    again = save_comfyui(read, tmp_path / "again.safetensors", layout=layout, names="flux")
    assert again.read_bytes() == path.read_bytes()
    prefixed = {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}
    write_tensors(path, prefixed, read_tensors(again)[1])
    same_model(read, assemble(open_comfyui(path)))


def test_a_fused_layer_answers_as_its_parts(fusable: FluxTransformer2DModel) -> None:
    x = torch.randn(7, 128, generator=torch.Generator().manual_seed(0))
    for group in (("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")):
        layers = {f"{DOUBLE}.{name}": fusable.get_submodule(f"{DOUBLE}.{name}") for name in group}
        fused = fuse_rows(layers, "qkv")
        assert fused.rank == 16
        assert relative_rms(fused(x), torch.cat([layer(x) for layer in layers.values()], dim=1)) < 1e-6


def test_16_bit_groups_are_fused_too(fusable: FluxTransformer2DModel, tmp_path: Path) -> None:
    for name in ("to_q", "to_k", "to_v"):
        path = f"{DOUBLE}.{name}"
        linear = torch.nn.Linear(128, 128, dtype=torch.bfloat16).requires_grad_(False)
        replace_module(fusable, path, linear)
    read = assemble(open_comfyui(save_comfyui(fusable, tmp_path / "flux.safetensors", names="flux")))
    for leaf in ("weight", "bias"):
        assert torch.equal(
            getattr(read.get_submodule(f"{DOUBLE}.to_k"), leaf), getattr(fusable.get_submodule(f"{DOUBLE}.to_k"), leaf)
        )
    replace_module(fusable, f"{DOUBLE}.add_k_proj", torch.nn.Linear(128, 128))
    with pytest.raises(
        ValueError, match=r"one layer \(double_blocks\.0\.txt_attn\.qkv\) in ComfyUI, only .* are quantized"
    ):
        save_comfyui(fusable, tmp_path / "mixed.safetensors", names="flux")


def test_what_cannot_be_fused_is_refused(
    fusable: FluxTransformer2DModel, interchange_flux: FluxTransformer2DModel, tmp_path: Path
) -> None:
    path = tmp_path / "flux.safetensors"
    layer = fusable.get_submodule(f"{SINGLE}.proj_mlp")
    _instead(fusable, f"{SINGLE}.proj_mlp", smooth=2 * layer.smooth)
    with pytest.raises(ValueError, match=r"to_q' and '.*proj_mlp' have different smoothing factors.*--to comfyui"):
        save_comfyui(fusable, path, names="flux")
    tensors = dict(layer.named_buffers())
    unsigned = SVDQuantLinear(layer.in_features, layer.out_features, "w4a4", tensors, act_unsigned=True)
    replace_module(fusable, f"{SINGLE}.proj_mlp", unsigned)
    with pytest.raises(ValueError, match="differ in kind"):
        save_comfyui(fusable, path, names="flux")
    model = PixArtTransformer2DModel(num_layers=1, num_attention_heads=1, attention_head_dim=64, cross_attention_dim=64)
    replace_module(model, "proj_out", layer)
    with pytest.raises(ValueError, match="names of FLUX for a PixArtTransformer2DModel"):
        save_comfyui(model, path, names="flux")
    assert not path.exists()


def test_foreign_flux_files_are_refused(fusable: FluxTransformer2DModel, tmp_path: Path) -> None:
    path = save_comfyui(fusable, tmp_path / "flux.safetensors", names="flux")
    tensors, metadata = read_tensors(path)
    for change, message in (
        (
            {"double_blocks.9.img_mlp.0.weight": torch.zeros(1)},
            r"'double_blocks\.9\.img_mlp\.0\.weight' belongs to no layer",
        ),
        ({"img_in.bias": torch.zeros(3)}, r"'x_embedder\.bias' has shape \(3,\), expected \(128,\)"),
        (
            {"double_blocks.0.img_attn.qkv.weight_scale": torch.zeros(2, 9).bfloat16()},
            r"'double_blocks\.0\.img_attn\.qkv\.weight_scale' has shape \(2, 9\), expected \(2, 384\)",
        ),
    ):
        write_tensors(path, tensors | change, metadata)
        with pytest.raises(CheckpointError, match=message):
            assemble(open_comfyui(path))
    with pytest.raises(CheckpointError, match="layers of FLUX, but the configuration is of PixArtTransformer2DModel"):
        open_comfyui(path, {"_class_name": "PixArtTransformer2DModel"})
