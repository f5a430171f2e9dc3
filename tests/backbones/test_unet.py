"""What a UNet is given in a training step: against its own pipeline; and what its LoRA gets, against 16 bits."""

import copy
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor, nn

from loragraft.adapters.inject import inject_adapter
from loragraft.backbones.architectures import UNET
from loragraft.backbones.family import Family
from loragraft.backbones.skeleton import plan_architecture
from loragraft.backbones.stable_diffusion import KINDS, LORA_TARGETS
from loragraft.backbones.unet import SD_LIKE, SDXL_LIKE, time_ids
from loragraft.quantization.linear import SVDQuantLinear
from loragraft.quantization.settings import QuantSettings
from loragraft.recipes.schema import AdapterConfig


class Recorder(nn.Module):
    """Stands in for a UNet: returns `answer` and keeps what it was called with."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer
        self.seen: dict[str, Any] = {}

    def forward(self, sample: Tensor, timestep: Tensor, states: Tensor, **others: Any) -> tuple[Tensor]:
        self.seen = {"sample": sample, "timestep": timestep, "states": states, **others}
        return (self.answer,)


def text_of(family: Family, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
    shapes = {"prompt_embeds": (batch, 77, 64), "pooled_prompt_embeds": (batch, 32)}
    return {key: torch.randn(shapes[key], generator=generator) for key in family.text_keys}


@pytest.mark.parametrize("family", [SD_LIKE, SDXL_LIKE])
def test_the_loss_is_zero_for_the_true_noise(family: Family) -> None:
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(3, 4, 8, 6, generator=generator) for _ in range(2))
    times, text = torch.tensor([0.0, 0.25, 1.0]), text_of(family, 3, generator)
    model = Recorder(noise)
    assert float(family.loss(model, latents, noise, times, text)) == 0
    assert model.seen["timestep"].tolist() == [0, 250, 999]
    torch.testing.assert_close(model.seen["sample"], family.process.noisy(latents, noise, times))
    assert model.seen["states"] is text["prompt_embeds"]
    weighted = family.loss(Recorder(noise + 2), latents, noise, times, text, torch.tensor([1.0, 0.0, 0.5]))
    assert float(weighted) == pytest.approx(4 * 1.5 / 3)


def test_sizes_are_those_that_the_pipeline_gives(tiny_unets: ModuleType) -> None:
    unet = tiny_unets.tiny_unet("sdxl")
    pipeline = StableDiffusionXLPipeline(
        vae=tiny_unets.tiny_vae("sdxl"), unet=unet, scheduler=KINDS["sdxl"].scheduler[0](), text_encoder=None,
        text_encoder_2=None, tokenizer=None, tokenizer_2=None,
    )  # fmt: skip
    theirs = pipeline._get_add_time_ids((64, 48), (0, 0), (64, 48), torch.float32, 32)
    ours = time_ids(torch.zeros(2, 4, 8, 6))
    assert ours.tolist() == theirs.tolist() * 2
    model = Recorder(torch.zeros(2, 4, 8, 6))
    text = text_of(SDXL_LIKE, 2, torch.Generator())
    SDXL_LIKE.predict(model, torch.zeros(2, 4, 8, 6), torch.zeros(2), text)
    assert torch.equal(model.seen["added_cond_kwargs"]["time_ids"], ours)
    assert model.seen["added_cond_kwargs"]["text_embeds"] is text["pooled_prompt_embeds"]


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_rows_are_those_that_the_layers_get(name: str, tiny_unets: ModuleType) -> None:
    unet, family = tiny_unets.tiny_unet(name), KINDS[name].family
    seen: set[int] = set()
    for path, module in unet.named_modules():
        if isinstance(module, nn.Linear) and ".transformer_blocks." in path:
            module.register_forward_pre_hook(lambda _, given: seen.add(given[0].flatten(0, -2).shape[0]))
    latents, text = torch.zeros(2, 4, 16, 10), text_of(family, 2, torch.Generator())
    with torch.no_grad():
        family.predict(unet, latents, torch.zeros(2), text)
    assert seen == family.rows(tuple(latents.shape), text)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_gradients_are_those_of_the_16_bit_model_with_the_same_linear_weights(
    tiny_unets: ModuleType, name: str
) -> None:
    """W4A16 has no rounded activations, so A's and B's gradients agree with those of plain layers of the dequantized weights."""
    family, torch_seed = KINDS[name].family, 3
    quantized = tiny_unets.tiny_unet(name)
    settings = QuantSettings("w4a16", rank=4, smoothing="none", iterations=1)
    plan = plan_architecture(UNET, settings, quantized)
    plain = copy.deepcopy(quantized)
    for path, chosen in plan.items():
        linear = quantized.get_submodule(path)
        if isinstance(linear, nn.Linear):
            quantized.set_submodule(path, SVDQuantLinear.from_linear(linear, None, chosen)[0])
    for path, layer in quantized.named_modules():
        if isinstance(layer, SVDQuantLinear):
            plain.get_submodule(path).weight.data = layer.dequantized_weight()  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(1)
    latents, noise = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    text, times = text_of(family, 2, generator), torch.tensor([0.2, 0.7])
    gradients, losses = [], []
    for model in (quantized, plain):
        model.requires_grad_(False).eval()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch_seed)
            parameters = inject_adapter(model, AdapterConfig(rank=4), LORA_TARGETS)
            for parameter in parameters:
                nn.init.normal_(parameter, std=0.05)
        for module in model.modules():
            if isinstance(module, SVDQuantLinear):
                module.save_x = "raw"
        loss = family.loss(model, latents, noise, times, text)
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len(gradients[0]) == len(gradients[1]) > 1000
    error = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    assert float(error) < 5e-3
