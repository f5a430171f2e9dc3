"""Run by test_several.py in two processes: steps of one model on samples divided in several ways, results to a JSON file."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from conftest import build_tiny_flux  # type: ignore[import-not-found]

from loragraft.recipes.load import load_recipe
from loragraft.train.loop import _one_step, distributed
from loragraft.train.optim import build_optimizer
from loragraft.train.sharding import held_bytes, shard_base, shard_digest, shards_base

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
    sharded: bool,
    steps: int = 2,
) -> dict[str, Any]:
    """Metrics of every step and the adapter after the last, as one list."""
    recipe = load_recipe(
        "marketing", [f"train.accumulation={accumulation}", "optim.warmup_steps=0", "optim.schedule=constant"]
    )
    optimizer, schedule = build_optimizer(parameters, recipe.optim, 10)
    transformer: Any = model
    if not sharded:
        transformer, optimizer = accelerator.prepare(model, optimizer)
    parts: Any = Parts(accumulation, accelerator.process_index, accelerator.num_processes)
    metrics = [
        _one_step(accelerator, transformer, optimizer, schedule, parts, parameters, recipe, step, sharded)
        for step in range(steps)
    ]
    return {"metrics": metrics, "adapter": torch.cat([p.detach().flatten() for p in parameters]).tolist()}


def main(out: Path, plan: str) -> None:
    """plan: `plain` is the 16-bit model under DDP, `sharded` the INT4 model under DDP and divided."""
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True, kwargs_handlers=distributed())
    found: dict[str, Any] = {}
    if plan == "plain":
        for accumulation in (1, 2):
            model, parameters = build_tiny_flux(quantized=False)
            found[f"2 x {accumulation}"] = steps_of(accelerator, model, parameters, accumulation, sharded=False)
    else:
        model, parameters = build_tiny_flux()
        found["ddp"] = steps_of(accelerator, model, parameters, 2, sharded=False)
        found["ddp bytes"] = held_bytes(model)
        model, parameters = build_tiny_flux()
        assert shards_base(accelerator)
        shard_base(model, parameters, accelerator.device)
        before = shard_digest(model)
        found["fsdp"] = steps_of(accelerator, model, parameters, 2, sharded=True)
        found["fsdp bytes"] = held_bytes(model)
        found["unchanged"] = shard_digest(model) == before
    (out / f"rank{accelerator.process_index}.json").write_text(json.dumps(found))
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
