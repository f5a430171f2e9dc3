"""`loragraft convert --adapter`: a grafted model as a checkpoint, the same in our own format, Lite's and ComfyUI's."""

import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.quantizers.quantization_config import NunchakuLiteQuantizationConfig
from torch import Tensor

from loragraft import cli
from loragraft.adapters.checkpoint import Adapter, load_adapter, write_adapter
from loragraft.adapters.graft import graft
from loragraft.kernels.layout import relative_rms
from loragraft.quantization.checkpoint import base_id, load_quantized, quantized_layers, save_quantized
from loragraft.quantization.convert import plan_layers, quantize_model
from loragraft.quantization.dialects.detection import load_any
from loragraft.quantization.linear import SVDQuantLinear
from loragraft.quantization.settings import QuantSettings
from loragraft.quantization.tensor_file import read_tensors, write_tensors

BLOCKS = (r"(single_)?transformer_blocks\.\d+\.(attn\..*|ff(_context)?\.net\..*|proj_mlp|proj_out)",)
ADALN = (r"(single_)?transformer_blocks\.\d+\.norm(1|1_context)?\.linear",)
KEEP = ("x_embedder", "context_embedder", r"time_text_embed\..*", r"norm_out\.linear", "proj_out")
TO_Q, NORM = "transformer_blocks.0.attn.to_q", "transformer_blocks.0.norm1.linear"
Inputs = Callable[[int], dict[str, Tensor]]


def _adapter(model: FluxTransformer2DModel, seed: int, paths: list[str] | None = None) -> Adapter:
    random, pairs = torch.Generator().manual_seed(seed), {}
    for path, layer in quantized_layers(model).items():
        if paths is None or path in paths:
            down = torch.randn(3, layer.in_features, generator=random) / layer.in_features**0.5
            pairs[path] = down, 0.2 * torch.randn(layer.out_features, 3, generator=random)
    return Adapter(f"a{seed}", {"base": "tiny", "base_id": base_id(model), "name": f"a{seed}"}, pairs)


@pytest.fixture
def interchange(plain_flux: FluxTransformer2DModel) -> FluxTransformer2DModel:
    model = plain_flux.to(torch.bfloat16)
    main = QuantSettings("w4a4", smoothing="weight", rank=16, iterations=1, grid=1)
    rules = dict.fromkeys(BLOCKS, main) | dict.fromkeys(ADALN, QuantSettings("w4a16"))
    quantize_model(model, plan_layers(model, rules, KEEP), {}, keep=KEEP)
    return model


@pytest.fixture
def baked(interchange: FluxTransformer2DModel, tmp_path: Path) -> Callable[..., Path]:
    """(target, its options, layers) -> the file or folder that the command wrote; `interchange` is then grafted likewise."""
    source = save_quantized(interchange, tmp_path / "base")

    def bake(to: str, *options: str, paths: list[str] | None = None) -> Path:
        adapter = _adapter(interchange, 0, paths)
        write_adapter(adapter.pairs, tmp_path / "adapter", adapter.metadata)
        dest = tmp_path / ("baked.safetensors" if to.startswith("comfyui") else "baked")
        command = ["convert", str(source), str(dest), "--to", to, "--adapter", f"{tmp_path / 'adapter'}@0.7"]
        assert cli.main([*command, *options]) == 0
        graft(interchange, load_adapter(tmp_path / "adapter"), 0.7)
        return dest

    return bake


def _output(model: FluxTransformer2DModel, inputs: dict[str, Tensor]) -> Tensor:
    output: Tensor = model.float()(**inputs).sample
    return output


def test_native_is_the_grafted_model_bit_for_bit(
    interchange: FluxTransformer2DModel, baked: Callable[..., Path], flux_inputs: Inputs,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    codes = {path: layer.qweight.clone() for path, layer in quantized_layers(interchange).items()}
    read = load_quantized(baked("native"), FluxTransformer2DModel)
    state, grafted = read.state_dict(), interchange.state_dict()
    assert state.keys() == grafted.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in grafted.items())
    assert all(torch.equal(layer.qweight, codes[path]) for path, layer in quantized_layers(read).items())
    assert read.get_submodule(TO_Q).base_rank == 16 + 3
    assert torch.equal(_output(read, flux_inputs(1)), _output(interchange, flux_inputs(1)))
    assert "grafted a0 with weight 0.7, rank 3" in capsys.readouterr().out


@pytest.mark.parametrize("to", ["nunchaku-lite", "comfyui"])
def test_interchange_files_read_back_as_the_grafted_model(
    interchange: FluxTransformer2DModel, baked: Callable[..., Path], flux_inputs: Inputs, to: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """W4A4 layers to the bit but for ranks of zeros; the adaLN layers, which have no branch there, in 16 bits."""
    read = load_any(baked(to))[0]
    for path, layer in quantized_layers(interchange).items():
        other = read.get_submodule(path)
        if layer.numerics == "w4a16":
            assert isinstance(other, torch.nn.Linear)
            assert torch.equal(other.weight, layer.dequantized_weight(torch.bfloat16))
            continue
        assert isinstance(other, SVDQuantLinear)
        assert torch.equal(other.qweight, layer.qweight)
        assert torch.equal(other.lora_up[:, : layer.rank], layer.lora_up)
        assert not other.lora_up[:, layer.rank :].any()
    assert relative_rms(_output(read, flux_inputs(1)), _output(interchange, flux_inputs(1))) < 5e-3
    assert "3 grafted W4A16 layers" in capsys.readouterr().out


def test_only_grafted_adaln_layers_leave_four_bits(
    interchange: FluxTransformer2DModel, baked: Callable[..., Path]
) -> None:
    kinds = {path: layer.numerics for path, layer in quantized_layers(interchange).items()}
    read = quantized_layers(load_any(baked("comfyui", paths=[TO_Q, NORM]))[0])
    assert {path: layer.numerics for path, layer in read.items()} == {p: k for p, k in kinds.items() if p != NORM}


def test_the_lite_file_passes_diffusers_key_checks(baked: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers' own code puts its modules in and compares names and shapes with the file's; only the Hub's kernels, which it
    fetches on import, are left out."""
    folder = baked("nunchaku-lite")
    monkeypatch.setitem(sys.modules, "kernels", SimpleNamespace(get_kernel=lambda *_, **__: SimpleNamespace(ops=None)))
    monkeypatch.setattr("diffusers.utils.is_kernels_available", lambda: True)
    monkeypatch.setattr("diffusers.utils.is_kernels_version", lambda *_: False)
    monkeypatch.setattr("diffusers.utils.constants.DIFFUSERS_TRUST_REMOTE_KERNELS", True)
    monkeypatch.delitem(sys.modules, "diffusers.quantizers.nunchaku.utils", raising=False)
    utils = importlib.import_module("diffusers.quantizers.nunchaku.utils")
    sys.modules.pop("diffusers.quantizers.nunchaku.utils")  # without its kernels it is of no use to others
    config = json.loads((folder / "config.json").read_text())
    block = config.pop("quantization_config")
    parsed = NunchakuLiteQuantizationConfig(**{k: v for k, v in block.items() if k != "quant_method"})
    tensors, _ = read_tensors(folder / "diffusion_pytorch_model.safetensors")
    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config(config).to(torch.bfloat16)
    utils.replace_with_nunchaku_linear(model, parsed.to_dict(), parsed.compute_dtype)
    utils.check_strict_state_dict_match(model, tensors)
    assert {name: (tuple(t.shape), t.dtype) for name, t in model.state_dict().items()} == {
        name: (tuple(t.shape), t.dtype) for name, t in tensors.items()
    }
    assert parsed.svdq_w4a4["rank"] == 32  # 16 + 3, in steps of 16
    assert NORM not in (parsed.awq_w4a16 or {}).get("targets", [])


@pytest.fixture(scope="module")
def kitchen() -> Any:
    """comfy-kitchen, from the environment or from the folder that LORAGRAFT_COMFY_KITCHEN names (pip install --target)."""
    folder = os.environ.get("LORAGRAFT_COMFY_KITCHEN")
    sys.path[:0] = [folder] if folder else []
    try:
        pytest.importorskip(
            "comfy_kitchen", reason="comfy-kitchen has wheels for x86-64 only; it comes with loragraft[dev] there"
        )
        return __import__("comfy_kitchen.backends.eager.svdquant", fromlist=["svdquant"])
    finally:
        sys.path[:] = [entry for entry in sys.path if entry != folder]


def test_comfy_kitchen_answers_as_the_grafted_model(
    kitchen: Any, interchange: FluxTransformer2DModel, baked: Callable[..., Path]
) -> None:
    """Its eager code on the file's tensors, every W4A4 layer, in float32 and on x whose scales are bfloat16 values (it rounds
    them after the codes, we before)."""
    tensors, _ = read_tensors(baked("comfyui"))
    random = torch.Generator().manual_seed(2)
    checked = 0
    for path, layer in quantized_layers(interchange).items():
        if layer.numerics != "w4a4":
            continue
        stored = {name: tensors[f"{path}.{name}"] for name in ("weight", "weight_scale", "smooth_factor", "bias")}
        down, up = (tensors[f"{path}.{name}"].float() for name in ("proj_down", "proj_up"))
        assert down.shape[1] == 19
        scaled = torch.randn(33, layer.in_features // 64, 64, generator=random)
        scale = scaled.abs().amax(-1, keepdim=True) / 7
        x = (scaled / scale * scale.bfloat16().float()).view(33, -1) * stored["smooth_factor"].float()
        packed, scales, branch = kitchen.quantize_svdquant_w4a4(
            x, stored["smooth_factor"].float(), down, act_unsigned=False, lora_x=x
        )
        theirs = kitchen.scaled_mm_svdquant_w4a4(
            packed, stored["weight"], scales, stored["weight_scale"].float(), branch, up, stored["bias"].float(),
            act_unsigned=False,
        )[:33]  # fmt: skip
        assert relative_rms(layer(x), theirs) < 1e-6, path
        checked += 1
    assert checked == len([layer for layer in quantized_layers(interchange).values() if layer.numerics == "w4a4"]) > 0


def test_fused_layers_of_comfyuis_flux_carry_each_parts_graft(
    flux: FluxTransformer2DModel, flux_inputs: Inputs, tmp_path: Path
) -> None:
    """q, k and v are one layer there, with one branch: their factors stand side by side. Against our own format."""
    source, adapter = save_quantized(flux.to(torch.bfloat16), tmp_path / "base"), _adapter(flux, 0)
    folder = write_adapter(adapter.pairs, tmp_path / "adapter", adapter.metadata).parent
    file = tmp_path / "flux.safetensors"
    common = ["--numerics", "w4a4", "--any-base", "--adapter", str(folder)]
    assert cli.main(["convert", str(source), str(file), "--to", "comfyui-flux", *common]) == 0
    tensors, _ = read_tensors(file)
    rank = 3 * (4 + 3)
    assert tensors["double_blocks.0.img_attn.qkv.proj_down"].shape == (128, rank)
    assert tensors["double_blocks.0.img_mod.lin.weight"].dtype == torch.bfloat16
    read = load_any(file)[0]
    bare = tmp_path / "bare.safetensors"
    assert cli.main(["convert", str(source), str(bare), "--to", "comfyui-flux", "--numerics", "w4a4"]) == 0
    plain = load_any(bare)[0]
    graft(plain, adapter, any_base=True)
    for path, layer in quantized_layers(read).items():
        other = plain.get_submodule(path)
        assert torch.equal(layer.qweight, other.qweight)
        assert relative_rms(layer.dequantized_weight(), other.dequantized_weight()) < 1e-6
    assert relative_rms(_output(read, flux_inputs(1)), _output(plain, flux_inputs(1))) < 5e-3


def test_several_adapters_cut_to_one_rank(
    interchange: FluxTransformer2DModel, baked: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = _adapter(interchange, 1)
    write_adapter(other.pairs, tmp_path / "other", other.metadata)
    read = load_quantized(baked("native", "--adapter", str(tmp_path / "other"), "--rank", "2"), FluxTransformer2DModel)
    assert read.get_submodule(TO_Q).rank == 16 + 2
    assert "cut together to rank 2:" in capsys.readouterr().out


def test_what_a_graft_leaves_out_is_left_out_knowingly(
    flux: FluxTransformer2DModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The message names an option, and the verb has it."""
    source, file = save_quantized(flux, tmp_path / "base"), tmp_path / "theirs.safetensors"
    pair = torch.ones(2, 128), torch.ones(128, 2)
    tensors = {f"transformer.{TO_Q}.lora_{side}.weight": factor for side, factor in zip("AB", pair, strict=True)}
    te = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    tensors |= {f"{te}.lora_A.weight": torch.ones(2, 4), f"{te}.lora_B.weight": torch.ones(4, 2)}
    write_tensors(file, tensors, {"format": "pt"})
    command = ["convert", str(source), str(tmp_path / "out"), "--adapter", str(file), "--any-base"]
    assert cli.main(command) == 2
    assert "give --denoiser-only" in capsys.readouterr().err
    assert cli.main([*command, "--denoiser-only"]) == 0


def test_refusals(flux: FluxTransformer2DModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another base; other codes of the same base; options without an adapter. Nothing is written."""
    source = save_quantized(flux, tmp_path / "base")
    adapter = _adapter(flux, 0)
    folder = write_adapter(adapter.pairs, tmp_path / "own", adapter.metadata).parent
    foreign = write_adapter(adapter.pairs, tmp_path / "foreign", {**adapter.metadata, "base_id": "another"}).parent
    cases = (
        (["--adapter", str(foreign)], "trained on base another"),
        (["--adapter", str(folder), "--numerics", "w4a4"], "--any-base"),
        (["--adapter", str(folder), "--to", "comfyui"], "is w4a8, which ComfyUI cannot hold"),
        (["--rank", "4"], "name one with --adapter"),
        (["--denoiser-only"], "name one with --adapter"),
        (["--adapter", str(folder), "--rank", "0"], "expected at least one"),
    )
    for options, message in cases:
        dest = tmp_path / ("no.safetensors" if "comfyui" in options else "no")
        assert cli.main(["convert", str(source), str(dest), *options]) != 0
        assert message in capsys.readouterr().err
        assert not dest.exists()
    assert (
        cli.main(["convert", str(source), str(dest), "--adapter", str(folder), "--numerics", "w4a4", "--any-base"]) == 0
    )
    assert load_quantized(dest, FluxTransformer2DModel).get_submodule(TO_Q).numerics == "w4a4"
