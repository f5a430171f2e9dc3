"""SANA's and PixArt-Sigma's families: what the transformer is told, which loss, gradients, and pictures through the stock pipelines."""

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, PixArtSigmaPipeline, SanaPipeline
from torch import Tensor, nn

from loragraft.adapters.inject import inject_adapter
from loragraft.backbones.architectures import PIXART, SANA, Architecture
from loragraft.backbones.family import Family
from loragraft.backbones.masked_dit import PIXART_LIKE, SANA_LIKE, SANA_SCHEDULER
from loragraft.backbones.pixart_encoders import PixArtEncoders
from loragraft.backbones.sampler import build_pipeline, generate_from_text
from loragraft.backbones.sana_encoders import SanaEncoders
from loragraft.backbones.skeleton import plan_architecture
from loragraft.kernels.layout import relative_rms
from loragraft.quantization.checkpoint import quantized_layers
from loragraft.quantization.convert import quantize_model
from loragraft.quantization.settings import Numerics, QuantSettings
from loragraft.recipes.schema import AdapterConfig
from loragraft.train.step import compile_blocks

CPU = torch.device("cpu")
KINDS: list[tuple[Family, Architecture, type[Any], int]] = [
    (SANA_LIKE, SANA, SanaPipeline, 32),
    (PIXART_LIKE, PIXART, PixArtSigmaPipeline, 4),
]
Folders = dict[str, Path]


@pytest.fixture(scope="module")
def folders(sana_folder: Path, pixart_folder: Path) -> Folders:
    return {SANA.class_name: sana_folder, PIXART.class_name: pixart_folder}


def opened(folder: Path, pipeline: type[Any]) -> nn.Module:
    model = pipeline.from_pretrained(
        folder, text_encoder=None, tokenizer=None, vae=None, dtype=torch.float32, local_files_only=True
    ).transformer
    with torch.no_grad():  # a trained model's gates are no zeros
        for parameter in model.parameters():
            parameter.add_(
                0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            )
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]


def inputs(channels: int, edge: int = 4) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """latents, noise, times, text of a caption of 5 tokens and of one of 2, padded to 8."""
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 2, channels, edge, edge, generator=generator)
    mask = (torch.arange(8) < torch.tensor([[5], [2]])).float()
    text = {"prompt_embeds": torch.randn(2, 8, 64, generator=generator), "prompt_attention_mask": mask}
    return latents, noise, torch.tensor([0.3, 0.8]), text


@pytest.mark.parametrize(("family", "lists", "pipeline", "channels"), KINDS)
def test_padding_is_not_read(
    family: Family, lists: Architecture, pipeline: type[Any], channels: int, folders: Folders
) -> None:
    model = opened(folders[lists.class_name], pipeline)
    latents, _, times, text = inputs(channels)
    said = family.predict(model, latents, times, text)
    mask = text["prompt_attention_mask"].bool().unsqueeze(-1)
    junk = {**text, "prompt_embeds": text["prompt_embeds"].where(mask, torch.full_like(text["prompt_embeds"], 9.0))}
    assert said.shape == latents.shape
    torch.testing.assert_close(family.predict(model, latents, times, junk), said)
    other = {**text, "prompt_embeds": text["prompt_embeds"] + mask}
    assert relative_rms(family.predict(model, latents, times, other), said) > 1e-4


class Recorder(nn.Module):
    """Keeps what it is told; answers with constants."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels, self.seen = channels, {}  # type: ignore[var-annotated]

    def forward(self, latents: Tensor, **told: Any) -> tuple[Tensor]:
        self.seen = told
        b, _, h, w = latents.shape
        return (torch.arange(float(self.channels)).view(1, -1, 1, 1).expand(b, -1, h, w),)


def test_sana_predicts_the_velocity_of_the_straight_path_at_1000_t() -> None:
    latents, noise, times, text = inputs(32)
    model = Recorder(32)
    loss = SANA_LIKE.loss(model, latents, noise, times, text)
    assert torch.equal(model.seen["timestep"], torch.tensor([300.0, 800.0]))
    assert torch.equal(model.seen["encoder_attention_mask"], text["prompt_attention_mask"])
    assert loss == pytest.approx(float((torch.arange(32.0).view(1, -1, 1, 1) - (noise - latents)).square().mean()))


def test_pixart_predicts_the_noise_with_its_first_four_channels() -> None:
    latents, noise, times, text = inputs(4)
    model = Recorder(8)
    loss = PIXART_LIKE.loss(model, latents, noise, times, text)
    assert torch.equal(model.seen["timestep"], torch.tensor([300, 800]))
    assert loss == pytest.approx(float((torch.arange(4.0).view(1, -1, 1, 1) - noise).square().mean()))


def test_the_variance_channels_have_no_part_in_pixarts_gradient(pixart_folder: Path) -> None:
    model = opened(pixart_folder, PixArtSigmaPipeline)
    weight = model.proj_out.weight.requires_grad_()  # rows: (row, column, channel) of a patch
    PIXART_LIKE.loss(model, *inputs(4)).backward()
    by_channel = weight.grad.view(4, 8, -1).abs().sum((0, 2))  # type: ignore[union-attr, operator]
    assert (by_channel[:4] > 0).all() and (by_channel[4:] == 0).all()


def test_pixarts_noise_levels_are_its_schedulers() -> None:
    latents, noise, times, _ = inputs(4)
    reference = DDPMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
    expected = reference.add_noise(latents, noise, torch.tensor([300, 800]))
    torch.testing.assert_close(PIXART_LIKE.process.noisy(latents, noise, times), expected, rtol=1e-4, atol=1e-5)
    solver = PIXART_LIKE.scheduler()
    torch.testing.assert_close(solver.alphas_cumprod, reference.alphas_cumprod)


def test_sanas_times_are_shifted_as_its_scheduler_shifts_them() -> None:
    plain = torch.sigmoid(torch.randn(4000, generator=torch.Generator().manual_seed(3)))
    times = SANA_LIKE.process.sample_times(4000, torch.Generator().manual_seed(3))
    torch.testing.assert_close(times / (3 - 2 * times), plain)
    solver = DPMSolverMultistepScheduler.from_config(SANA_SCHEDULER)
    solver.set_timesteps(10)
    even = torch.linspace(1, 1 / 1000, 11)[:-1]
    torch.testing.assert_close(solver.sigmas[:-1], 3 * even / (1 + 2 * even), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("family", "lists", "pipeline", "channels"), KINDS)
def test_the_gradient_is_that_of_the_16_bit_model_with_the_same_weights(
    family: Family, lists: Architecture, pipeline: type[Any], channels: int, folders: Folders
) -> None:
    settings = QuantSettings("w4a16", rank=4, search="subsampled", iterations=1, grid=1)
    ours, twin = (opened(folders[lists.class_name], pipeline) for _ in range(2))
    quantize_model(ours, plan_architecture(lists, settings, ours), {}, keep=lists.keep_16bit)
    for path, layer in quantized_layers(ours).items():
        weight = twin.get_submodule(path).weight
        assert relative_rms(layer.dequantized_weight().reshape(weight.shape), weight) < 0.12, path
        weight.data.copy_(layer.dequantized_weight().reshape(weight.shape))
    gradients = []
    for model in (ours, twin):
        parameters = inject_adapter(model, AdapterConfig(rank=2, alpha=2), lists.quantize)
        generator = torch.Generator().manual_seed(1)
        for parameter in parameters:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        family.loss(model, *inputs(channels)).backward()
        gradients.append([parameter.grad for parameter in parameters])
    assert len(gradients[0]) == len(gradients[1]) > 0
    for found, expected in zip(*gradients, strict=True):
        assert expected is not None and found is not None and expected.abs().max() > 0
        assert relative_rms(found, expected) < 1e-3


@pytest.mark.parametrize("numerics", ["w4a8", "w4a4", "w4a16"])
@pytest.mark.parametrize(("family", "lists", "pipeline", "channels"), KINDS)
def test_every_profile_covers_all_layers_and_stays_near_the_16_bit_model(
    family: Family, lists: Architecture, pipeline: type[Any], channels: int, numerics: Numerics, folders: Folders
) -> None:
    settings = QuantSettings(numerics, rank=8, smoothing=None if numerics == "w4a16" else "weight", search="subsampled")
    plain, ours = (opened(folders[lists.class_name], pipeline) for _ in range(2))
    quantize_model(ours, plan_architecture(lists, settings, ours), {}, keep=lists.keep_16bit)
    latents, _, times, text = inputs(channels)
    expected = family.predict(plain, latents, times, text)
    assert relative_rms(family.predict(ours, latents, times, text), expected) < (0.25 if numerics == "w4a4" else 0.15)
    counts = Counter(layer.numerics for layer in quantized_layers(ours).values())
    assert counts == Counter({numerics: 20}) + Counter({"w4a16": 1})


@pytest.mark.parametrize(("family", "lists", "pipeline", "channels"), KINDS)
def test_pictures_are_the_stock_pipelines(
    family: Family, lists: Architecture, pipeline: type[Any], channels: int, folders: Folders
) -> None:
    """From cached embeddings and masks, with the guidance's second pass; the same pixels as the pipeline alone gives."""
    folder = folders[lists.class_name]
    made = SanaEncoders if family is SANA_LIKE else PixArtEncoders
    encoders = made(folder, CPU, torch.float32)
    model = opened(folder, pipeline)
    text, empty = encoders.encode_text(["a white heart", "Two red hats"]), encoders.encode_text([""])
    told: list[tuple[int, int]] = []
    drawn = generate_from_text(
        family, build_pipeline(family, model, encoders), text, empty, [3, 4], resolution=64, steps=2, guidance=4.5,
        on_step=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert [picture.size for picture in drawn] == [(64, 64)] * 2 and told == [(1, 2), (2, 2)]
    stock = pipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    nn.Module.to(stock.text_encoder, torch.float32)
    stock.transformer = model
    stock.set_progress_bar_config(disable=True)
    (again,) = stock(
        "Two red hats", num_inference_steps=2, guidance_scale=4.5, height=64, width=64,
        use_resolution_binning=False, clean_caption=False, generator=torch.Generator().manual_seed(4),
    ).images  # fmt: skip
    ours, theirs = (torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8).int() for p in (drawn[1], again))
    assert (ours - theirs).abs().max() <= 1
    assert ours.float().std() > 0
    with pytest.raises(ValueError, match="no image-to-image pipeline"):
        generate_from_text(
            family, build_pipeline(family, model, encoders), text, empty, [3, 4], resolution=64, steps=2, guidance=1.0,
            start=torch.zeros(1, channels, 4, 4), strength=0.5,
        )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("family", "lists", "pipeline", "channels"), KINDS)
def test_blocks_compile_whole(
    family: Family, lists: Architecture, pipeline: type[Any], channels: int, folders: Folders
) -> None:
    """No graph break: what is traced runs as it is, and no code is generated."""
    settings = QuantSettings("w4a8", rank=4, smoothing="weight", search="subsampled", iterations=1, grid=1)
    model = opened(folders[lists.class_name], pipeline)
    quantize_model(model, plan_architecture(lists, settings, model), {}, keep=lists.keep_16bit)
    parameters = inject_adapter(model, AdapterConfig(rank=2, alpha=2), lists.quantize)
    expected = family.loss(model, *inputs(channels))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
        assert compile_blocks(model) == 2
    loss = family.loss(model, *inputs(channels))
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(parameter.grad is not None for parameter in parameters)
