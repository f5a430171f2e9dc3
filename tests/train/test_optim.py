"""Both optimizers descend, resume to the same bits, and keep as much as they say."""

import dataclasses
import io
from typing import Any

import pytest
import torch
from torch import nn

from loragraft.recipes.load import load_recipe
from loragraft.recipes.schema import OptimConfig
from loragraft.train.optim import build_optimizer, state_bytes

NAMES = ["adamw", "adamw8bit"]
DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])]


def factors(device: str = "cpu") -> list[nn.Parameter]:
    """One of whole blocks of 256, one that is not."""
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


def test_8_bit_moments_take_a_quarter() -> None:
    sizes = {}
    for name in ("adamw", "adamw8bit"):
        parameters = factors()
        optimizer, schedule = build_optimizer(parameters, OptimConfig(name=name), 4)
        descend(parameters, optimizer, schedule, range(1))
        sizes[name] = state_bytes(optimizer)
    assert sizes["adamw"] == pytest.approx((16 * 512 + 4 * 96) * 8, abs=8)
    assert sizes["adamw8bit"] == (32 + 2) * (2 * 256 + 2 * 4)


def test_8_bit_moments_learn_what_float32_ones_do() -> None:
    """Linear regression on columns whose sizes differ by a factor of 50, stopped before either has converged."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(512, 64, generator=generator) * torch.logspace(-1, 0.7, 64)
    target = x @ torch.randn(64, 32, generator=generator)
    losses = {}
    for name in ("adamw", "adamw8bit"):
        weight = nn.Parameter(torch.zeros(64, 32))
        config = OptimConfig(name=name, learning_rate=0.05, warmup_steps=5)
        optimizer, schedule = build_optimizer([weight], config, 80)
        for step in range(80):
            rows = torch.randint(512, (32,), generator=torch.Generator().manual_seed(step))
            (x[rows] @ weight - target[rows]).square().mean().backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        losses[name] = float((x @ weight.detach() - target).square().mean())
    assert losses["adamw"] < 0.2 * float(target.square().mean())
    assert losses["adamw8bit"] == pytest.approx(losses["adamw"], rel=0.02)


def test_a_factor_without_gradient_keeps_its_place() -> None:
    parameters = factors()
    optimizer, _ = build_optimizer(parameters, OptimConfig(name="adamw8bit", warmup_steps=0), 4)
    before = parameters[0].detach().clone()
    parameters[1].grad = torch.ones_like(parameters[1])
    optimizer.step()
    assert torch.equal(parameters[0], before)
    codes = optimizer.state["moments"]["codes"]  # type: ignore[index]
    assert codes[0, : 32 * 256].count_nonzero() == 0
    assert codes[0, 32 * 256 :].count_nonzero() == 4 * 96


def test_anothers_state_and_a_second_group_are_refused() -> None:
    other, _ = build_optimizer(factors(), OptimConfig(), 4)
    ours, _ = build_optimizer(factors(), OptimConfig(name="adamw8bit"), 4)
    ours.load_state_dict(ours.state_dict())  # before the first step there is none
    for parameter in other.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    other.step()
    with pytest.raises(ValueError, match="not adamw8bit's for these factors"):
        ours.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="one group"):
        ours.add_param_group({"params": factors()})


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
