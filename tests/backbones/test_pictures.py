"""What DC-AE does in tiles and what it never does."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler

from loragraft.backbones import pictures
from loragraft.backbones.flux1_encoders import random_vae
from loragraft.backbones.pictures import Pictures, is_small, tile_decoding
from loragraft.backbones.sana import DC_AE

NARROW = {
    **DC_AE, "encoder_block_out_channels": [8, 8, 8, 8, 16, 32], "decoder_block_out_channels": [8, 8, 8, 8, 16, 32],
    "attention_head_dim": 8, "encoder_layers_per_block": [1] * 6, "decoder_layers_per_block": [1] * 6,
}  # fmt: skip


def made() -> tuple[AutoencoderDC, Pictures]:
    vae = random_vae(NARROW, 0, torch.float32, AutoencoderDC)
    assert isinstance(vae, AutoencoderDC)
    return vae, Pictures(vae, (DPMSolverMultistepScheduler, {}), torch.device("cpu"))


def test_the_true_dc_ae_has_its_published_size() -> None:
    with torch.device("meta"):
        vae = AutoencoderDC.from_config(dict(DC_AE))
    sizes = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (vae.encoder, vae.decoder)]
    assert sizes == pytest.approx([153, 159], abs=0.5)


def test_tiles_are_decoded_and_never_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    vae, half = made()
    pixels = torch.rand(1, 3, 192, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = half.encode_images(pixels)
    with torch.no_grad():
        whole = vae.decode(latents).sample
    monkeypatch.setattr(pictures, "TILE", 128)
    monkeypatch.setattr(pictures, "STRIDE", 96)
    tile_decoding(vae)
    assert torch.equal(half.encode_images(pixels), latents)
    assert vae.use_tiling, "encoding must leave the decoder's tiles"
    seen: list[tuple[int, ...]] = []
    vae.decoder.register_forward_hook(lambda _module, given, _out: seen.append(tuple(given[0].shape[-2:])))
    with torch.no_grad():
        tiled = vae.decode(latents).sample
    assert tiled.shape == whole.shape
    assert seen == [(4, 4), (4, 1), (3, 4), (3, 1)]


def test_a_small_gpu_is_one_of_8_gb(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_small(torch.device("cpu"))
    for size, small in ((8 * 2**30, True), (12 * 2**30, False)):
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda _, size=size: SimpleNamespace(total_memory=size)
        )
        assert is_small(torch.device("cuda")) is small


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_tiles_take_less_memory() -> None:
    vae = random_vae(DC_AE, 0, torch.bfloat16, AutoencoderDC)
    assert isinstance(vae, AutoencoderDC)
    vae.to("cuda")
    latents = torch.zeros(1, 32, 32, 32, device="cuda", dtype=torch.bfloat16)
    peaks = []
    for tiled in (False, True):
        if tiled:
            tile_decoding(vae)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with torch.no_grad():
            vae.decode(latents)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 0.5 * peaks[0]
