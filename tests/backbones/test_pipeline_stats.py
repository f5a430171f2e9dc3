"""Calibrating a pipeline that lies in a folder: tiny encoders and transformer, the true FluxPipeline, the command around it."""

import json
import string
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from loragraft import cli
from loragraft.backbones import architectures, pipeline_stats
from loragraft.backbones.pipeline_stats import base_of, collect_pipeline_stats
from loragraft.quantization.calibrate import StatsFile
from loragraft.quantization.stream import quantize_stream

LAYER = "transformer_blocks.0.attn.to_q"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline") / "flux"
    letters = list(string.ascii_lowercase)
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *[f"{letter}</w>" for letter in letters]]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -5.0), ("▁", -1.0), *[(letter, -2.0) for letter in letters]]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=AutoencoderKL(
                block_out_channels=(4,), latent_channels=16, norm_num_groups=1, down_block_types=("DownEncoderBlock2D",),
                up_block_types=("UpDecoderBlock2D",), shift_factor=0.0, scaling_factor=1.0,
            ),
            tokenizer=CLIPTokenizer(
                vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77
            ),
            tokenizer_2=T5TokenizerFast(vocab=pieces, extra_ids=0),
            text_encoder=CLIPTextModel(
                CLIPTextConfig(
                    vocab_size=len(words), hidden_size=32, intermediate_size=37, num_hidden_layers=1,
                    num_attention_heads=4, projection_dim=32, bos_token_id=0, eos_token_id=1,
                )
            ),
            text_encoder_2=T5EncoderModel(
                T5Config(vocab_size=64, d_model=64, d_kv=16, d_ff=37, num_layers=1, num_heads=4)
            ),
            transformer=FluxTransformer2DModel(
                patch_size=1, in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=128,
                num_attention_heads=1, joint_attention_dim=64, pooled_projection_dim=32, guidance_embeds=True,
                axes_dims_rope=(16, 56, 56),
            ),
        ).save_pretrained(folder)  # fmt: skip
    return folder


def _collect(folder: Path, out: Path, *prompts: str) -> torch.Tensor:
    collect_pipeline_stats(folder, [LAYER], out, "cpu", prompts=prompts, steps=2, resolution=32)
    return StatsFile(out).read(LAYER).samples_SK


def test_the_layers_inputs_are_those_of_the_prompts(pipeline: Path, tmp_path: Path) -> None:
    samples = [
        _collect(pipeline, tmp_path / f"{i}.safetensors", p, "dog") for i, p in enumerate(("a cat", "a cat", "zebra"))
    ]
    assert samples[0].shape == (512, 128)  # of 2 prompts, 2 steps, 256 tokens
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])
    with pytest.raises(ValueError, match="at least one prompt"):
        _collect(pipeline, tmp_path / "none")


def _interrupted(*_: object, **__: object) -> None:
    raise RuntimeError("interrupted")


def test_the_command_calibrates_once_and_leaves_nothing_beside_the_checkpoint(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts").write_text("a cat\n\na dog\n")
    out = tmp_path / "made" / "out"
    command = ["quantize", str(pipeline), "--out", str(out), "--rank", "4", "--smoothing", "calibrated"]
    command += ["--prompts", str(tmp_path / "prompts"), "--resolution", "32"]
    collected = []
    collect = pipeline_stats.collect_pipeline_stats

    def counting(*args: object, **more: object) -> None:
        collected.append(more["prompts"])
        collect(*args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(pipeline_stats, "collect_pipeline_stats", counting)
    assert cli.main([*command, "--profile", "interchange", "--group-size", "128"]) == 2
    assert collected == []  # refused before the model runs
    monkeypatch.setattr(architectures, "quantize_stream", _interrupted)
    (tmp_path / "before").write_text("a zebra\n")
    with pytest.raises(RuntimeError, match="interrupted"):
        cli.main([*command, "--prompts", str(tmp_path / "before")])
    with pytest.raises(RuntimeError, match="interrupted"):
        cli.main(command)
    assert len(list(out.parent.glob(".out.*"))) == 1
    monkeypatch.setattr(architectures, "quantize_stream", quantize_stream)
    assert cli.main(command) == 0
    assert collected == [("a zebra",), ("a cat", "a dog")]  # other prompts are not those of the file, equal ones are
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    report = json.loads((out / "quantization_report.json").read_text())
    assert any(layer["alpha"] > 0 for layer in report["layers"])


def test_every_kind_of_pipeline_calibrates_itself(sana_folder: Path, pixart_folder: Path, tmp_path: Path) -> None:
    """Guidance included: the empty prompt's pass is watched too."""
    for folder, names, tokens in ((sana_folder, {"sana-06b", "sana-16b"}, 4), (pixart_folder, {"pixart-sigma"}, 16)):
        assert base_of(folder)[0].name in names
        out = tmp_path / f"{folder.name}.safetensors"
        last = "conv_point" if folder == sana_folder else "net.2"
        layers = {"transformer_blocks.0.attn1.to_q": 64, f"transformer_blocks.0.ff.{last}": 160 if tokens == 4 else 256}
        collect_pipeline_stats(folder, list(layers), out, "cpu", prompts=["a cat"], steps=2, resolution=64)
        for layer, width in layers.items():
            assert StatsFile(out).read(layer).samples_SK.shape == (2 * 2 * tokens, width)


def test_a_pipeline_of_no_known_base_is_refused(sana_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    config = json.loads((sana_folder / "transformer" / "config.json").read_text())
    (tmp_path / "transformer" / "config.json").write_text(json.dumps({**config, "guidance_embeds": True}))
    for name, expected in (
        ("SanaPipeline", "sana-16b: .* SANA-Sprint"),
        ("WanPipeline", "is a WanPipeline of no known"),
    ):
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
        with pytest.raises(ValueError, match=expected):
            base_of(tmp_path)
