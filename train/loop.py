"""The optimizer loop: steps on the family's loss, validation at fixed noise, checkpoints, an orderly stop on ctrl-C.

One step = `accumulation` x `batch_size` samples on every process. Whatever is random in a step (order, timesteps,
noise, text dropout) is drawn from (seed, purpose, step) for the whole step and then shared out among the processes:
a resumed run repeats an uninterrupted one bit for bit on a CPU, and N processes see what one with N times the batch
would.
"""

import contextlib
import math
import signal
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, KwargsHandler
from torch import Tensor, nn
from tqdm import tqdm

from loragraft.backbones.compiled import uncompiled
from loragraft.backbones.spec import Backbone, BaseSpec
from loragraft.data.dataset import LatentCache, LatentDataset, text_of
from loragraft.data.order import pure_chunks
from loragraft.recipes.schema import Recipe, TrainConfig
from loragraft.train.batches import Batches, seeded
from loragraft.train.early_stop import EarlyStop
from loragraft.train.measured import Measured
from loragraft.train.optim import build_optimizer, state_bytes
from loragraft.train.previews import Previews
from loragraft.train.run_folder import RunFolder
from loragraft.train.sharding import average_gradients, shard_base, shard_digest, shards_base
from loragraft.train.step import EagerStep, GraphStep, Loss, captures, choose_step
from loragraft.train.tracking import Tracking

VALIDATION_SAMPLES = 64


def train(
    accelerator: Accelerator,
    recipe: Recipe,
    backbone: Backbone,
    parameters: list[nn.Parameter],
    cache: LatentCache,
    previews: Previews,
    folder: RunFolder,
    tracking: Tracking,
    prior: LatentDataset | None = None,
) -> bool:
    """Runs the steps that are left. Returns True if it was interrupted (a checkpoint is on disk), False when done.

    prior: class images, mixed into every batch (`PriorConfig`).
    """
    config = recipe.train
    optimizer, schedule = build_optimizer(parameters, recipe.optim, config.steps)
    transformer, sharded, base_before = backbone.transformer, shards_base(), ""
    averages = sharded or (accelerator.num_processes > 1 and captures(config, accelerator))
    if sharded:
        shard_base(transformer, parameters, accelerator.device)
        base_before = shard_digest(transformer)
    elif not averages:  # otherwise every process has drawn or restored the same adapter, and DDP has nothing to do
        transformer, optimizer = accelerator.prepare(transformer, optimizer)
    if folder.checkpoint is not None:
        _restore(folder.checkpoint, parameters, optimizer, schedule)
        folder.summary = dict(folder.checkpoint["summary"])
    batches = Batches(cache.split("train"), cache.empty, recipe, backbone, accelerator, prior)
    loss = micro_batch_loss(transformer, batches, config, backbone.spec)
    step = choose_step(
        config, accelerator, transformer, parameters, loss, len(batches.order.buckets), backbone.spec.family
    )
    validation = cache.split("validation")
    early = _early_stop(config.patience, validation, folder.checkpoint)
    started, elapsed_before = time.perf_counter(), float((folder.checkpoint or {}).get("elapsed_seconds", 0.0))

    def checkpoint() -> None:
        if accelerator.is_main_process:
            elapsed = elapsed_before + time.perf_counter() - started
            state = _state(parameters, optimizer, schedule, elapsed)
            folder.save_checkpoint(state | {"summary": folder.summary, "early_stop": early.state()})

    def finished() -> bool:
        return folder.step >= config.steps or early.exhausted

    def draw(lacking_only: bool = False) -> None:
        due = finished() or _due(folder.step, config.sample_every)
        there = lacking_only and previews.file(folder.path, folder.step).exists()
        if due and not there and (sharded or accelerator.is_main_process):  # a divided base runs on all or on none
            step.pause()
            images = previews.render(
                backbone,
                folder.path,
                folder.step,
                write=accelerator.is_main_process,
                capture=captures(config, accelerator),
            )
            if accelerator.is_main_process:
                tracking.log_images(images, step=folder.step)

    if folder.step == 0:
        folder.summary["validation_loss_start"] = validation_loss(transformer, backbone, validation, recipe)
        tracking.log({"validation/loss": folder.summary["validation_loss_start"]}, step=0)
    else:
        if finished():
            early.restore(parameters)
        draw(lacking_only=True)  # the checkpoint comes before the images: the run may have been killed between the two
    bar = tqdm(
        total=config.steps, initial=folder.step, desc="train", unit="step", disable=not accelerator.is_main_process
    )
    behind: Measured | None = None  # a step of a GPU whose figures are read when the next one is queued
    clock = time.perf_counter()

    def note(figures: dict[str, float], number: int, last: bool = False) -> None:
        """Step `number` as lines of files and on the screen."""
        if accelerator.is_main_process:
            folder.append_metrics({"step": number, **figures})
            if last or number == 1 or _due(number, config.log_every):
                seconds = {"seconds_per_step": time.perf_counter() - clock}
                tracking.log({f"train/{k}": v for k, v in {**figures, **seconds}.items()}, step=number)
            bar.set_postfix(loss=f"{figures['loss']:.4f}", memory=memory_in_use(accelerator.device))
        bar.update()

    with _stop_on_signal() as stop, bar, batches:
        while not finished():
            clock = time.perf_counter()
            made = _one_step(accelerator, step, optimizer, schedule, batches, parameters, recipe, folder.step, averages)
            if behind is not None:
                note(behind.read(), behind.step)
                behind = None
            folder.step += 1
            last = folder.step == config.steps
            validates = last or _due(folder.step, config.validate_every)
            saves, draws = _due(folder.step, config.checkpoint_every), _due(folder.step, config.sample_every)
            if made.waits and not (folder.step == 1 or validates or saves or draws or stop.requested):
                behind = made
                continue
            metrics = made.read()
            if validates:
                step.pause()
                metrics["validation_loss"] = validation_loss(transformer, backbone, validation, recipe)
                early.observe(_agreed(metrics["validation_loss"], accelerator), folder.step, parameters)
                folder.summary["validation_loss_end"] = early.best_loss if early.best else metrics["validation_loss"]
                last = last or early.exhausted
            note(metrics, folder.step, last)
            if stop.requested or last or saves:
                checkpoint()
            if last:
                early.restore(parameters)  # after the checkpoint, which keeps the state that training goes on from
            draw()
            if stop.requested and not last:
                step.close()
                return True
    step.close()
    early.restore(parameters)
    if sharded and shard_digest(transformer) != base_before:
        raise RuntimeError("the frozen base changed during training: do not use what was trained")
    if early.best:
        folder.summary |= {"best_step": early.best_step, "stopped_early": early.exhausted}
    folder.summary |= {
        "steps": folder.step,
        "train_seconds": elapsed_before + time.perf_counter() - started,
        "device": str(accelerator.device),
        "attention": backbone.ledger.attention,
        "optimizer_bytes": state_bytes(optimizer),
    }
    return False


def _early_stop(patience: int, validation: LatentDataset, checkpoint: dict[str, Any] | None) -> EarlyStop:
    """As it was at the checkpoint. Raises ValueError where there is nothing to validate on."""
    if patience and not len(validation):
        raise ValueError(
            "train.patience needs held-out images, and the validation split is empty: raise data.validation_fraction, or "
            "set train.patience=0"
        )
    early = EarlyStop(patience)
    if checkpoint is not None:
        early.load(checkpoint["early_stop"])
    return early


def distributed() -> list[KwargsHandler]:
    """How several processes work together: the frozen base, which is all buffers, is never broadcast again, and the others
    wait for the first while it draws, encodes and quantizes."""
    return [
        DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),  # one copy of gradients
        InitProcessGroupKwargs(timeout=timedelta(hours=12)),
    ]


def micro_batch_loss(transformer: nn.Module, batches: Batches, config: TrainConfig, spec: BaseSpec) -> Loss:
    """The family's loss of one micro-batch as a share of the step's; its tensors are what `Batches` yields, by name."""

    def loss(tensors: dict[str, Tensor]) -> Tensor:
        latents, noise, times, *_ = tensors.values()
        text = {key: tensors[key] for key in batches.empty_text}
        loss = spec.family.loss(
            transformer, latents, noise, times, text, batches.weights, guidance=spec.training_guidance
        )
        return loss / config.accumulation

    return loss


def _one_step(
    accelerator: Accelerator,
    step: EagerStep | GraphStep,
    optimizer: Any,
    schedule: Any,
    batches: Batches,
    parameters: list[nn.Parameter],
    recipe: Recipe,
    number: int,
    averages: bool = False,
) -> Measured:
    """Step `number`, counted from 0. On a GPU it is queued; nothing here waits for it.

    averages: nothing exchanges gradients during the backward pass, so it is done here.
    """
    count = recipe.train.accumulation
    total = torch.zeros((), device=accelerator.device)
    for micro, (latents, noise, times, text) in enumerate(batches(number)):
        total += step({"latents": latents, "noise": noise, "times": times, **text}, last=micro == count - 1)
    if averages:
        average_gradients(parameters)
    limit = recipe.train.max_grad_norm or math.inf
    norm = accelerator.clip_grad_norm_(parameters, limit)
    rate = float(schedule.get_last_lr()[0])
    optimizer.step()
    schedule.step()
    optimizer.zero_grad(set_to_none=step.assigns)
    return Measured(number + 1, accelerator.reduce(total, "mean"), norm, rate)


@torch.no_grad()
@uncompiled()
def validation_loss(transformer: nn.Module, backbone: Backbone, dataset: LatentDataset, recipe: Recipe) -> float:
    """The family's loss over the first samples of the validation split, at noise and times fixed by the seed alone.

    Times are the midpoints of equal strata of [0, 1], so that the figure moves with the adapter and not with luck.
    NaN if the split is empty.
    """
    count = min(len(dataset), VALIDATION_SAMPLES)
    if count == 0:
        return math.nan
    generator = seeded(recipe.train.seed, "validation", 0)
    order = torch.randperm(count, generator=generator)
    times = (order + 0.5) / count
    total = 0.0
    for chosen in pure_chunks(dataset.shapes[:count], recipe.train.batch_size):
        batch = dataset.batch(chosen)
        latents = batch["latents"].float()
        noise = torch.randn(latents.shape, generator=generator)
        text = {key: value.to(backbone.device, backbone.dtype) for key, value in text_of(batch).items()}
        loss = backbone.spec.family.loss(
            transformer,
            latents.to(backbone.device, backbone.dtype),
            noise.to(backbone.device, backbone.dtype),
            times[chosen].to(backbone.device),
            text,
            guidance=backbone.spec.training_guidance,
        )
        total += float(loss) * len(chosen)
    return total / count


def memory_in_use(device: torch.device) -> str:
    """Peak GPU memory allocated, or on a CPU the process's resident memory, as text in GiB."""
    used = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
    return f"{used / 2**30:.2f}GiB"


def _agreed(loss: float, accelerator: Accelerator) -> float:
    """The mean over the processes: on GPUs their losses may differ in the last bits, and all must stop together."""
    mean = accelerator.reduce(torch.tensor(loss, dtype=torch.float64, device=accelerator.device), "mean")
    return float(mean)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _state(parameters: Sequence[nn.Parameter], optimizer: Any, schedule: Any, elapsed: float) -> dict[str, Any]:
    return {
        "parameters": [p.detach().cpu() for p in parameters],
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "elapsed_seconds": elapsed,
    }


def _restore(state: dict[str, Any], parameters: Sequence[nn.Parameter], optimizer: Any, schedule: Any) -> None:
    with torch.no_grad():
        for parameter, saved in zip(parameters, state["parameters"], strict=True):
            parameter.copy_(saved)
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])


class _Stop:
    requested = False


@contextlib.contextmanager
def _stop_on_signal() -> Iterator[_Stop]:
    """ctrl-C or SIGTERM: finish the step, write a checkpoint, return. A second ctrl-C stops at once."""
    stop = _Stop()

    def handler(number: int, frame: object) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True
        tqdm.write("stopping after this step (again to stop at once)")

    previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
