"""Trains the tiny autoencoder: AutoencoderTiny with 16 latent channels, 128 px -> 16 x 16 x 16.

Loss = L1 + MSE + 0.5 sum of gradient L1 at 3 scales + latent moments. The moment term pulls every latent channel
to mean 0, deviation 1, so that ONE scalar scale and shift normalise the space, as FLUX's pipeline wants; latent noise
(deviation 0.05) teaches the decoder to forgive the small errors of a sampler.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch import Tensor

Pictures = Callable[[int, int, torch.Generator], Tensor]  # (step, batch, generator) -> [B, 3, 128, 128] in [-1, 1]


@dataclass(frozen=True)
class AutoencoderSettings:
    """``seconds`` of training, or exactly ``steps`` if given."""

    seconds: float = 150.0
    steps: int | None = None
    batch: int = 96
    learning_rate: float = 1.5e-3
    latent_noise: float = 0.05
    moments: float = 0.01


def build_autoencoder(scaling_factor: float = 1.0, shift_factor: float = 0.0) -> AutoencoderTiny:
    """Fewer residual blocks than AutoencoderTiny's default (15 of 20): 1.2 MB less, and faster on a CPU."""
    return AutoencoderTiny(
        latent_channels=16,
        num_encoder_blocks=(1, 2, 2, 2),
        num_decoder_blocks=(3, 2, 2, 1),
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
    )


def mixed_precision(device: str | torch.device) -> torch.autocast:
    """bf16 autocast on GPUs; on CPUs full precision, since few of them compute in bf16."""
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=kind != "cpu")


def picture_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 + MSE + 0.5 sum_s |grad output_s - grad target_s| over 3 scales, means per pixel."""
    difference = output - target
    loss = difference.abs().mean() + difference.square().mean()
    for scale in range(3):
        level = F.avg_pool2d(difference, 2**scale) if scale else difference
        loss = loss + 0.5 * (level.diff(dim=2).abs().mean() + level.diff(dim=3).abs().mean())
    return loss


def train_autoencoder(
    pictures: Pictures, settings: AutoencoderSettings, device: str, log: Callable[[str], None], compiled: bool = True
) -> AutoencoderTiny:
    """AdamW, warm-up 100 steps, cosine to 0 over time; bf16 autocast. Returns the model in fp32."""
    torch.manual_seed(0)
    model = build_autoencoder().to(device, memory_format=torch.channels_last)
    encode, decode = (torch.compile(part) if compiled else part for part in (model.encoder, model.decoder))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.0)
    generator = torch.Generator(device).manual_seed(1)
    started, step, running = time.perf_counter(), 0, torch.zeros((), device=device)
    while True:
        elapsed = time.perf_counter() - started
        done = step / settings.steps if settings.steps else elapsed / settings.seconds
        if done >= 1:
            break
        cosine = 0.5 * (1 + torch.cos(torch.tensor(done * torch.pi)).item())
        optimizer.param_groups[0]["lr"] = settings.learning_rate * min(1.0, (step + 1) / 100) * cosine
        target = pictures(step, settings.batch, generator).contiguous(memory_format=torch.channels_last)
        with mixed_precision(device):
            latents = encode(target).float()
            noise = torch.randn(latents.shape, generator=generator, device=device) * settings.latent_noise
            output = decode(latents + noise).float()
        moments = latents.mean((0, 2, 3)).square().mean() + (latents.std((0, 2, 3)) - 1).square().mean()
        loss = picture_loss(output, target) + settings.moments * moments
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        running = torch.lerp(running, loss.detach(), 1.0 if step == 0 else 0.02)
        if step % 500 == 0:
            log(f"autoencoder step {step} {elapsed:.0f} s loss {running.item():.4f}")
        step += 1
    log(f"autoencoder {step} steps, loss {running.item():.4f}")
    return model.eval()


@torch.no_grad()
def encode(model: AutoencoderTiny, pictures: Tensor) -> Tensor:
    """Pictures -> scaled latents (z - shift) * scale [B, 16, 16, 16], fp32."""
    with mixed_precision(pictures.device):
        raw = model.encode(pictures.contiguous(memory_format=torch.channels_last)).latents
    return (raw.float() - model.config.shift_factor) * model.config.scaling_factor


@torch.no_grad()
def decode(model: AutoencoderTiny, latents: Tensor) -> Tensor:
    """Scaled latents -> pictures in [-1, 1], fp32."""
    return model.decode(latents / model.config.scaling_factor + model.config.shift_factor).sample.float().clamp(-1, 1)


@torch.no_grad()
def with_scalar_scaling(model: AutoencoderTiny, pictures: Tensor) -> tuple[AutoencoderTiny, list[float]]:
    """A copy whose config holds scale = 1 / std and shift = mean of the latents of ``pictures``; and the channel stds."""
    raw = torch.cat([model.encode(part).latents.float() for part in pictures.split(256)])
    scaled = build_autoencoder(1.0 / raw.std().item(), raw.mean().item())
    scaled.load_state_dict(model.state_dict())
    scaled = scaled.to(pictures.device, memory_format=torch.channels_last).eval()
    return scaled, [round(value, 4) for value in raw.std((0, 2, 3)).tolist()]


@torch.no_grad()
def psnr(model: AutoencoderTiny, pictures: Tensor) -> float:
    """Mean over pictures of 10 log10(1 / MSE), values in [0, 1], in dB, capped at 60 per picture."""
    values = []
    for part in pictures.split(256):
        output = decode(model, encode(model, part))
        error = ((output - part) / 2).square().mean((1, 2, 3)).clamp_min(1e-6)
        values.append(-10 * error.log10())
    return torch.cat(values).mean().item()
