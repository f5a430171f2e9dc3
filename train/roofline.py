"""How long a dry run's ops take on a GPU: each piece at the rate of the unit that does it, or of the memory, whichever is slower.

    t_op   = correction * sum over its parts of  max(flops / rate(unit), bytes / bandwidth)  +  gpu_op, gpu_forward or gpu_gradient
    t_GPU  = sum over ops of t_op                              flops of a product of few tiles: as if each multiprocessor had as many
    t_host = fixed + ops * op + launches * launch              Python, where nothing is captured: `Host`, one for steps and one for
    t      = max(t_GPU, t_host)                                passes without gradients; launches: of our kernels (`launches`)

The gpu_... are what an op costs beside its roofline, replayed from a CUDA graph: a custom op is several kernels, more in a forward than
in a backward pass, and on small models most of them are as long as the gap before the next. `calibrate` measures all of this on the GPU
that is here (a minute, once) and keeps it in the cache folder, by the card's name. For a card that is not here the rates are its maker's
peaks times `USUAL`, the shares that an H100 reaches with these kernels, and the costs of an op an H100's.
Williams et al., "Roofline" (2009).
"""

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from loragraft.disk import write_atomic
from loragraft.train.dry_run import DryRun
from loragraft.train.op_cost import OpCost, Unit

USUAL: dict[Unit, float] = {
    "int8": 0.6, "gemm": 0.7, "gemm32": 0.6, "attention": 0.33, "attention_backward": 0.28,
    "fast_attention": 0.65, "fast_attention_backward": 0.57, "conv": 0.4, "memory": 1.0,
    "batched32": 0.12, "depthwise": 0.06, "depthwise_backward": 0.04, "group_norm": 0.03,
    "weight_only": 0.07,
}  # fmt: skip
"""Measured on an H100, but the last five: four are what captured steps of SDXL and SANA on one leave over, shared out by eye; a group of
columns of weight_only is taken to wait 1 us, as in the kernel for 16 tokens."""
USUAL_BANDWIDTH, USUAL_GPU_OP, USUAL_GPU_FORWARD, USUAL_GPU_GRADIENT = 0.75, 2e-6, 25e-6, 25e-6
"""`w4a8_linear` of 512 to 1024 rows took 18 to 40 us more than its roofline (`int4_engine.json`), the median 23; six captured steps
of `bases.json` come out within 16 %."""
VERSION = 4
"""Of the stored figures: raised when they mean something else."""


@dataclass(frozen=True)
class Host:
    """Seconds that Python needs to launch a step or a pass."""

    op: float
    """For an op, whosever it is."""
    launch: float
    """For a small kernel of this project, beside its op."""
    fixed: float = 0.0
    """Once: copies to the device, waiting for it."""


USUAL_HOST, USUAL_HOST_INFER = Host(op=30e-6, launch=300e-6), Host(op=15e-6, launch=150e-6, fixed=7e-3)
"""Of the machines of those H100s, with slow cores: with 15 us an op, eight launched passes of FLUX.1, SDXL and SANA took 130 to 180 us
a small launch; with 30 us, two steps of FLUX.1 260 and 310."""


@dataclass(frozen=True)
class Machine:
    """A GPU with the host that drives it. Rates per second."""

    name: str
    memory: int
    """Bytes of the card."""
    rates: dict[str, float]
    """Operations of each `op_cost.Unit`."""
    bandwidth: float
    """Bytes."""
    host: Host
    """Of a training step: much of a backward pass is launched without Python."""
    host_infer: Host
    """Of a pass without gradients."""
    gpu_op: float
    """Seconds that the GPU needs per op beside the roofline's."""
    gpu_forward: float
    """The same for an op of this project that computes a layer."""
    gpu_gradient: float
    """The same for one that computes gradients or uses them."""
    correction: float = 1.0
    """Of a block of true width, measured time over the roofline's."""
    calibrated: bool = False
    processors: int = 132
    """Multiprocessors."""


def known(
    name: str, memory_gb: int, processors: int, gemm: float, int8: float, fp32: float, bandwidth_gb: float
) -> Machine:
    """A card by its maker's dense peaks in T(FL)OP/s and GB/s."""
    peaks: dict[Unit, float] = {
        "int8": int8, "gemm": gemm, "gemm32": fp32, "attention": gemm, "attention_backward": gemm,
        "fast_attention": gemm, "fast_attention_backward": gemm, "conv": gemm, "memory": gemm,
        "batched32": fp32, "depthwise": fp32, "depthwise_backward": fp32, "group_norm": bandwidth_gb / 2000,
        "weight_only": gemm,
    }  # fmt: skip
    rates = {str(unit): peaks[unit] * 1e12 * share for unit, share in USUAL.items()}
    bandwidth = bandwidth_gb * 1e9 * USUAL_BANDWIDTH
    host = USUAL_HOST, USUAL_HOST_INFER
    gpu = USUAL_GPU_OP, USUAL_GPU_FORWARD, USUAL_GPU_GRADIENT
    return Machine(name, memory_gb * 2**30, rates, bandwidth, *host, *gpu, processors=processors)


CARDS = (
    known("H200", 141, 132, 989, 1979, 67, 4800),
    known("H100", 80, 132, 989, 1979, 67, 3350),
    known("A100", 80, 108, 312, 624, 19.5, 2039),
    known("RTX 4090", 24, 128, 165, 660, 82.6, 1008),
    known("RTX 3090", 24, 82, 71, 284, 35.6, 936),
    known("L4", 24, 58, 121, 242, 30.3, 300),
)
"""Peaks: the makers' data sheets (dense; 16 bits with 32-bit sums)."""


def seconds(ops: Iterable[tuple[OpCost, float]], machine: Machine, *, host: bool = True, trains: bool = True) -> float:
    """Time of ops, each with how often it runs. host=False: launches cost nothing (CUDA graphs). trains: with gradients."""
    ops = list(ops)
    n, by = Counts.of(ops), machine.host if trains else machine.host_infer
    ideal = sum(count * roofline_seconds(cost, machine) for cost, count in ops)
    beside = n.others * machine.gpu_op + n.forward * machine.gpu_forward + n.gradients * machine.gpu_gradient
    launched = by.fixed + n.ops * by.op + n.launches * by.launch if host and n.ops else 0.0
    return max(machine.correction * ideal + beside, launched)


class Counts(NamedTuple):
    """Ops of a step or a pass."""

    others: float
    """torch's."""
    forward: float
    """Ours that compute layers."""
    gradients: float
    """Ours that compute gradients."""
    launches: float
    """Kernels that ours launch, by the time that takes."""

    @classmethod
    def of(cls, ops: Iterable[tuple[OpCost, float]]) -> "Counts":
        """Those of them that do something."""
        counted = [(cost, count) for cost, count in ops if cost.parts]
        custom = sum(count for cost, count in counted if cost.custom)
        forward = sum(count for cost, count in counted if cost.forward)
        launches = sum(count * cost.launches for cost, count in counted)
        return cls(sum(count for _, count in counted) - custom, forward, custom - forward, launches)

    @property
    def ops(self) -> float:
        """All of them."""
        return self.others + self.forward + self.gradients


def roofline_seconds(cost: OpCost, machine: Machine) -> float:
    """The least time of an op's parts, one after the other, uncorrected."""
    return sum(part_seconds(part.unit, part.flops, part.nbytes, machine, part.tiles) for part in cost.parts)


def part_seconds(unit: str, flops: int, nbytes: int, machine: Machine, tiles: int = 0) -> float:
    """Time of one kernel on the GPU, uncorrected."""
    return max(rounded_up(tiles, machine) * flops / machine.rates[unit], nbytes / machine.bandwidth)


def rounded_up(tiles: int, machine: Machine) -> float:
    """Whole rounds of the multiprocessors over the rounds that `tiles` would need if the last one were shared out; 1 for 0 tiles."""
    return -(-tiles // machine.processors) * machine.processors / tiles if tiles else 1.0


def run_seconds(run: DryRun, machine: Machine, *, host: bool = True, compiled: bool = False) -> float:
    """Time of a whole dry run: a step, or a pass. compiled: torch's own ops between products run as fused kernels."""
    return seconds(run.counted(compiled), machine, host=host, trains="backward" in run.ops)


def machine_file(name: str, cache_root: Path) -> Path:
    """Where the figures of the card `name` are kept."""
    return cache_root / "preflight" / f"{'-'.join(name.split())}.json"


def save_machine(machine: Machine, cache_root: Path) -> Path:
    """Keeps measured figures for later preflights."""
    path = machine_file(machine.name, cache_root)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps({"version": VERSION, **asdict(machine)}, indent=1).encode())
    return path


def load_machine(name: str, cache_root: Path) -> Machine | None:
    """The kept figures of a card; None if it was not calibrated, or by another version."""
    path = machine_file(name, cache_root)
    if not path.is_file():
        return None
    found = json.loads(path.read_text())
    if found.pop("version") != VERSION:
        return None
    found |= {name: Host(**found[name]) for name in ("host", "host_infer")}
    return Machine(**found)


def machine_for(name: str, cache_root: Path) -> Machine | None:
    """Calibrated figures of the card whose name torch reports, else those of the known card that it contains as words: an L40S
    is no L4."""
    measured = load_machine(name, cache_root)
    return measured or next((card for card in CARDS if re.search(rf"\b{card.name}\b", name)), None)


def card_names(cache_root: Path) -> list[str]:
    """Of the cards that `machine_for` finds: those of `CARDS`, and the ones calibrated here."""
    files = sorted((cache_root / "preflight").glob("*.json"))
    calibrated = [str(json.loads(path.read_text())["name"]) for path in files]
    return [*(card.name for card in CARDS), *(name for name in calibrated if load_machine(name, cache_root))]
