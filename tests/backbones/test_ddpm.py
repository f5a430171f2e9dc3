"""The discrete process, against diffusers' own tables."""

import pytest
import torch
from diffusers import DDPMScheduler

from loragraft.backbones.ddpm import Ddpm

TIMES = torch.tensor([0.0, 0.0015, 0.5, 0.9991, 1.0])


@pytest.mark.parametrize(
    ("process", "betas"),
    [(Ddpm(), (0.00085, 0.012)), (Ddpm(betas=(0.0001, 0.02), schedule="linear"), (0.0001, 0.02))],
)
def test_noise_and_targets_are_the_schedulers(process: Ddpm, betas: tuple[float, float]) -> None:
    scheduler = DDPMScheduler(beta_start=betas[0], beta_end=betas[1], beta_schedule=process.schedule)
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(5, 4, 8, 8, generator=generator) for _ in range(2))
    steps = process.steps(TIMES)
    assert steps.tolist() == [0, 1, 500, 999, 999]
    torch.testing.assert_close(process.noisy(latents, noise, TIMES), scheduler.add_noise(latents, noise, steps))
    assert process.target(latents, noise, TIMES) is noise
    velocity = Ddpm("v_prediction", process.betas, process.schedule).target(latents, noise, TIMES)
    torch.testing.assert_close(velocity, scheduler.get_velocity(latents, noise, steps))


def test_noisy_latents_keep_their_dtype() -> None:
    latents = torch.randn(5, 4, 8, 8, dtype=torch.bfloat16)
    assert Ddpm().noisy(latents, latents, TIMES).dtype == torch.bfloat16


def test_training_times_are_uniform() -> None:
    times = Ddpm().sample_times(20_000, torch.Generator().manual_seed(0))
    assert 0 <= float(times.min()) < float(times.max()) <= 1
    assert abs(float(times.mean()) - 0.5) < 0.01
    assert abs(float(times.std()) - 12**-0.5) < 0.005
