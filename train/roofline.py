"""How long a dry run's ops take on a GPU: each piece at the rate of the unit that does it, or of the memory, whichever is slower.

    t_GPU  = correction * sum over ops and their parts of  max(flops / rate(unit), bytes / bandwidth, FLOOR)
    t_host = ops * host_op + custom ops * host_custom                       Python and launches, where nothing is captured
    t      = max(t_GPU, t_host)

`calibrate` measures the rates of this machine's GPU once (twenty seconds) and keeps them in the cache folder, by the card's name.
For a card that is not here the rates are its maker's peaks times `USUAL`, the shares that an H100 reaches with these kernels:
good for an order of magnitude, and marked as not calibrated. Williams et al., "Roofline" (2009).
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from loragraft.disk import write_atomic
from loragraft.train.dry_run import DryRun
from loragraft.train.op_cost import OURS, OpCost, Unit

FLOOR = 2.5e-6
"""Seconds of the shortest kernel, launch gap included."""
USUAL: dict[Unit, float] = {
    "int8": 0.45, "gemm": 0.6, "gemm32": 0.6, "attention": 0.33, "attention_backward": 0.28,
    "fast_attention": 0.6, "fast_attention_backward": 0.5, "conv": 0.4, "memory": 1.0,
}  # fmt: skip
USUAL_BANDWIDTH, USUAL_HOST_OP, USUAL_HOST_CUSTOM = 0.75, 8e-6, 60e-6
VERSION = 1
"""Of the stored figures: raised when they mean something else."""


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
    host_op: float
    """Seconds that Python needs per op."""
    host_custom: float
    """The same for an op of this project."""
    correction: float = 1.0
    """Measured time of a transformer block over its predicted time."""
    calibrated: bool = False


def known(name: str, memory_gb: int, gemm: float, int8: float, fp32: float, bandwidth_gb: float) -> Machine:
    """A card by its maker's dense peaks in T(FL)OP/s and GB/s."""
    peaks: dict[Unit, float] = {
        "int8": int8, "gemm": gemm, "gemm32": fp32, "attention": gemm, "attention_backward": gemm,
        "fast_attention": gemm, "fast_attention_backward": gemm, "conv": gemm, "memory": gemm,
    }  # fmt: skip
    rates = {str(unit): peaks[unit] * 1e12 * share for unit, share in USUAL.items()}
    bandwidth = bandwidth_gb * 1e9 * USUAL_BANDWIDTH
    return Machine(name, memory_gb * 2**30, rates, bandwidth, USUAL_HOST_OP, USUAL_HOST_CUSTOM)


CARDS = (
    known("H200", 141, 989, 1979, 67, 4800),
    known("H100", 80, 989, 1979, 67, 3350),
    known("A100", 80, 312, 624, 19.5, 2039),
    known("RTX 4090", 24, 165, 660, 82.6, 1008),
    known("RTX 3090", 24, 71, 284, 35.6, 936),
    known("L4", 24, 121, 242, 30.3, 300),
)
"""Peaks: the makers' data sheets (dense; 16 bits with 32-bit sums)."""


def seconds(ops: Iterable[tuple[OpCost, float]], machine: Machine, *, host: bool = True) -> float:
    """Time of ops, each with how often it runs. host=False: launches cost nothing (CUDA graphs, a compiled step)."""
    gpu = launched = 0.0
    for cost, count in ops:
        launched += count * (machine.host_custom if cost.name.startswith(OURS) else machine.host_op)
        gpu += count * sum(part_seconds(part.unit, part.flops, part.nbytes, machine) for part in cost.parts)
    return max(machine.correction * gpu, launched if host else 0.0)


def part_seconds(unit: str, flops: int, nbytes: int, machine: Machine) -> float:
    """Time of one kernel on the GPU, uncorrected."""
    return max(flops / machine.rates[unit], nbytes / machine.bandwidth, FLOOR)


def run_seconds(run: DryRun, machine: Machine, *, host: bool = True) -> float:
    """Time of a whole dry run: a step, or a pass."""
    ops = [pair for counts in run.ops.values() for pair in counts.items()]
    return seconds(ops, machine, host=host)


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
    return Machine(**found) if found.pop("version") == VERSION else None


def machine_for(name: str, cache_root: Path) -> Machine | None:
    """Calibrated figures of the card whose name torch reports, else those of the known card that it contains."""
    measured = load_machine(name, cache_root)
    return measured or next((card for card in CARDS if card.name in name), None)
