"""Is preflight true? Models of FLUX.1, SDXL and SANA with random weights, predicted on fake tensors and then run on the GPU.

    python benchmarks/preflight.py --out benchmarks/results/preflight.json --commit $(git rev-parse HEAD)          four minutes
    python benchmarks/preflight.py --predict predicted.json          the memory alone, anywhere; two minutes of one core

Each base has its published shapes, quantized in shape (W4A8) as it is loaded, an adapter of rank 16 where the base puts it, and is
trained for a few steps, replayed from a CUDA graph as a run does it, or run forward, launched anew as validation does it and replayed
as pictures are drawn. Memory: predicted against `torch.cuda.max_memory_allocated`, to be within max(10 %, 300 MiB). Time: a calibrated
roofline against the median step, to be within 25 %. Predictions are made in processes beside, while the first model is drawn; then the machine is calibrated, and
the configurations of a model share its weights. The file is written after each of them. Exit code 1 if one is not within its bounds.
"""

import argparse
import gc
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loragraft.adapters.inject import inject_adapter
from loragraft.adapters.joined import JoinedFactors
from loragraft.backbones.compiled import compile_blocks
from loragraft.backbones.replay import Replay
from loragraft.backbones.skeleton import randomize
from loragraft.backbones.spec import BaseSpec
from loragraft.data.cache import default_cache_root
from loragraft.disk import write_atomic
from loragraft.recipes.load import load_recipe
from loragraft.recipes.schema import AdapterConfig
from loragraft.train.dry_run import DryRun, dry_infer, dry_train
from loragraft.train.machine_calibration import calibrate
from loragraft.train.memory import set_checkpointing
from loragraft.train.preflight import Subject, open_subject
from loragraft.train.roofline import CARDS, Machine, run_seconds
from loragraft.train.step import GraphStep

GIB, MIB = 2**30, 2**20
WARM, STEPS = 2, 5
LAUNCHED = 8.0
"""Seconds of steps, at least, where Python counts: its speed on a shared machine changes by half within seconds."""
BESIDE = 12
"""Predictions that run at once."""
MODELS = {"flux": "flux1-dev", "sdxl": "sdxl", "sana": "sana-16b"}
"""Configuration's model -> base."""


@dataclass(frozen=True)
class Model:
    """A base without its weights, and a batch for it."""

    subject: Subject

    @classmethod
    def of(cls, base: str) -> "Model":
        """The base as a recipe that names nothing else would have it. Raises ValueError for an unknown one."""
        return cls(open_subject(load_recipe("marketing", [f"base={base}"]), default_cache_root()))

    @property
    def spec(self) -> BaseSpec:
        return self.subject.spec

    def batch(self, device: torch.device, pixels: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(latents, times, text) of one sample, all ones but the time."""
        latents, text = self.subject.batch(1, pixels)
        ones = {key: _ones(device, *value.shape) for key, value in text.items()}
        return _ones(device, *latents.shape), torch.full((1,), 0.5, device=device), ones

    def loss(self, module: nn.Module, device: torch.device, pixels: int) -> Tensor:
        """Of one sample, as training computes it."""
        latents, times, text = self.batch(device, pixels)
        guidance = self.spec.training_guidance
        return self.spec.family.loss(module, latents, torch.zeros_like(latents), times, text, guidance=guidance)


@dataclass(frozen=True)
class Configuration:
    """What is run."""

    model: str
    pixels: int = 1024
    trains: bool = True
    checkpointing: bool = False
    captured: bool = False
    """The step, or the pass as `backbones.replay` draws, replayed from a CUDA graph."""
    compiled: bool = False
    """The repeated blocks compiled as well, as a run on a GPU does it."""

    def __str__(self) -> str:
        how = "infer" if not self.trains else "train" + ("-checkpointed" if self.checkpointing else "")
        launched = "-launched" if self.trains and not self.captured else ""
        replayed = "-captured" if self.captured and not self.trains else ""
        return f"{self.model}-{self.pixels}-{how}{launched}{replayed}{'-compiled' if self.compiled else ''}"


_trained = partial(Configuration, captured=True)
CONFIGURATIONS = (
    Configuration("flux", trains=False),
    Configuration("flux", trains=False, captured=True),
    _trained("flux"),
    _trained("flux", checkpointing=True),
    _trained("flux", pixels=512),
    _trained("flux", pixels=512, checkpointing=True),
    Configuration("flux", pixels=512),
    Configuration("sdxl", trains=False),
    Configuration("sdxl", trains=False, captured=True),
    _trained("sdxl"),
    _trained("sdxl", checkpointing=True),
    Configuration("sana", trains=False),
    Configuration("sana", trains=False, captured=True),
    _trained("sana"),
    _trained("sana", checkpointing=True),
)
"""Of a model, passes without an adapter come first."""
COMPILED = tuple(_trained("flux", checkpointing=checkpointing, compiled=True) for checkpointing in (False, True))
"""What a run of FLUX.1 on one GPU does by itself. Its memory is predicted as blocks are written, so these are reported and not judged."""


def _ones(device: torch.device, *shape: int) -> Tensor:
    return torch.ones(shape, device=device, dtype=torch.bfloat16)


def build(model: Model) -> nn.Module:
    """The quantized model on meta, its 16-bit part in bfloat16."""
    return nn.Module.to(model.subject.transformer(), dtype=torch.bfloat16)


def predict(model: Model, configuration: Configuration) -> DryRun:
    """The dry run of a configuration."""
    module, cpu = build(model), torch.device("cpu")
    if configuration.trains:
        inject_adapter(module, AdapterConfig(), model.spec.lora_targets)
        set_checkpointing(module, "block" if configuration.checkpointing else "none")
    if configuration.captured and configuration.trains:
        JoinedFactors(module, torch.bfloat16)
    loss = partial(model.loss, module, cpu, configuration.pixels)
    if configuration.trains:
        optimizer = partial(torch.optim.AdamW, fused=True)
        return dry_train(module, loss, optimizer, captured=configuration.captured)
    return dry_infer(module, loss)


class Loaded:
    """A model on the GPU, for several measurements: those without an adapter first."""

    def __init__(self, model: Model, device: torch.device) -> None:
        self.model, self.device = model, device
        self.module = randomize(build(model), device, torch.bfloat16)
        self.parameters: list[nn.Parameter] = []
        self._compiled = False

    def measure(self, configuration: Configuration) -> dict[str, float]:
        """{peak_bytes, reserved_bytes, resting_bytes, seconds, fastest, slowest} of the real thing; resting: before the first step. Raises ValueError for what has to come before training."""
        if not configuration.trains and self.parameters:
            raise ValueError(f"{configuration} has no adapter, and the model carries one already: measure it first")
        if configuration.trains:
            if not self.parameters:
                self.parameters = inject_adapter(self.module, AdapterConfig(), self.model.spec.lora_targets)
            set_checkpointing(self.module, "block" if configuration.checkpointing else "none")
        if configuration.compiled and not self._compiled:
            compile_blocks(self.module)
            self._compiled = True
        free_memory()
        torch.cuda.reset_peak_memory_stats()
        resting = torch.cuda.memory_allocated()
        loss = partial(self.model.loss, self.module, self.device, configuration.pixels)
        try:
            found = (self._trained if configuration.trains else self._drawn)(configuration, loss)
            return {**found, "resting_bytes": resting}
        finally:
            for parameter in self.parameters:
                parameter.grad = None
            free_memory()

    def _drawn(self, configuration: Configuration, loss: Callable[[], Tensor]) -> dict[str, float]:
        """A pass; captured as the product draws. Raises RuntimeError where the GPU has no room for a graph."""
        step = torch.no_grad()(loss)
        if not configuration.captured:
            return timed(step, True)
        replay = Replay()
        try:
            with replay.drawing(self.module):
                found = timed(step, False)
            if not replay.graphs:
                raise RuntimeError(f"{configuration}: no pass was captured, `backbones.replay.ROOM` says when one is")
            return found
        finally:
            replay.clear()

    def _trained(self, configuration: Configuration, loss: Callable[[], Tensor]) -> dict[str, float]:
        optimizer, graph = torch.optim.AdamW(self.parameters, fused=True), None
        if (
            configuration.captured
        ):  # with the optimizer's states there, as when a run captures anew; replays count as reserved alone
            for parameter in self.parameters:
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            graph = GraphStep(lambda _: loss(), self.parameters, JoinedFactors(self.module, torch.bfloat16))

        def step() -> None:
            if graph is None:
                torch.autograd.backward(loss())
            else:
                graph({}, last=True)
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=graph is None)

        try:
            return timed(step, graph is None)
        finally:
            if graph is not None:
                graph.close()


def free_memory() -> None:
    """What is left of an earlier measurement."""
    gc.collect()
    torch.cuda.empty_cache()
    torch._C._cuda_clearCublasWorkspaces()


def timed(step: Callable[[], object], anew: bool) -> dict[str, float]:
    """Peaks, and the median of several steps beside the fastest and the slowest. anew: launched, not replayed. Memory of the warm ones
    then does not count; what is captured allocates once, in the first."""
    times: list[float] = []
    while len(times) < WARM + STEPS or (anew and sum(times[WARM:]) < LAUNCHED):
        if len(times) == WARM and anew:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    counted = times[WARM:]
    spread = {"seconds": statistics.median(counted), "fastest": min(counted), "slowest": max(counted)}
    return {"peak_bytes": peak, "reserved_bytes": reserved, **spread}


def measure(model: Model, configuration: Configuration, device: torch.device) -> dict[str, float]:
    """One measurement of a model of its own."""
    return Loaded(model, device).measure(configuration)


def compare(predicted: dict[str, Any], measured: dict[str, float]) -> dict[str, Any]:
    """Both, and how far they are apart."""
    off = predicted["peak_bytes"] - measured["peak_bytes"]
    late = predicted["seconds"] / measured["seconds"] - 1
    return {
        "predicted": predicted,
        "measured": measured,
        "memory_pct": 100 * off / measured["peak_bytes"],
        "time_pct": 100 * late,
        "memory_holds": abs(off) <= max(0.1 * measured["peak_bytes"], 300 * MIB),
        "time_holds": abs(late) <= 0.25,
    }


def figures(run: DryRun, machine: Machine | None, configuration: Configuration) -> dict[str, Any]:
    """JSON-able prediction; without a machine it has no time."""
    seconds = None
    if machine is not None:
        seconds = run_seconds(run, machine, host=not configuration.captured, compiled=configuration.compiled)
    return {
        "peak_bytes": run.peak, "reserved_bytes": run.reserved, "at_peak": run.at_peak, "saved": run.saved, "static_bytes": run.static,
        "unknown": list(run.unknown), "seconds": seconds,
    }  # fmt: skip


def predict_beside(configuration: Configuration) -> DryRun:
    """`predict` in a process of its own. Whether the card is a Hopper is asked of it; nothing runs there."""
    torch.set_num_threads(1)
    return predict(Model.of(MODELS[configuration.model]), configuration)


def predict_alone(chosen: Sequence[Configuration], file: Path) -> None:
    """Memory, one configuration after the other."""
    models = {name: Model.of(MODELS[name]) for name in {configuration.model for configuration in chosen}}
    found = {}
    for configuration in chosen:
        start = time.perf_counter()
        run = predict(models[configuration.model], configuration)
        found[str(configuration)] = figures(run, None, configuration)
        print(f"{configuration!s:36s} {run.peak / GIB:8.2f} GiB   {time.perf_counter() - start:5.1f} s", flush=True)
        write_atomic(file, (json.dumps(found, indent=1) + "\n").encode())


def line(name: str, found: dict[str, Any]) -> str:
    """One line of the table."""
    if "error" in found:
        return f"{name:36s} FAILED {found['error'].splitlines()[0]}"
    predicted, measured = found["predicted"], found["measured"]
    return (
        f"{name:36s} {predicted['peak_bytes'] / GIB:6.2f} predicted {measured['peak_bytes'] / GIB:6.2f} GiB measured "
        f"({found['memory_pct']:+.1f} %)   {predicted['seconds']:6.3f} / {measured['seconds']:6.3f} s ({found['time_pct']:+.0f} %)"
    )


def report(
    results: dict[str, Any], wanted: Sequence[Configuration], machine: Machine, commit: str, seconds: float
) -> dict[str, Any]:
    """The file as far as it is known; `passed` once all that is judged is there and within its bounds."""
    named = {name: found for name, found in results.items() if not name.endswith("-compiled") and "error" not in found}
    replayed = {str(configuration) for configuration in wanted if configuration.captured}
    judged = named.values()
    complete = all("error" not in results.get(str(configuration), {"error": "not yet"}) for configuration in wanted)
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu", "commit": commit,
        "versions": {package: version(package) for package in ("torch", "diffusers", "peft", "triton")},
        "command": "python benchmarks/preflight.py --out FILE", "machine": asdict(machine),
        "preflight_worst_pct": max((abs(found["memory_pct"]) for found in judged), default=None),
        "time_worst_pct": max((abs(found["time_pct"]) for found in judged), default=None),
        "replayed_time_worst_pct": max((abs(named[name]["time_pct"]) for name in replayed & named.keys()), default=None),
        "complete": complete, "seconds": seconds,
        "passed": complete and machine.calibrated and all(found["memory_holds"] and found["time_holds"] for found in judged),
        "configurations": results,
    }  # fmt: skip


def run_all(chosen: Sequence[Configuration], out: Path, commit: str, device: torch.device) -> int:
    """Predicts beside, calibrates, measures. Returns 1 if a prediction is outside its bounds."""
    start = time.perf_counter()

    def say(text: str) -> None:
        print(f"{time.perf_counter() - start:6.1f} s  {text}", flush=True)

    with ProcessPoolExecutor(BESIDE, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting: dict[Configuration, Future[DryRun]] = {c: pool.submit(predict_beside, c) for c in chosen}
        first = Loaded(Model.of(MODELS[chosen[0].model]), device)
        with torch.no_grad():  # has its kernels compiled
            first.model.loss(first.module, device, chosen[0].pixels)
        say(f"{chosen[0].model} drawn")
        runs = {configuration: future.result() for configuration, future in waiting.items()}
    say(f"{len(runs)} steps predicted")
    try:
        machine = calibrate(device)
        say(f"calibrated: {machine}")
    except (
        RuntimeError
    ) as error:  # memory is measured all the same; the file says "calibrated": false, and does not pass
        machine = next((card for card in CARDS if card.name in torch.cuda.get_device_name(device)), CARDS[0])
        say(f"calibration FAILED, {machine.name}'s usual figures instead: {error}")
    results: dict[str, Any] = {}
    there = {(chosen[0].model, False): first}  # one at a time
    del first
    for configuration in chosen:
        kind = (configuration.model, configuration.compiled)
        try:
            if kind not in there:
                there.clear()
                free_memory()
                there[kind] = Loaded(Model.of(MODELS[configuration.model]), device)
            measured = there[kind].measure(configuration)
            found = compare(figures(runs[configuration], machine, configuration), measured)
        except (RuntimeError, ValueError) as error:  # the others are measured all the same
            found = {"error": str(error)[-1500:]}
        results[str(configuration)] = found
        say(line(str(configuration), found))
        result = report(results, chosen, machine, commit, time.perf_counter() - start)
        write_atomic(out, (json.dumps(result, indent=1) + "\n").encode())
    return 0 if result["passed"] else 1


def main() -> int:
    """Predicts, measures, writes the JSON; 1 if a prediction is outside its bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--predict", type=Path, help="predict memory only, into this file, and stop: needs no GPU")
    parser.add_argument("--only", default="", help="configurations whose name contains this")
    parser.add_argument(
        "--compiled", action="store_true", help="also compiled and captured FLUX steps; a minute more each"
    )
    parser.add_argument("--commit", default="", help="commit of the code that runs")
    args = parser.parse_args()
    every = (*CONFIGURATIONS, *(COMPILED if args.compiled else ()))
    chosen = [configuration for configuration in every if args.only in str(configuration)]
    if not chosen:
        parser.error(f"--only {args.only}: there are {', '.join(map(str, every))}")
    if args.predict is not None:
        predict_alone(chosen, args.predict)
        return 0
    if args.out is None:
        parser.error("give --out, or --predict")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes beside
    torch.backends.cuda.enable_cudnn_sdp(False)  # as training does: its backward pass fails on some drivers
    return run_all(chosen, args.out, args.commit, torch.device("cuda"))


if __name__ == "__main__":
    sys.exit(main())
