"""The INT4 folder: bit-exact round trip, stable identity, and every corruption refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from loragraft.quantization.checkpoint import base_id, checksum, load_quantized, recorded_base_id, save_quantized
from loragraft.quantization.convert import plan_layers, quantize_model
from loragraft.quantization.tensor_file import CheckpointError, read_tensors, write_tensors

Inputs = Callable[[int], dict[str, Tensor]]
WEIGHTS = "diffusion_pytorch_model.safetensors"
LAYER = "transformer_blocks.0.attn.to_q"


@pytest.fixture
def folder(quantized_flux: FluxTransformer2DModel, tmp_path: Path) -> Path:
    return save_quantized(quantized_flux, tmp_path / "transformer-int4")


def _change_weights(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors, metadata = read_tensors(folder / WEIGHTS)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    write_tensors(folder / WEIGHTS, tensors, metadata)


def _change_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def test_roundtrip_is_bit_exact(quantized_flux: FluxTransformer2DModel, folder: Path, flux_inputs: Inputs) -> None:
    loaded = load_quantized(folder, FluxTransformer2DModel)
    state, again = quantized_flux.state_dict(), loaded.state_dict()
    assert state.keys() == again.keys()
    for name, tensor in state.items():
        assert tensor.dtype == again[name].dtype, name
        assert torch.equal(tensor, again[name]), name
    assert base_id(loaded) == base_id(quantized_flux) == loaded.loragraft_base_id
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    for model in (loaded, quantized_flux):
        model.to(torch.float32)
    assert torch.equal(loaded(**flux_inputs(1)).sample, quantized_flux(**flux_inputs(1)).sample)
    assert recorded_base_id(loaded) != base_id(loaded)  # cast, and still the same base on record


def test_config_says_what_each_layer_is(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["_class_name"] == "FluxTransformer2DModel"
    assert "_name_or_path" not in config
    block = config["quantization_config"]
    assert (block["quant_method"], block["version"], block["profile"]) == ("loragraft", 1, "native")
    layer = block["layers"][LAYER]
    assert layer.items() >= {"numerics": "w4a8", "group_size": 64, "act_unsigned": False, "rank": 4}.items()
    assert block["layers"]["transformer_blocks.0.norm1.linear"]["numerics"] == "w4a16"


def test_base_id_sees_names_types_shapes_and_bytes() -> None:
    state = {"b": torch.zeros(2, 3), "a": torch.ones(4, dtype=torch.uint8), "scalar": torch.tensor(1.0)}
    first = base_id(state)
    assert len(first) == 64
    assert base_id(dict(reversed(state.items()))) == first
    assert base_id({name: tensor.clone() for name, tensor in state.items()}) == first
    changed = (
        state | {"b": torch.zeros(3, 2)},
        state | {"b": torch.zeros(2, 3, dtype=torch.int32)},
        state | {"a": torch.tensor([1, 1, 1, 0], dtype=torch.uint8)},
        {"c": state["b"], "a": state["a"], "scalar": state["scalar"]},
    )
    assert len({first, *map(base_id, changed)}) == 5


CORRUPT_WEIGHTS = {
    "missing": (lambda t: t.pop(f"{LAYER}.row_scale"), rf"missing.*{LAYER}\.row_scale"),
    "foreign": (lambda t: t.update(stray=torch.zeros(1)), "belong to no layer.*stray"),
    "shape": (
        lambda t: t.update({f"{LAYER}.qweight": t[f"{LAYER}.qweight"][:64]}),
        r"to_q\.qweight' has shape \(64, 64\)",
    ),
    "plain shape": (lambda t: t.update({"proj_out.weight": torch.zeros(2, 2)}), r"proj_out\.weight' has shape"),
    "codes": (lambda t: t.update({f"{LAYER}.qweight": t[f"{LAYER}.qweight"].int()}), r"to_q\.qweight' is torch.int32"),
    "scale": (
        lambda t: t.update({f"{LAYER}.row_scale": t[f"{LAYER}.row_scale"].half()}),
        r"row_scale' is torch.float16",
    ),
    "nan": (lambda t: t[f"{LAYER}.row_scale"].fill_(torch.nan), r"row_scale' holds NaN"),
    "range": (lambda t: t[f"{LAYER}.group_scale"].fill_(16), r"group_scale' leaves the code"),
    "zero": (lambda t: t[f"{LAYER}.group_zero"].fill_(16), r"group_zero' leaves the code"),
}


@pytest.mark.parametrize("case", CORRUPT_WEIGHTS)
def test_corrupt_weights_are_refused(folder: Path, case: str) -> None:
    change, message = CORRUPT_WEIGHTS[case]
    _change_weights(folder, change)
    with pytest.raises(CheckpointError, match=message):
        load_quantized(folder, FluxTransformer2DModel)


CORRUPT_CONFIGS = {
    "method": (lambda c: c.update(quant_method="nunchaku_lite"), "quant_method is 'nunchaku_lite'"),
    "version": (lambda c: c.update(version=2), "format version 2"),
    "stranger": (lambda c: c["layers"].update({"blocks.7": c["layers"][LAYER]}), "'blocks.7' is no linear layer"),
    "numerics": (lambda c: c["layers"][LAYER].update(numerics="w2a2"), f"{LAYER}' has numerics 'w2a2'"),
    "lacks": (lambda c: c["layers"][LAYER].pop("rank"), f"{LAYER}' lacks rank"),
    "shift": (
        lambda c: c["layers"][LAYER].update(act_unsigned=True),
        f"{LAYER}' has act_unsigned True with act_shift 0",
    ),
    "unsigned": (
        lambda c: c["layers"][LAYER].update(act_unsigned=True, act_shift=0.171875),
        f"{LAYER}': unsigned activations are for w4a4",
    ),
    "rank": (lambda c: c["layers"][LAYER].update(rank=5), rf"{LAYER}\.lora_down' has shape \(4, 128\)"),
    "group": (lambda c: c["layers"][LAYER].update(group_size=128), rf"{LAYER}\.group_scale' has shape"),
    "profile": (lambda c: c["layers"][LAYER].update(numerics="w4a4"), rf"missing.*{LAYER}\.wscale"),
}


@pytest.mark.parametrize("case", CORRUPT_CONFIGS)
def test_corrupt_configs_are_refused(folder: Path, case: str) -> None:
    change, message = CORRUPT_CONFIGS[case]
    _change_config(folder, change)
    with pytest.raises(CheckpointError, match=message):
        load_quantized(folder, FluxTransformer2DModel)


def test_truncated_and_absent_files(folder: Path, tmp_path: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"truncated: tensor '[\w.]+'"):
        load_quantized(folder, FluxTransformer2DModel)
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="no file"):
        load_quantized(folder, FluxTransformer2DModel)
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_quantized(tmp_path / "nowhere", FluxTransformer2DModel)


def test_saving_is_careful(quantized_flux: FluxTransformer2DModel, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save_quantized(quantized_flux, folder)
    save_quantized(quantized_flux, folder, overwrite=True)
    layer = quantized_flux.get_submodule(LAYER)
    layer.set_branch(torch.cat([layer.lora_down, layer.lora_down]), torch.cat([layer.lora_up, layer.lora_up], dim=1))
    with pytest.raises(ValueError, match=rf"carry grafts, e\.g\. '{LAYER}'"):
        save_quantized(quantized_flux, tmp_path / "grafted")
    save_quantized(quantized_flux, tmp_path / "grafted", bake_grafts=True)
    baked = load_quantized(tmp_path / "grafted", FluxTransformer2DModel)
    assert baked.get_submodule(LAYER).rank == baked.get_submodule(LAYER).base_rank == 8
    shutil.rmtree(folder)


def test_unsigned_layers_keep_their_mark(
    tiny_flux: FluxTransformer2DModel, flux_rules: Any, flux_keep: Any, tmp_path: Path
) -> None:
    plan = plan_layers(tiny_flux, flux_rules("w4a4", smoothing="weight", rank=4, iterations=1, grid=1), flux_keep)
    quantize_model(tiny_flux, plan, {}, keep=flux_keep)
    layer = tiny_flux.get_submodule("transformer_blocks.0.ff.net.2")
    layer.act_unsigned, layer.unsigned_from = True, 64
    folder = save_quantized(tiny_flux, tmp_path / "interchange")
    described = json.loads((folder / "config.json").read_text())["quantization_config"]["layers"]
    assert described["transformer_blocks.0.ff.net.2"].items() >= {"act_unsigned": True, "act_shift": 0.171875}.items()
    loaded = load_quantized(folder, FluxTransformer2DModel)
    again = loaded.get_submodule("transformer_blocks.0.ff.net.2")
    assert (again.act_unsigned, again.unsigned_from) == (True, 64)
    assert not loaded.get_submodule(LAYER).act_unsigned
    x = torch.nn.functional.gelu(torch.randn(3, layer.in_features), approximate="tanh")
    assert torch.equal(again(x), layer(x))
    layer.unsigned_from = 0
    assert not torch.equal(again(x), layer(x))


def test_a_checksum_sees_every_byte_and_their_order(quantized_flux: FluxTransformer2DModel) -> None:
    before = checksum(quantized_flux)
    layer = quantized_flux.get_submodule(LAYER)
    for name, tensor in [*layer.named_buffers()]:
        if not tensor.numel():
            continue
        flat = tensor.view(-1).view(torch.uint8)
        for index in (0, len(flat) // 2, len(flat) - 1):
            flat[index] ^= 1
            assert checksum(quantized_flux) != before, (name, index)
            flat[index] ^= 1
    codes = layer.qweight.view(-1)
    codes[:16] = codes[:16].roll(8)  # two words change places
    assert checksum(quantized_flux) != before
    codes[:16] = codes[:16].roll(8)
    assert checksum(quantized_flux) == before
