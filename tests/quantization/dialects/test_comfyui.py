"""ComfyUI's svdquant_w4a4: both layouts there and back bit for bit, and the answers of comfy-kitchen where it is installed."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from loragraft.kernels.layout import LinearCase, relative_rms, unpack_int4
from loragraft.kernels.registry import OPS
from loragraft.kernels.w4a4_linear import w4a4_linear
from loragraft.kernels.w4a16_linear import w4a16_linear
from loragraft.quantization.checkpoint import quantized_layers
from loragraft.quantization.dialects.assembly import assemble
from loragraft.quantization.dialects.comfyui import open_comfyui, save_comfyui
from loragraft.quantization.linear import SVDQuantLinear
from loragraft.quantization.tensor_file import CheckpointError, read_tensors, write_tensors

Q, FC2 = "transformer_blocks.0.attn.to_q", "transformer_blocks.0.ff.net.2"
LAYOUTS = ("row-major", "tile-packed")


def _unsigned(model: FluxTransformer2DModel, path: str) -> FluxTransformer2DModel:
    """The model with unsigned activations in one layer."""
    layer = model.get_submodule(path)
    tensors = dict(layer.named_buffers())
    marked = SVDQuantLinear(layer.in_features, layer.out_features, "w4a4", tensors, act_unsigned=True)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, marked)
    return model


@pytest.mark.parametrize("layout", LAYOUTS)
def test_roundtrip(
    interchange_flux: FluxTransformer2DModel, tmp_path: Path, layout: Any, same_model: Callable[..., None]
) -> None:
    """W4A4 and 16-bit layers bit for bit; the offsets of W4A16 layers once rounded, from then on bit for bit too."""
    model = _unsigned(interchange_flux, FC2)
    first = save_comfyui(model, tmp_path / "first.safetensors", layout=layout)
    read = assemble(open_comfyui(first))
    for path, layer in quantized_layers(model).items():
        again = read.get_submodule(path)
        assert (again.numerics, again.act_unsigned) == (layer.numerics, layer.act_unsigned), path
        assert again.dequantized_weight().isfinite().all()
        for name, tensor in layer.named_buffers():
            if name != "wzero":
                assert torch.equal(getattr(again, name), tensor), (path, name)
            else:
                centers = (layer.wzero.float() + 8 * layer.wscale.float()).abs()
                assert ((again.wzero - layer.wzero.float()).abs() <= centers * 2**-8).all(), path
    for name, tensor in model.state_dict().items():
        if name.rpartition(".")[0] not in quantized_layers(model):
            assert torch.equal(read.state_dict()[name], tensor), name
    second = save_comfyui(read, tmp_path / "second.safetensors", layout=layout)
    assert second.read_bytes() == first.read_bytes()
    same_model(read, assemble(open_comfyui(second)))


def test_both_layouts_hold_the_same_model(
    interchange_flux: FluxTransformer2DModel, tmp_path: Path, same_model: Callable[..., None], formulas: ModuleType
) -> None:
    paths = [save_comfyui(interchange_flux, tmp_path / f"{layout}.safetensors", layout=layout) for layout in LAYOUTS]
    same_model(*(assemble(open_comfyui(path)) for path in paths))
    rows, tiles = (read_tensors(path)[0] for path in paths)
    layer = interchange_flux.get_submodule(Q)
    codes = unpack_int4(layer.qweight)
    low, high = codes[:, 0::2].int() & 15, codes[:, 1::2].int() & 15
    assert torch.equal(rows[f"{Q}.weight"].view(torch.uint8).int(), low + 16 * high)
    assert torch.equal(tiles[f"{Q}.weight"], formulas.tile_packed(codes))
    assert tiles[f"{Q}.weight_scale"].shape == (1, 2, 128)
    assert tiles[f"{Q}.proj_up"].shape == (1, 16, 128)
    mark = json.loads(bytes(tiles[f"{Q}.comfy_quant"].tolist()))
    assert (
        mark.items() >= {"format": "svdquant_w4a4", "layout": "kitchen_tile_packed_w4a4", "act_unsigned": False}.items()
    )


def test_both_spellings_are_read(
    interchange_flux: FluxTransformer2DModel, tmp_path: Path, same_model: Callable[..., None]
) -> None:
    """comfy-kitchen's `state_dict_tensors` composes its suffixes onto `weight`."""
    path = save_comfyui(interchange_flux, tmp_path / "model.safetensors")
    expected = assemble(open_comfyui(path))
    tensors, metadata = read_tensors(path)
    spelt = {
        name.replace(".proj_down", ".weight_proj_down")
        .replace(".proj_up", ".weight_proj_up")
        .replace(".smooth_factor", ".weight_smooth_factor")
        .replace(".weight_zero", ".weight_zeros"): tensor
        for name, tensor in tensors.items()
    }
    assert spelt.keys() != tensors.keys()
    write_tensors(path, spelt, metadata)
    same_model(expected, assemble(open_comfyui(path)))


def test_prefixed_names_and_a_config_beside_the_file(
    interchange_flux: FluxTransformer2DModel, tmp_path: Path, same_model: Callable[..., None]
) -> None:
    path = save_comfyui(interchange_flux, tmp_path / "model.safetensors")
    expected = assemble(open_comfyui(path))
    tensors, metadata = read_tensors(path)
    write_tensors(path, {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}, {})
    with pytest.raises(CheckpointError, match=r"no `config` in its header and no config\.json"):
        open_comfyui(path)
    same_model(expected, assemble(open_comfyui(path, json.loads(metadata["config"]))))
    (tmp_path / "config.json").write_text(metadata["config"])
    same_model(expected, assemble(open_comfyui(path)))


def test_what_it_cannot_hold_is_refused(
    interchange_flux: FluxTransformer2DModel, quantized_flux: FluxTransformer2DModel, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match=r"to_q' is w4a8.*ComfyUI"):
        save_comfyui(quantized_flux, path)
    with pytest.raises(ValueError, match="no quantized layer"):
        save_comfyui(FluxTransformer2DModel.from_config(interchange_flux.config), path)
    _unsigned(interchange_flux, FC2).get_submodule(FC2).unsigned_from = 64
    with pytest.raises(ValueError, match=r"net\.2' has unsigned columns from 64 on"):
        save_comfyui(interchange_flux, path)
    assert not path.exists()
    path.write_bytes(b"")
    with pytest.raises(FileExistsError, match="overwrite"):
        save_comfyui(interchange_flux, path)


def _mark(**described: Any) -> Tensor:
    return torch.tensor(list(json.dumps(described).encode()), dtype=torch.uint8)


BROKEN = {
    "missing": (lambda t: t.pop(f"{Q}.proj_up"), rf"model\.safetensors: tensor '{Q}\.proj_up' is missing"),
    "shape": (lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"][:64]}), rf"{Q}\.weight' has shape \(64, 64\)"),
    "layout": (
        lambda t: t.update({f"{Q}.comfy_quant": _mark(format="svdquant_w4a4", layout="kitchen_tile_packed_w4a4")}),
        rf"{Q}\.weight' has shape \(128, 64\), expected \(1, 2, 32, 128\)",
    ),
    "format": (lambda t: t.update({f"{Q}.comfy_quant": _mark(format="nvfp4")}), rf"{Q}\.comfy_quant': format 'nvfp4'"),
    "basis": (
        lambda t: t.update({f"{Q}.comfy_quant": _mark(format="svdquant_w4a4", lowrank_branch_input_basis="smoothed")}),
        "does not read raw x",
    ),
    "json": (lambda t: t[f"{Q}.comfy_quant"].fill_(65), rf"{Q}\.comfy_quant' is not JSON"),
    "inf": (lambda t: t[f"{Q}.weight_scale"].fill_(torch.inf), rf"{Q}\.weight_scale' holds NaN or infinity"),
    "foreign": (lambda t: t.update(extra=torch.zeros(2)), r"'extra' belongs to no layer"),
    "unmarked": (
        lambda t: [t.pop(n) for n in list(t) if n.endswith("comfy_quant")],
        r"no tensor named \*\.comfy_quant",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused(interchange_flux: FluxTransformer2DModel, tmp_path: Path, case: str) -> None:
    path = save_comfyui(interchange_flux, tmp_path / "model.safetensors")
    tensors, metadata = read_tensors(path)
    change, message = BROKEN[case]
    change(tensors)
    write_tensors(path, {name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)
    with pytest.raises(CheckpointError, match=message):
        assemble(open_comfyui(path))


@pytest.fixture(scope="module")
def kitchen() -> Any:
    """comfy-kitchen, from the environment or from the folder that LORAGRAFT_COMFY_KITCHEN names (pip install --target)."""
    folder = os.environ.get("LORAGRAFT_COMFY_KITCHEN")
    sys.path[:0] = [folder] if folder else []
    try:
        return pytest.importorskip(
            "comfy_kitchen", reason="comfy-kitchen has wheels for x86-64 only; it comes with loragraft[dev] there"
        )
    finally:
        sys.path[:] = [entry for entry in sys.path if entry != folder]


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize(("M", "N", "K", "R"), [(7, 40, 192, 16), (33, 128, 320, 32), (1, 96, 64, 8)])
def test_comfy_kitchen_answers_the_same(kitchen: Any, unsigned: bool, M: int, N: int, K: int, R: int) -> None:
    """Its eager backend in float32, on x whose scales are bfloat16 values (it rounds them after the codes, we before)."""
    eager = __import__("comfy_kitchen.backends.eager.svdquant", fromlist=["svdquant"])
    w4a4 = next(op for op in OPS if op.name == "w4a4")
    inputs: dict[str, Any] = w4a4.inputs(LinearCase(M, N, K, R=R, r=0, unsigned=unsigned))
    levels = 15 if unsigned else 7
    x = inputs["x"] + (0.171875 if unsigned else 0)
    scaled = (x / inputs["smooth"]).view(M, -1, 64)
    scale = scaled.abs().amax(-1, keepdim=True) / levels
    x = (scaled / scale * scale.bfloat16().float()).view(M, K) * inputs["smooth"]
    inputs["x"] = x - 0.171875 if unsigned else x
    packed, scales, branch = eager.quantize_svdquant_w4a4(
        inputs["x"] + (0.171875 if unsigned else 0), inputs["smooth"], inputs["lora_down"].T, act_unsigned=unsigned,
        lora_x=inputs["x"],
    )  # fmt: skip
    theirs = eager.scaled_mm_svdquant_w4a4(
        packed, inputs["qweight"][:, : K // 2].view(torch.int8), scales, inputs["wscale"][: K // 64].float(), branch,
        inputs["lora_up"], inputs["bias"], act_unsigned=unsigned,
    )[:M]  # fmt: skip
    assert relative_rms(w4a4_linear(**inputs), theirs) < 1e-6


@pytest.mark.parametrize("layout", LAYOUTS)
def test_comfy_kitchen_reads_our_files(
    kitchen: Any, interchange_flux: FluxTransformer2DModel, tmp_path: Path, layout: Any
) -> None:
    """Its weights, from the tensors as they lie in the file, are ours: the effective ones of both kinds of layers."""
    svdquant = __import__("comfy_kitchen.backends.eager.svdquant", fromlist=["svdquant"])
    awq = __import__("comfy_kitchen.backends.eager.awq", fromlist=["awq"])
    path = save_comfyui(interchange_flux, tmp_path / "model.safetensors", layout=layout)
    tensors, _ = read_tensors(path)
    read = assemble(open_comfyui(path))
    stored = {name.removeprefix(f"{Q}."): t for name, t in tensors.items() if name.startswith(f"{Q}.")}
    layer = read.get_submodule(Q)
    codes = svdquant._unpack_int4_row_major(svdquant._tile_packed_weight_to_row_major(stored["weight"]))
    assert torch.equal(codes, unpack_int4(layer.qweight))
    assert torch.equal(svdquant._tile_packed_scales_to_natural(stored["weight_scale"]), layer.wscale)
    assert torch.equal(svdquant._tile_packed_lora_up_to_natural(stored["proj_up"]), layer.lora_up)
    name = "transformer_blocks.0.norm1.linear"
    stored = {leaf: tensors[f"{name}.{leaf}"].float() for leaf in ("weight_scale", "weight_zero", "bias")}
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(1))
    theirs = awq.gemv_awq_w4a16(x, tensors[f"{name}.weight"], *stored.values())
    awq_layer = read.get_submodule(name)
    ours = w4a16_linear(
        x, awq_layer.qweight, awq_layer.wscale, awq_layer.wzero, awq_layer.lora_down, awq_layer.lora_up, awq_layer.bias
    )
    assert relative_rms(ours, theirs) < 1e-6
