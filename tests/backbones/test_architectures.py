"""FLUX from its files: recognised, planned, quantized by the command, refused where it is something else."""

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import nn

from loragraft import cli
from loragraft.backbones.architectures import FLUX, flux_config, folder_settings, open_model, plan_model
from loragraft.backbones.pocket import SPEC
from loragraft.kernels.layout import relative_rms
from loragraft.quantization.checkpoint import branched_layers, load_quantized
from loragraft.quantization.formats import FORMATS
from loragraft.quantization.tensor_file import CheckpointError
from loragraft.quantization.weight_source import FileSource


def _model(head: int, **more: object) -> FluxTransformer2DModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = FluxTransformer2DModel(**{
            "patch_size": 1, "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": head,
            "num_attention_heads": 1, "joint_attention_dim": 64, "pooled_projection_dim": 32, "guidance_embeds": True,
            "axes_dims_rope": (16, 56, 56) if head == 128 else (16, 24, 24), **more,
        })  # fmt: skip
    nn.Module.to(model, torch.bfloat16)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("flux") / "model"
    _model(128).save_pretrained(path)
    return path


def _weights(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


def test_pocket_follows_the_architecture_rules() -> None:
    source, architecture, config = open_model(SPEC.transformer_16bit)
    assert architecture is FLUX
    plan = plan_model(source, architecture, folder_settings("native", calibrated=True))
    shipped = json.loads((SPEC.transformer_int4["native"] / "config.json").read_text())["quantization_config"]["layers"]
    assert {path: settings.numerics for path, settings in plan.items()} == {
        path: layer["numerics"] for path, layer in shipped.items()
    }
    assert config["_class_name"] == "FluxTransformer2DModel"


@pytest.mark.parametrize("changes", [{}, {"guidance_embeds": False, "num_single_layers": 2, "out_channels": 8}])
def test_a_bare_file_is_configured_by_its_shapes(tmp_path: Path, changes: dict[str, object]) -> None:
    model = _model(128, **changes)
    model.save_pretrained(tmp_path)
    found = flux_config(FileSource(_weights(tmp_path)), tmp_path)
    assert {k: v for k, v in found.items() if k != "_class_name"} == {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in model.config.items()
        if not key.startswith("_")
    }


def test_the_command_takes_folder_pipeline_and_file(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    (tmp_path / "pipeline" / "transformer").symlink_to(folder)
    bare = tmp_path / "flux.safetensors"
    bare.write_bytes(_weights(folder).read_bytes())
    outputs = []
    for i, source in enumerate((folder, tmp_path / "pipeline", bare)):
        out = tmp_path / f"out{i}"
        assert cli.main(["quantize", str(source), "--out", str(out), "--rank", "4", "--group-size", "128"]) == 0
        outputs.append(_weights(out).read_bytes())
        assert load_quantized(out, FluxTransformer2DModel).config.num_attention_heads == 1
    assert outputs[0] == outputs[1] == outputs[2]
    shown = capsys.readouterr()
    assert "w4a8: 17 layers" in shown.out and "w4a16: 3 layers" in shown.out
    assert "layer/s" in shown.err
    layers = json.loads((tmp_path / "out0" / "config.json").read_text())["quantization_config"]["layers"]
    at_end = shown.err.splitlines()[-1]  # what a bar shows before its end depends on the machine's speed
    assert "20/20" in at_end and any(path in at_end for path in layers)
    assert {layer["group_size"] for layer in layers.values() if layer["numerics"] == "w4a8"} == {128}


def test_refusals(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(_weights(folder))
    save_file({f"double_blocks.0.{i}.weight": t for i, t in enumerate(tensors.values())}, tmp_path / "bfl.safetensors")
    with pytest.raises(CheckpointError, match="original FLUX key names"):
        open_model(tmp_path / "bfl.safetensors")
    save_file({"x_embedder.weigth": torch.ones(2, 2)}, tmp_path / "odd.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks 'x_embedder\.weight'; nearest: x_embedder\.weigth"):
        open_model(tmp_path / "odd.safetensors")
    with pytest.raises(CheckpointError, match="quantized already"):
        open_model(SPEC.transformer_int4["native"])
    _model(64).save_pretrained(tmp_path / "heads")
    (tmp_path / "heads" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"heads of 64 .* config\.json"):
        open_model(tmp_path / "heads")
    (tmp_path / "heads" / "config.json").write_text('{"_class_name": "HunyuanDiT2DModel"}')
    with pytest.raises(CheckpointError, match="is a HunyuanDiT2DModel; quantized from files are FluxTransformer2D"):
        open_model(tmp_path / "heads")
    for options, message in (
        (["--smoothing", "weight"], "weights on disk are quantized with auto"),
        (["--smoothing", "calibrated"], "needs the folder of the whole pipeline"),
        (["--gptq"], "--gptq needs activations: --smoothing calibrated on the pipeline"),
        (["--profile", "interchange", "--group-size", "128"], "group_size 128 with w4a4, which has groups of 64"),
        (["--profile", "mxfp4", "--group-size", "128"], "group_size 128 with mxfp4, which has a block size of its own"),
        (["--prompts", "p.txt"], "--prompts p.txt is for a pipeline's folder"),
        (["--resolution", "64"], "--resolution 64 is for a pipeline's folder"),
        (["--profile", "nf4", "--smoothing", "calibrated"], "nf4 stores no smoothing vector"),
        (["--profile", "nf4", "--gptq"], "nf4 has neither smoothing nor GPTQ"),
    ):
        assert cli.main(["quantize", str(folder), "--out", str(tmp_path / "out"), *options]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["quantize", "pocket", "--out", str(tmp_path / "out"), "--stats", "x"]) == 2
    assert "the base 'pocket' calibrates itself" in capsys.readouterr().err
    assert cli.main(["quantize", "pocket", "--out", str(tmp_path / "out"), "--resolution", "64"]) == 2
    assert "nothing reads it here" in capsys.readouterr().err
    assert not list(tmp_path.glob("*out*"))


def test_an_unplanned_layer_is_named(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(_weights(folder))
    save_file({**tensors, "extra.weight": torch.ones(4, 4)}, tmp_path / "more.safetensors")
    source, architecture, _ = open_model(tmp_path / "more.safetensors")
    with pytest.raises(ValueError, match=r"neither planned nor kept: extra"):
        plan_model(source, architecture, folder_settings("native", calibrated=False))


WEIGHT, BIAS = "transformer_blocks.0.attn.to_q.weight", "transformer_blocks.0.attn.to_q.bias"


@pytest.mark.parametrize(
    ("changes", "blocks", "message"),
    [
        ({WEIGHT: None}, 1, rf"1 tensor\(s\) .* missing, the first is '{WEIGHT}'"),
        ({BIAS: None}, 1, rf"1 tensor\(s\) .* missing, the first is '{BIAS}'"),
        ({}, 2, r"tensor\(s\) .* missing, the first is 'transformer_blocks\.1"),
        (
            {"proj_outt.bias": torch.ones(2)},
            1,
            r"belong to no layer .*, the first is 'proj_outt\.bias'; nearest: proj_out",
        ),
        ({WEIGHT: torch.ones(128, 100)}, 1, r"shape \(128, 100\), its configuration means \(128, 128\)"),
        ({WEIGHT: torch.ones(128 * 128)}, 1, r"shape \(16384,\), its configuration means \(128, 128\)"),
        ({WEIGHT: torch.ones(128, 128, dtype=torch.int8)}, 1, "is torch.int8: these are codes, not 16-bit weights"),
    ],
)
def test_files_that_do_not_make_the_model_are_refused_before_any_work(
    changes: dict[str, torch.Tensor | None], blocks: int, message: str, folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    tensors = load_file(_weights(folder)) | changes
    (tmp_path / "model").mkdir()
    save_file({n: t for n, t in tensors.items() if t is not None}, tmp_path / "model" / _weights(folder).name)
    config = json.loads((folder / "config.json").read_text()) | {"num_layers": blocks}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert cli.main(["quantize", str(tmp_path / "model"), "--out", str(tmp_path / "out")]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_weight_only_rounds_no_activations_and_needs_none(folder: Path) -> None:
    source, architecture, _ = open_model(folder)
    plan = plan_model(source, architecture, folder_settings("weight-only", calibrated=False, rank=4))
    assert {settings.numerics for settings in plan.values()} == {"w4a16"}
    assert {settings.branch_rank for settings in plan.values()} == {4, 0}  # adaLN has no branch
    assert not any(settings.needs_statistics for settings in plan.values())


@pytest.mark.parametrize("profile", ["int8", "nf4-double", "mxfp4", "int3"])
def test_a_format_is_quantized_from_the_files_alone(profile: str, folder: Path, tmp_path: Path) -> None:
    assert cli.main(["quantize", str(folder), "--out", str(tmp_path / "out"), "--profile", profile]) == 0
    model = load_quantized(tmp_path / "out", FluxTransformer2DModel)
    layers = branched_layers(model)
    plain = _model(128)
    assert {path for path, layer in layers.items() if layer.numerics not in (profile, "w4a16")} == set()
    for path in ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.proj_out"):
        assert layers[path].numerics == profile
        assert layers[path].rank == FORMATS[profile].rank
        error = relative_rms(layers[path].dequantized_weight(), plain.get_submodule(path).weight)
        assert 0 < error < 0.2
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["profile"] == profile
