"""Measures what `roofline.Machine` holds, on the GPU that is here: a few products, attention, a convolution, a copy, some blocks.

Rates come from single ops at FLUX.1's shapes (linear attention and a depthwise convolution at SANA's, a group norm at SDXL's); INT8
from `w4a8_linear` less what its other parts take. Host times come from steps and from passes without gradients of a FLUX so narrow that
only launching takes time, with and without quantized layers; without them of two depths, which tell what happens once. Python's speed on a
shared machine changes by half within seconds, so these are timed in turn, a part of the rounds before the rates, between, and at the end.
Layers are rotated, as the bases' are: those that read one x then share its codes. The step replayed from a CUDA graph, without quantized
layers, says what an op costs the GPU beside its work. The correction c and what our ops cost, f in a forward pass and g for gradients, come
from three more replays: a large step (a double and a single block of true width at 1024 px), a middling pass (width 1280, 1088 rows) and
the step of the same:

    c R + n gpu_op + k f + l g = T          R the roofline's seconds, n, k and l ops of each kind, T measured; three equations
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, get_args

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from torch.nn.functional import conv2d, group_norm, scaled_dot_product_attention

from loragraft.adapters.inject import inject_adapter
from loragraft.adapters.joined import JoinedFactors
from loragraft.backbones.architectures import FLUX
from loragraft.backbones.flow import flow_loss
from loragraft.backbones.replay import Replay
from loragraft.backbones.skeleton import meta_transformer, plan_architecture, randomize
from loragraft.kernels.attention import Backend, attention, check_backend
from loragraft.quantization.linear import SVDQuantLinear
from loragraft.quantization.settings import QuantSettings
from loragraft.recipes.schema import AdapterConfig
from loragraft.train.dry_run import DryRun, dry_infer, dry_train
from loragraft.train.op_cost import product_tiles, weight_only_tiles
from loragraft.train.roofline import Counts, Host, Machine, part_seconds, roofline_seconds, rounded_up
from loragraft.train.step import GraphStep

M, D, MLP, HEADS, HEAD = 4608, 3072, 12288, 24, 128
COPIED = 2**28
"""Values of the vector whose copy measures the memory."""
LINEAR = (70, 32, 1024)
"""Heads of SANA 1.6B's linear attention, their width, tokens at 1024 px."""
DEPTHWISE = (11200, 32)
"""Channels and edge of the image in its feed-forward part."""
GROUP_NORM = (320, 128)
"""Channels and edge of SDXL's first level; 32 groups."""
WEIGHT_ONLY = (77, 1280, (64, 2048))
"""Tokens, outputs and inputs of SDXL's keys of the text, and inputs so few that only the beginning and the end are left."""
TOGETHER = 8
"""Runs of a single op between two waits for the device."""
SHALLOW, BLOCKS = 1, 3
"""Of each kind, in the narrow models."""
ROUNDS = 5
"""Of the narrow models' launches, three times."""
NARROW, MIDDLE, LARGE = (1, 64, 16), (10, 512, 64), (HEADS, 1024, 512)
"""Heads, pixels and words of the steps that are timed: launches alone, the middling one, the one that corrects."""


def calibrate(device: torch.device) -> Machine:
    """The figures of the CUDA device. Raises ValueError for another kind: there is nothing to plan for on a CPU."""
    if device.type != "cuda":
        raise ValueError(
            "calibration measures a GPU, and there is none; without it the known cards' usual figures are used"
        )
    properties = torch.cuda.get_device_properties(device)
    torch.backends.cuda.enable_cudnn_sdp(False)  # as training does: its backward pass fails on some drivers
    hosts = HostTimes(device, trains=True), HostTimes(device, trains=False)
    _more(hosts)
    blank = unmeasured(properties.name, properties.total_memory, properties.multi_processor_count)
    machine = _rates(blank, device)
    _more(hosts)
    machine = _corrected(machine, device)
    _more(hosts)
    steps, passes = hosts
    return replace(machine, host=steps.host(), host_infer=passes.host())


def unmeasured(name: str, memory: int, processors: int) -> Machine:
    """A machine whose figures are yet to come."""
    nothing = Host(0.0, 0.0)
    return Machine(name, memory, {}, 0.0, nothing, nothing, *(0.0,) * 3, calibrated=True, processors=processors)


def time_of(run: Callable[[], object], repeats: int = 10, together: int = 1, warm: int = 3) -> float:
    """Median seconds of `run` on the current CUDA device, after `warm` runs of warming up. together: launched one behind the other
    before the device is waited for, so that of a single op Python's time does not count."""
    for _ in range(warm):
        run()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(together):
            run()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / together)
    return sorted(times)[repeats // 2]


def replayed(run: Callable[[], object]) -> Callable[[], None]:
    """`run` from a CUDA graph: a product of codes is done before Python has launched the next."""
    run()
    replay, _ = Replay().capture(run)
    return replay


def _rates(machine: Machine, device: torch.device) -> Machine:
    def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    op_time = partial(time_of, together=TOGETHER)
    x, w, big = normal(M, D), normal(D, MLP), normal(COPIED)
    bandwidth = 2 * big.nbytes / op_time(lambda: big.mul(2.0))
    x32, w32 = normal(M, D, dtype=torch.float32), normal(D, D, dtype=torch.float32)
    picture, kernel = normal(1, 640, 64, 64), normal(640, 640, 3, 3)
    q, k, v = (normal(1, HEADS, M, HEAD).requires_grad_() for _ in range(3))
    forward = op_time(lambda: scaled_dot_product_attention(q, k, v))
    out = scaled_dot_product_attention(q, k, v)
    grad = torch.ones_like(out)
    backward = op_time(lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True))
    flops = 4 * HEADS * M * M * HEAD
    gemm = 2 * M * D * MLP / op_time(lambda: x @ w)
    rates = {
        "gemm": gemm,
        "memory": gemm,
        "gemm32": 2 * M * D * D / op_time(lambda: x32 @ w32),
        "conv": 2 * 64 * 64 * 640 * 640 * 9 / op_time(lambda: conv2d(picture, kernel, padding=1)),
        "attention": flops / forward,
        "attention_backward": 2.5 * flops / backward,
    }
    rates |= _fast_attention(rates, flops, device) | _small_rates(device)
    rates["weight_only"] = _weight_only(machine, device)
    machine = replace(machine, rates=rates, bandwidth=bandwidth)
    layer = SVDQuantLinear.empty(D, MLP, "w4a8", rank=32, bias=True)
    holder = nn.ModuleList([layer])
    randomize(holder, device, torch.bfloat16)
    with torch.no_grad():
        whole = op_time(replayed(lambda: layer(x)))
    beside = part_seconds("memory", 0, M * D * 3, machine) + part_seconds("gemm", 2 * M * MLP * 32, 0, machine)
    work = 2 * M * D * MLP * rounded_up(product_tiles(M, MLP), machine)
    return replace(machine, rates={**rates, "int8": work / max(whole - beside, 0.2 * whole)})


@torch.no_grad()
def _small_rates(device: torch.device) -> dict[str, float]:
    """Of ops that no large product stands for, replayed one behind the other: each is done before Python has launched the next."""

    def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    def each(run: Callable[[], object]) -> float:
        return time_of(replayed(lambda: [run() for _ in range(TOGETHER)])) / TOGETHER

    heads, width, tokens = LINEAR
    values, queries = (
        normal(heads, width + 1, tokens, dtype=torch.float32),
        normal(heads, width, tokens, dtype=torch.float32),
    )
    sums = torch.bmm(values, queries.mT)
    linear = each(lambda: torch.bmm(values, queries.mT)) + each(lambda: torch.bmm(sums, queries))
    channels, edge = DEPTHWISE
    picture, kernel = normal(1, channels, edge, edge), normal(channels, 1, 3, 3)
    gradients = partial(
        torch.ops.aten.convolution_backward, picture, picture, kernel, None, [1, 1], [1, 1], [1, 1], False, [0, 0], channels,
        [True, False, False],
    )  # fmt: skip
    flops = 2 * 9 * picture.numel()
    channels, edge = GROUP_NORM
    level, scale = normal(1, channels, edge, edge), normal(channels)
    return {
        "batched32": 2 * 2 * sums.numel() * tokens / linear,
        "depthwise": flops / each(lambda: conv2d(picture, kernel, padding=1, groups=len(kernel))),
        "depthwise_backward": flops / each(gradients),
        "group_norm": level.numel() / each(lambda: group_norm(level, 32, scale, scale)),
    }


@torch.no_grad()
def _weight_only(machine: Machine, device: torch.device) -> float:
    """Rate of W4A16 of many tokens, by what more inputs take: the rest is what any op of ours takes."""
    tokens, outputs, widths = WEIGHT_ONLY
    times = []
    for width in widths:
        layer = SVDQuantLinear.empty(width, outputs, "w4a16", rank=0, bias=True)
        randomize(nn.ModuleList([layer]), device, torch.bfloat16)
        x = torch.randn(tokens, width, device=device, dtype=torch.bfloat16)
        run = replayed(partial(_repeat, partial(layer, x)))
        times.append(time_of(run) / TOGETHER)
    flops = 2 * tokens * outputs * (widths[1] - widths[0])
    work = flops * rounded_up(weight_only_tiles(tokens, outputs), machine)
    return work / max(times[1] - times[0], 0.2 * times[1])


def _repeat(run: Callable[[], object]) -> None:
    for _ in range(TOGETHER):
        run()


def _fast_attention(rates: dict[str, float], flops: int, device: torch.device) -> dict[str, float]:
    """Rates of the fastest backend that runs here; those of flash-2 where none does."""
    found = {"fast_attention": rates["attention"], "fast_attention_backward": rates["attention_backward"]}
    for backend in get_args(Backend):
        try:
            check_backend(backend, device)
        except ValueError:
            continue
        q, k, v = (
            torch.randn(1, M, HEADS, HEAD, device=device, dtype=torch.bfloat16).requires_grad_() for _ in range(3)
        )
        op_time = partial(time_of, together=TOGETHER)
        out = attention(q, k, v, backend)
        grad = torch.ones_like(out)
        forward = op_time(partial(attention, q, k, v, backend))
        backward = op_time(partial(torch.autograd.grad, out, (q, k, v), grad, retain_graph=True))
        found["fast_attention"] = max(found["fast_attention"], flops / forward)
        if backend == "flash_attn_4":
            found["fast_attention_backward"] = 2.5 * flops / backward
    return found


def flux(width_heads: int, blocks: int, *, quantized: bool = True) -> nn.Module:
    """A FLUX of few blocks on meta, with an adapter of rank 16 injected; 16-bit where not quantized."""
    config: dict[str, Any] = {
        "patch_size": 1, "in_channels": 64, "num_layers": blocks, "num_single_layers": blocks, "attention_head_dim": HEAD,
        "num_attention_heads": width_heads, "joint_attention_dim": 4096, "pooled_projection_dim": 768,
        "guidance_embeds": False, "axes_dims_rope": [16, 56, 56],
    }  # fmt: skip
    plan = partial(plan_architecture, FLUX, QuantSettings(rank=32, smoothing="hadamard")) if quantized else None
    return meta_transformer(FluxTransformer2DModel, config, plan)


def flux_loss(model: nn.Module, device: torch.device | str, edge: int, tokens: int) -> Tensor:
    """The training loss of a random batch of one, at `edge` pixels and `tokens` of text."""
    latents = torch.zeros(1, 16, edge // 8, edge // 8, dtype=torch.bfloat16, device=device)
    text = {
        "prompt_embeds": torch.zeros(1, tokens, 4096, dtype=torch.bfloat16, device=device),
        "pooled_prompt_embeds": torch.zeros(1, 768, dtype=torch.bfloat16, device=device),
    }
    return flow_loss(model, latents, torch.ones_like(latents), torch.full((1,), 0.5, device=device), text)


@dataclass(frozen=True)
class Timed:
    """A real step or pass, and its dry run."""

    seconds: float
    run: DryRun

    def counts(self) -> Counts:
        """Its ops."""
        return Counts.of(self.run.counted())

    def roofline(self, machine: Machine) -> float:
        """Seconds of the parts alone, uncorrected."""
        return sum(count * roofline_seconds(cost, machine) for cost, count in self.run.counted())


def _timed(
    size: tuple[int, int, int],
    blocks: int,
    device: torch.device,
    *,
    quantized: bool = True,
    trains: bool = True,
    captured: bool = False,
) -> Timed:
    """A training step of a FLUX of that size, or a pass without gradients. captured: replayed from a CUDA graph."""
    run, imagined = _prepared(size, blocks, device, quantized=quantized, trains=trains, captured=captured)
    return Timed(time_of(run), imagined())


def _prepared(
    size: tuple[int, int, int], blocks: int, device: torch.device, *, quantized: bool, trains: bool, captured: bool
) -> tuple[Callable[[], object], Callable[[], DryRun]]:
    """(what `_timed` times, its dry run)."""
    heads, edge, tokens = size
    real, imagined = (nn.Module.to(flux(heads, blocks, quantized=quantized), dtype=torch.bfloat16) for _ in range(2))
    randomize(real, device, torch.bfloat16)
    loss = partial(flux_loss, real, device, edge, tokens)
    imagined_loss = partial(flux_loss, imagined, "cpu", edge, tokens)
    if not trains:
        with torch.no_grad():
            run = replayed(loss) if captured else loss
        return partial(_passes, run, real), partial(dry_infer, imagined, imagined_loss)
    parameters = inject_adapter(real, AdapterConfig(), FLUX.quantize)
    inject_adapter(imagined, AdapterConfig(), FLUX.quantize)
    if captured:
        JoinedFactors(imagined, torch.bfloat16)
    optimizer = partial(torch.optim.AdamW, fused=True)
    dry = partial(dry_train, imagined, imagined_loss, optimizer, max_grad_norm=0, captured=captured)
    return _step(real, parameters, loss, captured=captured), dry


@torch.no_grad()
def _passes(run: Callable[[], object], _: nn.Module) -> None:
    """A pass; the model is held because a graph reads its weights without holding them."""
    run()


def _step(
    model: nn.Module, parameters: list[nn.Parameter], loss: Callable[[], Tensor], *, captured: bool
) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(parameters, fused=True)
    graph = GraphStep(lambda _: loss(), parameters, JoinedFactors(model, torch.bfloat16)) if captured else None

    def step() -> None:
        if graph is None:
            torch.autograd.backward(loss())
        else:
            graph({}, last=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=graph is None)

    return step


class HostTimes:
    """Steps, or passes without gradients, of three narrow models: a shallow and a deep one without our layers, a deep one with them."""

    def __init__(self, device: torch.device, *, trains: bool) -> None:
        kinds = ((False, SHALLOW), (False, BLOCKS), (True, BLOCKS))
        self.seconds: list[list[float]] = [[] for _ in kinds]
        self.counts, self._runs = [], []
        for quantized, blocks in kinds:
            run, imagined = _prepared(NARROW, blocks, device, quantized=quantized, trains=trains, captured=False)
            self._runs.append(run)
            self.counts.append(Counts.of(imagined().counted()))
            time_of(run, repeats=1, warm=2)

    def round(self) -> None:
        """Times each of them once more."""
        for run, seconds in zip(self._runs, self.seconds, strict=True):
            seconds.append(time_of(run, repeats=1, warm=0))

    def host(self) -> Host:
        """From medians."""
        times = [sorted(seconds)[len(seconds) // 2] for seconds in self.seconds]
        return host_of(times, self.counts)


def host_of(seconds: Sequence[float], counts: Sequence[Counts]) -> Host:
    """t = fixed + ops op + launches launch, from the three t of `HostTimes`. Where they contradict each other, an op or what happens
    once costs nothing, and a launch what an op does."""
    shallow, deep, ours = counts
    op = max((seconds[1] - seconds[0]) / (deep.ops - shallow.ops), 0.0)
    fixed = max(seconds[1] - deep.ops * op, 0.0)
    return Host(op, max((seconds[2] - fixed - ours.ops * op) / ours.launches, op), fixed)


def _more(hosts: Sequence[HostTimes]) -> None:
    """Rounds of all of them, in turn."""
    for _ in range(ROUNDS):
        for times in hosts:
            times.round()


def _corrected(machine: Machine, device: torch.device) -> Machine:
    """gpu_op, then the three equations; where they contradict each other an op of ours costs what one of torch's does."""
    plain = _timed(NARROW, BLOCKS, device, quantized=False, captured=True)
    gpu_op = max(plain.seconds - plain.roofline(machine), 0.0) / plain.counts().others
    timed = [
        _timed(LARGE, 1, device, captured=True),
        _timed(MIDDLE, 1, device, trains=False, captured=True),
        _timed(MIDDLE, 1, device, captured=True),
    ]
    rows = [(run.roofline(machine), *run.counts()[1:3]) for run in timed]
    left = [run.seconds - run.counts().others * gpu_op for run in timed]
    _, forward, gradient = torch.linalg.solve(
        torch.tensor(rows, dtype=torch.float64), torch.tensor(left, dtype=torch.float64)
    ).tolist()
    forward, gradient = max(forward, gpu_op), max(gradient, gpu_op)
    (R, k, m), T = rows[0], left[0]
    correction = (T - k * forward - m * gradient) / R
    return replace(machine, gpu_op=gpu_op, gpu_forward=forward, gpu_gradient=gradient, correction=correction)
