"""Trains the FLUX transformer of ``pocket`` by rectified flow on a pool of latents and text embeddings.

x_t = (1 - t) x_0 + t noise; the target is noise - x_0; the model is called with timestep = t in [0, 1]. Legend: B batch,
T = 32 text tokens, latents [B, 16, 16, 16] packed 2 x 2 into 64 tokens x 64 channels (FLUX's own packing).
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from autoencoder import mixed_precision
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor

CONFIG = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 3,
    "num_single_layers": 6,
    "attention_head_dim": 64,
    "num_attention_heads": 4,
    "joint_attention_dim": 384,
    "pooled_projection_dim": 384,
    "guidance_embeds": False,
    "axes_dims_rope": (16, 24, 24),
}


@dataclass(frozen=True)
class TransformerSettings:
    """Schedule: warm-up, constant, then linear to 0 over the last ``decay`` of the run (of time, or of ``steps``)."""

    batch: int = 512
    learning_rate: float = 8e-4
    weight_decay: float = 0.01
    warmup: int = 500
    decay: float = 0.4
    text_dropout: float = 0.1
    ema: float = 0.9995
    seed: int = 0
    steps: int | None = None


@dataclass
class Pool:
    """Training material on the device: latents [N, 16, 16, 16], states [N, T, 384], pooled [N, 384], all bf16."""

    latents: Tensor
    states: Tensor
    pooled: Tensor
    empty_states: Tensor  # [T, 384], the empty prompt
    empty_pooled: Tensor


@dataclass
class Progress:
    """What a run has done so far; ``losses`` holds (step, seconds, mean loss since the last entry, learning rate)."""

    step: int = 0
    seconds: float = 0.0
    losses: list[tuple[int, float, float, float]] = field(default_factory=list)


def build_transformer() -> FluxTransformer2DModel:
    """Modulation and output start at zero: every block is the identity at first. Without it the start is unstable."""
    model = FluxTransformer2DModel(**CONFIG)
    zero = [model.norm_out.linear, model.proj_out]
    for block in model.transformer_blocks:
        zero += [block.norm1.linear, block.norm1_context.linear]
    zero += [block.norm.linear for block in model.single_transformer_blocks]
    for layer in zero:
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    return model


def pack(latents: Tensor) -> Tensor:
    """[B, 16, 16, 16] -> [B, 64, 64]"""
    return FluxPipeline._pack_latents(latents, *latents.shape)


def unpack(tokens: Tensor) -> Tensor:
    """[B, 64, 64] -> [B, 16, 16, 16]"""
    return FluxPipeline._unpack_latents(tokens, 128, 128, 8)


def position_ids(device: str, text_tokens: int) -> dict[str, Tensor]:
    image = FluxPipeline._prepare_latent_image_ids(1, 8, 8, device, torch.float32)
    return {"img_ids": image, "txt_ids": torch.zeros(text_tokens, 3, device=device)}


def learning_rate(settings: TransformerSettings, step: int, done: float) -> float:
    """Rate at ``step`` with the share ``done`` of the run behind it."""
    warm = min(1.0, (step + 1) / settings.warmup)
    return settings.learning_rate * warm * min(1.0, max(0.0, (1 - done) / settings.decay))


class Trainer:
    """Model, EMA, optimizer and counters; every random number depends on (seed, step) alone, so a resumed run is the
    same run."""

    def __init__(self, settings: TransformerSettings, device: str, compiled: bool = True) -> None:
        torch.manual_seed(settings.seed)
        self.settings, self.device = settings, device
        self.model = build_transformer().to(device)
        self.ema = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=settings.weight_decay, fused=True
        )
        self.forward = torch.compile(self.model, dynamic=False) if compiled else self.model
        self.generator = torch.Generator(device)
        self.progress = Progress()

    def save(self, path: Path) -> None:
        """Atomically: a killed run leaves the previous checkpoint."""
        content = {
            "model": self.model.state_dict(),
            "ema": self.ema,
            "optimizer": self.optimizer.state_dict(),
            "progress": vars(self.progress),
        }
        torch.save(content, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def load(self, path: Path) -> None:
        content = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(content["model"])
        self.ema = content["ema"]
        self.optimizer.load_state_dict(content["optimizer"])
        self.progress = Progress(**content["progress"])

    def loss(self, pool: Pool, index: Tensor, t: Tensor, noise: Tensor, dropped: Tensor) -> Tensor:
        """Flow-matching loss per sample [B] for pool items ``index``, ``dropped`` ones with the empty prompt."""
        states = torch.where(dropped[:, None, None], pool.empty_states, pool.states[index])
        pooled = torch.where(dropped[:, None], pool.empty_pooled, pool.pooled[index])
        clean = pool.latents[index].float()
        noisy = torch.lerp(clean, noise, t[:, None, None, None])
        with mixed_precision(self.device):
            predicted = self.forward(
                hidden_states=pack(noisy),
                encoder_hidden_states=states.float(),
                pooled_projections=pooled.float(),
                timestep=t,
                return_dict=False,
                **position_ids(self.device, states.shape[1]),
            )[0]
        return F.mse_loss(predicted.float(), pack(noise - clean), reduction="none").mean((1, 2))

    def draw(self, pool: Pool, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(index, t logit-normal, noise, dropped) of one batch, from ``seed`` alone."""
        generator, batch = self.generator.manual_seed(seed), self.settings.batch
        keyed = {"generator": generator, "device": self.device}
        index = torch.randint(len(pool.latents), (batch,), **keyed)
        t = torch.sigmoid(torch.randn(batch, **keyed))
        noise = torch.randn(batch, *pool.latents.shape[1:], **keyed)
        return index, t, noise, torch.rand(batch, **keyed) < self.settings.text_dropout

    def step(self, pool: Pool, done: float) -> Tensor:
        """One AdamW step; returns the mean loss, still on the device."""
        now = self.progress.step
        rate = learning_rate(self.settings, now, done)
        self.optimizer.param_groups[0]["lr"] = rate
        loss = self.loss(pool, *self.draw(pool, self.settings.seed * 10**9 + now)).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        decay = min(self.settings.ema, (1 + now) / (10 + now))
        with torch.no_grad():
            values = list(self.model.state_dict().values())
            torch._foreach_lerp_(list(self.ema.values()), values, 1 - decay)
        self.progress.step += 1
        return loss.detach()

    def train(
        self, pool: Pool, seconds: float, later: float, checkpoint: Path, log: Callable[[str], None], every: int = 200
    ) -> None:
        """Trains for ``seconds``, or to ``settings.steps``; the schedule expects ``later`` more seconds in other calls."""
        start, before = time.perf_counter(), self.progress.seconds
        total, saved, running, since = before + seconds + later, 0.0, torch.zeros((), device=self.device), 0
        while True:
            elapsed = time.perf_counter() - start
            done = self.progress.step / self.settings.steps if self.settings.steps else (before + elapsed) / total
            if done >= 1 or elapsed >= seconds:
                break
            running, since = running + self.step(pool, done), since + 1
            if self.progress.step % every == 0:
                self.note(before + time.perf_counter() - start, running.item() / since, log)
                running, since = torch.zeros_like(running), 0
            if elapsed - saved > 120:
                self.progress.seconds, saved = before + elapsed, elapsed
                self.save(checkpoint)
        self.progress.seconds = before + time.perf_counter() - start
        if since:
            self.note(self.progress.seconds, running.item() / since, log)
        self.save(checkpoint)

    def note(self, seconds: float, loss: float, log: Callable[[str], None]) -> None:
        if not math.isfinite(loss):
            raise FloatingPointError(f"loss {loss} at step {self.progress.step}: lower the learning rate and resume")
        rate = self.optimizer.param_groups[0]["lr"]
        self.progress.losses.append((self.progress.step, round(seconds, 1), round(loss, 5), rate))
        if self.progress.step % 1000 == 0 or len(self.progress.losses) < 4:
            log(f"transformer step {self.progress.step} {seconds:.0f} s loss {loss:.4f} rate {rate:.1e}")

    def averaged(self) -> FluxTransformer2DModel:
        """The EMA weights as a model of their own."""
        model = FluxTransformer2DModel(**CONFIG)
        model.load_state_dict(self.ema)
        return model.to(self.device).eval()


@torch.no_grad()
def sample(
    model: FluxTransformer2DModel, pool: Pool, states: Tensor, pooled: Tensor, steps: int, guidance: float, seed: int
) -> Tensor:
    """Euler from t = 1 to 0 with guidance against the empty prompt -> scaled latents [B, 16, 16, 16]."""
    count, device = len(states), states.device
    x = pack(torch.randn(count, 16, 16, 16, generator=torch.Generator(device).manual_seed(seed), device=device))
    text = torch.cat([states.float(), pool.empty_states.float().expand_as(states)])
    vector = torch.cat([pooled.float(), pool.empty_pooled.float().expand_as(pooled)])
    ids = position_ids(str(device), states.shape[1])
    for i in range(steps):
        t = torch.full((2 * count,), 1 - i / steps, device=device)
        velocity = model(torch.cat([x, x]), text, vector, t, return_dict=False, **ids)[0]
        asked, empty = velocity.chunk(2)
        x = x - (empty + guidance * (asked - empty)) / steps
    return unpack(x)
