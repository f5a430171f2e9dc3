"""How long a GPU computes and how long it waits, from the kernels that the profiler saw.

busy = length of the union of all kernels' intervals (of all streams; copies from and to the host do not count)
idle = window - busy,      window = from one optimizer step's kernels to a later one's, so a whole number of steps
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

STEP_ENDS = ("FusedAdam", "FusedOptimizer", "adamw8bit", "Optimizer.step")
"""In the name of what closes a step: torch's fused kernel, ours, and on a CPU the profiler's own mark."""
APART_MS = 0.5
"""One optimizer step's kernels are nearer to each other than that; two steps' are not."""
STALL_MS = 0.02
"""A longer gap is the GPU waiting for the CPU; shorter ones lie between the nodes of a graph."""
HOST_COPIES = ("Memcpy HtoD", "Memcpy DtoH")


@dataclass(frozen=True)
class Span:
    """One kernel; milliseconds."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """Sums over `steps` whole steps; milliseconds."""

    steps: int
    window_ms: float
    busy_ms: float
    stalls_ms: float
    """Of the gaps, those above STALL_MS."""
    longest_gap_ms: float
    kernels: int

    @property
    def idle_share(self) -> float:
        """Idle / window."""
        return 1 - self.busy_ms / self.window_ms

    @property
    def stall_share(self) -> float:
        """Waiting for the CPU / window."""
        return self.stalls_ms / self.window_ms


def timeline(spans: Iterable[Span]) -> Timeline:
    """Raises ValueError where no whole step was seen."""
    ordered = sorted((span for span in spans if not span.name.startswith(HOST_COPIES)), key=lambda span: span.start)
    ends = [span for span in ordered if any(mark in span.name for mark in STEP_ENDS)]
    closing = [b for a, b in zip([None, *ends], ends, strict=False) if a is None or b.start - a.end > APART_MS]
    if len(closing) < 2:
        raise ValueError(f"the profile holds {len(closing)} ends of steps among {len(ordered)} kernels: two are needed")
    first, last = closing[0].start, closing[-1].start
    inside = [span for span in ordered if first <= span.start < last]
    gaps, reached = [], first
    for span in inside:
        gaps.append(max(0.0, span.start - reached))
        reached = max(reached, span.end)
    gaps.append(max(0.0, last - reached))
    window = last - first
    return Timeline(
        steps=len(closing) - 1,
        window_ms=window,
        busy_ms=window - sum(gaps),
        stalls_ms=sum(gap for gap in gaps if gap > STALL_MS),
        longest_gap_ms=max(gaps),
        kernels=len(inside),
    )


def spans_of(profile: Any, cuda: bool) -> list[Span]:
    """What a finished `torch.profiler.profile` saw on the GPU, or on a CPU its operators.

    Marks that the profiler lays over a GPU's kernels (`ProfilerStep`, `Optimizer.step`) are none.
    """
    kind = "CUDA" if cuda else "CPU"
    return [
        Span(event.name(), event.start_ns() / 1e6, (event.start_ns() + event.duration_ns()) / 1e6)
        for event in profile.profiler.kineto_results.events()
        if event.device_type().name == kind and not (cuda and _is_mark(event))
    ]


def _is_mark(event: Any) -> bool:
    return bool(event.is_user_annotation()) or event.name().startswith(("ProfilerStep", "Optimizer."))
