"""SANA's and PixArt-Sigma's encoders on tiny pipelines: diffusers' own embeddings and masks, what is read, what is freed."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PixArtSigmaPipeline, SanaPipeline
from transformers import Gemma2Model

from loragraft.backbones.masked_encoders import CAPTIONS_TOGETHER, RandomMaskedEncoders
from loragraft.backbones.pixart_encoders import PixArtEncoders
from loragraft.backbones.resting import stream_layers
from loragraft.backbones.sana_encoders import INSTRUCTION, SanaEncoders, _instruction
from loragraft.kernels.layout import relative_rms
from loragraft.quantization.tensor_file import CheckpointError

CPU = torch.device("cpu")
CAPTIONS = [f"a white heart number {i}" for i in range(CAPTIONS_TOGETHER)] + ["", "A Cat"]


@pytest.fixture(scope="module")
def sana(sana_folder: Path) -> SanaEncoders:
    return SanaEncoders(sana_folder, CPU, torch.float32)


@pytest.fixture(scope="module")
def pixart(pixart_folder: Path) -> PixArtEncoders:
    return PixArtEncoders(pixart_folder, CPU, torch.float32)


def test_sanas_text_is_what_the_pipeline_makes_of_it(sana: SanaEncoders, sana_folder: Path) -> None:
    """A caption as its prompt, with the instruction; the empty one as its negative prompt, without."""
    found = sana.encode_text(CAPTIONS)
    pipeline = SanaPipeline.from_pretrained(
        sana_folder, transformer=None, vae=None, dtype=torch.float32, local_files_only=True
    )
    for i in (0, 9):
        with torch.no_grad():
            states, mask, negative, negative_mask = pipeline.encode_prompt(
                CAPTIONS[i], complex_human_instruction=INSTRUCTION
            )
        torch.testing.assert_close(found["prompt_embeds"][i : i + 1], states)
        assert torch.equal(found["prompt_attention_mask"][i : i + 1], mask.float())
    torch.testing.assert_close(found["prompt_embeds"][8:9], negative)
    assert torch.equal(found["prompt_attention_mask"][8:9], negative_mask.float())
    assert found["prompt_embeds"].shape == (10, 300, 64) and found["prompt_attention_mask"].dtype == torch.float32
    assert found["prompt_attention_mask"].sum(1).tolist()[8:] == [1, 6]


def test_pixarts_text_is_what_the_pipeline_makes_of_it(pixart: PixArtEncoders, pixart_folder: Path) -> None:
    found = pixart.encode_text(CAPTIONS)
    pipeline = PixArtSigmaPipeline.from_pretrained(
        pixart_folder, transformer=None, vae=None, dtype=torch.float32, local_files_only=True
    )
    for i in (0, 8, 9):
        with torch.no_grad():
            states, mask, *_ = pipeline.encode_prompt(CAPTIONS[i], do_classifier_free_guidance=False)
        torch.testing.assert_close(found["prompt_embeds"][i : i + 1], states)
        assert torch.equal(found["prompt_attention_mask"][i : i + 1], mask.float())
    assert found["prompt_attention_mask"].sum(1).tolist()[8:] == [1, 5]


def test_a_caption_is_read_as_far_as_t5s_tokens_reach(pixart: PixArtEncoders, caplog: pytest.LogCaptureFixture) -> None:
    fits, over = "abc " * 99 + "ab", "abc " * 99 + "abc"  # one token a letter, 299 beside the end mark
    assert pixart.readable(fits) == fits
    assert pixart.readable(over) == fits
    cut, whole = (pixart.encode_text([text])["prompt_embeds"] for text in (pixart.readable(over), over))
    torch.testing.assert_close(cut, whole)
    assert "truncated" not in caplog.text


def test_a_caption_is_read_as_far_as_gemmas_tokens_reach(sana: SanaEncoders) -> None:
    fits, over = (
        "Abc " * 99 + "a",
        "  " + "Abc " * 99 + "ab",
    )  # one of 300 is the mark, one the instruction's last token
    assert sana.readable(fits) == fits
    assert sana.readable(over) == "  " + fits
    cut, whole = (sana.encode_text([text])["prompt_embeds"] for text in (fits, over))
    torch.testing.assert_close(cut, whole)
    assert _instruction().endswith("User Prompt: ")


def test_a_letter_that_is_two_in_lower_case_counts_once(pixart: PixArtEncoders) -> None:
    assert pixart.readable("İ" * 3 + "a" * 300) == "İ" * 3 + "a" * (299 - 2 * 3)


def test_dc_aes_latents_are_scaled_once(sana: SanaEncoders) -> None:
    """Encoded and scaled, divided by the scale and decoded: what the pipeline does with what the cache holds."""
    pixels = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = sana.encode_images(pixels)
    assert latents.shape == (2, 32, 2, 3)
    with torch.no_grad():
        code = sana.vae.encode(pixels[1:]).latent
        torch.testing.assert_close(latents[1:], code * 0.41407)
        again = sana.vae.decode(latents[1:] / sana.vae.config.scaling_factor).sample
        torch.testing.assert_close(again, sana.vae.decode(code).sample)


def test_pixarts_latents_are_the_scaled_mean(pixart: PixArtEncoders) -> None:
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = pixart.encode_images(pixels)
    assert latents.shape == (2, 4, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(latents[1:], pixart.vae.encode(pixels[1:]).latent_dist.mean * 0.13025)


def test_the_parts_are_the_pipelines(sana: SanaEncoders, pixart: PixArtEncoders) -> None:
    ours, theirs = sana.pipeline_parts["scheduler"], pixart.pipeline_parts["scheduler"]
    assert ours.config.flow_shift == 3.0 and ours.config.prediction_type == "flow_prediction"
    assert theirs.config.prediction_type == "epsilon"
    assert sana.pipeline_parts["scheduler"] is not ours, "a scheduler keeps state from one picture to the next"
    assert sana.pipeline_parts["tokenizer"] is None and sana.pipeline_parts["vae"] is sana.vae


def test_the_identity_follows_the_files(sana: SanaEncoders, sana_folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(sana_folder, tmp_path / "copy")
    assert SanaEncoders(copy, CPU, torch.float32).id == sana.id
    file = copy / "text_encoder" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert SanaEncoders(copy, CPU, torch.float32).id != sana.id


def test_the_identity_follows_the_instruction(
    sana: SanaEncoders, sana_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loragraft.backbones.sana_encoders.INSTRUCTION", ["Repeat: "])
    assert SanaEncoders(sana_folder, CPU, torch.float32).id != sana.id


def test_weights_of_one_variant_are_found(sana: SanaEncoders, sana_folder: Path, tmp_path: Path) -> None:
    """SANA is published as `model.bf16.safetensors` too."""
    copy = shutil.copytree(sana_folder, tmp_path / "copy")
    for name in ("text_encoder/model", "vae/diffusion_pytorch_model"):
        (copy / f"{name}.safetensors").rename(copy / f"{name}.bf16.safetensors")
    renamed = SanaEncoders(copy, CPU, torch.float32)
    torch.testing.assert_close(renamed.encode_text(["x"]), sana.encode_text(["x"]))


def test_released_and_incomplete_say_so(pixart_folder: Path, tmp_path: Path) -> None:
    encoders = PixArtEncoders(pixart_folder, CPU, torch.float32)
    encoders.release_text()
    with pytest.raises(RuntimeError, match="released"):
        encoders.encode_text(["x"])
    copy = shutil.copytree(pixart_folder, tmp_path / "copy")
    shutil.rmtree(copy / "text_encoder")
    with pytest.raises(CheckpointError, match="lacks text_encoder"):
        PixArtEncoders(copy, CPU, torch.float32)
    (copy / "text_encoder").mkdir()
    with pytest.raises(CheckpointError, match="cannot be read"):
        PixArtEncoders(copy, CPU, torch.float32).encode_text(["x"])


def test_random_encoders_have_the_shapes_and_depend_on_caption_and_seed(sana: SanaEncoders) -> None:
    parts = (type(sana.vae), sana.vae.config), (type(sana.pipeline_parts["scheduler"]), {})

    def made(seed: int) -> RandomMaskedEncoders:
        return RandomMaskedEncoders("sana", *parts, (6, 5), seed, CPU, torch.float32)

    state = torch.random.get_rng_state()
    encoders = made(0)
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator was used"
    text = encoders.encode_text(["a red hat", ""])
    assert text["prompt_embeds"].shape == (2, 6, 5)
    assert text["prompt_attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]]
    assert torch.equal(made(0).encode_text([""])["prompt_embeds"][0], text["prompt_embeds"][1])
    assert not torch.equal(made(1).encode_text([""])["prompt_embeds"][0], text["prompt_embeds"][1])
    assert made(1).id != encoders.id
    pixels = torch.zeros(1, 3, 64, 64)
    assert torch.equal(made(0).encode_images(pixels), encoders.encode_images(pixels))
    encoders.release_text()
    with pytest.raises(RuntimeError, match="released"):
        encoders.encode_text(["a"])


def test_a_streamed_gemma_gives_the_same_and_holds_nothing_in_between(sana_folder: Path) -> None:
    """Its rotary frequencies are no part of a checkpoint, so they cannot be offloaded as weights are."""
    model = Gemma2Model.from_pretrained(sana_folder / "text_encoder", dtype=torch.float32, local_files_only=True).eval()
    ids = torch.arange(12).view(2, 6)
    mask = (ids % 6 < 4).long()
    with torch.no_grad():
        expected = model(ids, attention_mask=mask)[0]
        stream_layers(model, CPU)
        assert all(p.is_meta for p in model.parameters()), "the weights lie with the hooks, not in the model"
        for _ in range(2):
            assert torch.equal(model(ids, attention_mask=mask)[0], expected)
        assert all(p.is_meta for p in model.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["sana", "pixart"])
def test_on_a_gpu_every_encoder_leaves_it(
    kind: str, sana_folder: Path, pixart_folder: Path, encoded_on_a_gpu: Callable[..., Any]
) -> None:
    folder, made = (sana_folder, SanaEncoders) if kind == "sana" else (pixart_folder, PixArtEncoders)
    latents, on_gpu = encoded_on_a_gpu(lambda: made(folder, torch.device("cuda"), torch.bfloat16))
    on_cpu = made(folder, CPU, torch.float32)
    mask = on_cpu.encode_text(["a white heart", ""])["prompt_attention_mask"]
    assert torch.equal(on_gpu["prompt_attention_mask"].float(), mask)
    states = on_cpu.encode_text(["a white heart", ""])["prompt_embeds"]
    assert relative_rms(on_gpu["prompt_embeds"].float()[mask.bool()], states[mask.bool()]) < 0.03
    assert relative_rms(latents.float(), on_cpu.encode_images(torch.zeros(2, 3, 64, 64))) < 0.05
