"""The graft of an adapter that was trained on FLUX.1's shapes: one double and one single block, random codes, no files needed.

A hidden low-rank change of every layer makes the targets; an adapter is trained to match them as `train/lora.py` would train
it (inject, the project's AdamW, save), read back from its file, and grafted; the probe is what the layers saw.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from graft_proof import figures
from torch import Tensor

from loragraft.adapters.certificate import certify
from loragraft.adapters.checkpoint import Adapter, load_adapter, save_adapter
from loragraft.adapters.graft import graft, ungraft
from loragraft.adapters.inject import inject_adapter, remove_adapter
from loragraft.adapters.resident import ResidentAdapters
from loragraft.backbones.architectures import FLUX, stand_in_settings
from loragraft.backbones.skeleton import meta_transformer, plan_architecture, randomize
from loragraft.quantization.calibrate import collect
from loragraft.quantization.checkpoint import checksum, quantized_layers, recorded_base_id
from loragraft.recipes.schema import AdapterConfig, OptimConfig
from loragraft.train.optim import build_optimizer

RANK, HIDDEN_RANK, HIDDEN_STRENGTH = 16, 16, 0.3
STEPS, BATCHES = 60, 8
LEARNING_RATE = 3e-3
"""At a width of 128; it falls with the root of the width."""
ROWS = 64
"""Of the probe; the modulation of adaLN has one a batch."""
TEXT_TOKENS, TEXT_WIDTH, POOLED_WIDTH, CHANNELS = 32, 4096, 768, 64
TARGETS = FLUX.quantize + FLUX.quantize_w4a16


def flux_shapes(heads: int, profile: Any, seed: int, device: str, folder: Path, steps: int = STEPS) -> dict[str, Any]:
    """Certificate of the trained adapter's graft, with another adapter resident and switched off; `folder` takes its file.

    heads: width over 128, FLUX.1 has 24; a CPU computes in float32, a GPU in bfloat16.
    """
    model = blocks(heads, profile, seed, device)
    random, before = torch.Generator().manual_seed(seed), checksum(model)
    hidden = random_adapter(model, list(quantized_layers(model)), "hidden", HIDDEN_RANK, random, HIDDEN_STRENGTH)
    batches = [_inputs(model, random) for _ in range(BATCHES)]

    def draw() -> None:
        _outputs(model, batches)

    seen = collect(model, list(hidden.pairs), draw, rows=ROWS)
    left = train(model, hidden, batches, steps)
    file = save_adapter(model, folder, {"name": "trained", "base": "flux-shapes", "base_id": recorded_base_id(model)})
    remove_adapter(model)
    adapters = ResidentAdapters(model)
    adapters.add(load_adapter(file))
    adapters.add(hidden, active=False)
    certificate = certify(model, {path: stats.samples_SK.float() for path, stats in seen.items()})
    adapters.clear()
    return {
        "device": device, "width": heads * 128, "factors": f"trained, {steps} steps", "rank": RANK, "loss_left": left,
        **figures(certificate), "undo_restores_every_byte": checksum(model) == before,
    }  # fmt: skip


def blocks(heads: int, profile: Any, seed: int, device: str) -> FluxTransformer2DModel:
    """One double and one single block of FLUX.1, with random codes."""
    config = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": heads, "guidance_embeds": False}
    plan = partial(plan_architecture, FLUX, stand_in_settings(profile, seed))
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return randomize(meta_transformer(FluxTransformer2DModel, config, plan), device, dtype, seed)


def train(model: FluxTransformer2DModel, hidden: Adapter, batches: list[dict[str, Tensor]], steps: int) -> float:
    """Leaves an adapter of `RANK` injected; returns the squared error that is left, as a share of what `hidden` changes."""
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward fails on torch 2.11 with driver 580
    plain = _outputs(model, batches)
    graft(model, hidden)
    targets = _outputs(model, batches)
    ungraft(model, hidden.name)
    parameters = inject_adapter(model, AdapterConfig(rank=RANK), TARGETS)
    heads = model.config.num_attention_heads
    config = OptimConfig(learning_rate=LEARNING_RATE / heads**0.5, warmup_steps=0)
    optimizer, schedule = build_optimizer(parameters, config, steps)
    for step in range(steps):
        batch, target = batches[step % len(batches)], targets[step % len(batches)]
        F.mse_loss(model(**batch).sample.float(), target).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return _difference(_outputs(model, batches), targets) / _difference(plain, targets)


def _difference(outputs: list[Tensor], targets: list[Tensor]) -> float:
    return sum(float(F.mse_loss(output, target)) for output, target in zip(outputs, targets, strict=True))


def _inputs(model: FluxTransformer2DModel, random: torch.Generator) -> dict[str, Tensor]:
    """One picture, of 64 tokens a head: 1536 for 24 heads."""
    tokens = 64 * model.config.num_attention_heads
    weight = next(model.parameters())

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(weight)

    ids = torch.zeros(tokens, 3).to(weight)
    ids[:, 1] = torch.arange(tokens).to(weight) % 32
    ids[:, 2] = torch.arange(tokens).to(weight) // 32
    return {
        "hidden_states": draw(1, tokens, CHANNELS),
        "encoder_hidden_states": draw(1, TEXT_TOKENS, TEXT_WIDTH),
        "pooled_projections": draw(1, POOLED_WIDTH),
        "timestep": torch.rand(1, generator=random).to(weight),
        "img_ids": ids,
        "txt_ids": torch.zeros(TEXT_TOKENS, 3).to(weight),
    }


@torch.no_grad()
def _outputs(model: FluxTransformer2DModel, batches: list[dict[str, Tensor]]) -> list[Tensor]:
    return [model(**batch).sample.float() for batch in batches]


def random_adapter(
    model: FluxTransformer2DModel,
    paths: list[str],
    name: str,
    rank: int,
    random: torch.Generator,
    strength: float = 0.1,
) -> Adapter:
    """Factors that add about `strength` of each layer's output, in bfloat16, drawn where `random` lives."""
    layers, pairs = quantized_layers(model), {}
    for path in paths:
        K, N = layers[path].in_features, layers[path].out_features
        down = torch.randn(rank, K, generator=random, device=random.device) / K**0.5
        up = strength * torch.randn(N, rank, generator=random, device=random.device) / rank**0.5
        pairs[path] = down.to(torch.bfloat16), up.to(torch.bfloat16)
    return Adapter(name, {"base": "random", "base_id": recorded_base_id(model)}, pairs)
