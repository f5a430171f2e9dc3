"""The optimizer loop: steps on the family's loss, validation at fixed noise, checkpoints, an orderly stop on ctrl-C.

One step = `accumulation` x `batch_size` samples on every process. Whatever is random in a step (order, timesteps,
noise, text dropout) is drawn from (seed, purpose, step) for the whole step and then shared out among the processes:
a resumed run repeats an uninterrupted one bit for bit on a CPU, and N processes see what one with N times the batch
would.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
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
from loragraft.train.measured import Measured, StepTimes
from loragraft.train.optim import build_optimizer, state_bytes
from loragraft.train.previews import Previews
from loragraft.train.run_folder import RunFolder
from loragraft.train.sharding import average_gradients, shard_base, shard_digest, shards_base
from loragraft.train.stall import moved
from loragraft.train.step import EagerStep, GraphStep, Loss, captures, choose_step
from loragraft.train.stopping import Stop, stop_on_signal
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
    run = _begin(accelerator, recipe, backbone, parameters, cache, previews, folder, tracking, prior)
    run.look()
    bar = tqdm(
        total=recipe.train.steps,
        initial=folder.step,
        desc="train",
        unit="step",
        disable=not accelerator.is_main_process,
    )
    with stop_on_signal(accelerator.num_processes == 1) as stop, bar, run.batches:
        interrupted = run.go_on(stop, bar)
    run.step.close()
    if not interrupted:
        run.end()
    return interrupted


def _begin(
    accelerator: Accelerator,
    recipe: Recipe,
    backbone: Backbone,
    parameters: list[nn.Parameter],
    cache: LatentCache,
    previews: Previews,
    folder: RunFolder,
    tracking: Tracking,
    prior: LatentDataset | None,
) -> "_Run":
    """Optimizer, batches and step, as they were at the checkpoint if there is one."""
    config = recipe.train
    optimizer, schedule = build_optimizer(parameters, recipe.optim, config.steps)
    transformer, base_before = backbone.transformer, ""
    averages = shards_base() or (accelerator.num_processes > 1 and captures(config, accelerator))
    if shards_base():
        shard_base(transformer, parameters, accelerator.device)
        base_before = shard_digest(transformer)
    elif not averages:  # otherwise every process has drawn or restored the same adapter, and DDP has nothing to do
        transformer, optimizer = accelerator.prepare(transformer, optimizer)
    saved = folder.checkpoint
    if saved is not None:
        _restore(saved, parameters, optimizer, schedule)
        folder.summary = dict(saved["summary"])
    batches = Batches(cache.split("train"), cache.empty, recipe, backbone, accelerator, prior)
    loss = micro_batch_loss(transformer, batches, config, backbone.spec)
    shapes, family = len(batches.order.buckets), backbone.spec.family
    step = choose_step(config, accelerator, transformer, parameters, loss, shapes, family)
    validation = cache.split("validation")
    early = _early_stop(config.patience, validation, saved)
    elapsed = float((saved or {}).get("elapsed_seconds", 0.0))
    return _Run(
        accelerator, recipe, backbone, parameters, validation, previews, folder, tracking,
        transformer, base_before, optimizer, schedule, batches, step, averages, early, elapsed,
    )  # fmt: skip


@dataclass
class _Run:
    """A training under way: what `train` was given, and what `_begin` made of it."""

    accelerator: Accelerator
    recipe: Recipe
    backbone: Backbone
    parameters: list[nn.Parameter]
    validation: LatentDataset
    previews: Previews
    folder: RunFolder
    tracking: Tracking
    transformer: nn.Module
    base_before: str
    """Digest of a divided base."""
    optimizer: Any
    schedule: Any
    batches: Batches
    step: EagerStep | GraphStep
    averages: bool
    """Whether gradients are exchanged after the backward pass, not in it."""
    early: EarlyStop
    elapsed_before: float
    """Seconds until the checkpoint."""
    started: float = field(default_factory=time.perf_counter)
    clock: float = 0.0
    """When the step began."""
    times: StepTimes = field(default_factory=StepTimes)

    @property
    def finished(self) -> bool:
        return self.folder.step >= self.recipe.train.steps or self.early.exhausted

    @property
    def elapsed(self) -> float:
        """Seconds of training, those of interrupted processes included."""
        return self.elapsed_before + time.perf_counter() - self.started

    def look(self) -> None:
        """Before the first step the loss that it starts from; after a checkpoint the images that are due and lacking."""
        if self.folder.step == 0:
            self.folder.summary["validation_loss_start"] = self.validate()
            self.tracking.log({"validation/loss": self.folder.summary["validation_loss_start"]}, step=0)
            return
        if self.finished:
            self.early.restore(self.parameters)
        # The checkpoint comes before the images: the run may have been killed between the two.
        if not self.previews.file(self.folder.path, self.folder.step).exists():
            self.draw()

    def go_on(self, stop: Stop, bar: Any) -> bool:
        """Steps until the last one, or until `stop`; returns whether it was asked to stop before the last."""
        behind: Measured | None = None  # a step of a GPU whose figures are read when the next one is queued
        while not self.finished:
            self.clock = time.perf_counter()
            made = _one_step(
                self.accelerator, self.step, self.optimizer, self.schedule, self.batches, self.parameters, self.recipe,
                self.folder.step, self.averages, stop.asked,
            )  # fmt: skip
            if behind is not None:
                self.note(behind.read(), behind.step, bar)
                stop.learn(behind.asked)
                behind = None
            self.folder.step += 1
            if made.waits and not (self.folder.step == 1 or self._pauses() or stop.requested):
                behind = made
            elif self.conclude(made, stop, bar):
                return True
        return False

    def _pauses(self) -> bool:
        """Whether more than the next step follows."""
        config, number = self.recipe.train, self.folder.step
        every = (config.validate_every, config.checkpoint_every, config.sample_every)
        return number == config.steps or any(_due(number, each) for each in every)

    def conclude(self, made: Measured, stop: Stop, bar: Any) -> bool:
        """What follows a step: validation, lines of files, a checkpoint, images. Returns whether to stop before the last."""
        config, number = self.recipe.train, self.folder.step
        last = number == config.steps
        metrics = made.read()
        stop.learn(made.asked)
        if last or _due(number, config.validate_every):
            self.step.pause()
            loss = metrics["validation_loss"] = self.validate()
            self.early.observe(_agreed(loss, self.accelerator), number, self.parameters)
            self.folder.summary["validation_loss_end"] = self.early.best_loss if self.early.best else loss
            last = last or self.early.exhausted
        self.note(metrics, number, bar, last)
        stopping = stop.requested  # asked once: a ctrl-C while images are drawn must not leave without a checkpoint
        if stopping or last or _due(number, config.checkpoint_every):
            self.checkpoint()
        if last:
            self.early.restore(
                self.parameters
            )  # after the checkpoint, which keeps the state that training goes on from
        self.draw()
        return stopping and not last

    def validate(self) -> float:
        loss = validation_loss(self.transformer, self.backbone, self.validation, self.recipe)
        moved()
        return loss

    def note(self, figures: dict[str, float], number: int, bar: Any, last: bool = False) -> None:
        """Step `number` as lines of files and on the screen."""
        moved()
        self.times.note()
        if self.accelerator.is_main_process:
            self.folder.append_metrics({"step": number, **figures})
            if last or number == 1 or _due(number, self.recipe.train.log_every):
                seconds = {"seconds_per_step": time.perf_counter() - self.clock}
                self.tracking.log({f"train/{k}": v for k, v in {**figures, **seconds}.items()}, step=number)
            bar.set_postfix(loss=f"{figures['loss']:.4f}", memory=memory_in_use(self.accelerator.device))
        bar.update()

    def checkpoint(self) -> None:
        if self.accelerator.is_main_process:
            state = _state(self.parameters, self.optimizer, self.schedule, self.elapsed)
            self.folder.save_checkpoint(state | {"summary": self.folder.summary, "early_stop": self.early.state()})
        moved()

    def draw(self) -> None:
        """The images of this step, if they are due."""
        main = self.accelerator.is_main_process
        due = self.finished or _due(self.folder.step, self.recipe.train.sample_every)
        if not due or not (shards_base() or main):  # a divided base runs on all or on none
            return
        self.step.pause()
        captured = captures(self.recipe.train, self.accelerator)
        images = self.previews.render(self.backbone, self.folder.path, self.folder.step, write=main, capture=captured)
        if main:
            self.tracking.log_images(images, step=self.folder.step)
        moved()

    def end(self) -> None:
        """The best adapter in place, and the summary. Raises RuntimeError if a divided base changed."""
        self.early.restore(self.parameters)
        if shards_base() and shard_digest(self.transformer) != self.base_before:
            raise RuntimeError("the frozen base changed during training: do not use what was trained")
        if self.early.best:
            self.folder.summary |= {"best_step": self.early.best_step, "stopped_early": self.early.exhausted}
        device = self.accelerator.device
        self.folder.step_seconds = self.times.median
        self.folder.summary |= {
            "steps": self.folder.step,
            "train_seconds": self.elapsed,
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "attention": self.backbone.ledger.attention,
            "optimizer_bytes": state_bytes(self.optimizer),
        }


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
    asked: bool = False,
) -> Measured:
    """Step `number`, counted from 0. On a GPU it is queued; nothing here waits for it.

    averages: nothing exchanges gradients during the backward pass, so it is done here. asked: this process was asked to stop.
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
    if accelerator.num_processes == 1:
        return Measured(number + 1, total, norm, rate)
    mean, share = accelerator.reduce(torch.stack([total, total.new_full((), asked)]), "mean")
    return Measured(number + 1, mean, norm, rate, share)


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
