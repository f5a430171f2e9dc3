"""FLUX.1-dev-shaped LoRA training and inference on one GPU: ours against bf16, FP8, NF4 and SDNQ, each in a process of its own.

    python benchmarks/flux_training.py all --parts parts --out benchmarks/results/flux_training.json --commit $(git rev-parse HEAD)
    python benchmarks/flux_training.py run ours_1024 --parts parts --profile
    python benchmarks/flux_training.py run ours_512_8gib --parts parts --phases              where the time to the first step goes

Every variant trains the same rank-16 adapter (attention and feed-forward, 418 layers) on the same latents, text and noise, over
weights that stand for the same matrices: those of the rivals are the dequantized ones of the INT4 model, whose codes are random.
One step = forward + loss + backward + clipping + AdamW. bf16 runs as people run it: PEFT, float32 factors, autocast, SDPA, eager or
after `compile_repeated_blocks`. A variant that is in `--parts` already is not run again; one that is cut short leaves NAME.partial there:
what it reached when, and the milliseconds of its steps so far. SDNQ compiles its products before its first step (`sdnq_rehearsal.py`).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import triton
from diffusers import AutoencoderKL, FluxTransformer2DModel
from first_step import Phases, Progress, first_step_parts, kernel_seconds, phase_lines
from frozen_linears import frozen_linear
from sdnq_rehearsal import rehearse
from torch import Tensor, nn

from loragraft.adapters.checkpoint import Adapter
from loragraft.adapters.inject import inject_adapter
from loragraft.adapters.switching import AdapterSwitch
from loragraft.backbones.architectures import FLUX, FOLDER_RANK
from loragraft.backbones.attention import Attention, set_attention
from loragraft.backbones.compiled import compile_blocks
from loragraft.backbones.flow import flow_loss, predict_velocity
from loragraft.backbones.replay import Replay
from loragraft.backbones.skeleton import meta_transformer, plan_architecture, randomize
from loragraft.quantization.linear import SVDQuantLinear
from loragraft.quantization.settings import QuantSettings
from loragraft.recipes.schema import AdapterConfig, OptimConfig
from loragraft.train.memory import Checkpointing, set_checkpointing
from loragraft.train.optim import choose_optimizer
from loragraft.train.step import graph_step
from loragraft.train.warm import start_workers

GIB = 2**30
LOSS_STEPS, TIMED_FROM = 20, 5
TEXT_TOKENS, RATE = 512, 1e-4
CONFIG = {"guidance_embeds": False}  # FluxTransformer2DModel's defaults are FLUX.1's; the guidance embedder is 0.1 ms
VAE = {
    "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4, "layers_per_block": 2,
    "up_block_types": ["UpDecoderBlock2D"] * 4, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip
DEVICE = torch.device("cuda")


@dataclass(frozen=True)
class Variant:
    """One process. base: int4, bf16, fp8, nf4 or sdnq."""

    base: str = "int4"
    resolution: int = 1024
    compiled: bool = True
    attention: Attention = "sdpa"
    checkpointing: Checkpointing = "none"
    dgrad: Literal["dequantized", "int8"] = "dequantized"
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    offload: bool = False
    cap_gib: float = 0.0
    """Of reserved memory; 0: none."""
    infer: bool = False


VARIANTS = {
    "ours_1024": Variant(attention="flash_attn_4", checkpointing="gelu"),
    "ours_1024_keep_all": Variant(attention="flash_attn_4"),
    "ours_1024_cheap": Variant(attention="flash_attn_4", checkpointing="cheap"),
    "ours_1024_sdpa": Variant(checkpointing="gelu"),
    "ours_1024_int8_dgrad": Variant(attention="flash_attn_4", checkpointing="gelu", dgrad="int8"),
    "ours_1024_ckpt": Variant(attention="flash_attn_4", checkpointing="block"),
    "ours_1024_ckpt_offload": Variant(attention="flash_attn_4", checkpointing="block", offload=True),
    "ours_1024_ckpt_adamw8bit": Variant(attention="flash_attn_4", checkpointing="block", optimizer="adamw8bit"),
    "ours_512": Variant(resolution=512, attention="flash_attn_4"),
    "ours_512_8gib": Variant(
        "int4", 512, True, "flash_attn_4", "block", optimizer="adamw8bit", offload=True, cap_gib=8.0
    ),
    "bf16_eager_1024": Variant("bf16", compiled=False),
    "bf16_compiled_1024": Variant("bf16"),
    "bf16_compiled_1024_same_attention": Variant("bf16", attention="flash_attn_4"),
    "bf16_eager_512": Variant("bf16", 512, compiled=False),
    "bf16_compiled_512": Variant("bf16", 512),
    "fp8_compiled_1024": Variant("fp8"),
    "nf4_eager_1024": Variant("nf4", compiled=False),
    "sdnq_eager_1024": Variant("sdnq", compiled=False),  # it compiles its own functions
    "ours_image": Variant(attention="flash_attn_4", infer=True),
    "bf16_image": Variant("bf16", attention="flash_attn_4", infer=True),
}


def build_transformer(base: str) -> nn.Module:
    """A FLUX.1-dev-shaped model with random codes, or one of another kind over the same matrices."""
    settings = QuantSettings(numerics="w4a8", rank=FOLDER_RANK, smoothing="hadamard")
    skeleton = meta_transformer(FluxTransformer2DModel, CONFIG, partial(plan_architecture, FLUX, settings))
    model = randomize(skeleton, DEVICE, torch.bfloat16)
    if base == "int4":
        return model
    few_rows = [
        path for path, layer in model.named_modules() if isinstance(layer, SVDQuantLinear) and layer.numerics == "w4a16"
    ]
    for path, layer in list(model.named_modules()):
        if isinstance(layer, SVDQuantLinear):
            made = "bf16" if path in few_rows else base
            model.set_submodule(path, frozen_linear(made, layer.dequantized_weight(torch.bfloat16), layer.bias))
    return model


def batch(resolution: int, step: int) -> dict[str, Tensor]:
    """Latents, noise, time and text of one image; the same for every variant."""
    generator = torch.Generator().manual_seed(step)
    edge = resolution // 8

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, torch.bfloat16)

    return {
        "latents": normal(1, 16, edge, edge), "noise": normal(1, 16, edge, edge),
        "times": torch.rand(1, generator=generator).to(DEVICE),
        "prompt_embeds": normal(1, TEXT_TOKENS, 4096), "pooled_prompt_embeds": normal(1, 768),
    }  # fmt: skip


def loss_of(transformer: nn.Module, autocast: bool) -> Callable[[dict[str, Tensor]], Tensor]:
    """The flow-matching loss; rivals under autocast, as diffusers' training scripts run them."""

    def loss(tensors: dict[str, Tensor]) -> Tensor:
        text = {key: tensors[key] for key in ("prompt_embeds", "pooled_prompt_embeds")}
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            return flow_loss(transformer, tensors["latents"], tensors["noise"], tensors["times"], text)

    return loss


def train(variant: Variant, profile: bool, progress: Progress) -> dict[str, Any]:
    """Twenty steps: losses, milliseconds of a step (median of the last fifteen), peak memory, seconds to the first step."""
    if variant.cap_gib:
        torch.cuda.set_per_process_memory_fraction(variant.cap_gib * GIB / torch.cuda.mem_get_info()[1])
    # As train/lora.py does, while weights are read; what is not done by then counts.
    workers = start_workers(variant.attention, DEVICE) if variant.compiled else None
    transformer = build_transformer(variant.base)
    torch.cuda.synchronize()
    static = torch.cuda.memory_allocated() / GIB
    progress("model built", static_gib=static)
    torch.cuda.empty_cache()
    start, phases = time.perf_counter(), Phases(progress)
    if workers is not None:
        workers.join()
    phases("compilers started")
    torch.cuda.reset_peak_memory_stats()
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward pass fails on some drivers
    set_attention(transformer, variant.attention)
    parameters = inject_adapter(transformer, AdapterConfig(), FLUX.quantize)
    phases("adapter injected")
    ours = variant.base == "int4"
    if ours:
        for module in transformer.modules():
            if isinstance(module, SVDQuantLinear):
                module.dgrad = variant.dgrad
    set_checkpointing(transformer, variant.checkpointing, offload=variant.offload)
    if variant.compiled:
        if ours:
            compile_blocks(transformer)
        else:
            transformer.compile_repeated_blocks(fullgraph=True)
    loss = loss_of(transformer, autocast=not ours)
    graph = graph_step(transformer, loss, parameters) if ours else None
    optimizer = choose_optimizer(parameters, OptimConfig(name=variant.optimizer, learning_rate=RATE), fused=True)
    phases("blocks marked, factors joined, optimizer made")
    batches, kernels = [batch(variant.resolution, number) for number in range(LOSS_STEPS)], kernel_seconds()
    if variant.base == "sdnq":
        rehearse(lambda: loss(batches[0]).backward(), phases)
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def step(tensors: dict[str, Tensor]) -> Tensor:
        if graph is not None:
            value = graph(tensors, last=True)
        else:
            value = loss(tensors)
            phases("first forward pass")
            value.backward()
        phases("first micro-batch")
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        phases("clipping and optimizer")
        optimizer.zero_grad(set_to_none=graph is None)
        return value.detach()

    losses, times = [], []
    first = 0.0
    for number, tensors in enumerate(batches):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        value = step(tensors)
        end.record()
        losses.append(float(value))
        times.append(begin.elapsed_time(end))
        if number == 0:
            first = time.perf_counter() - start
            parts = first_step_parts(phases, {} if graph is None else graph.seconds, kernels)
        progress(f"step {number + 1}", steps_ms=times, losses=losses)
    result = {
        "step_ms": statistics.median(times[TIMED_FROM:]),
        "step_ms_worst": max(times[TIMED_FROM:]),
        "losses": losses,
        "static_gib": static,
        "peak_gib": torch.cuda.max_memory_allocated() / GIB,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        "first_step_seconds": first,
        "first_step_parts": parts,
        "parameters": sum(p.numel() for p in parameters),
    }
    return result | ({"profile": profiled(lambda: step(batches[0]))} if profile else {})


def profiled(call: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of GPU time per kernel of one call, the largest first; names shortened to 70 characters."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    total: dict[str, float] = {}
    for event in seen.key_averages():
        name = event.key[:70]
        total[name] = total.get(name, 0.0) + event.self_device_time_total / 1000
    return dict(sorted(total.items(), key=lambda item: -item[1])[:60])


@torch.no_grad()
def infer(variant: Variant) -> dict[str, Any]:
    """Seconds of an image of 20 and of 4 steps, decoding included, and peak memory; ours also with an adapter grafted."""
    transformer = build_transformer(variant.base)
    torch.cuda.empty_cache()
    transformer_gib = torch.cuda.memory_allocated() / GIB
    set_attention(transformer, variant.attention)
    vae = AutoencoderKL.from_config(VAE).to(DEVICE, torch.bfloat16).eval()
    tensors = batch(variant.resolution, 0)
    result: dict[str, Any] = {"transformer_gib": transformer_gib}
    ours = variant.base == "int4"
    if variant.compiled:
        compile_blocks(transformer, shapes=2) if ours else transformer.compile_repeated_blocks(fullgraph=True)
    for grafted in (False, True) if ours else (False,):
        if grafted:
            AdapterSwitch(transformer).use([(_random_adapter(transformer), 1.0)], any_base=True)
        sampler = _Sampler(transformer, vae, tensors, Replay() if ours else None)
        torch.cuda.reset_peak_memory_stats()
        name = "grafted_" if grafted else ""
        for steps in (20, 4):
            seconds = []
            for _ in range(3):
                torch.cuda.synchronize()
                start = time.perf_counter()
                sampler(steps)
                torch.cuda.synchronize()
                seconds.append(time.perf_counter() - start)
            result[f"{name}image_{steps}_steps_seconds"] = statistics.median(seconds)
        result[f"{name}peak_gib"] = torch.cuda.max_memory_allocated() / GIB
        del sampler
    return result


class _Sampler:
    """Euler steps and decoding; passes replayed from CUDA graphs where asked, as the product draws."""

    def __init__(
        self, transformer: nn.Module, vae: nn.Module, tensors: dict[str, Tensor], replay: Replay | None
    ) -> None:
        self.transformer, self.vae, self.replay, self.noise = transformer, vae, replay, tensors["noise"]
        self.latents, self.times = tensors["noise"].clone(), tensors["times"].clone()
        self.text = {key: tensors[key] for key in ("prompt_embeds", "pooled_prompt_embeds")}
        self(3)

    def __call__(self, steps: int) -> Tensor:
        self.latents.copy_(self.noise)
        with nullcontext() if self.replay is None else self.replay.drawing(self.transformer):
            for number in range(steps):
                self.times.fill_(1 - number / steps)
                self.latents.sub_(predict_velocity(self.transformer, self.latents, self.times, self.text) / steps)
        return self.vae.decode(self.latents / 0.3611 + 0.1159, return_dict=False)[0]


def _random_adapter(transformer: nn.Module) -> Adapter:
    generator = torch.Generator().manual_seed(1)
    pairs = {}
    for path, layer in transformer.named_modules():
        if isinstance(layer, SVDQuantLinear) and layer.numerics == "w4a8":
            down = torch.randn(16, layer.in_features, generator=generator) / layer.in_features**0.5
            pairs[path] = (
                down.to(DEVICE),
                (torch.randn(layer.out_features, 16, generator=generator) * 0.01).to(DEVICE),
            )
    return Adapter("random", {}, pairs)


def run(name: str, parts: Path, profile: bool, commit: str) -> dict[str, Any]:
    """One variant in this process; its figures go to `parts`/NAME.json."""
    variant = VARIANTS[name]
    torch.manual_seed(0)
    progress = Progress(parts / f"{name}.partial")
    figures = infer(variant) if variant.infer else train(variant, profile, progress)
    versions = {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda}
    made = {"variant": name, "device": torch.cuda.get_device_name(), "versions": versions, "commit": commit}
    figures = {**made, **asdict(variant), **figures}
    parts.mkdir(parents=True, exist_ok=True)
    (parts / f"{name}.json").write_text(json.dumps(figures, indent=1) + "\n")
    progress.file.unlink(missing_ok=True)
    return figures


def collect(parts: Path, fidelity: Path | None, preflight: Path | None = None) -> dict[str, Any]:
    """The report's keys from the parts that are there, `multi_gpu.py`'s among them; a figure whose parts are missing is null.

    fidelity, preflight: the files of the benchmarks of that name."""
    found = {file.stem: json.loads(file.read_text()) for file in sorted(parts.glob("*.json"))}

    def ratio(above: str, below: str, key: str = "step_ms") -> float | None:
        return found[above][key] / found[below][key] if above in found and below in found else None

    def figure(name: str, key: str) -> float | None:
        return found[name][key] if name in found else None

    def given(file: Path | None, key: str) -> float | None:
        return None if file is None else json.loads(file.read_text())[key]

    def held_share() -> float | None:
        """The most that a process keeps of a base divided between two."""
        return max(found["fsdp"]["held_gib"]) / found["fsdp"]["held_gib_whole"] if "fsdp" in found else None

    return {
        "device": sorted({part["device"] for part in found.values()}),
        "versions": next(iter(found.values()))["versions"],
        "commit": sorted({part["commit"] for part in found.values()}),
        "command": "python benchmarks/flux_training.py all --parts PARTS --out OUT --commit COMMIT",
        "step_1024_vs_eager": ratio("bf16_eager_1024", "ours_1024"),
        "step_1024_vs_compiled": ratio("bf16_compiled_1024", "ours_1024"),
        "step_1024_vs_compiled_same_attention": ratio("bf16_compiled_1024_same_attention", "ours_1024"),
        "step_1024_vs_fp8": ratio("fp8_compiled_1024", "ours_1024"),
        "step_1024_vs_nf4": ratio("nf4_eager_1024", "ours_1024"),
        "step_1024_vs_sdnq": ratio("sdnq_eager_1024", "ours_1024"),
        "step_512_vs_eager": ratio("bf16_eager_512", "ours_512"),
        "step_512_vs_compiled": ratio("bf16_compiled_512", "ours_512"),
        "peak_gib_ckpt_1024": figure("ours_1024_ckpt", "peak_gib"),
        "peak_gib_ckpt_1024_offload": figure("ours_1024_ckpt_offload", "peak_gib"),
        "step_1024_ckpt_offload_vs_ckpt": ratio("ours_1024_ckpt_offload", "ours_1024_ckpt"),
        "peak_gib_nockpt_1024": figure("ours_1024", "peak_gib"),
        "first_step_seconds": figure("ours_1024", "first_step_seconds"),
        "image_20_steps_vs_bf16": ratio("bf16_image", "ours_image", "image_20_steps_seconds"),
        "image_memory_vs_bf16": ratio("ours_image", "bf16_image", "transformer_gib"),
        "reserved_gib_whole_run_1024": figure("whole_run_1024", "reserved_gib"),
        "reserved_gib_whole_run_512": figure("whole_run_512", "reserved_gib"),
        "preflight_worst_pct": given(preflight, "preflight_worst_pct"),
        "grad_cosine_min": given(fidelity, "grad_cosine_min"),
        "ddp2_scaling": figure("ddp_2", "ddp2_scaling"),
        "gpu_idle_share": figure("idle", "idle_share"),
        "fsdp_held_share": held_share(),
        "keep_all": {
            "step_1024_vs_eager": ratio("bf16_eager_1024", "ours_1024_keep_all"),
            "step_1024_vs_compiled": ratio("bf16_compiled_1024", "ours_1024_keep_all"),
            "step_1024_vs_compiled_same_attention": ratio("bf16_compiled_1024_same_attention", "ours_1024_keep_all"),
            "peak_gib_nockpt_1024": figure("ours_1024_keep_all", "peak_gib"),
        },
        "loss_worst_pct": _loss_difference(found),
        "parts": found,
    }


def _loss_difference(found: dict[str, Any]) -> float | None:
    """Largest difference of a step's loss from bf16's, in per cent."""
    if "bf16_compiled_1024" not in found or "ours_1024" not in found:
        return None
    pairs = zip(found["ours_1024"]["losses"], found["bf16_compiled_1024"]["losses"], strict=True)
    return 100 * max(abs(ours - theirs) / theirs for ours, theirs in pairs)


def main() -> int:
    """Prints one line per variant and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["all", "run", "collect"])
    parser.add_argument("variant", nargs="*", choices=[*VARIANTS, []], help="default: all of them")
    parser.add_argument("--parts", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default="", help="commit of the code that runs")
    parser.add_argument("--fidelity", type=Path, help="JSON of benchmarks/fidelity.py")
    parser.add_argument("--preflight", type=Path, help="JSON of benchmarks/preflight.py")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument(
        "--phases", action="store_true", help="print where the time to the first step goes, not all figures"
    )
    parser.add_argument("--timeout", type=float, default=240, help="seconds for one variant")
    args = parser.parse_args()
    if args.what == "run":
        for name in args.variant:
            figures = run(name, args.parts, args.profile, args.commit)
            print("\n".join(phase_lines(figures["first_step_parts"])) if args.phases else json.dumps(figures, indent=1))
        return 0
    if args.what == "all":
        for name in args.variant or VARIANTS:
            if not (args.parts / f"{name}.json").exists():
                _in_its_own_process(name, args)
    if args.out is not None:
        args.out.write_text(json.dumps(collect(args.parts, args.fidelity, args.preflight), indent=1) + "\n")
    return 0


def _in_its_own_process(name: str, args: argparse.Namespace) -> None:
    command = [sys.executable, __file__, "run", name, "--parts", str(args.parts), "--commit", args.commit]
    start = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=args.timeout, env=dict(os.environ))
    except subprocess.TimeoutExpired:
        reached = args.parts / f"{name}.partial"
        print(
            f"{name}: not done after {args.timeout:.0f} s; {reached.read_text() if reached.exists() else 'nothing told'}"
        )
        return
    file = args.parts / f"{name}.json"
    if done.returncode or not file.exists():
        print(f"{name}: failed\n{done.stderr[-1500:]}")
        return
    figures = json.loads(file.read_text())
    shown = {key: round(value, 3) for key, value in figures.items() if isinstance(value, float)}
    print(f"{name}: {time.perf_counter() - start:.0f} s; {shown}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
