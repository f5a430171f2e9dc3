"""Every precision trains through the same steps, keeps its base, and takes its adapter as a graft."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from loragraft.adapters.checkpoint import Adapter, load_adapter
from loragraft.adapters.graft import graft, graft_deviation, ungraft
from loragraft.adapters.inject import adapter_factors, inject_adapter, remove_adapter
from loragraft.backbones.architectures import FLUX, NUMERICS, stand_in_settings
from loragraft.backbones.load import load_backbone
from loragraft.backbones.skeleton import meta_transformer, plan_architecture, randomize
from loragraft.backbones.spec import Profile
from loragraft.kernels.layout import relative_rms
from loragraft.quantization.checkpoint import branched_layers, checksum, quantization_config, recorded_base_id
from loragraft.recipes.schema import AdapterConfig, Numerics, OptimConfig
from loragraft.train.dry_run import dry_train
from loragraft.train.optim import build_optimizer

ROOT = Path(__file__).parents[2]
PROFILES: tuple[Profile, ...] = get_args(Numerics)
every_precision = pytest.mark.parametrize("profile", PROFILES)
TARGETS = FLUX.quantize + FLUX.quantize_w4a16


def tiny(two_ranks: ModuleType, profile: Profile, *, meta: bool = False) -> nn.Module:
    plan = None
    if profile in NUMERICS:
        plan = partial(plan_architecture, FLUX, stand_in_settings(profile))
    model = meta_transformer(FluxTransformer2DModel, two_ranks.CONFIG, plan)
    return model if meta else randomize(model, "cpu", torch.float32)


@every_precision
def test_three_steps_learn_and_the_graft_is_what_was_trained(
    profile: Profile, two_ranks: ModuleType, loss_of: Callable[[nn.Module], torch.Tensor]
) -> None:
    model = tiny(two_ranks, profile)
    layers = branched_layers(model)
    assert (quantization_config(model)["profile"] == profile) if layers else profile == "16bit"
    before = checksum(model)
    with torch.no_grad():
        bare = loss_of(model)
    parameters = inject_adapter(model, AdapterConfig(rank=4, alpha=8), TARGETS)
    optimizer, schedule = build_optimizer(parameters, OptimConfig(learning_rate=3e-3, warmup_steps=0), 3)
    losses = []
    for _ in range(3):
        loss = loss_of(model)
        loss.backward()  # type: ignore[no-untyped-call]
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in parameters)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    with torch.no_grad():
        trained = loss_of(model)
    assert losses[0] == bare.item()  # B is zero
    assert trained < 0.98 * losses[0]
    pairs = {path: (a.clone(), b.clone()) for path, (a, b) in adapter_factors(model).items()}
    remove_adapter(model)
    assert checksum(model) == before

    adapter = Adapter("three", {"base": "tiny", "base_id": recorded_base_id(model)}, pairs)
    graft(model, adapter)
    with torch.no_grad():
        grafted = loss_of(model)
    # The graft rounds A and B to bfloat16.
    assert abs(grafted - trained) < 0.1 * abs(trained - bare)
    ungraft(model, "three")
    assert checksum(model) == before
    if layers:
        path = "single_transformer_blocks.0.proj_out"
        x = torch.randn(6, layers[path].in_features, generator=torch.Generator().manual_seed(1))
        (found,) = graft_deviation(model, adapter, {path: x})
        assert found.merged_vs_apart < 1e-6 < found.effect
        assert relative_rms(layers[path](x), layers[path](x, *[torch.zeros_like(f) for f in pairs[path]])) < 1e-6


@pytest.mark.parametrize("profile", ["fp8", "nf4-double", "int3"])
def test_a_dry_run_counts_its_bytes(
    profile: Profile, two_ranks: ModuleType, loss_of: Callable[[nn.Module], torch.Tensor]
) -> None:
    model = tiny(two_ranks, profile, meta=True)
    layers = branched_layers(model).values()
    inject_adapter(model, AdapterConfig(rank=4), TARGETS)
    run = dry_train(model, lambda: loss_of(model), torch.optim.AdamW)
    held = [buffer.nbytes for layer in layers for buffer in layer.buffers()]
    assert sum(held) <= run.at_peak["INT4 weights"] <= sum(held) + 512 * len(held)  # the allocator rounds up
    assert run.peak > run.static


@pytest.mark.slow
def test_nf4_through_the_commands(tmp_path: Path) -> None:
    environment = {**os.environ, "LORAGRAFT_CACHE": str(tmp_path / "cache"), "ACCELERATE_USE_CPU": "true"}
    words = [
        str(ROOT / "train" / "lora.py"), "--recipe", "marketing", "--cpu", "--out", "run", "numerics=nf4", "data.count=20",
        "data.limit=10", "train.steps=2", "train.batch_size=2", "train.threads=1", "adapter.rank=2", "optim.warmup_steps=0",
        "sample.steps=1", "sample.guidance=1", "sample.prompts=[white heart icon]", "tracking.mode=disabled",
    ]  # fmt: skip
    draw = [
        "-m",
        "loragraft.cli",
        "generate",
        "--adapter",
        "run",
        "--prompt",
        "white heart icon",
        "--steps",
        "1",
        "--out",
        "i",
    ]
    for command in (words, draw):
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1200,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
    adapter = load_adapter(tmp_path / "run" / "adapter")
    assert adapter.metadata["profile"] == "nf4"
    assert adapter.base_id == load_backbone("pocket", "nf4", "cpu", tmp_path / "cache").base_id
    assert len([json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]) == 2
    assert (tmp_path / "i" / "0000.png").is_file()
