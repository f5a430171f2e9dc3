"""`loragraft convert`: from what people have on their disks to what each runtime reads, with the table that it prints."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from loragraft import cli
from loragraft.kernels.layout import relative_rms
from loragraft.quantization.checkpoint import load_quantized, quantized_layers, save_quantized
from loragraft.quantization.dialects.conversion import Target, convert_checkpoint
from loragraft.quantization.dialects.detection import detect_dialect, load_any
from loragraft.quantization.tensor_file import read_tensors, write_tensors


@pytest.fixture
def svdq(tiny_flux: FluxTransformer2DModel, formulas: ModuleType, nunchaku_maker: ModuleType, tmp_path: Path) -> Path:
    """A merged Nunchaku file."""
    blocks, rest, _ = nunchaku_maker.make(tiny_flux, formulas, "v1")
    config = dict(tiny_flux.config) | {"_class_name": "NunchakuFluxTransformer2dModel"}
    write_tensors(tmp_path / "svdq.safetensors", blocks | rest, {"config": json.dumps(config)})
    return tmp_path / "svdq.safetensors"


def test_nunchaku_to_ours_changes_no_value(svdq: Path, tmp_path: Path, same_model: Callable[..., None]) -> None:
    done = convert_checkpoint(svdq, tmp_path / "ours", show_progress=False)
    assert (done.source_dialect, done.changes) == ("nunchaku", ())
    assert "single_transformer_blocks.0.proj_out" in done.table()
    same_model(load_any(svdq)[0], load_quantized(tmp_path / "ours", FluxTransformer2DModel))


def test_nunchaku_to_w4a8_reports_each_layer(
    svdq: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flux_inputs: Callable[[int], dict[str, Tensor]]
) -> None:
    dest = tmp_path / "native"
    assert cli.main(["convert", str(svdq), str(dest), "--numerics", "w4a8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    converted = load_quantized(dest, FluxTransformer2DModel)
    main = {path for path, layer in quantized_layers(converted).items() if layer.numerics == "w4a8"}
    assert {line.split()[0] for line in lines[1:-2]} == main
    assert [line.split()[1:3] for line in lines if "proj_out" in line] == [["w4a4u", "w4a8"]]
    assert lines[-2].startswith(f"{len(main)} layers: mean added weight error ")
    assert lines[-1] == f"{svdq} (nunchaku) as native: {dest}"
    inputs = flux_inputs(3)
    before, after = (model.float()(**inputs).sample for model in (load_any(svdq)[0], converted))
    assert 0 < relative_rms(after, before) < 0.25  # the INT4 activations of before, more than the rounding


def test_nunchaku_to_lite_and_comfyui_without_unsigned_activations(svdq: Path, tmp_path: Path) -> None:
    for to, name in (("nunchaku-lite", "lite"), ("comfyui", "comfy.safetensors")):
        with pytest.raises(ValueError, match=r"has unsigned .*convert with --signed"):
            convert_checkpoint(svdq, tmp_path / name, to, show_progress=False)  # type: ignore[arg-type]
        assert not (tmp_path / name).exists()
        done = convert_checkpoint(svdq, tmp_path / name, to, signed=True, show_progress=False)  # type: ignore[arg-type]
        assert {change.after for change in done.changes} == {"w4a4"}
        assert {change.weight_error for change in done.changes} == {0.0}
        assert detect_dialect(tmp_path / name) == to
        layer = load_any(tmp_path / name)[0].get_submodule("single_transformer_blocks.0.proj_out")
        assert (layer.act_unsigned, layer.rank) == (False, 32)


def test_nunchaku_to_comfyuis_flux(svdq: Path, tmp_path: Path) -> None:
    """Its fused layers come together again: the qkv of a double block has the rank that it had in the file."""
    dest = tmp_path / "flux.safetensors"
    assert cli.main(["convert", str(svdq), str(dest), "--to", "comfyui-flux", "--signed"]) == 0
    tensors, _ = read_tensors(dest)
    assert tensors["double_blocks.0.img_attn.qkv.proj_down"].shape == (128, 16)
    assert tensors["single_blocks.0.linear1.weight"].shape == (384 + 512, 64)
    before, after = load_any(svdq)[0], load_any(dest)[0]
    for path in ("transformer_blocks.0.attn.add_k_proj", "single_transformer_blocks.0.proj_mlp"):
        for name, buffer in before.get_submodule(path).named_buffers():
            assert torch.equal(getattr(after.get_submodule(path), name), buffer), (path, name)


def test_native_to_comfyui_needs_other_numerics(quantized_flux: FluxTransformer2DModel, tmp_path: Path) -> None:
    source = save_quantized(quantized_flux, tmp_path / "native")
    dest = tmp_path / "comfy.safetensors"
    with pytest.raises(ValueError, match=r"to_q' is w4a8, .*--numerics w4a4"):
        convert_checkpoint(source, dest, "comfyui", show_progress=False)
    done = convert_checkpoint(source, dest, "comfyui", numerics="w4a4", layout="tile-packed", show_progress=False)
    assert done.source_dialect == "native"
    assert 0 < max(change.weight_error for change in done.changes) < 0.2
    read = load_any(dest)[0].get_submodule("transformer_blocks.0.attn.to_q")
    assert (
        relative_rms(
            read.dequantized_weight(),
            quantized_flux.get_submodule("transformer_blocks.0.attn.to_q").dequantized_weight(),
        )
        < 0.2
    )
    flux = convert_checkpoint(
        source, tmp_path / "flux.safetensors", "comfyui-flux", numerics="w4a4", show_progress=False
    )
    assert "single_blocks.0.linear1.weight" in read_tensors(flux.path)[0]
    q, mlp = (
        load_any(flux.path)[0].get_submodule(f"single_transformer_blocks.0.{n}") for n in ("attn.to_q", "proj_mlp")
    )
    assert torch.equal(q.smooth, mlp.smooth)
    with pytest.raises(FileExistsError, match="exists; name another place"):
        convert_checkpoint(source, dest, "comfyui", show_progress=False)
    with pytest.raises(ValueError, match="target 'gguf'"):
        convert_checkpoint(source, tmp_path / "x", "gguf")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("to", "name", "message"),
    [
        ("comfyui", "flux", r"a \.safetensors file: .*/flux\.safetensors \("),  # ComfyUI lists no file without it
        ("native", "flux.safetensors", r"a folder: .*/flux \("),
    ],
)
def test_a_folder_is_not_named_like_a_file_nor_a_file_like_a_folder(
    svdq: Path, tmp_path: Path, to: Target, name: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(svdq, tmp_path / name, to, show_progress=False)
    assert not (tmp_path / name).exists()


def test_a_failed_write_leaves_nothing(svdq: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    before = set(tmp_path.iterdir())
    monkeypatch.setattr("loragraft.quantization.tensor_file.save_file", full)
    for to, name in (("native", "out"), ("nunchaku-lite", "out"), ("comfyui", "out.safetensors")):
        with pytest.raises(OSError, match="no space is left"):
            convert_checkpoint(svdq, tmp_path / name, to, signed=True, show_progress=False)  # type: ignore[arg-type]
    assert set(tmp_path.iterdir()) == before
    assert torch.get_default_dtype() == torch.float32
