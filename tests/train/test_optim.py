"""Both optimizers descend, resume to the same bits, and keep as much as they say."""

import dataclasses
import importlib.util
import io
from typing import Any

import pytest
import torch
from torch import nn

from loragraft.recipes.load import load_recipe
from loragraft.recipes.schema import OptimConfig
from loragraft.train.optim import build_optimizer, state_bytes

WITH_8BIT = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes, an optional extra, is not installed"
)
NAMES = ["adamw", pytest.param("adamw8bit", marks=WITH_8BIT)]
DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])]


def factors(device: str = "cpu") -> list[nn.Parameter]:
    """One that is large enough for 8-bit moments, one that is not."""
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in ((16, 512), (4, 96))]


def descend(parameters: list[nn.Parameter], optimizer: Any, schedule: Any, steps: range) -> float:
    """Towards 1 with a noise that depends on the step alone. Returns the last loss."""
    loss = torch.zeros(())
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        noise = [torch.randn(p.shape, generator=generator).to(p.device) / 10 for p in parameters]
        loss = sum(((p - 1 + n) ** 2).mean() for p, n in zip(parameters, noise, strict=True))  # type: ignore[assignment]
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return float(loss.detach())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_is_the_same_bits(name: Any, device: str) -> None:
    config = OptimConfig(name=name, learning_rate=0.05, warmup_steps=2)
    whole = factors(device)
    first = descend(whole, *build_optimizer(whole, config, 12), range(1))
    whole = factors(device)
    optimizer, schedule = build_optimizer(whole, config, 12)
    assert descend(whole, optimizer, schedule, range(6)) < first
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}, file)
    resumed = [nn.Parameter(p.detach().clone()) for p in whole]
    descend(whole, optimizer, schedule, range(6, 12))

    file.seek(0)
    state = torch.load(file, map_location="cpu", weights_only=True)  # as a run's folder reads it
    optimizer, schedule = build_optimizer(resumed, config, 12)
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    descend(resumed, optimizer, schedule, range(6, 12))
    for one, two in zip(whole, resumed, strict=True):
        assert torch.equal(one, two)


@WITH_8BIT
def test_8_bit_moments_take_a_quarter() -> None:
    sizes = {}
    for name in ("adamw", "adamw8bit"):
        parameters = factors()[:1]
        optimizer, schedule = build_optimizer(parameters, OptimConfig(name=name), 4)  # type: ignore[arg-type]
        descend(parameters, optimizer, schedule, range(1))
        sizes[name] = state_bytes(optimizer)
    table = 2 * 256 * 4  # the two code books, shared by all factors
    assert sizes["adamw"] == pytest.approx(16 * 512 * 8, abs=8)
    assert sizes["adamw8bit"] == pytest.approx(16 * 512 * 2 * (1 + 4 / 256) + table, abs=8)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loragraft.train.optim.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"adamw8bit needs bitsandbytes: pip install \"loragraft\[adamw8bit\]\""):
        build_optimizer(factors(), OptimConfig(name="adamw8bit"), 1)


def test_adamw_on_a_cpu_is_torchs_own_default() -> None:
    """Bits of runs made before the fused kernel was asked for."""
    ours, theirs = factors(), factors()
    optimizer, _ = build_optimizer(ours, OptimConfig(warmup_steps=0), 3)
    reference = torch.optim.AdamW(theirs, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0)
    for parameters, which in ((ours, optimizer), (theirs, reference)):
        for _ in range(3):
            sum((p**3).sum() for p in parameters).backward()  # type: ignore[union-attr]
            which.step()
            which.zero_grad()
    for one, two in zip(ours, theirs, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(("schedule", "last"), [("constant", 1.0), ("cosine", 0.0), ("linear", 0.0)])
def test_schedule_warms_up_and_ends(schedule: str, last: float) -> None:
    config = dataclasses.replace(load_recipe("marketing").optim, schedule=schedule, warmup_steps=10, learning_rate=0.1)
    optimizer, rate = build_optimizer([nn.Parameter(torch.zeros(1))], config, steps=100)
    rates = []
    for _ in range(100):
        rates.append(rate.get_last_lr()[0])
        optimizer.step()
        rate.step()
    assert rates[0] == 0
    assert rates[10] == pytest.approx(0.1)
    assert rates[-1] == pytest.approx(0.1 * last, abs=0.003)
