"""A model from parts: its class by name, JSON that is none, and dense tensors that must all be there."""

import json
from pathlib import Path

import pytest
from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel

from loragraft.quantization.checkpoint import base_id, recorded_base_id
from loragraft.quantization.dialects.assembly import Opened, assemble, model_class, parse_json, read_json
from loragraft.quantization.dialects.files import TensorFiles
from loragraft.quantization.tensor_file import CheckpointError, write_tensors


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("FluxTransformer2DModel", FluxTransformer2DModel),
        ("NunchakuFluxTransformer2dModel", FluxTransformer2DModel),
        ("NunchakuFluxTransformer2DModelV2", FluxTransformer2DModel),
        ("PixArtTransformer2DModel", PixArtTransformer2DModel),
    ],
)
def test_model_classes_by_any_of_their_names(name: str, expected: type) -> None:
    assert model_class({"_class_name": name}, "config.json") is expected


def test_what_is_no_model_or_no_json(tmp_path: Path) -> None:
    for config in ({"_class_name": "FluxPipeline"}, {"_class_name": "GaussianModel"}, {}):
        with pytest.raises(CheckpointError, match=r"config\.json: _class_name .* is no model of diffusers"):
            model_class(config, "config.json")
    with pytest.raises(CheckpointError, match="header is not JSON"):
        parse_json("{", "header")
    with pytest.raises(CheckpointError, match="header is JSON, but no object"):
        parse_json("[]", "header")
    with pytest.raises(CheckpointError, match="no file"):
        read_json(tmp_path / "config.json")


def test_dense_tensors_alone(tiny_flux: FluxTransformer2DModel, tmp_path: Path) -> None:
    """No quantized layer at all: the tensors of the file, under its own names, and nothing else."""
    path = tmp_path / "model.safetensors"
    state = tiny_flux.state_dict()
    config = json.loads(tiny_flux.to_json_string())
    write_tensors(path, {f"net.{name}": tensor for name, tensor in state.items()}, {})
    names = {name: f"net.{name}" for name in state}
    model = assemble(Opened("test", TensorFiles([path]), config, dense=names))
    assert base_id(model) == base_id(tiny_flux) == recorded_base_id(model)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    del names["proj_out.bias"]
    with pytest.raises(CheckpointError, match=r"tensor 'proj_out\.bias' is missing; nearest: net\.proj_out\.bias"):
        assemble(Opened("test", TensorFiles([path]), config, dense=names))
