"""What DC-AE does in tiles and what it never does."""

import pytest
import torch
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler

from loragraft.backbones.pictures import DECODING, Pictures, random_vae, tile_decoding, tile_edge
from loragraft.backbones.sana import DC_AE

NARROW = {
    **DC_AE, "encoder_block_out_channels": [8, 8, 8, 8, 16, 32], "decoder_block_out_channels": [8, 8, 8, 8, 16, 32],
    "attention_head_dim": 8, "encoder_layers_per_block": [1] * 6, "decoder_layers_per_block": [1] * 6,
}  # fmt: skip


def made() -> tuple[AutoencoderDC, Pictures]:
    vae = random_vae(NARROW, 0, torch.float32, AutoencoderDC)
    assert isinstance(vae, AutoencoderDC)
    return vae, Pictures(vae, (DPMSolverMultistepScheduler, {}), torch.device("cpu"), ())


def test_the_true_dc_ae_has_its_published_size() -> None:
    with torch.device("meta"):
        vae = AutoencoderDC.from_config(dict(DC_AE))
    sizes = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (vae.encoder, vae.decoder)]
    assert sizes == pytest.approx([153, 159], abs=0.5)


def test_tiles_are_decoded_and_never_encoded() -> None:
    vae, half = made()
    pixels = torch.rand(1, 3, 192, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = half.encode_images(pixels)
    with torch.no_grad():
        whole = vae.decode(latents).sample
    tile_decoding(vae, 128)
    assert torch.equal(half.encode_images(pixels), latents)
    assert vae.use_tiling, "encoding must leave the decoder's tiles"
    seen: list[tuple[int, ...]] = []
    vae.decoder.register_forward_hook(lambda _module, given, _out: seen.append(tuple(given[0].shape[-2:])))
    with torch.no_grad():
        tiled = vae.decode(latents).sample
    assert tiled.shape == whole.shape
    assert seen == [(4, 4), (4, 1), (3, 4), (3, 1)]


@pytest.mark.parametrize(("gib", "edge"), [(4, 768), (8, 1088), (12, 1344), (80, 3584), (0.01, 64)])
def test_a_tile_takes_a_quarter_of_the_gpu(gib: float, edge: int) -> None:
    """1024 px are decoded whole from 8 GiB on."""
    total = int(gib * 2**30)
    assert tile_edge(total) == edge
    assert edge**2 * DECODING <= total / 4 or edge == 64


@pytest.mark.gpu
def test_on_a_gpu_tiles_take_less_memory() -> None:
    vae = random_vae(DC_AE, 0, torch.bfloat16, AutoencoderDC)
    assert isinstance(vae, AutoencoderDC)
    vae.to("cuda")
    latents = torch.zeros(1, 32, 32, 32, device="cuda", dtype=torch.bfloat16)
    peaks = []
    for tiled in (False, True):
        if tiled:
            tile_decoding(vae, 512)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with torch.no_grad():
            vae.decode(latents)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 0.5 * peaks[0]
