"""One process of a part of `multi_gpu.py`: a base, an adapter and cached images, through the trainer; what it measured, as files."""

import argparse
import faulthandler
import hashlib
import itertools
import json
import os
import signal
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from accelerate import Accelerator
from cached_images import CachedImages
from gpu_timeline import spans_of, timeline
from PIL.Image import Image
from torch import nn

from loragraft.adapters.inject import inject_adapter
from loragraft.backbones.load import find_spec, load_backbone
from loragraft.backbones.pocket import PocketEncoders
from loragraft.backbones.spec import Backbone
from loragraft.data.dataset import LatentCache
from loragraft.data.order import BatchOrder
from loragraft.disk import write_atomic
from loragraft.recipes.load import load_recipe
from loragraft.recipes.schema import Recipe
from loragraft.train.loop import distributed, train
from loragraft.train.memory import set_checkpointing
from loragraft.train.previews import Previews
from loragraft.train.run_folder import RunFolder
from loragraft.train.sharding import average_gradients, check_sharding, held_bytes, shards_base
from loragraft.train.tracking import Tracking
from loragraft.train.warm import start_workers

GIB = 2**30
FILES = {"one": ("ddp_1", "idle"), "two": ("ddp_2",), "divided": ("fsdp",)}
"""Part -> the files that it leaves."""
SETTLE = 3
"""Steps that are not timed after every size has been compiled and captured."""
PROFILER_WARMS, PROFILED = 2, 9
"""Steps: the profiler's first ones are slow and thrown away. Of n steps' ends, n - 1 whole steps lie between."""
DIVIDED_STEPS = 3


class NoPictures(Previews):
    """Draws nothing: a preview of random weights shows nothing, and takes seconds."""

    def render(
        self, backbone: Backbone, run: Path, step: int, *, write: bool = True, capture: bool = False
    ) -> list[tuple[Image, str]]:
        """No image."""
        return []


class Unsaved(RunFolder):
    """A run that nobody resumes."""

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Writes nothing."""


class Stopwatch(Tracking):
    """Notes when the figures of every step are there; hands each step to `then`."""

    def __init__(self, then: Callable[["Stopwatch", int], None]) -> None:
        super().__init__(None, "multi_gpu")
        self.times: list[float] = []
        self.losses: list[float] = []
        self.then = then

    def log(self, values: dict[str, float], step: int) -> None:
        """Of what the loop logs, the training figures, every step's."""
        if "train/loss" in values:
            self.times.append(time.perf_counter())
            self.losses.append(values["train/loss"])
            self.then(self, step)

    def seconds(self, first: int, last: int) -> list[float]:
        """Of the steps `first` + 1 to `last`."""
        times = self.times[first - 1 : last]
        return [b - a for a, b in itertools.pairwise(times)]


class Part:
    """One process of a part: the base, the adapter, and what `train` is given."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        faulthandler.register(signal.SIGUSR1)  # from `multi_gpu`, before it ends what hangs
        self.accelerator = Accelerator(cpu=args.cpu, log_with=None, kwargs_handlers=distributed())
        self.world = self.accelerator.num_processes
        self.batch = 1 if args.what == "divided" else args.batch
        self.cache: LatentCache = cached_images(args).open()
        self.warm = self._warm_steps()
        self.recipe = self._recipe()
        check_sharding(self.accelerator, self.recipe.train)
        if args.cpu:
            torch.set_num_threads(1)
        else:  # as train/lora.py
            torch.backends.cuda.enable_cudnn_sdp(False)
            if not shards_base():
                start_workers()
        self.begun = started = time.perf_counter()
        self.backbone = self._backbone()
        self.parameters = self._adapter()
        self.held = held_bytes(self.backbone.transformer)
        self.build_seconds = time.perf_counter() - started
        if not args.cpu:
            torch.cuda.reset_peak_memory_stats()

    def _warm_steps(self) -> int:
        """Steps until a batch of every size was there, and SETTLE more."""
        order = BatchOrder(self.cache.split("train").shapes, self.batch * self.world, seed=0)
        seen: set[int] = set()
        shapes = self.cache.split("train").shapes
        number = 0
        while len(seen) < len(order.buckets):
            seen.add(list(order.buckets).index(shapes[order(number).indices[0]]))
            number += 1
        return number + SETTLE

    def _recipe(self) -> Recipe:
        args = self.args
        steps = {"one": 100_000, "two": self.warm + args.steps + 1, "divided": DIVIDED_STEPS}[args.what]
        return load_recipe(
            "marketing",
            [
                f"base={args.base}", *(["weights.random=true"] if find_spec(args.base).external else []),
                "data.buckets=true", f"data.resolution={args.edge}", f"train.batch_size={self.batch}", f"train.steps={steps}",
                f"train.attention={args.attention}", f"train.checkpointing={args.checkpointing}", "train.validate_every=0",
                "train.checkpoint_every=0", "train.log_every=1", "train.threads=1", "optim.learning_rate=1e-5",
                "optim.warmup_steps=0", "optim.schedule=constant", "tracking.mode=disabled",
            ],
        )  # fmt: skip

    def _backbone(self) -> Backbone:
        device = self.accelerator.device
        small = PocketEncoders(device, torch.float32, text=False) if self.args.base == "pocket" else None
        recipe = self.recipe
        backbone = load_backbone(
            recipe.base, recipe.numerics, device, self.args.work, recipe.weights, wait=True, encoders=small
        )
        backbone.set_training_numerics(recipe.train.save_x, recipe.train.dgrad)
        backbone.onto_device()
        backbone.set_attention(recipe.train.attention)
        return backbone

    def _adapter(self) -> list[nn.Parameter]:
        config, transformer = self.recipe.train, self.backbone.transformer
        parameters = inject_adapter(transformer, self.recipe.adapter, self.backbone.spec.lora_targets)
        set_checkpointing(transformer, config.checkpointing, config.checkpoint_blocks)
        return parameters

    def train(self, watch: Stopwatch) -> None:
        """Until the recipe's last step, or until `watch` stops it."""
        self.begun = time.perf_counter()
        folder = Unsaved.open(
            self.args.work / "runs" / f"{self.args.what}-{os.getpid()}", self.recipe, self.backbone.base_id
        )
        previews = NoPictures((), {}, {}, self.recipe.sample)
        train(
            self.accelerator, self.recipe, self.backbone, self.parameters, self.cache, previews, folder, watch
        )  # fmt: skip

    def adapter_digest(self) -> str:
        """sha256 of the adapter's bytes."""
        digest = hashlib.sha256()
        for parameter in self.parameters:
            digest.update(parameter.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def exchange_ms(self, times: int = 5) -> float:
        """Of averaging all gradients over the processes, at the end of a step; the least of several."""
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        seconds = []
        for _ in range(times):
            self.accelerator.wait_for_everyone()
            start = time.perf_counter()
            average_gradients(self.parameters)
            if not self.args.cpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        return 1000 * min(seconds)

    def peak_gib(self) -> float:
        """Allocated since the base is there; 0 on a CPU."""
        return 0.0 if self.args.cpu else torch.cuda.max_memory_allocated() / GIB

    def about(self, name: str) -> dict[str, Any]:
        """What every file says."""
        device = "cpu" if self.args.cpu else torch.cuda.get_device_name()
        versions = {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda}
        same = {
            key: getattr(self.args, key) for key in ("base", "edge", "formats", "images", "attention", "checkpointing")
        }
        made = {"variant": name, "device": device, "versions": versions, "commit": self.args.commit}
        return {**made, **same, "batch": self.batch, "processes": self.world, "build_seconds": self.build_seconds}

    def speed(self, watch: Stopwatch, last: int) -> dict[str, float]:
        """Of the steps after the warm ones, up to `last`."""
        seconds = watch.seconds(self.warm, last)
        return {
            "images_per_second": self.batch * self.world * len(seconds) / sum(seconds),
            "step_ms": 1000 * statistics.mean(seconds),
            "step_ms_median": 1000 * statistics.median(seconds),
            "step_ms_worst": 1000 * max(seconds),
            "steps_timed": len(seconds),
            "seconds_timed": sum(seconds),
            "peak_gib": self.peak_gib(),
            "first_step_seconds": watch.times[0] - self.begun,
        }


def cached_images(args: argparse.Namespace) -> CachedImages:
    """The data set that the options ask for."""
    return CachedImages(args.work / "cache", args.base, args.edge, tuple(args.formats), args.images, args.captions)


def leave(args: argparse.Namespace, name: str, figures: dict[str, Any]) -> None:
    """`figures` as --parts/`name`.json."""
    args.parts.mkdir(parents=True, exist_ok=True)
    write_atomic(args.parts / f"{name}.json", (json.dumps(figures, indent=1) + "\n").encode())


def run_one(args: argparse.Namespace) -> None:
    """Timed steps for `--seconds`, then profiled ones, then a stop as ctrl-C makes it."""
    part = Part(args)
    kind = torch.profiler.ProfilerActivity.CPU if args.cpu else torch.profiler.ProfilerActivity.CUDA
    profiler = torch.profiler.profile(
        activities=[kind], schedule=torch.profiler.schedule(wait=0, warmup=PROFILER_WARMS, active=PROFILED, repeat=1)
    )
    timed: dict[str, float] = {}
    profiled, enough = 0, PROFILER_WARMS + PROFILED

    def then(watch: Stopwatch, step: int) -> None:
        nonlocal profiled
        if step == part.warm - 1:
            _wait_for(args.after)  # the next step is queued and ends meanwhile; the clock starts with its figures
        if step <= part.warm or profiled == enough:  # the step that was queued when the run was stopped
            return
        if not timed:
            if watch.times[-1] - watch.times[part.warm - 1] < args.seconds:
                return
            timed.update(part.speed(watch, step))
            leave(args, "ddp_1", {**part.about("ddp_1"), **timed, "losses": watch.losses[:DIVIDED_STEPS]})
            profiler.start()
        else:
            profiler.step()
            profiled += 1
            if profiled == enough:
                profiler.stop()
                signal.raise_signal(signal.SIGTERM)

    part.train(Stopwatch(then))
    seen = timeline(spans_of(profiler, cuda=not args.cpu))
    busy = seen.busy_ms / seen.steps
    leave(
        args,
        "idle",
        {
            **part.about("idle"),
            "idle_share": max(seen.idle_share, 1 - busy / timed["step_ms"]),
            "idle_share_profiled": seen.idle_share,
            "idle_share_unprofiled": 1 - busy / timed["step_ms"],
            "stall_share": seen.stall_share,
            "longest_gap_ms": seen.longest_gap_ms,
            "busy_ms": busy,
            "step_ms": timed["step_ms"],
            "step_ms_profiled": seen.window_ms / seen.steps,
            "seconds_timed": timed["seconds_timed"],
            "steps_profiled": seen.steps,
            "kernels_per_step": seen.kernels / seen.steps,
            "sizes": sorted({f"{w}x{h}" for h, w in part.cache.split("train").shapes}),
        },
    )


def run_several(args: argparse.Namespace) -> None:
    """`two` or `divided`: the steps of one of the processes; what it found goes to --work."""
    part = Part(args)
    watch = Stopwatch(lambda *_: None)
    part.train(watch)
    name = FILES[args.what][0]
    found = {
        **part.about(name),
        "adapter": part.adapter_digest(),
        "losses": watch.losses[:DIVIDED_STEPS],
        "peak_gib": part.peak_gib(),
        "held_gib_whole": part.held / GIB,
        "held_gib": held_bytes(part.backbone.transformer) / GIB,
        "divided": shards_base(),
    }
    if watch.times and args.what == "two":  # the last step's figures wait for what ends a run
        found |= part.speed(watch, len(watch.times) - 1)
    if watch.times and args.what == "divided":
        found["step_ms"] = 1000 * watch.seconds(1, DIVIDED_STEPS - 1)[0]
    found["exchange_ms"] = part.exchange_ms()
    rank = part.accelerator.process_index
    write_atomic(args.work / f"{name}.rank{rank}.json", json.dumps(found).encode())
    part.accelerator.end_training()


def _wait_for(file: Path | None) -> None:
    """Until `file` is there."""
    while file is not None and not file.exists():
        time.sleep(0.1)
