"""One file instead of a folder: Stable Diffusion's own key names, diffusers', and files that are something else."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor

from loragraft.backbones.architectures import open_model
from loragraft.backbones.load import find_spec, load_backbone
from loragraft.backbones.single_file import as_folder
from loragraft.quantization.tensor_file import CheckpointError
from loragraft.recipes.schema import WeightsConfig

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
TOP = {
    "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2", "conv_norm_out": "out.0",
    "conv_out": "out.2",
}  # fmt: skip


def original(name: str, model: UNet2DConditionModel) -> str:
    """The name that the authors' code gives a tensor: blocks are numbered through, down and up, resnets before samplers."""
    for ours, theirs in TOP.items():
        if name.startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    layers = model.config.layers_per_block
    block, _, rest = name.partition(".")
    if block == "mid_block":
        kind, index, rest = rest.split(".", 2)
        place = f"middle_block.{1 if kind == 'attentions' else 2 * int(index)}"
    else:
        level, kind, index, rest = rest.split(".", 3)
        if block == "down_blocks":
            number = 1 + int(level) * (layers + 1) + (layers if kind == "downsamplers" else int(index))
            place = f"input_blocks.{number}.{int(kind == 'attentions')}"
        else:
            has_attention = hasattr(model.up_blocks[int(level)], "attentions")
            number = int(level) * (layers + 1) + (layers if kind == "upsamplers" else int(index))
            inside = 1 + has_attention if kind == "upsamplers" else int(kind == "attentions")
            place = f"output_blocks.{number}.{inside}"
    if kind == "downsamplers":
        return f"{place}.op.{rest.removeprefix('conv.')}"
    if kind == "resnets":
        part = rest.rpartition(".")[0]
        rest = rest.replace(part, RESNET[part], 1)
    return f"{place}.{rest}"


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def state(name: str, tiny_unets: ModuleType) -> dict[str, Tensor]:
    return {key: value.to(torch.bfloat16) for key, value in tiny_unets.tiny_unet(name).state_dict().items()}


@pytest.fixture(scope="module")
def spec_of(tiny_unets: ModuleType) -> Callable[[str], tuple[object, object]]:
    """The base, and its `External` with the tiny configuration."""
    import dataclasses

    def found(name: str) -> tuple[object, object]:
        spec = find_spec(name)
        assert spec.external is not None
        return spec, dataclasses.replace(spec.external, config=tiny_unets.tiny_config(name))

    return found


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_a_file_becomes_the_folder_that_it_would_have_been(
    name: str,
    layout: str,
    state: dict[str, Tensor],
    spec_of: Callable[..., tuple],
    tiny_unets: ModuleType,
    tmp_path: Path,
) -> None:
    model = tiny_unets.tiny_unet(name)
    named = state if layout == "diffusers" else {
        f"model.diffusion_model.{original(key, model)}": value for key, value in state.items()
    } | {"first_stage_model.encoder.conv_in.weight": torch.ones(8, 3, 3, 3)}  # fmt: skip
    assert len(named) >= len(state)
    save_file(named, tmp_path / "shared.safetensors")
    spec, external = spec_of(name)
    folder = as_folder(spec, external, tmp_path / "shared.safetensors", tmp_path)
    again = UNet2DConditionModel.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) for key in state)
    before = folder.stat().st_mtime_ns
    assert as_folder(spec, external, tmp_path / "shared.safetensors", tmp_path) == folder
    assert folder.stat().st_mtime_ns == before, "it was converted twice"


def test_what_is_no_such_unet_is_refused(
    name: str, state: dict[str, Tensor], spec_of: Callable[..., tuple], tiny_unets: ModuleType, tmp_path: Path
) -> None:
    spec, external = spec_of(name)
    save_file({"lora.weight": torch.ones(2, 2)}, tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match="holds no UNet"):
        as_folder(spec, external, tmp_path / "lora.safetensors", tmp_path)
    save_file(state, tmp_path / "bare.safetensors")
    with pytest.raises(CheckpointError, match="is a UNet without config"):
        open_model(tmp_path / "bare.safetensors")
    model = tiny_unets.tiny_unet(name)
    wide = {f"model.diffusion_model.{original(key, model)}": value for key, value in state.items()}
    for key in [key for key in wide if key.endswith("attn2.to_k.weight")]:
        wide[key] = torch.ones(wide[key].shape[0], 96, dtype=torch.bfloat16)
    save_file(wide, tmp_path / "wide.safetensors")
    with pytest.raises(ValueError, match=rf"reads text of width 96, {name} of 64"):
        as_folder(spec, external, tmp_path / "wide.safetensors", tmp_path)
    few = {
        f"model.diffusion_model.{original(key, model)}": value
        for key, value in state.items()
        if not key.startswith("mid_block.resnets.0")
    }
    save_file(few, tmp_path / "few.safetensors")
    with pytest.raises(CheckpointError, match="has other tensors"):
        as_folder(spec, external, tmp_path / "few.safetensors", tmp_path)


def test_a_file_beside_a_pipeline_is_a_base(
    tiny_unets: ModuleType, unet_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    spec_of: Callable[..., tuple],
) -> None:  # fmt: skip
    import dataclasses

    spec, external = spec_of("sd15")
    monkeypatch.setattr("loragraft.backbones.load.find_spec", lambda _: dataclasses.replace(spec, external=external))
    model = tiny_unets.tiny_unet("sd15")
    named = {f"model.diffusion_model.{original(k, model)}": v.to(torch.bfloat16) for k, v in model.state_dict().items()}
    save_file(named, tmp_path / "shared.safetensors")
    given = WeightsConfig(path=str(tmp_path / "shared.safetensors"), encoders=str(unet_folder("sd15")))
    backbone = load_backbone("sd15", "16bit", "cpu", tmp_path, given)
    whole = load_backbone("sd15", "16bit", "cpu", tmp_path, WeightsConfig(path=str(unet_folder("sd15"))))
    assert backbone.base_id == whole.base_id
