"""Dry runs against bytes counted by hand and against what autograd really keeps of a small quantized FLUX."""

import contextlib
import math
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from loragraft.adapters.inject import inject_adapter
from loragraft.adapters.joined import JoinedFactors
from loragraft.backbones.architectures import FLUX
from loragraft.backbones.flow import flow_loss, predict_velocity
from loragraft.backbones.skeleton import meta_transformer, plan_architecture, randomize
from loragraft.quantization.settings import QuantSettings
from loragraft.recipes.schema import AdapterConfig
from loragraft.train import dry_run
from loragraft.train.dry_run import LIBRARY_WORKSPACE, dry_infer, dry_train
from loragraft.train.memory import set_checkpointing

TINY: dict[str, Any] = {
    "patch_size": 1, "in_channels": 64, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 64,
    "num_attention_heads": 2, "joint_attention_dim": 96, "pooled_projection_dim": 32, "guidance_embeds": False,
    "axes_dims_rope": (16, 24, 24),
}  # fmt: skip
ADAMW = partial(torch.optim.AdamW, fused=True)


def _flux(main: QuantSettings | None = None, adapter: bool = True) -> nn.Module:
    main = QuantSettings(rank=8) if main is None else main
    model = meta_transformer(FluxTransformer2DModel, TINY, partial(plan_architecture, FLUX, main))
    nn.Module.to(model, dtype=torch.float32)
    if adapter:
        inject_adapter(model, AdapterConfig(rank=4, alpha=4), FLUX.quantize)
    return model


def _loss(model: nn.Module, batch: int = 2) -> Tensor:
    latents = torch.zeros(batch, 16, 16, 16)
    text = {"prompt_embeds": torch.zeros(batch, 24, 96), "pooled_prompt_embeds": torch.zeros(batch, 32)}
    return flow_loss(model, latents, torch.ones_like(latents), torch.full((batch,), 0.5), text)


def test_a_linear_layer_by_hand() -> None:
    """x [1024, 256] -> y [1024, 512], mean squared; everything float32."""
    model = nn.Linear(256, 512, bias=False, device="meta")

    def loss() -> Tensor:
        return model(torch.empty(1024, 256)).square().sum()

    run = dry_train(model, loss, ADAMW, max_grad_norm=0)
    weight, x, y = 256 * 512 * 4, 1024 * 256 * 4, 1024 * 512 * 4
    assert run.at_peak["adapter"] == weight
    assert run.at_peak["optimizer"] == 2 * weight + 512  # two moments and the step count
    assert run.static == 3 * weight + 512
    assert run.saved == x + y + 512  # x and y for the backward pass, the scalar; y^2 is gone
    # grad * (2 * y.pow(1)): torch's formula for the square's backward pass holds three temporaries of y's size
    assert run.peak - run.static - run.library - run.saved == pytest.approx(3 * y, abs=4 * 512)
    assert run.library == 2 * LIBRARY_WORKSPACE
    ours = sum(part.flops * n for counts in run.ops.values() for cost, n in counts.items() for part in cost.parts)
    assert ours == 2 * (2 * 1024 * 256 * 512)  # forward and the weight's gradient; x needs none


def test_saved_activations_are_what_autograd_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run, "gpu_paths", contextlib.nullcontext)  # the real run is on a CPU
    imagined = _flux()
    run = dry_train(imagined, partial(_loss, imagined), ADAMW)
    real = randomize(_flux(adapter=False), "cpu", torch.float32)
    inject_adapter(real, AdapterConfig(rank=4, alpha=4), FLUX.quantize)
    own = {t.untyped_storage().data_ptr() for t in (*real.parameters(), *real.buffers())}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor.detach())  # keeps the address taken
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = _loss(real)
    del loss
    assert run.saved == pytest.approx(sum(kept.values()), rel=0.02)


def test_checkpointing_keeps_less_and_computes_more() -> None:
    runs = {}
    for policy, blocks in (("none", 0), ("selective", 2), ("block", 0)):
        model = _flux()
        set_checkpointing(model, policy, blocks)  # type: ignore[arg-type]
        runs[policy] = dry_train(model, partial(_loss, model), ADAMW)
    assert runs["block"].saved < runs["selective"].saved < runs["none"].saved
    assert runs["block"].static == runs["none"].static
    linears = {
        policy: sum(n for cost, n in run.ops["backward"].items() if cost.name == "loragraft::w4a8_linear")
        for policy, run in runs.items()
    }
    assert linears["none"] == 0 < linears["selective"] < linears["block"]


def test_views_of_one_storage_are_counted_once() -> None:
    """A captured step joins branch and adapter; the base's branch becomes a view."""
    plain, joined = _flux(), _flux()
    JoinedFactors(joined, torch.bfloat16)
    nbytes = {id(model): sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (plain, joined)}
    runs = [dry_train(model, partial(_loss, model), ADAMW) for model in (plain, joined)]
    grown = runs[1].static - runs[0].static
    assert 2 * nbytes[id(joined)] * 0.5 < grown < 2 * nbytes[id(joined)] * 1.5


def test_captured_gradients_stay() -> None:
    plain, captured = _flux(), _flux()
    eager = dry_train(plain, partial(_loss, plain), ADAMW)
    graph = dry_train(captured, partial(_loss, captured), ADAMW, captured=True)
    gradients = sum(p.numel() * 4 for p in captured.parameters() if p.requires_grad)
    assert 0 < graph.peak - eager.peak < 1.5 * gradients


def test_accumulation_holds_one_micro_batch_at_a_time() -> None:
    model, again = _flux(), _flux()
    once = dry_train(model, partial(_loss, model), ADAMW)
    twice = dry_train(again, partial(_loss, again), ADAMW, accumulation=2)
    assert twice.saved == once.saved
    gradients = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    assert twice.peak - once.peak < 2 * gradients
    forward = [sum(run.ops["forward"].values()) for run in (once, twice)]
    assert forward[1] == 2 * forward[0]


@pytest.mark.parametrize("numerics", ["w4a8", "w4a4"])
def test_int8_gradients_and_raw_inputs_are_seen(numerics: str) -> None:
    def peak(**settings: str) -> tuple[int, set[str]]:
        model = _flux(QuantSettings(numerics, rank=8))  # type: ignore[arg-type]
        for module in model.modules():
            for name, value in settings.items():
                if hasattr(module, name):
                    setattr(module, name, value)
        run = dry_train(model, partial(_loss, model), ADAMW)
        assert run.unknown == ()
        return run.saved, {part.unit for c in run.ops["backward"] for part in c.parts if "dgrad" in c.name}

    saved, units = peak()
    assert "int8" not in units
    # raw inputs are shared with what other ops keep; here in float32, four times the codes
    assert peak(save_x="raw")[0] != saved
    if numerics == "w4a8":
        assert "int8" in peak(dgrad="int8")[1]


def test_flops_are_torchs_own_where_torch_counts() -> None:
    config = {**TINY, "num_layers": 1}
    model = meta_transformer(FluxTransformer2DModel, config)
    text = {"prompt_embeds": (1, 24, 96), "pooled_prompt_embeds": (1, 32)}

    def call(device: str = "cpu") -> Tensor:
        made = {key: torch.zeros(shape, device=device) for key, shape in text.items()}
        return predict_velocity(model, torch.zeros(1, 16, 16, 16, device=device), torch.zeros(1, device=device), made)

    run = dry_infer(model, call)
    real = randomize(meta_transformer(FluxTransformer2DModel, config), "cpu", torch.float32)
    model = real
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    units = {"attention": 0, "gemm32": 0, "memory": 0}
    for cost, count in run.ops["forward"].items():
        for part in cost.parts:
            units[part.unit] += count * part.flops
    assert units["gemm32"] == counter.get_total_flops() - counter.get_flop_counts()["Global"].get(
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, 0
    )
    rows, blocks = 64 + 24, 3
    assert units["attention"] == blocks * 4 * 2 * rows * rows * 64


def test_inference_keeps_nothing() -> None:
    model = _flux(adapter=False)
    run = dry_infer(model, partial(_loss, model))
    trained = _flux()
    assert run.peak < dry_train(trained, partial(_loss, trained), ADAMW).peak
    assert run.at_peak["optimizer"] == run.at_peak["adapter"] == run.at_peak["gradients"] == 0
    assert math.isclose(run.static, run.at_peak["INT4 weights"] + run.at_peak["16-bit weights"])


def test_nothing_to_train_is_an_error() -> None:
    model = _flux(adapter=False)
    with pytest.raises(ValueError, match="inject an adapter"):
        dry_train(model, partial(_loss, model), ADAMW)
