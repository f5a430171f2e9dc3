"""A FLUX transformer told to compute attention otherwise: the same results, in the ledger, and compiled in one piece."""

from functools import partial
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import nn

from loragraft.backbones.architectures import FLUX
from loragraft.backbones.attention import set_attention
from loragraft.backbones.flow import predict_velocity
from loragraft.backbones.skeleton import meta_transformer, plan_architecture, randomize
from loragraft.backbones.spec import Backbone
from loragraft.quantization.ledger import build_ledger
from loragraft.quantization.settings import QuantSettings

CONFIG: dict[str, Any] = {
    "patch_size": 1, "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 64,
    "num_attention_heads": 2, "joint_attention_dim": 64, "pooled_projection_dim": 32, "guidance_embeds": False,
    "axes_dims_rope": (16, 24, 24),
}  # fmt: skip


@pytest.fixture
def model() -> nn.Module:
    plan = partial(plan_architecture, FLUX, QuantSettings(rank=8, smoothing="hadamard"))
    return randomize(meta_transformer(FluxTransformer2DModel, CONFIG, plan), "cpu", torch.float32)


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ops run their formulas on a CPU; that a run may not is tested without this."""
    monkeypatch.setattr("loragraft.backbones.attention.check_backend", lambda name, device: None)


def velocity(model: nn.Module) -> torch.Tensor:
    random = torch.Generator().manual_seed(2)
    text = {
        "prompt_embeds": torch.randn(1, 5, 64, generator=random),
        "pooled_prompt_embeds": torch.randn(1, 32, generator=random),
    }
    latents = torch.randn(1, 4, 8, 8, generator=random)
    return predict_velocity(model, latents, torch.tensor([0.5]), text)


@pytest.mark.usefixtures("anywhere")
def test_the_result_is_the_same_and_the_way_back_leads_to_the_same_bits(model: nn.Module) -> None:
    plain = velocity(model)
    called = []
    handle = torch.ops.loragraft.attention.default
    for name in ("cudnn_forward", "flash_attn_4"):
        assert set_attention(model, name) == 2  # type: ignore[arg-type]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            other = velocity(model)
        called += [event.key for event in profile.key_averages() if event.key == "loragraft::attention"]
        assert (other - plain).norm() < 0.02 * plain.norm()  # INT8 rounding follows the last bits
    assert called == [handle.name()] * 2
    set_attention(model, "sdpa")
    assert torch.equal(velocity(model), plain)


@pytest.mark.usefixtures("anywhere")
def test_a_block_compiles_in_one_piece(model: nn.Module) -> None:
    set_attention(model, "cudnn_forward")
    eager = velocity(model)
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")  # type: ignore[operator]
    assert torch.equal(velocity(model), eager)


@pytest.mark.usefixtures("anywhere")
def test_diffusers_own_names_are_untouched(model: nn.Module) -> None:
    before = {member: _AttentionBackendRegistry._backends[member] for member in AttentionBackendName
              if member in _AttentionBackendRegistry._backends}  # fmt: skip
    active = _AttentionBackendRegistry._active_backend
    set_attention(model, "cudnn_forward")
    assert all(_AttentionBackendRegistry._backends[member] is function for member, function in before.items())
    assert _AttentionBackendRegistry._active_backend is active
    ours = model.transformer_blocks[0].attn.processor._attention_backend  # type: ignore[union-attr, index]
    with pytest.raises(ValueError, match="plain attention over whole sequences"):
        _AttentionBackendRegistry._backends[ours](*torch.zeros(3, 1, 4, 1, 8), is_causal=True)


def test_the_ledger_says_so(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = Backbone(
        spec=None, profile="native", transformer=model, encoders=None, base_id="", ledger=build_ledger(model), resolution=16,  # type: ignore[arg-type]
        device=torch.device("cpu"), dtype=torch.float32,
    )  # fmt: skip
    assert backbone.ledger.to_dict()["attention"] == "sdpa"
    with pytest.raises(ValueError, match=r"train\.attention=cudnn_forward needs a CUDA GPU, this run is on cpu"):
        backbone.set_attention("cudnn_forward")
    assert backbone.ledger.attention == "sdpa"
    monkeypatch.setattr("loragraft.backbones.attention.check_backend", lambda name, device: None)
    backbone.set_attention("flash_attn_4")
    assert backbone.ledger.to_dict()["attention"] == "flash_attn_4"
    assert backbone.ledger.summary().endswith("; reference; attention flash_attn_4")


def test_a_model_without_such_attention_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Linear has no attention that takes another backend"):
        set_attention(nn.Linear(2, 2), "cudnn_forward")
    assert set_attention(nn.Linear(2, 2), "sdpa") == 0
