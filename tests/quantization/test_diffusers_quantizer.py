"""`from_pretrained` of diffusers on our folders, and Nunchaku Lite folders on our kernels when asked."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.quantizers import auto
from torch import Tensor

from loragraft.quantization.checkpoint import load_quantized, quantized_layers, recorded_base_id, save_quantized
from loragraft.quantization.dialects.nunchaku_lite import save_lite
from loragraft.quantization.diffusers_quantizer import load_nunchaku_lite, register
from loragraft.quantization.linear import SVDQuantLinear
from loragraft.quantization.numerics import convert_numerics
from loragraft.quantization.tensor_file import CheckpointError, read_tensors, write_tensors

WEIGHTS = "diffusion_pytorch_model.safetensors"
LAYER = "transformer_blocks.0.attn.to_q"


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    """diffusers' dictionaries as they were, after each test, and the default dtype, which its loader forgets if it fails."""
    dtype = torch.get_default_dtype()
    before = dict(auto.AUTO_QUANTIZER_MAPPING), dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    yield
    torch.set_default_dtype(dtype)
    for mapping, content in zip(
        (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING), before, strict=True
    ):
        mapping.clear()
        mapping.update(content)


@pytest.fixture
def folder(quantized_flux: FluxTransformer2DModel, tmp_path: Path) -> Path:
    return save_quantized(quantized_flux, tmp_path / "int4")


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32])
def test_from_pretrained_is_load_quantized(
    folder: Path,
    flux_inputs: Callable[[int], dict[str, Tensor]],
    dtype: torch.dtype | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """torch_dtype reaches the 16-bit layers; quantized ones are what the file holds."""
    register()
    register()
    loaded = FluxTransformer2DModel.from_pretrained(folder, torch_dtype=dtype)
    expected = load_quantized(folder, FluxTransformer2DModel)
    assert recorded_base_id(loaded) == recorded_base_id(expected)
    layers = quantized_layers(expected)
    assert quantized_layers(loaded).keys() == layers.keys()
    for path, layer in quantized_layers(loaded).items():
        assert repr(layer) == repr(layers[path])
        for name, buffer in layer.named_buffers():
            stored = getattr(layers[path], name)
            assert buffer.dtype == stored.dtype, (path, name)
            assert torch.equal(buffer, stored), (path, name)
    assert loaded.x_embedder.weight.dtype == (dtype or torch.float32)
    assert torch.equal(loaded.x_embedder.weight.float(), expected.x_embedder.weight.float())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    inputs = {name: tensor.to(dtype or torch.float32) for name, tensor in flux_inputs(1).items()}
    expected.to(dtype or torch.float32)
    assert torch.equal(loaded(**inputs).sample, expected(**inputs).sample)
    with pytest.raises(ValueError, match="not serializable"):
        loaded.save_pretrained(folder.parent / "again")
    assert "save_quantized(model, folder) writes" in caplog.text  # diffusers' message points to the log
    again = load_quantized(save_quantized(loaded, folder.parent / "again"), FluxTransformer2DModel)
    assert torch.equal(again.get_submodule(LAYER).qweight, layers[LAYER].qweight)


def test_without_register_diffusers_knows_no_such_method(folder: Path) -> None:
    with pytest.raises(ValueError, match="Unknown quantization type, got loragraft"):
        FluxTransformer2DModel.from_pretrained(folder)


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


def _index_names_more(missing: str) -> Callable[[Path], None]:
    """Of several files, whose index names a tensor that is in none."""

    def apply(folder: Path) -> None:
        names = dict.fromkeys(read_tensors(folder / WEIGHTS)[0], "part.safetensors")
        _weights(lambda tensors: tensors.pop(missing))(folder)
        (folder / WEIGHTS).rename(folder / "part.safetensors")
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))

    return apply


BROKEN = {
    "version": (_config(lambda c: c.update(version=9)), "format version 9"),
    "stranger": (_config(lambda c: c["layers"].update(x=c["layers"][LAYER])), "'x' is no linear layer"),
    "missing": (_weights(lambda t: t.pop(f"{LAYER}.row_scale")), rf"tensor '{LAYER}\.row_scale' is missing"),
    "missing, 16 bit": (
        _weights(lambda t: (t.pop("x_embedder.weight"), t.pop("proj_out.bias"))),
        r"tensor 'proj_out\.bias' is missing, and 1 more",
    ),
    "missing, of several files": (_index_names_more(f"{LAYER}.row_scale"), rf"tensor '{LAYER}\.row_scale' is missing"),
    "missing, 16 bit, of several files": (_index_names_more("proj_out.bias"), r"tensor 'proj_out\.bias' is missing"),
    "shape": (
        _weights(lambda t: t.update({f"{LAYER}.qweight": t[f"{LAYER}.qweight"][:9]})),
        rf"{LAYER}\.qweight' has shape",
    ),
    "dtype": (_weights(lambda t: t.update({f"{LAYER}.row_scale": t[f"{LAYER}.row_scale"].half()})), "is torch.float16"),
    "range": (_weights(lambda t: t[f"{LAYER}.group_scale"].fill_(16)), "leaves the code"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folders_are_refused(folder: Path, case: str) -> None:
    register()
    change, message = BROKEN[case]
    change(folder)
    with pytest.raises(CheckpointError, match=message):
        FluxTransformer2DModel.from_pretrained(folder)


def test_nunchaku_lite_loads_when_asked_and_diffusers_keeps_its_own(
    quantized_flux: FluxTransformer2DModel, tmp_path: Path, flux_inputs: Callable[[int], dict[str, Tensor]]
) -> None:
    own = auto.AUTO_QUANTIZER_MAPPING["nunchaku_lite"]
    register()
    convert_numerics(quantized_flux, "w4a4")
    folder = save_lite(quantized_flux, tmp_path / "lite")
    model = load_nunchaku_lite(folder)
    assert auto.AUTO_QUANTIZER_MAPPING["nunchaku_lite"] is own
    assert isinstance(model.get_submodule(LAYER), SVDQuantLinear)
    inputs = flux_inputs(2)
    expected = quantized_flux.float()(**inputs).sample
    assert torch.allclose(model.float()(**inputs).sample, expected, atol=1e-5)  # ranks padded from 4 to 16 with zeros
