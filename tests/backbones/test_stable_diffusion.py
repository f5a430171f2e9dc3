"""The UNet bases as data: sizes, lists that cover every layer, schedules, and configurations that are another's."""

import math
from collections import Counter

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from loragraft.backbones.load import find_spec, list_bases, shipped_bases
from loragraft.backbones.skeleton import meta_transformer, plan_architecture
from loragraft.backbones.stable_diffusion import KINDS, check_unet
from loragraft.quantization.convert import linear_paths
from loragraft.quantization.ledger import build_ledger
from loragraft.quantization.names import match_paths
from loragraft.quantization.settings import QuantSettings

PARAMETERS = {"sd15": 859_520_964, "sd-turbo": 865_910_724, "sdxl": 2_567_463_684, "sdxl-turbo": 2_567_463_684}
"""Of the published weights."""
LEDGERS = {  # linear layers
    "sd15": {"w4a8": 128, "w4a16": 54, "bf16": 2},
    "sd-turbo": {"w4a8": 160, "w4a16": 54, "bf16": 2},
    "sdxl": {"w4a8": 582, "w4a16": 157, "bf16": 4},
}
SIXTEEN_BIT = {"sd15": 1.7, "sdxl": 5.1}
"""GB of the UNet in 16 bits."""


@pytest.mark.parametrize("name", LEDGERS)
def test_true_shapes_and_every_layer_is_in_the_ledger(name: str) -> None:
    spec = find_spec(name)
    assert spec.external is not None
    whole = meta_transformer(UNet2DConditionModel, spec.external.config)
    assert sum(p.numel() for p in whole.parameters()) == PARAMETERS[name]
    if name in SIXTEEN_BIT:
        assert 2 * PARAMETERS[name] / 1e9 == pytest.approx(SIXTEEN_BIT[name], abs=0.05)
    convolutions = [path for path, module in whole.named_modules() if isinstance(module, nn.Conv2d)]
    (listed,) = match_paths(spec.quantize_conv, convolutions).values()
    assert set(convolutions) - set(listed) == {"conv_in", "conv_out"}
    (targets,) = match_paths(spec.lora_targets, linear_paths(whole)).values()
    assert len(targets) == (160 if "sdxl" not in name else 700)
    linears = set(linear_paths(whole))
    del whole
    quantized = meta_transformer(
        UNet2DConditionModel, spec.external.config, lambda m: plan_architecture(spec, QuantSettings(rank=32), m)
    )
    nn.Module.to(quantized, torch.bfloat16)
    ledger = build_ledger(quantized)
    assert Counter(row.numerics for row in ledger.rows if row.path in linears) == LEDGERS[name]
    few = {row.path.rpartition(".")[2] for row in ledger.rows if row.numerics == "w4a16"}
    assert few == {"to_k", "to_v", "time_emb_proj"}
    assert all(".attn2." in row.path for row in ledger.rows if row.path.endswith("to_k") and row.numerics == "w4a16")


def test_turbo_is_its_sibling_but_for_the_size() -> None:
    ours, theirs = KINDS["sdxl"].unet, KINDS["sdxl-turbo"].unet
    assert {key for key in ours if ours[key] != theirs[key]} == {"sample_size"}


def test_bases_are_known_and_none_travels_with_the_package() -> None:
    assert set(KINDS) <= set(list_bases())
    assert not set(KINDS) & set(shipped_bases())


@pytest.mark.parametrize("name", KINDS)
def test_times_end_where_the_model_was_distilled(name: str) -> None:
    """Turbo begins at the last training time, its siblings at the 1000 / steps-th before their last."""
    made, config = KINDS[name].scheduler
    scheduler = made.from_config(dict(config))
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == ([999, 749, 499, 249] if "turbo" in name else [751, 501, 251, 1])


@pytest.mark.parametrize("name", KINDS)
def test_guidance(name: str) -> None:
    spec = find_spec(name)
    guided = spec.guided(spec.guidance)
    assert spec.family.guided(guided["guidance"], guided["embedded_guidance"]) == {"guidance_scale": spec.guidance}
    assert (spec.guidance > 1) == ("turbo" not in name)
    assert bool(spec.refuses_training) == ("turbo" in name)


@pytest.mark.parametrize(
    ("change", "name", "expected"),
    [
        ({"in_channels": 9}, "sd15", "9 input channels, sd15 has 4: variants that also read a picture"),
        ({"use_linear_projection": True}, "sd15", "did you mean base=sd-turbo"),
        ({"sample_size": 64}, "sdxl", "sample_size 64, sdxl has 128; did you mean base=sdxl-turbo"),
        ({"sample_size": 128}, "sdxl-turbo", "did you mean base=sdxl?"),
        ({"addition_embed_type": None}, "sdxl", "addition_embed_type None, sdxl has text_time"),
    ],
)
def test_another_models_configuration_is_refused(change: dict[str, object], name: str, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        check_unet(name, {**KINDS[name].unet, **change}, "here")
    check_unet(name, KINDS[name].unet, "here")


def test_a_time_is_the_same_share_of_noise_for_training_and_drawing() -> None:
    """What the denoiser sees at time t in training is what the scheduler's sigma says there: sqrt((1 - a) / a)."""
    made, config = KINDS["sdxl-turbo"].scheduler
    scheduler = made.from_config(dict(config))
    scheduler.set_timesteps(4)
    for step, sigma in zip(scheduler.timesteps, scheduler.sigmas[:-1], strict=True):
        kept = float(KINDS["sdxl-turbo"].family.process.kept((step + 0.5) / 1000))
        assert math.sqrt((1 - kept) / kept) == pytest.approx(float(sigma), rel=1e-3)
