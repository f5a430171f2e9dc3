"""Nunchaku's FLUX files, v1 and v2: every tensor lands where diffusers' model wants it, and the layers mean what they say."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from loragraft.kernels.layout import relative_rms, unpack_int4, unpack_uint4
from loragraft.quantization.checkpoint import load_quantized, save_quantized
from loragraft.quantization.dialects.assembly import assemble
from loragraft.quantization.dialects.nunchaku_flux import open_nunchaku
from loragraft.quantization.tensor_file import CheckpointError, write_tensors

Made = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, dict[str, Any]]]
QUANTIZATION = {"method": "svdquant", "weight": {"dtype": "int4", "group_size": 64}, "rank": 16}


def _config(model: FluxTransformer2DModel, **changes: Any) -> dict[str, Any]:
    return {"_class_name": "NunchakuFluxTransformer2dModel"} | dict(model.config) | changes


def _write(folder: Path, spelling: str, model: FluxTransformer2DModel, made: Made) -> Path:
    """v1: the folder of two files; v2: the merged single file."""
    blocks, rest, _ = made
    folder.mkdir(exist_ok=True)
    if spelling == "v1":
        write_tensors(folder / "transformer_blocks.safetensors", blocks, {})
        write_tensors(folder / "unquantized_layers.safetensors", rest, {})
        (folder / "config.json").write_text(json.dumps(_config(model)))
        return folder
    metadata = {"config": json.dumps(_config(model)), "quantization_config": json.dumps(QUANTIZATION)}
    write_tensors(folder / "svdq.safetensors", blocks | rest, metadata)
    return folder / "svdq.safetensors"


@pytest.fixture(params=["v1", "v2"])
def spelling(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def made(tiny_flux: FluxTransformer2DModel, formulas: ModuleType, nunchaku_maker: ModuleType, spelling: str) -> Made:
    return nunchaku_maker.make(tiny_flux, formulas, spelling)


def test_every_tensor_lands_in_its_place(
    tiny_flux: FluxTransformer2DModel, made: Made, spelling: str, tmp_path: Path
) -> None:
    model = assemble(open_nunchaku(_write(tmp_path / "svdq", spelling, tiny_flux, made)))
    for path, wanted in made[2].items():
        layer = model.get_submodule(path)
        if "attention" in wanted:
            wanted = _joined(wanted["attention"], wanted["mlp"])
        unpack = unpack_uint4 if layer.numerics == "w4a16" else unpack_int4
        assert torch.equal(unpack(layer.qweight), wanted["codes"]), path
        for name in wanted.keys() - {"codes", "unsigned"}:
            assert torch.equal(getattr(layer, name), wanted[name]), (path, name)
        assert (layer.act_unsigned, layer.unsigned_from) == ("unsigned" in wanted, wanted.get("unsigned", 0)), path
    for name, tensor in tiny_flux.state_dict().items():
        if name.rpartition(".")[0] not in made[2]:
            assert torch.equal(model.state_dict()[name], tensor.bfloat16()), name


def _joined(attention: dict[str, Tensor], mlp: dict[str, Tensor]) -> dict[str, Any]:
    return {
        "codes": torch.cat([attention["codes"], mlp["codes"]], dim=1),
        "wscale": torch.cat([attention["wscale"], mlp["wscale"]]),
        "smooth": torch.cat([attention["smooth"], mlp["smooth"]]),
        "lora_down": torch.block_diag(attention["lora_down"], mlp["lora_down"]),
        "lora_up": torch.cat([attention["lora_up"], mlp["lora_up"]], dim=1),
        "bias": mlp["bias"],
        "unsigned": attention["codes"].shape[1],
    }


def _answer(layer: dict[str, Tensor], x: Tensor, unsigned: bool) -> Tensor:
    """SVDQUANT's run-time numerics, spelt out in float64: quantize x per 64 channels, multiply, add branch and bias."""
    codes, wscale = layer["codes"].double(), layer["wscale"].double()
    shifted = (x + 0.171875 if unsigned else x) / layer["smooth"].double()
    groups = shifted.view(x.shape[0], -1, 64)
    scale = (groups.abs().amax(-1, keepdim=True) / (15 if unsigned else 7)).bfloat16().double()
    rounded = (groups / scale).round().clamp(0 if unsigned else -7, 15 if unsigned else 7) * scale
    weight = codes.view(codes.shape[0], -1, 64) * wscale.T[..., None]
    branch = (x @ layer["lora_down"].double().T) @ layer["lora_up"].double().T
    return rounded.flatten(1) @ weight.flatten(1).T + branch + layer["bias"].double()


def test_layers_answer_as_the_runtime_does(
    tiny_flux: FluxTransformer2DModel, made: Made, spelling: str, tmp_path: Path
) -> None:
    """proj_out on cat(attention, gelu) is the sum of its halves; the second MLP layer quantizes x + 0.171875."""
    model = assemble(open_nunchaku(_write(tmp_path / "svdq", spelling, tiny_flux, made)))
    x = torch.randn(9, 640, generator=torch.Generator().manual_seed(5))
    x[:, 128:] = torch.nn.functional.gelu(x[:, 128:], approximate="tanh")
    halves, path = made[2]["single_transformer_blocks.0.proj_out"], "transformer_blocks.0.ff.net.2"
    expected = _answer(halves["attention"], x[:, :128].double(), False) + _answer(
        halves["mlp"], x[:, 128:].double(), True
    )
    assert relative_rms(model.get_submodule("single_transformer_blocks.0.proj_out")(x), expected) < 1e-5
    expected = _answer(made[2][path], x[:, 128:].double(), True)
    assert relative_rms(model.get_submodule(path)(x[:, 128:]), expected) < 1e-5
    adaln = made[2]["single_transformer_blocks.0.norm.linear"]
    weight = adaln["codes"].double().view(384, 2, 64) * adaln["wscale"].double().T[..., None]
    weight = (weight + adaln["wzero"].double().T[..., None]).flatten(1)
    actual = model.get_submodule("single_transformer_blocks.0.norm.linear")(x[:, :128])
    assert relative_rms(actual, x[:, :128].double() @ weight.T + adaln["bias"].double()) < 1e-5


def test_the_model_runs_and_our_checkpoint_keeps_it(
    tiny_flux: FluxTransformer2DModel, made: Made, spelling: str, tmp_path: Path, flux_inputs: Any
) -> None:
    model = assemble(open_nunchaku(_write(tmp_path / "svdq", spelling, tiny_flux, made)))
    again = load_quantized(save_quantized(model, tmp_path / "ours"), FluxTransformer2DModel)
    assert again.get_submodule("single_transformer_blocks.0.proj_out").unsigned_from == 128
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    inputs = flux_inputs(1)
    sample = model.float()(**inputs).sample
    assert sample.isfinite().all()
    assert torch.equal(again.float()(**inputs).sample, sample)


def test_float16_files(
    tiny_flux: FluxTransformer2DModel, formulas: ModuleType, nunchaku_maker: ModuleType, tmp_path: Path
) -> None:
    made = nunchaku_maker.make(tiny_flux, formulas, "v2", torch.float16)
    model = assemble(open_nunchaku(_write(tmp_path / "svdq", "v2", tiny_flux, made)))
    layer = model.get_submodule("transformer_blocks.0.attn.to_k")
    assert layer.wscale.dtype == layer.smooth.dtype == layer.lora_up.dtype == torch.float16
    assert torch.equal(layer.wscale, made[2]["transformer_blocks.0.attn.to_k"]["wscale"])


Q = "transformer_blocks.0.attn.to_qkv"
BROKEN = {
    "missing": (lambda t: t.pop(f"{Q}.wscales"), rf"svdq\.safetensors: tensor '{Q}\.wscales' is missing; nearest"),
    "shape": (lambda t: t.update({f"{Q}.qweight": t[f"{Q}.qweight"][:256]}), rf"{Q}\.qweight' has shape \(256, 64\), expected"),
    "dtype": (lambda t: t.update({f"{Q}.qweight": t[f"{Q}.qweight"].view(torch.uint8)}), rf"{Q}\.qweight' is torch.uint8"),
    "nan": (lambda t: t[f"{Q}.smooth_factor"].fill_(torch.nan), rf"{Q}\.smooth_factor' holds NaN"),
    "foreign": (lambda t: t.update({"blocks.7.weight": torch.zeros(1)}), r"'blocks\.7\.weight' belongs to no layer"),
    "nvfp4": (lambda t: t.update({f"{Q}.wtscale": torch.ones(1)}), rf"{Q}\.wtscale': an NVFP4 layer"),
    "rank": (lambda t: t.update({f"{Q}.proj_down": t[f"{Q}.proj_down"][:, :15]}), rf"{Q}\.proj_down' has rank 15"),
    "awq": (
        lambda t: t.update({"transformer_blocks.0.norm1.linear.wzeros": torch.zeros(1, 768)}),
        r"norm1\.linear\.wzeros' has shape \(1, 768\), expected \(16, 768\)",
    ),
    "dense": (lambda t: t.update({"proj_out.weight": torch.zeros(3, 3)}), r"'proj_out\.weight' has shape \(3, 3\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused(
    tiny_flux: FluxTransformer2DModel, formulas: ModuleType, nunchaku_maker: ModuleType, tmp_path: Path, case: str
) -> None:
    blocks, rest, expected = nunchaku_maker.make(tiny_flux, formulas, "v2")
    change, message = BROKEN[case]
    tensors = blocks | rest
    change(tensors)
    path = _write(tmp_path / "svdq", "v2", tiny_flux, (tensors, {}, expected))
    with pytest.raises(CheckpointError, match=message):
        assemble(open_nunchaku(path))


def test_foreign_headers_are_refused(tiny_flux: FluxTransformer2DModel, tmp_path: Path) -> None:
    path = tmp_path / "svdq.safetensors"
    tensors = {"x": torch.zeros(1)}
    for metadata, message in (
        ({}, r"no `config` in its header and no config\.json"),
        ({"config": "{"}, "`config` in the header is not JSON"),
        ({"config": json.dumps({"_class_name": "SanaTransformer2DModel"})}, "read for FLUX.1 only"),
        ({"config": json.dumps({"_class_name": "FluxTransformer2DModel"})}, "lacks num_layers"),
        (
            {"config": json.dumps(_config(tiny_flux)), "quantization_config": json.dumps({"weight": {"dtype": "fp4_e2m1_all"}})},
            "only int4 in groups of 64",
        ),
    ):  # fmt: skip
        write_tensors(path, tensors, metadata)
        with pytest.raises(CheckpointError, match=message):
            open_nunchaku(path)
    with pytest.raises(CheckpointError, match=r"no transformer_blocks\.safetensors there"):
        open_nunchaku(tmp_path)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(CheckpointError, match="truncated: tensor 'x'"):
        open_nunchaku(path)
