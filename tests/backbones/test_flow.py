"""The training target and FLUX's packing, against closed forms."""

import torch
from diffusers import FluxPipeline
from torch import Tensor, nn

from loragraft.backbones.flow import flow_loss, predict_velocity, sample_timesteps

TEXT = {"prompt_embeds": torch.zeros(3, 5, 7), "pooled_prompt_embeds": torch.zeros(3, 7)}


class Recorder(nn.Module):
    """Stands in for a transformer: returns `answer(hidden_states)` and keeps what it was called with."""

    def __init__(self, answer: Tensor | None = None) -> None:
        super().__init__()
        self.answer = answer
        self.seen: dict[str, Tensor] = {}

    def forward(self, hidden_states: Tensor, return_dict: bool, **others: Tensor) -> tuple[Tensor]:
        self.seen = {"hidden_states": hidden_states, **others}
        return (hidden_states if self.answer is None else self.answer,)


def test_unpacking_inverts_flux_packing() -> None:
    latents = torch.randn(3, 16, 8, 8)
    model = Recorder()
    assert torch.equal(predict_velocity(model, latents, torch.rand(3), TEXT), latents)
    assert model.seen["hidden_states"].shape == (3, 16, 64)
    assert model.seen["img_ids"].shape == (16, 3)
    assert model.seen["txt_ids"].shape == (5, 3)


def test_loss_is_zero_for_the_true_velocity_and_the_model_sees_the_interpolation() -> None:
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(3, 16, 8, 8, generator=generator) for _ in range(2))
    times = torch.tensor([0.0, 0.25, 1.0])
    truth = FluxPipeline._pack_latents(noise - latents, 3, 16, 8, 8)
    model = Recorder(truth)
    assert float(flow_loss(model, latents, noise, times, TEXT)) == 0
    seen = model.seen["hidden_states"]
    assert torch.equal(seen[0], FluxPipeline._pack_latents(latents, 3, 16, 8, 8)[0])
    assert torch.equal(seen[2], FluxPipeline._pack_latents(noise, 3, 16, 8, 8)[2])
    assert torch.equal(model.seen["timestep"], times)
    off = float(flow_loss(Recorder(truth + 0.5), latents, noise, times, TEXT))
    assert abs(off - 0.25) < 1e-6


def test_timesteps_are_logit_normal() -> None:
    times = sample_timesteps(20_000, torch.Generator().manual_seed(0))
    logits = torch.logit(times)
    assert 0 < float(times.min()) < float(times.max()) < 1
    assert abs(float(logits.mean())) < 0.03
    assert abs(float(logits.std()) - 1) < 0.03
