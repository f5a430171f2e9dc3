"""A UNet without weights: convolutions empty on the meta device, then random, and trained for a step."""

from functools import partial

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from loragraft.adapters.inject import SVDQuantLoraConv2d, inject_adapter
from loragraft.backbones.skeleton import meta_transformer, randomize
from loragraft.quantization.conv import SVDQuantConv2d
from loragraft.quantization.convert import plan_layers
from loragraft.quantization.settings import QuantSettings, Smoothing
from loragraft.recipes.schema import AdapterConfig

RULES = (
    r"(down|mid|up)_blocks?\..*\.(conv\d?|conv_shortcut|proj_in|proj_out)",
    r".*\.(to_[qkv]|to_out\.0|ff\.net\..*)",
)
KEEP = ("conv_in", "conv_out", r"time_embedding\..*", r".*time_emb_proj")
CONFIG = {
    "sample_size": 8, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "layers_per_block": 1,
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "block_out_channels": (32, 64), "cross_attention_dim": 32,
    "attention_head_dim": 2, "norm_num_groups": 8,
}  # fmt: skip


def _plan(model: nn.Module, smoothing: Smoothing) -> dict[str, QuantSettings]:
    return plan_layers(model, dict.fromkeys(RULES, QuantSettings(rank=4, smoothing=smoothing)), KEEP)


def _forward(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    sample, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 5, 32, generator=generator)
    result: Tensor = model(sample, torch.tensor([3.0]), text).sample
    return result


@pytest.mark.parametrize("smoothing", ["auto", "hadamard"])
def test_activations_stay_of_order_one_and_an_adapter_trains(smoothing: Smoothing) -> None:
    model = meta_transformer(UNet2DConditionModel, CONFIG, partial(_plan, smoothing=smoothing))
    convs = [module for module in model.modules() if isinstance(module, SVDQuantConv2d)]
    assert len(convs) == 31
    assert all(buffer.is_meta for conv in convs for buffer in conv.buffers())
    assert {conv.hadamard for conv in convs} == ({False, True} if smoothing == "hadamard" else {False})
    randomize(model, "cpu", torch.float32)
    for conv in convs:
        smooth = conv.smooth.view(conv.taps, -1)
        assert torch.equal(smooth, smooth[:1].expand_as(smooth))
    assert 0.01 < _forward(model).std() < 100
    parameters = inject_adapter(model, AdapterConfig(rank=2, alpha=2.0), [r".*resnets\.\d\.conv\d", r".*\.to_q"])
    assert any(isinstance(module, SVDQuantLoraConv2d) for module in model.modules())
    _forward(model).square().mean().backward()  # type: ignore[no-untyped-call]
    ups = parameters[1::2]
    assert all(up.grad is not None and up.grad.abs().max() > 0 for up in ups)


def test_a_convolution_with_an_adapter_compiles_whole() -> None:
    model = nn.ModuleDict({"conv": nn.Conv2d(64, 32, 3, 2, 1), "head": nn.Linear(2, 2)}).requires_grad_(False)
    conv, _ = SVDQuantConv2d.from_conv(model["conv"], None, QuantSettings(rank=4, smoothing="weight", grid=1))
    model["conv"] = conv
    parameters = inject_adapter(model, AdapterConfig(rank=2, alpha=4.0), ["conv"])
    parameters[1].data.normal_()
    x = torch.randn(1, 64, 5, 6)
    compiled = torch.compile(model["conv"], fullgraph=True, backend="aot_eager")
    eager, actual = (torch.autograd.grad(layer(x).square().sum(), parameters) for layer in (model["conv"], compiled))
    assert all(torch.equal(a, b) for a, b in zip(eager, actual, strict=True))
