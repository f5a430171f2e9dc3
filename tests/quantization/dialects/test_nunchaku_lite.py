"""diffusers' Nunchaku Lite: what is written is what its loader expects, and reads back bit for bit."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.quantizers.quantization_config import NunchakuLiteQuantizationConfig
from torch import nn

from loragraft.kernels.layout import unpack_int4
from loragraft.quantization.checkpoint import quantized_layers
from loragraft.quantization.dialects.assembly import assemble
from loragraft.quantization.dialects.nunchaku_lite import open_lite, save_lite
from loragraft.quantization.linear import SVDQuantLinear
from loragraft.quantization.tensor_file import CheckpointError, read_tensors, write_tensors

WEIGHTS = "diffusion_pytorch_model.safetensors"
Q = "transformer_blocks.0.attn.to_q"


@pytest.fixture
def folder(interchange_flux: FluxTransformer2DModel, tmp_path: Path) -> Path:
    return save_lite(interchange_flux, tmp_path / "lite")


def test_roundtrip_is_bit_exact(
    interchange_flux: FluxTransformer2DModel, folder: Path, tmp_path: Path, same_model: Callable[..., None]
) -> None:
    read = assemble(open_lite(folder))
    same_model(interchange_flux, read)
    save_lite(read, tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    assert (tmp_path / "again" / "config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_tensors_are_those_that_diffusers_declares(interchange_flux: FluxTransformer2DModel, folder: Path) -> None:
    """Names, shapes and dtypes of `SVDQW4A4Linear` and `AWQW4A16Linear` (diffusers `quantizers/nunchaku/utils.py`)."""
    tensors, _ = read_tensors(folder / WEIGHTS)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    parsed = NunchakuLiteQuantizationConfig(**{k: v for k, v in config.items() if k != "quant_method"})
    assert (parsed.quant_method, parsed.compute_dtype) == ("nunchaku_lite", torch.bfloat16)
    expected = {}
    for path in parsed.svdq_w4a4["targets"]:
        layer = interchange_flux.get_submodule(path)
        N, K, R = layer.out_features, layer.in_features, parsed.svdq_w4a4["rank"]
        shapes = {"wscales": (K // 64, N), "smooth_factor": (K,), "proj_down": (K, R), "proj_up": (N, R), "bias": (N,)}
        expected |= {f"{path}.{name}": (shape, torch.bfloat16) for name, shape in shapes.items()}
        expected[f"{path}.qweight"] = (N, K // 2), torch.int8
    for path in parsed.awq_w4a16["targets"]:
        layer = interchange_flux.get_submodule(path)
        N, K = layer.out_features, layer.in_features
        shapes = {"wscales": (K // 64, N), "wzeros": (K // 64, N), "bias": (N,)}
        expected |= {f"{path}.{name}": (shape, torch.bfloat16) for name, shape in shapes.items()}
        expected[f"{path}.qweight"] = (N // 4, K // 2), torch.int32
    for name, tensor in interchange_flux.state_dict().items():
        if name.rpartition(".")[0] not in quantized_layers(interchange_flux):
            expected[name] = tuple(tensor.shape), tensor.dtype
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == expected


def test_packing_is_nunchakus(interchange_flux: FluxTransformer2DModel, folder: Path, formulas: ModuleType) -> None:
    tensors, _ = read_tensors(folder / WEIGHTS)
    layer = interchange_flux.get_submodule(Q)
    assert torch.equal(tensors[f"{Q}.qweight"], formulas.packed_qweight(unpack_int4(layer.qweight)))
    assert torch.equal(tensors[f"{Q}.wscales"], formulas.packed_scales(layer.wscale))
    assert torch.equal(tensors[f"{Q}.proj_down"], formulas.packed_down(layer.lora_down))
    assert torch.equal(tensors[f"{Q}.bias"], formulas.packed_vector(layer.bias))


def test_smaller_ranks_are_padded_with_zeros(interchange_flux: FluxTransformer2DModel, tmp_path: Path) -> None:
    layer = interchange_flux.get_submodule(Q)
    down, up = layer.lora_down[:5], layer.lora_up[:, :5]
    tensors = dict(layer.named_buffers()) | {"lora_down": down, "lora_up": up}
    interchange_flux.transformer_blocks[0].attn.to_q = SVDQuantLinear(128, 128, "w4a4", tensors)
    read = assemble(open_lite(save_lite(interchange_flux, tmp_path / "lite"))).get_submodule(Q)
    assert (read.rank, read.base_rank) == (16, 16)
    assert torch.equal(read.lora_down[:5], down)
    assert torch.equal(read.lora_up[:, :5], up)
    assert not read.lora_down[5:].any()
    assert not read.lora_up[:, 5:].any()


def test_what_it_cannot_hold_is_refused(
    interchange_flux: FluxTransformer2DModel, quantized_flux: FluxTransformer2DModel, folder: Path, tmp_path: Path
) -> None:
    layer = interchange_flux.get_submodule(Q)

    def instead(**changes: Any) -> nn.Module:
        tensors = dict(layer.named_buffers())
        interchange_flux.transformer_blocks[0].attn.to_q = SVDQuantLinear(128, 128, "w4a4", tensors, **changes)
        return interchange_flux

    with pytest.raises(FileExistsError, match="overwrite"):
        save_lite(interchange_flux, folder)
    with pytest.raises(ValueError, match=r"to_q' is w4a8.*--numerics w4a4"):
        save_lite(quantized_flux, tmp_path / "refused")
    for changes, message in (
        ({"act_unsigned": True}, r"to_q' has unsigned activations.*--signed"),
        ({"act_unsigned": True, "unsigned_from": 64}, r"to_q' has unsigned columns from 64 on"),
        ({"hadamard": True}, r"to_q' is rotated"),
    ):
        with pytest.raises(ValueError, match=message):
            save_lite(instead(**changes), tmp_path / "refused")
    instead().get_submodule(Q).set_branch(torch.zeros(20, 128), torch.zeros(128, 20))
    with pytest.raises(ValueError, match="carry grafts"):
        save_lite(interchange_flux, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def _config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config["quantization_config"])
        (folder / "config.json").write_text(json.dumps(config))

    return apply


def _weights(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors, metadata = read_tensors(folder / WEIGHTS)
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        change(tensors)
        write_tensors(folder / WEIGHTS, tensors, metadata)

    return apply


BROKEN = {
    "method": (_config(lambda c: c.update(quant_method="sdnq")), "quant_method is 'sdnq'"),
    "nvfp4": (_config(lambda c: c["svdq_w4a4"].update(precision="nvfp4", group_size=16)), "precision 'nvfp4'"),
    "stranger": (_config(lambda c: c["svdq_w4a4"]["targets"].append("blocks.1")), "'blocks.1' is no linear layer"),
    "none": (_config(lambda c: [c.pop("svdq_w4a4"), c.pop("awq_w4a16")]), "names no targets"),
    "missing": (_weights(lambda t: t.pop(f"{Q}.proj_up")), rf"{WEIGHTS}: tensor '{Q}\.proj_up' is missing"),
    "shape": (
        _weights(lambda t: t.update({f"{Q}.wscales": t[f"{Q}.wscales"].T})),
        rf"{Q}\.wscales' has shape \(128, 2\)",
    ),
    "bias": (_weights(lambda t: t.pop(f"{Q}.bias")), rf"{Q}\.bias' is missing"),
    "dtype": (_weights(lambda t: t.update({f"{Q}.proj_up": t[f"{Q}.proj_up"].double()})), "is torch.float64"),
    "foreign": (_weights(lambda t: t.update(x=t[f"{Q}.bias"].clone())), r"tensor 'x' belongs to no layer"),
    "truncated": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]), r"truncated: tensor '[\w.]+'"),
    "empty": (lambda f: (f / WEIGHTS).unlink(), "no safetensors file"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folders_are_refused(folder: Path, case: str) -> None:
    change, message = BROKEN[case]
    change(folder)
    with pytest.raises(CheckpointError, match=message):
        assemble(open_lite(folder))
