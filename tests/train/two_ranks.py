"""Steps of a tiny FLUX on samples that are divided in several ways; run in two processes, it writes what they gave.

torchrun --nproc-per-node=2 tests/train/two_ranks.py FOLDER         one JSON file a process
"""

import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import FluxTransformer2DModel
from torch import nn

from loragraft.adapters.inject import inject_adapter
from loragraft.backbones.architectures import FLUX
from loragraft.backbones.flow import FLUX_LIKE, flow_loss
from loragraft.backbones.skeleton import meta_transformer, plan_architecture, randomize
from loragraft.quantization.settings import QuantSettings
from loragraft.recipes.load import load_recipe
from loragraft.recipes.schema import AdapterConfig, TrainConfig
from loragraft.train.loop import _one_step, distributed, micro_batch_loss
from loragraft.train.memory import set_checkpointing
from loragraft.train.optim import build_optimizer
from loragraft.train.sharding import check_sharding, held_bytes, shard_base, shard_digest
from loragraft.train.step import EagerStep

CONFIG: dict[str, Any] = {
    "patch_size": 1, "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 64,
    "num_attention_heads": 2, "joint_attention_dim": 64, "pooled_projection_dim": 32, "guidance_embeds": False,
    "axes_dims_rope": (16, 24, 24),
}  # fmt: skip


def build_tiny_flux(
    dtype: torch.dtype = torch.float32, smoothing: Any = "hadamard", device: str = "cpu", quantized: bool = True
) -> tuple[nn.Module, list[nn.Parameter]]:
    """Two double and two single blocks of width 128, rotated or smoothed or in 16 bits, and their adapter."""
    plan = partial(plan_architecture, FLUX, QuantSettings(rank=8, smoothing=smoothing)) if quantized else None
    model = randomize(meta_transformer(FluxTransformer2DModel, CONFIG, plan), device, dtype)
    parameters = inject_adapter(model, AdapterConfig(rank=4, alpha=4), FLUX.quantize)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in parameters[1::2]:  # B starts at zero
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    return model, parameters


SAMPLES = 4
Sample = tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]


def samples(step: int) -> Sample:
    """(latents, noise, times, text) of the four samples of a step."""
    generator = torch.Generator().manual_seed(step)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(SAMPLES, *shape, generator=generator)

    text = {"prompt_embeds": draw(5, 64), "pooled_prompt_embeds": draw(32)}
    return draw(4, 8, 8), draw(4, 8, 8), torch.rand(SAMPLES, generator=generator), text


class Parts:
    """As `train.loop.Batches` divides: micro-batches one after another, in each every `world`-th sample from `rank` on."""

    weights = None
    empty_text = ("prompt_embeds", "pooled_prompt_embeds")

    def __init__(self, accumulation: int, rank: int, world: int) -> None:
        self.accumulation, self.rank, self.world = accumulation, rank, world

    def __call__(self, step: int) -> Any:
        latents, noise, times, text = samples(step)
        for places in torch.arange(SAMPLES).chunk(self.accumulation):
            mine = places[self.rank :: self.world]
            yield latents[mine], noise[mine], times[mine], {key: value[mine] for key, value in text.items()}


def steps_of(
    accelerator: Accelerator,
    model: nn.Module,
    parameters: list[nn.Parameter],
    accumulation: int,
    wrapped: bool,
    steps: int = 2,
) -> dict[str, Any]:
    """Metrics of every step and the adapter after the last, as one list."""
    recipe = load_recipe(
        "marketing", [f"train.accumulation={accumulation}", "optim.warmup_steps=0", "optim.schedule=constant"]
    )
    optimizer, schedule = build_optimizer(parameters, recipe.optim, 10)
    transformer: Any = model
    if wrapped:
        transformer, optimizer = accelerator.prepare(model, optimizer)
    spec: Any = SimpleNamespace(family=FLUX_LIKE, training_guidance=None)
    parts: Any = Parts(accumulation, accelerator.process_index, accelerator.num_processes)
    step = EagerStep(micro_batch_loss(transformer, parts, recipe.train, spec), accelerator, transformer)
    metrics = [
        _one_step(accelerator, step, optimizer, schedule, parts, parameters, recipe, number, not wrapped).read()
        for number in range(steps)
    ]
    return {"metrics": metrics, "adapter": torch.cat([p.detach().flatten() for p in parameters]).tolist()}


def main(out: Path) -> None:
    """The 16-bit model without and with accumulation, then the INT4 model whole and divided."""
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True, kwargs_handlers=distributed())
    found: dict[str, Any] = {}
    for accumulation in (1, 2):
        model, parameters = build_tiny_flux(quantized=False)
        found[f"2 x {accumulation}"] = steps_of(accelerator, model, parameters, accumulation, wrapped=True)
    model, parameters = build_tiny_flux()
    found["ddp"] = steps_of(accelerator, model, parameters, 2, wrapped=True)
    found["ddp bytes"] = held_bytes(model)
    model, parameters = build_tiny_flux()
    found["averaged"] = steps_of(accelerator, model, parameters, 2, wrapped=False)
    for checkpointing in ("none", "block"):
        model, parameters = build_tiny_flux()
        set_checkpointing(model, checkpointing)  # type: ignore[arg-type]
        check_sharding(accelerator, TrainConfig())
        shard_base(model, parameters, accelerator.device)
        before = shard_digest(model)
        found[f"fsdp {checkpointing}"] = steps_of(accelerator, model, parameters, 2, wrapped=False)
        with torch.no_grad():
            flow_loss(model, *samples(0))  # as a preview at the end of a run
        found["unchanged"] = shard_digest(model) == before
    found["fsdp bytes"] = held_bytes(model)
    (out / f"rank{accelerator.process_index}.json").write_text(json.dumps(found))
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
