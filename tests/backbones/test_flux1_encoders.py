"""FLUX.1's encoders on a tiny pipeline: diffusers' own embeddings, what is read of a caption, and what is freed."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from transformers import T5Config, T5EncoderModel

from loragraft.backbones.flux1_encoders import CAPTIONS_TOGETHER, Flux1Encoders
from loragraft.backbones.load import find_spec, load_backbone
from loragraft.backbones.resting import rest, stream_layers
from loragraft.backbones.sampler import generate_images
from loragraft.backbones.text_encoders import RandomEncoders
from loragraft.kernels.layout import relative_rms
from loragraft.quantization.tensor_file import CheckpointError
from loragraft.recipes.schema import WeightsConfig

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def encoders(flux_folder: Path) -> Flux1Encoders:
    return Flux1Encoders(flux_folder, CPU, torch.float32, 64)


def test_text_is_what_the_pipeline_makes_of_it(encoders: Flux1Encoders, flux_folder: Path) -> None:
    captions = [f"a white heart number {i}" for i in range(CAPTIONS_TOGETHER + 3)]
    found = encoders.encode_text(captions)
    pipeline = FluxPipeline.from_pretrained(
        flux_folder, transformer=None, vae=None, dtype=torch.float32, local_files_only=True
    )
    for i in (0, CAPTIONS_TOGETHER, len(captions) - 1):
        with torch.no_grad():
            states, pooled, _ = pipeline.encode_prompt(captions[i], max_sequence_length=64)
        torch.testing.assert_close(found["prompt_embeds"][i : i + 1], states)
        torch.testing.assert_close(found["pooled_prompt_embeds"][i : i + 1], pooled)
    assert not torch.equal(found["prompt_embeds"][0], found["prompt_embeds"][1])


def test_clips_77_tokens_are_nobodys_warning(encoders: Flux1Encoders, caplog: pytest.LogCaptureFixture) -> None:
    encoders.encode_text(["abc " * 40])
    assert "longer than" not in caplog.text and "truncated" not in caplog.text


def test_a_caption_is_read_as_far_as_t5s_tokens_reach(encoders: Flux1Encoders) -> None:
    fits, over = "abc " * 21, "abc " * 22  # one token a letter, 63 beside the end mark
    assert encoders.readable(fits) == fits
    assert encoders.readable(over) == fits.rstrip()
    cut = encoders.encode_text([over])["prompt_embeds"]
    torch.testing.assert_close(cut, encoders.encode_text([encoders.readable(over)])["prompt_embeds"])


def test_latents_are_the_scaled_mean_one_picture_at_a_time(encoders: Flux1Encoders) -> None:
    pixels = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = encoders.encode_images(pixels)
    assert latents.shape == (3, 16, 8, 8)
    with torch.no_grad():
        mean = encoders.vae.encode(pixels[1:2]).latent_dist.mean
    torch.testing.assert_close(latents[1:2], (mean - 0.1159) * 0.3611)


def test_the_identity_follows_the_files_and_the_tokens(
    encoders: Flux1Encoders, flux_folder: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(flux_folder, tmp_path / "copy")
    assert Flux1Encoders(copy, CPU, torch.float32, 64).id == encoders.id
    assert Flux1Encoders(copy, CPU, torch.float32, 32).id != encoders.id
    file = copy / "text_encoder_2" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert Flux1Encoders(copy, CPU, torch.float32, 64).id != encoders.id


def test_the_identity_of_a_large_file_is_sampled_from_end_to_end(
    flux_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("_WHOLE", 1000), ("_SAMPLES", 8), ("_SAMPLE", 16)):
        monkeypatch.setattr(f"loragraft.backbones.text_encoders.{name}", value)
    copy = shutil.copytree(flux_folder, tmp_path / "copy")
    before = Flux1Encoders(copy, CPU, torch.float32, 64).id
    file = copy / "vae" / "diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    assert Flux1Encoders(copy, CPU, torch.float32, 64).id != before


def test_released_and_incomplete_say_so(flux_folder: Path, tmp_path: Path) -> None:
    encoders = Flux1Encoders(flux_folder, CPU, torch.float32, 64)
    encoders.release_text()
    with pytest.raises(RuntimeError, match="released"):
        encoders.encode_text(["x"])
    copy = shutil.copytree(flux_folder, tmp_path / "copy")
    shutil.rmtree(copy / "text_encoder_2")
    with pytest.raises(CheckpointError, match="lacks text_encoder_2"):
        Flux1Encoders(copy, CPU, torch.float32, 64)
    (copy / "text_encoder_2").mkdir()
    with pytest.raises(CheckpointError, match="cannot be read"):
        Flux1Encoders(copy, CPU, torch.float32, 64).encode_text(["x"])


def test_a_streamed_text_encoder_gives_the_same_and_holds_nothing_in_between() -> None:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=32, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    model = T5EncoderModel(config).eval()
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        expected = model(ids).last_hidden_state
        stream_layers(model, CPU)
        assert all(p.is_meta for p in model.parameters()), "the weights lie with the hooks, not in the model"
        for _ in range(2):
            assert torch.equal(model(ids).last_hidden_state, expected)
        assert all(p.is_meta for p in model.parameters())


def test_rest_brings_only_a_hooked_model_back() -> None:
    model = torch.nn.Linear(2, 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rest(model)  # nothing to do, nothing fails
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_random_encoders_have_the_shapes_and_depend_on_caption_and_seed(flux_folder: Path) -> None:
    vae = Flux1Encoders(flux_folder, CPU, torch.float32, 64).vae.config

    def made(seed: int) -> RandomEncoders:
        scheduler = (FlowMatchEulerDiscreteScheduler, {})
        return RandomEncoders("flux1", (AutoencoderKL, vae), scheduler, (6, 5, 4), seed, CPU, torch.float32)

    state = torch.random.get_rng_state()
    encoders = made(0)
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator was used"
    text = encoders.encode_text(["a", "b"])
    assert text["prompt_embeds"].shape == (2, 6, 5) and text["pooled_prompt_embeds"].shape == (2, 4)
    assert torch.equal(made(0).encode_text(["b"])["prompt_embeds"][0], text["prompt_embeds"][1])
    assert not torch.equal(text["prompt_embeds"][0], text["prompt_embeds"][1])
    assert not torch.equal(made(1).encode_text(["a"])["prompt_embeds"][0], text["prompt_embeds"][0])
    assert made(1).id != encoders.id
    pixels = torch.zeros(1, 3, 64, 64)
    assert torch.equal(made(0).encode_images(pixels), encoders.encode_images(pixels))
    encoders.release_text()
    with pytest.raises(RuntimeError, match="released"):
        encoders.encode_text(["a"])


def test_the_true_autoencoder_has_its_published_size() -> None:
    encoders = find_spec("flux1-dev").external.random_encoders(0, CPU, torch.float32)  # type: ignore[union-attr]
    vae = encoders.pipeline_parts["vae"]
    assert sum(p.numel() for p in vae.parameters()) == 83_819_683
    assert encoders.encode_images(torch.zeros(1, 3, 32, 32)).shape == (1, 16, 4, 4)
    assert encoders.pipeline_parts["scheduler"].config.use_dynamic_shifting


@pytest.mark.gpu
def test_on_a_gpu_every_encoder_leaves_it(flux_folder: Path, encoded_on_a_gpu: Callable[..., Any]) -> None:
    latents, on_gpu = encoded_on_a_gpu(lambda: Flux1Encoders(flux_folder, torch.device("cuda"), torch.bfloat16, 64))
    on_cpu = Flux1Encoders(flux_folder, CPU, torch.float32, 64)
    for key, tensor in on_cpu.encode_text(["a white heart", ""]).items():
        assert relative_rms(on_gpu[key].float(), tensor) < 0.03
    assert relative_rms(latents.float(), on_cpu.encode_images(torch.zeros(2, 3, 64, 64))) < 0.03


@pytest.mark.gpu
def test_on_a_gpu_drawing_leaves_the_transformer_alone_there(flux_folder: Path, flux_cache: Path) -> None:
    backbone = load_backbone("flux1-dev", "native", "cuda", flux_cache, WeightsConfig(path=str(flux_folder)), True)
    assert backbone.transformer.device.type == "cpu"
    backbone.resolution = 64
    (image,) = generate_images(backbone, ["a white heart"], [0], steps=2)
    assert image.size == (64, 64)
    assert backbone.transformer.device.type == "cuda"
    assert backbone.encoders.pipeline_parts["vae"].device.type == "cpu"
