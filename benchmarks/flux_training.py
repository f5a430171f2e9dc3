"""FLUX.1-dev-shaped LoRA training and inference on one GPU: ours against bf16, FP8, NF4 and SDNQ, each in a process of its own.

    python benchmarks/flux_training.py all --parts parts --out benchmarks/results/flux_training.json --commit $(git rev-parse HEAD)
    python benchmarks/flux_training.py all ours_512 whole_run_512 --parts parts --deadline 575
    python benchmarks/flux_training.py run ours_1024 --parts parts --profile
    python benchmarks/flux_training.py run ours_512_8gib --parts parts --phases              where the time to the first step goes

Every variant trains the same rank-16 adapter (attention and feed-forward, 418 layers) on the same latents, text and noise, over
weights that stand for the same matrices: those of the rivals are the dequantized ones of the INT4 model, whose codes are random.
One step = forward + loss + backward + clipping + AdamW, queued as `train/lora.py` queues it, for the rivals too: in the timed region no
step waits for the one before, whose loss is read a step later (`timed_steps.py`). The region begins with 4 s of untimed work, so that
all find a card as warm; it leaves the adapter alone. bf16 runs as people run it: PEFT, float32 factors, autocast, SDPA, eager or after
`compile_repeated_blocks`. A variant that is in `--parts` already is not run again; one that is cut short leaves NAME.partial there: what
it reached when, and the milliseconds of its steps so far. SDNQ compiles its products before its first step (`sdnq_rehearsal.py`).

`all` runs variants and whole runs (`whole_run.py`) side by side, as most of their time is the compiler's (`side_by_side.py`), and stops the
others while one is timed (`timed_alone.py`). `ours_1024` comes first, with nothing beside it and caches that are empty: its time to the
first step is the one that counts, the others' are null. At the deadline, and on a signal, what runs is ended, the table printed and
`--out` written. Exit code 1 if a part is missing in the end, 128 + N after signal N; the same command goes on.
"""

import argparse
import gc
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import torch
import triton
from diffusers import AutoencoderKL, FluxTransformer2DModel
from first_step import Phases, Progress, first_step_parts, kernel_seconds, phase_lines
from flux_figures import collect
from flux_variants import CONTEXT_GIB, EXPECTED, FIRST, VARIANTS, Variant, gib_before
from frozen_linears import frozen_linear
from sdnq_rehearsal import rehearse
from side_by_side import Job, Limits, SideBySide, table, wait_for_memory
from timed_alone import Alone, end_with
from timed_steps import TimedSteps, settling
from torch import Tensor, nn

from loragraft.adapters.checkpoint import Adapter
from loragraft.adapters.inject import inject_adapter
from loragraft.adapters.switching import AdapterSwitch
from loragraft.backbones.architectures import FLUX, FOLDER_RANK
from loragraft.backbones.attention import set_attention
from loragraft.backbones.compiled import compile_blocks
from loragraft.backbones.flow import flow_loss, predict_velocity
from loragraft.backbones.replay import Replay
from loragraft.backbones.skeleton import meta_transformer, plan_architecture, randomize
from loragraft.quantization.linear import SVDQuantLinear
from loragraft.quantization.settings import QuantSettings
from loragraft.recipes.schema import AdapterConfig, OptimConfig
from loragraft.train.memory import set_checkpointing
from loragraft.train.optim import choose_optimizer
from loragraft.train.step import graph_step
from loragraft.train.warm import start_workers

GIB = 2**30
LOSS_STEPS, TIMED_FROM, SETTLING, SETTLE_SECONDS = 20, 5, 2, 4.0  # before the first that is timed, the clock settles
END_SECONDS = 5.0
"""Of `--deadline`, kept for what follows the last process."""
TEXT_TOKENS, RATE, SEED = 512, 1e-4, 0
CONFIG = {"guidance_embeds": False}  # FluxTransformer2DModel's defaults are FLUX.1's; the guidance embedder is 0.1 ms
FEW_BLOCKS = {"num_layers": 2, "num_single_layers": 2}
VAE = {
    "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4, "layers_per_block": 2,
    "up_block_types": ["UpDecoderBlock2D"] * 4, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip
DEVICE = torch.device("cuda")


def build_transformer(base: str, config: Mapping[str, Any] = CONFIG) -> nn.Module:
    """A FLUX.1-dev-shaped model with random codes, or one of another kind over the same matrices.

    The modulations' layers, which see one row, are bf16 beside FP8 and SDNQ, whose products are for many; NF4's takes any number."""
    settings = QuantSettings(numerics="w4a8", rank=FOLDER_RANK, smoothing="hadamard")
    skeleton = meta_transformer(FluxTransformer2DModel, dict(config), partial(plan_architecture, FLUX, settings))
    model = randomize(skeleton, DEVICE, torch.bfloat16)
    if base == "int4":
        return model
    few_rows = [
        path for path, layer in model.named_modules() if isinstance(layer, SVDQuantLinear) and layer.numerics == "w4a16"
    ]
    for path, layer in list(model.named_modules()):
        if isinstance(layer, SVDQuantLinear):
            made = "bf16" if path in few_rows and base != "nf4" else base
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


def train(
    variant: Variant, profile: bool, progress: Progress, alone: Alone, grow: Callable[[], None] | None
) -> dict[str, Any]:
    """Twenty steps: losses, milliseconds of a step (median of the last fifteen), peak memory, seconds to the first step.

    grow: waits for the memory of a whole model and step; what a rival compiles it compiles before that (None: as steps come to it)."""
    if variant.cap_gib:
        torch.cuda.set_per_process_memory_fraction(variant.cap_gib * GIB / torch.cuda.mem_get_info()[1])
    # As train/lora.py does, while weights are read; what is not done by then counts.
    workers = start_workers(variant.attention, DEVICE) if variant.compiled else None
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward pass fails on some drivers
    if grow is not None:
        compile_beforehand(variant, workers, progress, alone)
        gc.collect()
        torch.cuda.empty_cache()
        torch.manual_seed(SEED)  # the adapter's start, which is the other variants' too
        grow()
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
    if variant.base == "sdnq" and grow is None:
        rehearse(lambda: loss(batches[0]).backward(), phases, alone)
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def step(number: int | None) -> tuple[Tensor, Tensor]:
        """None: one that does all but move the adapter."""
        tensors = batches[number or 0]
        if graph is not None:
            value = graph(tensors, last=True)
        else:
            value = loss(tensors)
            phases("first forward pass")
            value.backward()
        phases("first micro-batch")
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        if number is not None:
            optimizer.step()
        phases("clipping and optimizer")
        optimizer.zero_grad(set_to_none=graph is None)
        return value.detach(), norm

    def tell(count: int) -> None:
        progress(f"step {count}", steps_ms=steps.times, losses=steps.losses)

    steps = TimedSteps(step, RATE, tell)
    steps(range(1))
    first = time.perf_counter() - start
    parts = first_step_parts(phases, {} if graph is None else graph.seconds, kernels)
    steps(range(1, TIMED_FROM - SETTLING))
    with alone:
        learning, timed = range(TIMED_FROM - SETTLING, TIMED_FROM), range(TIMED_FROM, LOSS_STEPS)
        steps(chain(learning, settling(SETTLE_SECONDS), timed))
        peak, reserved = torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB
        profile_of_a_step = {"profile": profiled(lambda: step(0))} if profile else {}
    return {
        "step_ms": statistics.median(steps.times[TIMED_FROM:]),
        "step_ms_worst": max(steps.times[TIMED_FROM:]),
        "losses": steps.losses,
        "static_gib": static,
        "peak_gib": peak,
        "reserved_gib": reserved,
        "first_step_seconds": first,
        "first_step_parts": parts,
        "parameters": sum(p.numel() for p in parameters),
        **profile_of_a_step,
    }


def compile_beforehand(variant: Variant, workers: Thread | None, tell: Callable[[str], None], alone: Alone) -> None:
    """What a rival compiles, on a model with two blocks of each kind, the first and one whose input needs a gradient.

    What is compiled belongs to the code of a block, not to the blocks of a model: those of a whole one find it."""
    transformer = build_transformer(variant.base, CONFIG | FEW_BLOCKS)
    if workers is not None:
        workers.join()
    set_attention(transformer, variant.attention)
    inject_adapter(transformer, AdapterConfig(), FLUX.quantize)
    if variant.compiled:
        transformer.compile_repeated_blocks(fullgraph=True)
    loss, tensors = loss_of(transformer, autocast=True), batch(variant.resolution, 0)
    if variant.base == "sdnq":
        rehearse(lambda: loss(tensors).backward(), tell, alone)
    else:
        loss(tensors).backward()
    tell("compiled beforehand")


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
def infer(variant: Variant, alone: Alone) -> dict[str, Any]:
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
        with alone:
            for _ in settling(SETTLE_SECONDS):
                _drawn(sampler, 4)
            for steps in (20, 4):
                result[f"{name}image_{steps}_steps_seconds"] = statistics.median(
                    _drawn(sampler, steps) for _ in range(3)
                )
        result[f"{name}peak_gib"] = torch.cuda.max_memory_allocated() / GIB
        del sampler
    return result


def _drawn(sampler: "_Sampler", steps: int) -> float:
    """Seconds of an image."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    sampler(steps)
    torch.cuda.synchronize()
    return time.perf_counter() - start


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


def run(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One variant in this process; its figures go to `--parts`/NAME.json."""
    variant, parts = VARIANTS[name], args.parts
    torch.manual_seed(SEED)
    progress, alone = Progress(parts / f"{name}.partial"), Alone(parts, args.beside)
    grow = partial(wait_for_memory, parts, name) if args.grow else None
    figures = infer(variant, alone) if variant.infer else train(variant, args.profile, progress, alone, grow)
    if args.beside is not None and not args.first_step and not variant.infer:
        figures |= {
            "first_step_seconds": None,
            "first_step_parts": None,
            "first_step_why": "other variants ran beside it",
        }
    versions = {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda}
    made = {"variant": name, "device": torch.cuda.get_device_name(), "versions": versions, "commit": args.commit}
    figures = {**made, **asdict(variant), **figures, **alone.figures()}
    (parts / f"{name}.json").write_text(json.dumps(figures, indent=1) + "\n")
    progress.file.unlink(missing_ok=True)
    return figures


def run_all(args: argparse.Namespace) -> int:
    """What is not in `--parts` yet, side by side; returns the exit code.

    `--deadline` counts from the start of this process: on a cold machine imports alone take half a minute.
    Raises FileExistsError if the caches are not empty and `FIRST` is to run."""
    names = [name for name in EXPECTED if name in (args.variant or EXPECTED)]
    missing = [name for name in names if not (args.parts / f"{name}.json").exists()]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as made:  # what was killed may write a moment longer
        caches = args.caches or Path(made)
        if FIRST in missing and caches.exists() and any(caches.iterdir()):
            raise FileExistsError(
                f"--caches {caches} is not empty, but {FIRST}'s time to the first step is that of empty caches: give another "
                f"folder, or name the variants to run without {FIRST}"
            )
        os.environ |= {f"{name}_CACHE_DIR": str(caches / name.lower()) for name in ("TRITON", "TORCHINDUCTOR")}
        left = args.deadline - (time.time() - psutil.Process().create_time()) - END_SECONDS
        limits = Limits(gib=args.gib, jobs=args.jobs, timeout=args.timeout, deadline=left)
        jobs = [job(name, args) for name in missing]
        beside = SideBySide(jobs, args.parts, limits, about=lambda name: told(name, args.parts))
        ended = beside.run()
    print(table(ended), flush=True)
    if beside.signal is not None:
        return 128 + beside.signal
    return 0 if all((args.parts / f"{name}.json").exists() for name in names) else 1


def job(name: str, args: argparse.Namespace) -> Job:
    """The process of a variant or of a whole run."""
    gib, seconds = EXPECTED[name]
    before = gib_before(name)
    script = [__file__, "run"] if name in VARIANTS else [str(Path(__file__).with_name("whole_run.py"))]
    options = ["--parts", str(args.parts), "--commit", args.commit, "--beside", str(os.getpid())]
    options += ["--profile", "--first-step"] if name == FIRST else []
    options += [] if before is None else ["--grow"]
    command = (sys.executable, *script, name, *options)
    before = None if before is None else before + CONTEXT_GIB
    return Job(name, command, gib + CONTEXT_GIB, seconds, alone=name == FIRST, before=before)


def told(name: str, parts: Path) -> str:
    """The figures of a part that are plain numbers."""
    figures = json.loads((parts / f"{name}.json").read_text())
    return str({key: round(value, 3) for key, value in figures.items() if isinstance(value, float)})


def main() -> int:
    """Prints one line per variant and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["all", "run", "collect"])
    parser.add_argument("variant", nargs="*", choices=[*EXPECTED, []], help="default: all of them")
    parser.add_argument("--parts", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default="", help="commit of the code that runs")
    parser.add_argument("--fidelity", type=Path, help="JSON of benchmarks/fidelity.py")
    parser.add_argument("--preflight", type=Path, help="JSON of benchmarks/preflight.py")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument(
        "--phases", action="store_true", help="print where the time to the first step goes, not all figures"
    )
    several = parser.add_argument_group("all")
    several.add_argument("--jobs", type=int, default=4, help="processes at once (default 4)")
    several.add_argument("--gib", type=float, default=77, help="of GPU memory that they share (default 77)")
    several.add_argument("--timeout", type=float, default=240, help="seconds for one variant (default 240)")
    several.add_argument(
        "--deadline", type=float, default=math.inf, metavar="SECONDS",
        help="be done so long after the start: start nothing that would not be, and end what is not",
    )  # fmt: skip
    several.add_argument("--caches", type=Path, help="folder for compiled code (default: one that is removed)")
    one = parser.add_argument_group("run, as `all` calls it")
    one.add_argument("--beside", type=int, metavar="PID", help="of `all`, whose other processes stop for the timing")
    one.add_argument("--grow", action="store_true", help="ask `all` for the memory of the model once all is compiled")
    one.add_argument("--first-step", action="store_true", help="the time to the first step counts all the same")
    args = parser.parse_args()
    code = 0
    if args.what == "run":
        if args.beside is not None:
            end_with(args.beside)
        for name in args.variant:
            if name not in VARIANTS:
                parser.error(
                    f"{name} is a whole run, which has a script of its own: python benchmarks/whole_run.py {name}"
                )
            figures = run(name, args)
            print("\n".join(phase_lines(figures["first_step_parts"])) if args.phases else json.dumps(figures, indent=1))
        return 0
    if args.what == "all":
        code = run_all(args)
    if args.out is not None:
        args.out.write_text(json.dumps(collect(args.parts, args.fidelity, args.preflight), indent=1) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
