"""FLUX.1's two specs: their shapes, what they are told of guidance, and whose checkpoint is whose."""

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch import Tensor

from loragraft.backbones.flow import even_time, flow_loss
from loragraft.backbones.flux1 import flux1_config, flux1_scheduler
from loragraft.backbones.load import find_spec, list_bases, shipped_bases
from loragraft.backbones.skeleton import meta_transformer, plan_architecture
from loragraft.backbones.spec import BaseSpec
from loragraft.quantization.ledger import build_ledger
from loragraft.quantization.settings import QuantSettings

DEV, SCHNELL, POCKET = find_spec("flux1-dev"), find_spec("flux1_schnell"), find_spec("pocket")


def test_the_bases_are_listed_by_the_names_that_recipes_give() -> None:
    assert {"pocket", "flux1-dev", "flux1-schnell"} <= set(list_bases())
    assert shipped_bases() == ["pocket"]
    with pytest.raises(ValueError, match="Did you mean 'flux1-dev'"):
        find_spec("flux-dev")


@pytest.mark.parametrize(("spec", "parameters"), [(DEV, 11_901_408_320), (SCHNELL, 11_891_178_560)])
def test_the_true_shapes(spec: BaseSpec, parameters: int) -> None:
    """Published sizes: 11.90 B with the guidance embedding, 11.89 B without; 6.4 GiB in INT4."""
    assert spec.external is not None
    whole = meta_transformer(FluxTransformer2DModel, spec.external.config)
    assert sum(p.numel() for p in whole.parameters()) == parameters
    model = meta_transformer(
        FluxTransformer2DModel, spec.external.config, lambda m: plan_architecture(spec, QuantSettings(rank=32), m)
    )
    counts = build_ledger(model).to_dict()["layers"]
    assert (counts["w4a8"], counts["w4a16"]) == (418, 76)
    weights = sum(t.nbytes for t in (*model.buffers(), *model.parameters()) if t.is_meta)
    embedders = sum(p.numel() for p in model.parameters())
    assert weights - 2 * embedders < 6.5 * 2**30  # meta parameters are float32 here, bfloat16 on a GPU


class Recorder(torch.nn.Module):
    """Keeps what it was told of guidance; its velocity is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor | None] = []

    def forward(self, *, guidance: Tensor | None, hidden_states: Tensor, **_: object) -> tuple[Tensor]:
        self.seen.append(guidance)
        return (torch.zeros_like(hidden_states),)


def test_a_training_step_sees_guidance_1_where_the_base_has_the_input_and_nothing_elsewhere() -> None:
    model, latents = Recorder(), torch.ones(3, 16, 4, 4)
    text = {"prompt_embeds": torch.zeros(3, 2, 8), "pooled_prompt_embeds": torch.zeros(3, 4)}
    losses = [
        flow_loss(model, latents, torch.zeros_like(latents), torch.rand(3), text, guidance=spec.training_guidance)
        for spec in (DEV, POCKET)
    ]
    assert torch.equal(model.seen[0], torch.ones(3))
    assert model.seen[1] is None
    assert losses[0] == losses[1] == 1


def test_guidance_in_each_bases_own_kind() -> None:
    assert POCKET.guided(3.0) == {"guidance": 3.0, "embedded_guidance": 1.0}
    assert DEV.guided(3.5) == {"guidance": 1.0, "embedded_guidance": 3.5}
    assert DEV.guided(3.5, 2.0, "blurry") == {"guidance": 2.0, "embedded_guidance": 3.5}
    assert SCHNELL.guided(3.0) == {"guidance": 1.0, "embedded_guidance": 1.0}
    with pytest.raises(ValueError, match="would not read the negative prompt 'blurry'"):
        DEV.guided(3.5, 1.0, "blurry")
    with pytest.raises(ValueError, match="pocket's guidance is classifier-free itself"):
        POCKET.guided(3.0, 2.0)


def test_schnell_refuses_to_be_trained_and_names_the_way() -> None:
    assert DEV.refuses_training == POCKET.refuses_training == ""
    assert "base=flux1-dev" in SCHNELL.refuses_training and "--any-base" in SCHNELL.refuses_training
    ours, theirs = flux1_config("dev"), flux1_config("schnell")
    assert {key for key in ours if ours[key] != theirs[key]} == {"guidance_embeds"}


@pytest.mark.parametrize("kind", ["dev", "schnell"])
@pytest.mark.parametrize("tokens", [256, 1024, 4096])
@pytest.mark.parametrize("strength", [0.25, 0.6, 1.0])
def test_a_picture_is_entered_at_its_strength_whatever_the_shift(kind: str, tokens: int, strength: float) -> None:
    """The scheduler's own arithmetic, fed the even time that we compute, starts at t = strength."""
    scheduler = FlowMatchEulerDiscreteScheduler(**flux1_scheduler(kind))  # type: ignore[arg-type]
    even = even_time(scheduler.config, strength, tokens)
    mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
    scheduler.set_timesteps(sigmas=np.linspace(even, even / 4, 4), mu=mu)
    assert float(scheduler.timesteps[0]) == pytest.approx(1000 * strength, rel=1e-5)
    shift = math.exp(mu) if kind == "dev" else 1.0
    assert strength == pytest.approx(shift * even / (1 + (shift - 1) * even))


@pytest.mark.parametrize(
    ("change", "spec", "expected"),
    [
        ({"guidance_embeds": False}, DEV, "did you mean base=flux1-schnell"),
        ({"guidance_embeds": True}, SCHNELL, "did you mean base=flux1-dev"),
        ({"in_channels": 384}, DEV, "384 input channels"),
    ],
)
def test_another_models_configuration_is_refused(change: dict[str, object], spec: BaseSpec, expected: str) -> None:
    assert spec.external is not None
    spec.external.check(spec.external.config, "here")
    with pytest.raises(ValueError, match=expected):
        spec.external.check({**spec.external.config, **change}, "here")


def test_positions_are_exact_in_bfloat16_up_to_4096_pixels() -> None:
    """Rows and columns of tokens of 16 pixels: whole numbers up to 256 are bfloat16 numbers."""
    ids = torch.arange(257)
    assert torch.equal(ids.to(torch.bfloat16).long(), ids)
