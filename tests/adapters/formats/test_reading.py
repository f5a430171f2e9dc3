"""Every dialect from synthetic files: the layers it means, and the update it means, against other people's arithmetic."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import (
    _convert_bfl_flux_control_lora_to_diffusers,
    _convert_kohya_flux_lora_to_diffusers,
    _convert_xlabs_flux_lora_to_diffusers,
)
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from loragraft.adapters.formats.reading import Contents, read_file
from loragraft.quantization.dialects.flux_names import flux_linears, flux_norms
from loragraft.quantization.tensor_file import CheckpointError

Save = Callable[..., Path]
FULL = {"num_layers": 19, "num_single_layers": 38, "guidance_embeds": True}
FLUX_OUT = {"qkv": 3 * 3072, "linear1": 3 * 3072 + 12288}


Update = Tensor | tuple[Tensor, Tensor]


def applied(update: Update, inputs: int) -> Tensor:
    """The update, a matrix or its factors (A, B), times three random vectors in float64."""
    x = torch.randn(inputs, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    if isinstance(update, Tensor):
        return update.double() @ x
    return update[1].double().flatten(1) @ (update[0].double().flatten(1) @ x)


def same(contents: Contents, expected: Mapping[str, Update], tolerance: float = 1e-6) -> None:
    """The same layers, each with the same update."""
    assert contents.pairs.keys() == expected.keys()
    for path, update in expected.items():
        pair = contents.pairs[path]
        inputs = pair[0][0].numel()
        torch.testing.assert_close(applied(pair, inputs), applied(update, inputs), rtol=tolerance, atol=1e-5, msg=path)


def factors(state: dict[str, Tensor]) -> dict[str, Update]:
    """(A, B) of a state dict in diffusers' names."""
    paths = [key.removesuffix(".lora_A.weight") for key in state if key.endswith(".lora_A.weight")]
    return {p.removeprefix("transformer."): (state[f"{p}.lora_A.weight"], state[f"{p}.lora_B.weight"]) for p in paths}


def flux_modules(blocks: int = 1) -> list[str]:
    """BFL's names of the linears of the first blocks."""
    return [name for name in flux_linears(FULL) if "blocks" in name and int(name.split(".")[1]) < blocks]


def flux_outputs(module: str) -> int:
    return FLUX_OUT.get(module.rpartition(".")[2], 64)


def test_kohya_flux_as_diffusers_converts_it(draw, save: Save) -> None:
    tensors = {}
    for module in flux_modules():
        name = f"lora_unet_{module.replace('.', '_')}"
        tensors |= draw.lora(name, 3072, flux_outputs(module)) | {f"{name}.alpha": torch.tensor(4.0)}
    contents = read_file(save(tensors))
    assert contents.dialect == "kohya" and contents.family.name == "flux"
    expected = factors(_convert_kohya_flux_lora_to_diffusers(dict(tensors)))
    assert len(expected) == 20
    same(contents, expected)


def test_xlabs_as_diffusers_converts_it(draw, save: Save) -> None:
    tensors = {}
    for module, outputs in (
        ("double_blocks.0.processor.qkv_lora1", 24),
        ("double_blocks.0.processor.qkv_lora2", 24),
        ("double_blocks.0.processor.proj_lora1", 8),
        ("double_blocks.0.processor.proj_lora2", 8),
        ("single_blocks.1.processor.qkv_lora", 24),
        ("single_blocks.1.processor.proj_lora", 8),
    ):
        tensors |= draw.lora(module, 8, outputs, names=(".down", ".up"))
    contents = read_file(save(tensors))
    assert contents.dialect == "XLabs"
    expected = factors(_convert_xlabs_flux_lora_to_diffusers(dict(tensors)))
    assert len(expected) == 12
    same(contents, expected)


def test_bfl_control_as_diffusers_converts_it(draw, save: Save) -> None:
    """But for norm_out.linear, where the converter exchanges A's ranks as well. Inputs are few; linear1's tell its rows apart."""
    tensors: dict[str, Tensor] = {}
    for module in flux_linears(FULL):
        inputs = {"img_in": 128, "linear1": 3072}.get(module.rpartition(".")[2] or module, 4)
        tensors |= draw.lora(module, inputs, flux_outputs(module), names=(".lora_A", ".lora_B"))
        tensors[f"{module}.lora_B.bias"] = draw(flux_outputs(module))
    tensors |= {name: draw(128) for name in flux_norms(FULL)}
    contents = read_file(save(tensors))
    assert contents.dialect == "BFL control"
    converted = _convert_bfl_flux_control_lora_to_diffusers(dict(tensors))
    expected = factors(converted)
    up = tensors["final_layer.adaLN_modulation.1.lora_B.weight"]
    expected["norm_out.linear"] = (
        tensors["final_layer.adaLN_modulation.1.lora_A.weight"],
        torch.cat(up.chunk(2)[::-1]),
    )
    same(contents, expected)
    assert contents.pairs["x_embedder"][0].shape[1] == 128
    norms = {
        key.removeprefix("transformer."): value
        for key, value in converted.items()
        if ".norm_" in key and "lora" not in key
    }
    norms = {path.removesuffix(".weight"): value for path, value in norms.items()}
    assert contents.extras["norm"].keys() == norms.keys()
    assert all(torch.equal(contents.extras["norm"][path], value) for path, value in norms.items())
    biases = {key: value for key, value in converted.items() if key.endswith("lora_B.bias")}
    assert len(contents.extras["bias"]) == len(biases)
    for key, value in biases.items():
        path = key.removeprefix("transformer.").removesuffix(".lora_B.bias")
        assert torch.equal(contents.extras["bias"][path], value)


def test_the_last_adaln_of_flux_is_exchanged_in_b_only(draw, save: Save) -> None:
    """(shift, scale) rows become (scale, shift); A and alpha stay: where diffusers' converters go wrong."""
    name = "lora_unet_final_layer_adaLN_modulation_1"
    tensors = draw.lora(name, 8, 16, rank=2) | {f"{name}.alpha": torch.tensor(1.0)}
    update = 0.5 * tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"]
    same(read_file(save(tensors)), {"norm_out.linear": torch.cat([update[8:], update[:8]])})


def test_block_diagonal_qkv_gives_back_its_three_factors(draw, save: Save) -> None:
    downs, ups = [draw(2, 8) for _ in range(3)], [draw(8, 2) for _ in range(3)]
    name = "diffusion_model.double_blocks.3.img_attn.qkv"
    tensors = {f"{name}.lora_A.weight": torch.cat(downs), f"{name}.lora_B.weight": torch.block_diag(*ups)}
    contents = read_file(save(tensors))
    assert contents.dialect == "ComfyUI"
    for part, down, up in zip("qkv", downs, ups, strict=True):
        got_down, got_up = contents.pairs[f"transformer_blocks.3.attn.to_{part}"]
        assert torch.equal(got_down, down) and torch.equal(got_up, up)


@pytest.mark.parametrize("flat", ["lora_transformer_", "lycoris_"])
def test_flattened_diffusers_names(draw, save: Save, flat: str) -> None:
    """ff and adaLN layers included, which diffusers' converter of OneTrainer's files loses; more blocks than FLUX.1 has, too."""
    paths = ["single_transformer_blocks.40.proj_mlp", "transformer_blocks.0.ff.net.0.proj", "transformer_blocks.2.norm1.linear",
             "norm_out.linear", "x_embedder", "time_text_embed.guidance_embedder.linear_1"]  # fmt: skip
    tensors, expected = {}, {}
    for path in paths:
        pair = draw.lora(flat + path.replace(".", "_"), 8, 6)
        tensors |= pair
        down, up = pair.values()
        expected[path] = up @ down
    same(read_file(save(tensors)), expected)


def test_unet_names_of_kohya_in_both_spellings(draw, save: Save) -> None:
    """SD 1.5 files have diffusers' names, SDXL files LDM's; convolutions keep their shape, text encoders are kept apart."""
    conv = {"lora_unet_input_blocks_4_0_in_layers_2.lora_down.weight": draw(2, 4, 3, 3),
            "lora_unet_input_blocks_4_0_in_layers_2.lora_up.weight": draw(6, 2, 1, 1)}  # fmt: skip
    tensors = (
        draw.lora("lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_attn2_to_out_0", 8, 6)
        | draw.lora("lora_unet_input_blocks_8_1_transformer_blocks_9_ff_net_0_proj", 8, 6)
        | conv
        | draw.lora("lora_te2_text_model_encoder_layers_0_mlp_fc1", 4, 4)
    )
    contents = read_file(save(tensors))
    assert contents.family.name == "sdxl" and not contents.family.published
    assert set(contents.pairs) == {
        "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0",
        "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.0.proj",
        "down_blocks.1.resnets.0.conv1",
    }
    down, up = contents.pairs["down_blocks.1.resnets.0.conv1"]
    assert down.shape == (2, 4, 3, 3) and up.shape == (6, 2, 1, 1)
    assert len(contents.extras["text_encoder_2"]) == 2


def test_text_encoders_that_change_nothing_are_no_extras(draw, save: Save) -> None:
    tensors = draw.lora("lora_unet_mid_block_attentions_0_proj_in", 8, 8)
    tensors |= {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": draw(2, 4),
                "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.zeros(4, 2)}  # fmt: skip
    assert read_file(save(tensors)).extras == {}


def test_what_a_file_says_of_norms_and_biases_is_kept_apart(draw, save: Save) -> None:
    """LyCORIS' trained norms, a difference of a FLUX norm, a bias; a difference of zero is none."""
    unet, flux = "lora_unet_mid_block_attentions_0", "lora_unet_double_blocks_2_img_attn"
    tensors = draw.lora(f"{unet}_proj_in", 8, 8) | {f"{unet}_proj_in.diff_b": draw(8), f"{unet}_norm.w_norm": draw(8)}
    extras = read_file(save(tensors)).extras
    assert {kind: list(found) for kind, found in extras.items()} == {
        "norm_diff": ["mid_block_attentions_0_norm"], "bias": ["mid_block.attentions.0.proj_in"]}  # fmt: skip
    tensors = draw.lora(f"{flux}_proj", 8, 8) | {
        f"{flux}_norm_query_norm.diff": draw(4),
        f"{flux}_norm_key_norm.diff": torch.zeros(4),
    }
    extras = read_file(save(tensors)).extras
    assert {kind: list(found) for kind, found in extras.items()} == {"norm_diff": ["transformer_blocks.2.attn.norm_q"]}


def test_locon_with_a_middle_factor(draw, save: Save) -> None:
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    down, mid, up = draw(2, 4, 1, 1), draw(2, 2, 3, 3), draw(6, 2, 1, 1)
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_mid.weight": mid, f"{name}.lora_up.weight": up}
    x = draw(1, 4, 5, 5)
    conv = nn.functional.conv2d
    apart = conv(conv(conv(x, down), mid, padding=1), up)
    got_down, got_up = read_file(save(tensors)).pairs["down_blocks.0.resnets.0.conv1"]
    torch.testing.assert_close(conv(conv(x, got_down, padding=1), got_up), apart)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            [nn.ModuleDict({"wide": nn.Linear(8, 6), "narrow": nn.Linear(8, 4)}) for _ in range(2)]
        )


@pytest.mark.parametrize("rslora", [False, True])
def test_a_peft_folder(draw, tmp_path: Path, rslora: bool) -> None:
    """alpha, its pattern, ranks by pattern and rsLoRA stand in adapter_config.json; PEFT's own deltas are the oracle."""
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["wide", "narrow"], use_rslora=rslora,
                        rank_pattern={"blocks.1.wide": 2}, alpha_pattern={"narrow": 3})  # fmt: skip
    model = get_peft_model(Net(), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = draw(*parameter.shape)
    model.save_pretrained(tmp_path / "peft")
    contents = read_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert contents.dialect == "PEFT"
    layers = {
        f"blocks.{i}.{kind}": model.base_model.model.blocks[i][kind] for i in (0, 1) for kind in ("wide", "narrow")
    }
    same(contents, {path: layer.get_delta_weight("default").detach() for path, layer in layers.items()})


def test_diffusers_header_and_alpha_tensors_may_not_disagree(draw, save: Save) -> None:
    tensors = draw.lora("transformer.proj_out", 8, 6, rank=2, names=(".lora_A", ".lora_B"))
    header = {"lora_adapter_metadata": json.dumps({"transformer.r": 2, "transformer.lora_alpha": 4})}
    update = 2 * tensors["transformer.proj_out.lora_B.weight"] @ tensors["transformer.proj_out.lora_A.weight"]
    same(read_file(save(tensors, header)), {"proj_out": update})
    same(read_file(save(tensors | {"transformer.proj_out.alpha": torch.tensor(4.0)}, header)), {"proj_out": update})
    with pytest.raises(CheckpointError, match=r"'proj_out' has two scales, 1\.5 .* and 2"):
        read_file(save(tensors | {"transformer.proj_out.alpha": torch.tensor(3.0)}, header))
    wrong = {"lora_adapter_metadata": json.dumps({"transformer.r": 8, "transformer.lora_alpha": 8})}
    with pytest.raises(CheckpointError, match="'proj_out' has rank 2, its configuration says 8"):
        read_file(save(tensors, wrong))


def test_unknown_modules_are_listed_with_the_nearest(draw, save: Save) -> None:
    tensors = draw.lora("lora_unet_double_blocks_0_img_attn_qvk", 8, 24) | draw.lora(
        "lora_unet_single_blocks_0_linear1", 8, 56
    )
    with pytest.raises(
        CheckpointError, match=r"1 module.*img_attn_qvk\.lora_down.*nearest: double_blocks_0_img_attn_qkv"
    ):
        read_file(save(tensors))


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ("dora_scale", "DoRA"),
        ("lora_magnitude_vector", "DoRA"),
        ("oft_blocks", "OFT"),
        ("on_input", "IA3"),
        ("a1.weight", "GLoRA"),
    ],
)
def test_updates_without_a_low_rank_form_are_refused(draw, save: Save, part: str, reason: str) -> None:
    name = "lora_unet_mid_block_attentions_0_proj_in"
    with pytest.raises(CheckpointError, match=f"'mid_block_attentions_0_proj_in' .*{reason}.*no low-rank update"):
        read_file(save(draw.lora(name, 8, 8) | {f"{name}.{part}": draw(8, 1)}))
