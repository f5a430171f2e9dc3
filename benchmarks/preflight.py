"""Is preflight true? Models of FLUX.1, SDXL and SANA with random weights, predicted on fake tensors and then run on the GPU.

    python benchmarks/preflight.py --out benchmarks/results/preflight.json --commit $(git rev-parse HEAD)
    python benchmarks/preflight.py --predict predicted.json          the memory alone, anywhere

Each base has its published shapes, quantized in shape (W4A8) as it is loaded, an adapter of rank 16 where the base puts it, and is
trained for a few steps or run forward. Memory: predicted against `torch.cuda.max_memory_allocated`, to be
within max(10 %, 300 MiB). Time: a calibrated roofline against the median step, to be within 25 %. Exit code 1 if not.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
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
from loragraft.backbones.skeleton import randomize
from loragraft.backbones.spec import BaseSpec
from loragraft.data.cache import default_cache_root
from loragraft.recipes.load import load_recipe
from loragraft.recipes.schema import AdapterConfig
from loragraft.train.dry_run import DryRun, dry_infer, dry_train
from loragraft.train.machine_calibration import calibrate
from loragraft.train.memory import set_checkpointing
from loragraft.train.preflight import Subject, open_subject
from loragraft.train.roofline import Machine, run_seconds
from loragraft.train.step import GraphStep

GIB, MIB = 2**30, 2**20
WARM, STEPS = 3, 5
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
    """The step replayed from a CUDA graph."""
    compiled: bool = False
    """The repeated blocks compiled as well, as a run on a GPU does it."""

    def __str__(self) -> str:
        how = "infer" if not self.trains else "train" + ("-checkpointed" if self.checkpointing else "")
        return f"{self.model}-{self.pixels}-{how}{'-compiled' if self.compiled else ''}"


CONFIGURATIONS = (
    Configuration("flux"),
    Configuration("flux", checkpointing=True),
    Configuration("flux", trains=False),
    Configuration("flux", pixels=512),
    Configuration("flux", pixels=512, checkpointing=True),
    Configuration("sdxl"),
    Configuration("sdxl", checkpointing=True),
    Configuration("sdxl", trains=False),
    Configuration("sana"),
    Configuration("sana", checkpointing=True),
    Configuration("sana", trains=False),
)

COMPILED = tuple(
    Configuration("flux", checkpointing=checkpointing, captured=True, compiled=True) for checkpointing in (False, True)
)
"""What a run on one GPU does by itself. Compiled blocks keep less than preflight says, so these are reported and not judged."""


def _ones(device: torch.device, *shape: int) -> Tensor:
    return torch.ones(shape, device=device, dtype=torch.bfloat16)


def build(model: Model) -> nn.Module:
    """The quantized model on meta, its 16-bit part in bfloat16."""
    return nn.Module.to(model.subject.transformer(), dtype=torch.bfloat16)


def prepared(module: nn.Module, model: Model, configuration: Configuration) -> list[nn.Parameter]:
    """Adapter and checkpointing, as a run sets them up; returns what is trained."""
    if not configuration.trains:
        return []
    parameters = inject_adapter(module, AdapterConfig(), model.spec.lora_targets)
    set_checkpointing(module, "block" if configuration.checkpointing else "none")
    return parameters


def predict(model: Model, configuration: Configuration) -> DryRun:
    """The dry run of a configuration."""
    module, cpu = build(model), torch.device("cpu")
    prepared(module, model, configuration)
    if configuration.captured:
        JoinedFactors(module, torch.bfloat16)
    loss = partial(model.loss, module, cpu, configuration.pixels)
    if configuration.trains:
        optimizer = partial(torch.optim.AdamW, fused=True)
        return dry_train(module, loss, optimizer, captured=configuration.captured)
    return dry_infer(module, loss)


def measure(model: Model, configuration: Configuration, device: torch.device) -> dict[str, float]:
    """{peak_bytes, reserved_bytes, seconds} of the real thing."""
    gc.collect()
    torch.cuda.empty_cache()
    torch._C._cuda_clearCublasWorkspaces()
    module = randomize(build(model), device, torch.bfloat16)
    parameters = prepared(module, model, configuration)
    loss = partial(model.loss, module, device, configuration.pixels)
    step = _train_step(module, parameters, loss, configuration) if configuration.trains else torch.no_grad()(loss)
    times = []
    for number in range(WARM + STEPS):
        if number == WARM and not configuration.captured:  # what is captured allocates once, in the first step
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return {"peak_bytes": peak, "reserved_bytes": reserved, "seconds": statistics.median(times[WARM:])}


def _train_step(
    module: nn.Module, parameters: list[nn.Parameter], loss: Callable[[], Tensor], configuration: Configuration
) -> Callable[[], object]:
    optimizer = torch.optim.AdamW(parameters, fused=True)
    graph = None
    if configuration.compiled:
        compile_blocks(module)
    if configuration.captured:
        graph = GraphStep(lambda tensors: loss(), parameters, JoinedFactors(module, torch.bfloat16))

    def step() -> None:
        if graph is None:
            torch.autograd.backward(loss())
        else:
            graph({}, last=True)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=graph is None)

    return step


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
    seconds = None if machine is None else run_seconds(run, machine, host=not configuration.captured)
    return {
        "peak_bytes": run.peak, "reserved_bytes": run.reserved, "at_peak": run.at_peak, "saved": run.saved,
        "unknown": list(run.unknown), "seconds": seconds,
    }  # fmt: skip


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
    models = {name: Model.of(MODELS[name]) for name in {configuration.model for configuration in chosen}}
    if args.predict is not None:
        found = {}
        for configuration in chosen:
            start = time.perf_counter()
            run = predict(models[configuration.model], configuration)
            found[str(configuration)] = figures(run, None, configuration)
            print(f"{configuration!s:32s} {run.peak / GIB:8.2f} GiB   {time.perf_counter() - start:5.1f} s", flush=True)
        args.predict.write_text(json.dumps(found, indent=1) + "\n")
        return 0
    if args.out is None:
        parser.error("give --out, or --predict")
    device = torch.device("cuda")
    torch.backends.cuda.enable_cudnn_sdp(False)  # as training does: its backward pass fails on some drivers
    machine = calibrate(device)
    results = {}
    for configuration in chosen:
        model = models[configuration.model]
        predicted = figures(predict(model, configuration), machine, configuration)
        results[str(configuration)] = found = compare(predicted, measure(model, configuration, device))
        print(
            f"{configuration!s:32s} {predicted['peak_bytes'] / GIB:6.2f} predicted {found['measured']['peak_bytes'] / GIB:6.2f} "
            f"GiB measured ({found['memory_pct']:+.1f} %)   {predicted['seconds']:6.3f} / {found['measured']['seconds']:6.3f} s "
            f"({found['time_pct']:+.0f} %)",
            flush=True,
        )
    judged = {name: found for name, found in results.items() if not name.endswith("-compiled")}
    passed = all(found["memory_holds"] and found["time_holds"] for found in judged.values())
    result = {
        "device": torch.cuda.get_device_name(), "commit": args.commit,
        "versions": {package: version(package) for package in ("torch", "diffusers", "peft", "triton")},
        "command": "python benchmarks/preflight.py --out FILE", "machine": asdict(machine),
        "preflight_worst_pct": max(abs(found["memory_pct"]) for found in judged.values()),
        "time_worst_pct": max(abs(found["time_pct"]) for found in judged.values()),
        "passed": passed, "configurations": results,
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
