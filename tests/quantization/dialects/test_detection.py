"""Which dialect a path is, whoever wrote it, and one model through all of them."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import FluxTransformer2DModel

from loragraft.quantization.checkpoint import save_quantized
from loragraft.quantization.dialects.comfyui import save_comfyui
from loragraft.quantization.dialects.detection import detect_dialect, load_any
from loragraft.quantization.dialects.nunchaku_lite import save_lite
from loragraft.quantization.tensor_file import CheckpointError, write_tensors


def test_one_model_through_every_dialect_that_is_written(
    interchange_flux: FluxTransformer2DModel, tmp_path: Path, same_model: Callable[..., None]
) -> None:
    for dialect, save, name in (
        ("native", save_quantized, "ours"),
        ("nunchaku-lite", save_lite, "lite"),
        ("comfyui", save_comfyui, "comfy.safetensors"),
    ):
        path = save(interchange_flux, tmp_path / name)
        seen: list[int] = []
        model, found = load_any(path, lambda done, total, _path, seen=seen: seen.append(total - done))
        assert found == detect_dialect(path) == dialect
        assert seen == list(range(len(seen)))[::-1]
        assert dialect == "native" or len(seen) > 20
        if dialect == "comfyui":
            path = save_comfyui(model, path, overwrite=True)  # offsets of W4A16 layers are rounded once
            same_model(model, load_any(path)[0])
        else:
            same_model(interchange_flux, model)


def test_nunchaku_is_told_by_its_names(
    tiny_flux: FluxTransformer2DModel, formulas: ModuleType, nunchaku_maker: ModuleType, tmp_path: Path
) -> None:
    for spelling in ("v1", "v2"):
        blocks, rest, _ = nunchaku_maker.make(tiny_flux, formulas, spelling)
        config = json.dumps(dict(tiny_flux.config) | {"_class_name": "FluxTransformer2DModel"})
        path = tmp_path / f"{spelling}.safetensors"
        write_tensors(path, blocks | rest, {"config": config})
        model, dialect = load_any(path)
        assert dialect == "nunchaku"
        assert model.get_submodule("transformer_blocks.0.ff.net.2").act_unsigned
    write_tensors(tmp_path / "transformer_blocks.safetensors", blocks, {})
    assert detect_dialect(tmp_path) == "nunchaku"
    with pytest.raises(CheckpointError, match=r"no file .*unquantized_layers\.safetensors"):
        load_any(tmp_path)


def test_foreign_paths_are_refused(tmp_path: Path) -> None:
    plain = tmp_path / "plain.safetensors"
    write_tensors(plain, {"x": torch.zeros(1)}, {})
    (tmp_path / "pipeline" / "transformer").mkdir(parents=True)
    (tmp_path / "sixteen").mkdir()
    (tmp_path / "sixteen" / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "sdnq"}}))
    for path, message in (
        (plain, "no SVDQuant checkpoint. Read are"),
        (tmp_path / "nowhere", "no file or folder"),
        (tmp_path / "pipeline", r"its transformer/ may be what is meant"),
        (tmp_path / "sixteen", "16-bit weights, which `loragraft quantize` quantizes"),
        (tmp_path / "other", "quant_method 'sdnq'. Read are"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_any(path)
