"""Trains the FLUX transformer of ``pocket`` by rectified flow on a pool of latents and text embeddings.

x_t = (1 - t) x_0 + t noise; the target is noise - x_0; the model is called with timestep = t in [0, 1]. Legend: B batch,
T = 32 text tokens, latents [B, 16, 16, 16] packed 2 x 2 into 64 tokens x 64 channels (FLUX's own packing).
"""

import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from autoencoder import mixed_precision
from diffusers import FluxPipeline, FluxTransformer2DModel
from muon import Muon
from torch import Tensor

CONFIG = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 3,
    "num_single_layers": 5,
    "attention_head_dim": 64,
    "num_attention_heads": 4,
    "joint_attention_dim": 384,
    "pooled_projection_dim": 384,
    "guidance_embeds": False,
    "axes_dims_rope": (16, 24, 24),
}
TEXT_TOKENS = 32
# What Muon takes: adaLN is six functions in one matrix, and the embedders and the output are not square maps of a stream.
BLOCK_MATRIX = re.compile(r"transformer_blocks\.\d+\.(attn|ff|ff_context|proj_mlp|proj_out)")
EMA_EVERY = 4


@dataclass(frozen=True)
class TransformerSettings:
    """Schedule: warm-up, constant, then linear to 0 over the last ``decay`` of the run (of time, or of ``steps``)."""

    batch: int = 512
    learning_rate: float = 8e-4
    """Of AdamW: embedders, adaLN, output, biases, norms."""
    muon_rate: float = 2e-3
    """Of Muon: the matrices of the blocks; 0 = AdamW for all."""
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


def shortened(folder: Path, drop_single: int) -> FluxTransformer2DModel:
    """An exported transformer, fp32, without its single block ``drop_single``: residual blocks can be left out."""
    model = FluxTransformer2DModel.from_pretrained(folder, torch_dtype=torch.float32)
    del model.single_transformer_blocks[drop_single]
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


def schedule(settings: TransformerSettings, step: int, done: float) -> float:
    """Share of the peak rate at ``step`` with the share ``done`` of the run behind it."""
    warm = min(1.0, (step + 1) / settings.warmup)
    return warm * min(1.0, max(0.0, (1 - done) / settings.decay))


@dataclass
class Batch:
    """One batch: latents [B, 16, 16, 16], their noise, times t [B], and text with some prompts emptied."""

    clean: Tensor
    noise: Tensor
    t: Tensor
    states: Tensor
    pooled: Tensor

    def copy_(self, other: "Batch") -> None:
        for name, value in vars(self).items():
            value.copy_(getattr(other, name))


class Trainer:
    """Model, EMA, optimizers and counters; every random number depends on (seed, step) alone, so a resumed run is the
    same run. On a GPU a whole step (forward, backward, clipping, both optimizers) is one CUDA graph: the model is small
    and launches would be a third of its time."""

    def __init__(
        self, settings: TransformerSettings, device: str, compiled: bool = True, captured: bool = True
    ) -> None:
        torch.manual_seed(settings.seed)
        self.settings, self.device = settings, device
        self.captured = captured and device != "cpu"
        self.model = build_transformer().to(device)
        self.ema = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        matrices = {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if settings.muon_rate and parameter.ndim == 2 and BLOCK_MATRIX.search(name)
        }
        rest = [parameter for name, parameter in self.model.named_parameters() if name not in matrices]
        self.rate, self.muon_rate = torch.zeros((), device=device), torch.zeros((), device=device)
        self.optimizer = torch.optim.AdamW(
            rest, lr=self.rate, betas=(0.9, 0.95), weight_decay=settings.weight_decay, fused=True, capturable=device != "cpu"
        )  # fmt: skip
        self.optimizer.param_groups[0]["lr"] = self.rate  # the tensor itself, whatever the constructor copied
        self.muon = Muon(matrices.values(), self.muon_rate, weight_decay=settings.weight_decay)
        self.forward = torch.compile(self.model, dynamic=False) if compiled else self.model
        self.generator = torch.Generator(device)
        self.ids = position_ids(device, TEXT_TOKENS)
        self.graph: tuple[torch.cuda.CUDAGraph, Batch, Tensor] | None = None
        self.warm = 0
        self.progress = Progress()

    def start_from(self, model: FluxTransformer2DModel) -> None:
        """Weights of another model of this architecture. Raises RuntimeError naming what does not fit."""
        self.model.load_state_dict(model.state_dict())
        self.ema = {name: value.detach().clone() for name, value in self.model.state_dict().items()}

    def prepare(self) -> None:
        """Compiles and captures on an empty batch, at rate 0, and forgets it: this needs no data, and takes a minute."""
        count = self.settings.batch
        shapes = {"clean": (16, 16, 16), "noise": (16, 16, 16), "t": (), "states": (TEXT_TOKENS, 384), "pooled": (384,)}
        batch = Batch(**{name: torch.rand(count, *shape, device=self.device) for name, shape in shapes.items()})
        for _ in range(4 if self.captured else 1):
            self.advance(batch)
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()  # in place: the graph holds these addresses
        for average in self.muon.averages.values():
            average.zero_()

    def save(self, path: Path) -> None:
        """Atomically: a killed run leaves the previous checkpoint."""
        content = {
            "model": self.model.state_dict(),
            "ema": self.ema,
            "optimizer": self.optimizer.state_dict(),
            "muon": self.muon.state_dict(),
            "progress": vars(self.progress),
        }
        torch.save(content, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def load(self, path: Path) -> None:
        content = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(content["model"])
        self.ema = content["ema"]
        self.optimizer.load_state_dict(content["optimizer"])
        self.optimizer.param_groups[0]["lr"] = self.rate
        self.muon.load_state_dict(content["muon"])
        self.progress = Progress(**content["progress"])

    def draw(self, pool: Pool, seed: int) -> Batch:
        """One batch, from ``seed`` alone; t is logit-normal."""
        generator, batch = self.generator.manual_seed(seed), self.settings.batch
        keyed = {"generator": generator, "device": self.device}
        index = torch.randint(len(pool.latents), (batch,), **keyed)
        t = torch.sigmoid(torch.randn(batch, **keyed))
        noise = torch.randn(batch, *pool.latents.shape[1:], **keyed)
        dropped = torch.rand(batch, **keyed) < self.settings.text_dropout
        return Batch(
            clean=pool.latents[index].float(),
            noise=noise,
            t=t,
            states=torch.where(dropped[:, None, None], pool.empty_states, pool.states[index]).float(),
            pooled=torch.where(dropped[:, None], pool.empty_pooled, pool.pooled[index]).float(),
        )

    def loss(self, batch: Batch) -> Tensor:
        """Flow-matching loss per sample [B]."""
        noisy = torch.lerp(batch.clean, batch.noise, batch.t[:, None, None, None])
        with mixed_precision(self.device):
            predicted = self.forward(
                hidden_states=pack(noisy),
                encoder_hidden_states=batch.states,
                pooled_projections=batch.pooled,
                timestep=batch.t,
                return_dict=False,
                **self.ids,
            )[0]
        return F.mse_loss(predicted.float(), pack(batch.noise - batch.clean), reduction="none").mean((1, 2))

    def update(self, batch: Batch) -> Tensor:
        """Gradients and one step of both optimizers; the mean loss, still on the device."""
        self.optimizer.zero_grad(set_to_none=True)
        self.model.zero_grad(set_to_none=True)
        loss = self.loss(batch).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.muon.step()
        return loss.detach()

    def advance(self, batch: Batch) -> Tensor:
        """``update``, as a CUDA graph where there is one."""
        return self.replay(batch) if self.captured else self.update(batch)

    def replay(self, batch: Batch) -> Tensor:
        """``update`` as a CUDA graph: three warm steps on a side stream, then captured once and replayed."""
        if self.warm < 3:
            self.warm += 1
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                loss = self.update(batch)
            torch.cuda.current_stream().wait_stream(stream)
            return loss
        if self.graph is None:
            graph = torch.cuda.CUDAGraph()
            self.model.zero_grad(set_to_none=True)
            with torch.cuda.graph(graph):
                loss = self.update(batch)
            self.graph = graph, batch, loss
        graph, inputs, loss = self.graph
        if inputs is not batch:
            inputs.copy_(batch)
        graph.replay()
        return loss

    def step(self, pool: Pool, done: float) -> Tensor:
        """One step; returns the mean loss, still on the device."""
        now = self.progress.step
        share = schedule(self.settings, now, done)
        self.rate.fill_(self.settings.learning_rate * share)
        self.muon_rate.fill_(self.settings.muon_rate * share)
        batch = self.draw(pool, self.settings.seed * 10**9 + now)
        loss = self.advance(batch)
        if now % EMA_EVERY == 0:
            decay = min(self.settings.ema, (1 + now) / (10 + now)) ** EMA_EVERY
            with torch.no_grad():
                torch._foreach_lerp_(list(self.ema.values()), list(self.model.state_dict().values()), 1 - decay)
        self.progress.step += 1
        return loss

    def train(
        self, pool: Pool, seconds: float, later: float, checkpoint: Path, log: Callable[[str], None], every: int = 200
    ) -> None:
        """Trains for ``seconds``, or to ``settings.steps``; the schedule expects ``later`` more seconds in other calls."""
        start, before = time.perf_counter(), self.progress.seconds
        total, saved, running, since = before + seconds + later, 0.0, torch.zeros((), device=self.device), 0
        while True:
            if self.progress.step % 20 == 0 and self.device != "cpu":
                torch.cuda.synchronize()  # a graph queues without end: the clock would run ahead of the work
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
        self.progress.losses.append((self.progress.step, round(seconds, 1), round(loss, 5), round(self.rate.item(), 7)))
        if self.progress.step % 1000 == 0 or len(self.progress.losses) < 4:
            log(f"transformer step {self.progress.step} {seconds:.0f} s loss {loss:.4f} rate {self.rate.item():.1e}")

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
