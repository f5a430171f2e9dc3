"""Stable Diffusion's encoders from a pipeline's folder, against the stock pipelines; and the random ones."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

from loragraft.backbones.clip_encoders import ClipEncoders
from loragraft.backbones.load import find_spec
from loragraft.backbones.stable_diffusion import KINDS
from loragraft.quantization.tensor_file import CheckpointError

Folder = Callable[[str], Path]
CAPTIONS = ["a red bicycle", "", "two cats on a pile of books"]
CPU = torch.device("cpu")


def opened(folder: Path, name: str) -> ClipEncoders:
    return ClipEncoders(folder, KINDS[name].family, KINDS[name].scheduler[0], CPU, torch.float32)


def test_text_of_one_encoder_is_the_pipelines(unet_folder: Folder) -> None:
    folder = unet_folder("sd15")
    pipeline = StableDiffusionPipeline.from_pretrained(folder, unet=None, vae=None, dtype=torch.float32)
    expected, _ = pipeline.encode_prompt(CAPTIONS, CPU, 1, False)
    found = opened(folder, "sd15").encode_text(CAPTIONS)
    assert list(found) == ["prompt_embeds"]
    torch.testing.assert_close(found["prompt_embeds"], expected)


def test_text_of_two_encoders_is_the_pipelines_and_nothing_is_zeros(unet_folder: Folder) -> None:
    folder = unet_folder("sdxl")
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, unet=None, vae=None, dtype=torch.float32)
    states, _, pooled, _ = pipeline.encode_prompt(
        CAPTIONS[0::2], device=CPU, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    found = opened(folder, "sdxl").encode_text(CAPTIONS)
    torch.testing.assert_close(found["prompt_embeds"][0::2], states)
    torch.testing.assert_close(found["pooled_prompt_embeds"][0::2], pooled)
    assert not found["prompt_embeds"][1].any() and not found["pooled_prompt_embeds"][1].any()


def test_what_the_pipeline_says_of_the_empty_prompt_is_followed(unet_folder: Folder, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(unet_folder("sdxl"), folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "force_zeros_for_empty_prompt": False}))
    zeros, encoded = opened(unet_folder("sdxl"), "sdxl"), opened(folder, "sdxl")
    assert encoded.encode_text([""])["prompt_embeds"].any()
    assert zeros.id != encoded.id


def test_latents_are_scaled_once_and_decode(unet_folder: Folder) -> None:
    folder = unet_folder("sd15")
    encoders = opened(folder, "sd15")
    vae = AutoencoderKL.from_pretrained(folder / "vae", dtype=torch.float32)
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        expected = vae.encode(pixels).latent_dist.mode() * 0.18215
    torch.testing.assert_close(encoders.encode_images(pixels), expected)


def test_captions_are_read_as_far_as_77_tokens(unet_folder: Folder) -> None:
    encoders = opened(unet_folder("sd15"), "sd15")
    short, long = "a b" * 20, "ab " * 50
    assert encoders.readable(short) == short
    read = encoders.readable(long)
    assert len(read.replace(" ", "")) == 75 and long.startswith(read)
    a, b = encoders.encode_text([long])["prompt_embeds"], encoders.encode_text([read])["prompt_embeds"]
    assert torch.equal(a, b)


def test_the_scheduler_is_euler_on_the_published_times(unet_folder: Folder) -> None:
    parts = opened(unet_folder("sd15"), "sd15").pipeline_parts
    assert isinstance(parts["scheduler"], EulerDiscreteScheduler)
    assert parts["scheduler"].config.timestep_spacing == "leading" and parts["scheduler"].config.steps_offset == 1
    assert parts["text_encoder"] is None and "text_encoder_2" not in parts
    turbo = opened(unet_folder("sdxl-turbo"), "sdxl-turbo").pipeline_parts["scheduler"]
    assert turbo.config.timestep_spacing == "trailing"


def test_released_text_is_gone(unet_folder: Folder) -> None:
    encoders = opened(unet_folder("sdxl"), "sdxl")
    encoders.release_text()
    with pytest.raises(RuntimeError, match="released"):
        encoders.encode_text(["a"])


def test_another_prediction_and_missing_parts_are_refused(unet_folder: Folder, tmp_path: Path) -> None:
    folder = tmp_path / "velocity"
    shutil.copytree(unet_folder("sd15"), folder)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "prediction_type": "v_prediction"}))
    with pytest.raises(ValueError, match=r"predicts v_prediction .* this base's predicts epsilon"):
        opened(folder, "sd15")
    shutil.rmtree(folder / "text_encoder")
    with pytest.raises(CheckpointError, match="lacks text_encoder"):
        opened(folder, "sd15")


def test_random_encoders_have_the_true_shapes_and_depend_on_the_caption() -> None:
    spec = find_spec("sdxl")
    assert spec.external is not None
    with torch.device("meta"):
        made = spec.external.random_encoders(0, CPU, torch.bfloat16)
    text = made.encode_text(["a", "b"])
    assert {key: tuple(t.shape) for key, t in text.items()} == {
        "prompt_embeds": (2, 77, 2048), "pooled_prompt_embeds": (2, 1280),
    }  # fmt: skip
    assert torch.equal(made.encode_text(["b"])["prompt_embeds"][0], text["prompt_embeds"][1])
    assert not torch.equal(text["prompt_embeds"][0], text["prompt_embeds"][1])
