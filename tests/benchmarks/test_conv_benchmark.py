"""What of the convolutions' benchmark needs no GPU: its list of SDXL's layers, its errors and its sums."""

from collections import Counter
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from torch import Tensor, nn


@pytest.fixture(scope="module")
def conv(benchmark_module: Callable[..., ModuleType]) -> ModuleType:
    return benchmark_module("conv", beside=("int4_engine", "rivals", "timing"))


def test_the_list_is_sdxls(conv: ModuleType) -> None:
    """Every 3 x 3 convolution of the UNet at 1024 px, on the meta device, but for the first and the last."""
    with init_empty_weights(include_buffers=False):
        unet = UNet2DConditionModel(
            sample_size=128, block_out_channels=(320, 640, 1280), layers_per_block=2, cross_attention_dim=2048,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=1,
            attention_head_dim=(5, 10, 20), use_linear_projection=True, addition_embed_type="text_time",
            addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
        )  # fmt: skip
    seen: Counter[tuple[int, ...]] = Counter()

    def note(module: nn.Conv2d, args: tuple[Tensor, ...], _: Tensor) -> None:
        if module.kernel_size == (3, 3) and 4 not in (module.in_channels, module.out_channels):
            seen[args[0].shape[2], module.in_channels, module.out_channels, module.stride[0]] += 1

    for module in unet.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(note)
    with torch.device("meta"):
        added = {"text_embeds": torch.zeros(1, 1280), "time_ids": torch.zeros(1, 6)}
        unet.to("meta")(torch.zeros(1, 4, 128, 128), torch.zeros(1), torch.zeros(1, 77, 2048), added_cond_kwargs=added)
    assert {(c.size, c.C, c.N, c.stride): c.count for c in conv.SDXL} == dict(seen)


def test_errors_are_small_and_notice_a_wrong_result(conv: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv, "DEVICE", "cpu")
    monkeypatch.setattr(conv, "CHECKED", ((1, 5, 6, 64, 16, 1), (1, 6, 5, 64, 24, 2)))
    torch.manual_seed(0)
    found = conv.errors()
    assert found.keys() == {"y", "dx", "dA", "dB"}
    assert all(0 < error < conv.BOUND for error in found.values())
    layer = conv.w4a8_conv
    monkeypatch.setattr(conv, "w4a8_conv", lambda x, **given: layer(x, **given) * 1.02)
    assert conv.errors()["y"] > conv.BOUND


def test_sums_count_every_shape_as_often_as_the_unet_has_it(conv: ModuleType) -> None:
    row: dict[str, Any] = {"bf16": 20.0, "w4a8": 16.0, "w4a8_no_branch": 10.0}
    rows = {shape.name: dict(row) for shape in conv.SDXL}
    rows[conv.SDXL[0].name]["w4a8"] = 40.0
    summary = conv.summary(rows)
    count = sum(shape.count for shape in conv.SDXL)
    assert summary["convs_ms_bf16"] == pytest.approx(count * 0.02)
    assert summary["convs_ms_w4a8"] == pytest.approx(count * 0.016 + conv.SDXL[0].count * 0.024)
    assert summary["conv_vs_cudnn_worst_shape"] == 0.5
