"""Is preflight true? Models of FLUX.1, SDXL and SANA with random weights, predicted on fake tensors and then run on the GPU.

    python benchmarks/preflight.py --out benchmarks/results/preflight.json --commit $(git rev-parse HEAD)
    python benchmarks/preflight.py --predict predicted.json          the memory alone, anywhere

Each configuration is built from its published configuration, quantized in shape (W4A8), given an adapter of rank 16 on attention and
feed-forward, and trained for a few steps or run forward. Memory: predicted against `torch.cuda.max_memory_allocated`, to be
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
from diffusers import FluxTransformer2DModel, SanaTransformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

from loragraft.adapters.inject import inject_adapter
from loragraft.adapters.joined import JoinedFactors
from loragraft.backbones.architectures import FLUX, Architecture
from loragraft.backbones.compiled import compile_blocks
from loragraft.backbones.flow import flow_loss
from loragraft.backbones.flux1 import flux1_config
from loragraft.backbones.skeleton import meta_transformer, plan_architecture, randomize
from loragraft.quantization.settings import QuantSettings
from loragraft.recipes.schema import AdapterConfig
from loragraft.train.dry_run import DryRun, dry_infer, dry_train
from loragraft.train.machine_calibration import calibrate
from loragraft.train.memory import set_checkpointing
from loragraft.train.roofline import Machine, run_seconds
from loragraft.train.step import GraphStep

GIB, MIB = 2**30, 2**20
WARM, STEPS = 3, 5
SDXL = Architecture(
    class_name="UNet2DConditionModel",
    quantize=(r".*\.attn[12]\.(to_q|to_k|to_v|to_out\.0)", r".*\.ff\.net\.(0\.proj|2)", r".*\.proj_(in|out)"),
    quantize_w4a16=(),
    keep_16bit=(r"(time|add)_embedding\.linear_[12]", r".*\.time_emb_proj"),
)
SDXL_CONFIG: dict[str, Any] = {
    "in_channels": 4, "out_channels": 4, "sample_size": 128, "block_out_channels": [320, 640, 1280], "layers_per_block": 2,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10], "attention_head_dim": [5, 10, 20], "cross_attention_dim": 2048,
    "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
SANA = Architecture(
    class_name="SanaTransformer2DModel",
    quantize=(r".*\.attn[12]\.(to_q|to_k|to_v|to_out\.0)",),
    quantize_w4a16=(),
    keep_16bit=(r"time_embed\..*", r"caption_projection\..*", r"proj_out"),
)
SANA_CONFIG: dict[str, Any] = {
    "in_channels": 32, "out_channels": 32, "num_attention_heads": 70, "attention_head_dim": 32, "num_layers": 20,
    "num_cross_attention_heads": 20, "cross_attention_head_dim": 112, "cross_attention_dim": 2240,
    "caption_channels": 2304, "mlp_ratio": 2.5, "sample_size": 32, "patch_size": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Model:
    """A transformer by its configuration, and a batch for it."""

    transformer_class: type[nn.Module]
    config: dict[str, Any]
    architecture: Architecture
    loss: Callable[[nn.Module, torch.device, int], Tensor]
    """(model, device, pixels) -> the loss of a random batch of one."""


@dataclass(frozen=True)
class Configuration:
    """What is run."""

    model: str
    pixels: int = 1024
    trains: bool = True
    checkpointing: bool = False
    compiled: bool = False
    """Repeated blocks compiled and the step captured, as a run on a GPU does it."""

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

COMPILED = tuple(Configuration("flux", checkpointing=checkpointing, compiled=True) for checkpointing in (False, True))
"""What a run on one GPU does by itself. Compiled blocks keep less than preflight says, so these are reported and not judged."""


def _flux_loss(model: nn.Module, device: torch.device, pixels: int) -> Tensor:
    latents = _ones(device, 1, 16, pixels // 8, pixels // 8)
    text = {"prompt_embeds": _ones(device, 1, 512, 4096), "pooled_prompt_embeds": _ones(device, 1, 768)}
    times = torch.full((1,), 0.5, device=device)
    return flow_loss(model, latents, torch.zeros_like(latents), times, text, guidance=1.0)


def _sdxl_loss(model: nn.Module, device: torch.device, pixels: int) -> Tensor:
    latents = _ones(device, 1, 4, pixels // 8, pixels // 8)
    more = {"text_embeds": _ones(device, 1, 1280), "time_ids": _ones(device, 1, 6)}
    times = torch.full((1,), 500, device=device)
    (noise,) = model(latents, times, _ones(device, 1, 77, 2048), added_cond_kwargs=more, return_dict=False)
    return torch.nn.functional.mse_loss(noise.float(), latents.float())


def _sana_loss(model: nn.Module, device: torch.device, pixels: int) -> Tensor:
    latents = _ones(device, 1, 32, pixels // 32, pixels // 32)
    times = torch.full((1,), 500, device=device)
    (velocity,) = model(latents, _ones(device, 1, 300, 2304), times, return_dict=False)
    return torch.nn.functional.mse_loss(velocity.float(), latents.float())


def _ones(device: torch.device, *shape: int) -> Tensor:
    return torch.ones(shape, device=device, dtype=torch.bfloat16)


MODELS = {
    "flux": Model(FluxTransformer2DModel, flux1_config("dev"), FLUX, _flux_loss),
    "sdxl": Model(UNet2DConditionModel, SDXL_CONFIG, SDXL, _sdxl_loss),
    "sana": Model(SanaTransformer2DModel, SANA_CONFIG, SANA, _sana_loss),
}


def build(model: Model) -> nn.Module:
    """The quantized model on meta, its 16-bit part in bfloat16."""
    plan = partial(plan_architecture, model.architecture, QuantSettings(rank=32, smoothing="hadamard"))
    return nn.Module.to(meta_transformer(model.transformer_class, model.config, plan), dtype=torch.bfloat16)


def prepared(module: nn.Module, model: Model, configuration: Configuration) -> list[nn.Parameter]:
    """Adapter and checkpointing, as a run sets them up; returns what is trained."""
    if not configuration.trains:
        return []
    parameters = inject_adapter(module, AdapterConfig(), model.architecture.quantize)
    set_checkpointing(module, "block" if configuration.checkpointing else "none")
    if configuration.checkpointing:
        module.train()  # UNets checkpoint in training mode only; there is no dropout
    return parameters


def predict(model: Model, configuration: Configuration) -> DryRun:
    """The dry run of a configuration."""
    module, cpu = build(model), torch.device("cpu")
    prepared(module, model, configuration)
    if configuration.compiled:
        JoinedFactors(module, torch.bfloat16)
    loss = partial(model.loss, module, cpu, configuration.pixels)
    if configuration.trains:
        optimizer = partial(torch.optim.AdamW, fused=True)
        return dry_train(module, loss, optimizer, captured=configuration.compiled)
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
        if number == WARM and not configuration.compiled:  # what is captured allocates once, in the first step
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
    seconds = None if machine is None else run_seconds(run, machine, host=not configuration.compiled)
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
    if args.predict is not None:
        found = {}
        for configuration in chosen:
            start = time.perf_counter()
            run = predict(MODELS[configuration.model], configuration)
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
        model = MODELS[configuration.model]
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
