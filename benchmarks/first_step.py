"""Where the time to the first optimizer step goes: phases, what the captures took, torch's compiler, our Triton kernels."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton


class Progress:
    """What a run has reached, printed to stderr and kept in `file`, so that a run cut short still tells."""

    def __init__(self, file: Path) -> None:
        self.file, self._start = file, time.perf_counter()
        self.found: dict[str, Any] = {"reached_seconds": {}}
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)

    def __call__(self, name: str, **figures: Any) -> None:
        """`name` is done, seconds after the start; figures replace those of the same name."""
        seconds = time.perf_counter() - self._start
        self.found["reached_seconds"][name] = seconds
        self.found |= figures
        self.file.write_text(json.dumps(self.found, indent=1) + "\n")
        print(f"{seconds:7.1f} s  {name}", file=sys.stderr, flush=True)


class Phases:
    """Seconds of each phase up to the first optimizer step, with the GPU at rest; a name that was called before is passed over.

    tell: called with each new name."""

    def __init__(self, tell: Callable[[str], None] = lambda _: None) -> None:
        self.seconds: dict[str, float] = {}
        self.tell, self._last = tell, time.perf_counter()

    def __call__(self, name: str) -> None:
        if name in self.seconds:
            return
        torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[name], self._last = now - self._last, now
        self.tell(name)


def first_step_parts(phases: Phases, captures: dict[str, float], kernels: dict[str, float]) -> dict[str, Any]:
    """Phases add up to the time to the first step; the micro-batch's own add up to it; compilers' times overlap."""
    compilers = {name: sum(took) for name, took in torch._dynamo.utils.compilation_time_metrics.items()}
    return {
        "phases": phases.seconds,
        "first_micro_batch": captures,
        "compiler": {name: took for name, took in compilers.items() if took > 1},
        "triton_kernels": sum(kernels.values()),
        "slowest_kernels": dict(sorted(kernels.items(), key=lambda item: -item[1])[:12]),
    }


def phase_lines(parts: dict[str, Any]) -> list[str]:
    """`first_step_parts` as text."""
    lines = []
    for title, name in (
        ("to the first optimizer step", "phases"), ("of it, the first micro-batch", "first_micro_batch"),
        ("torch's compiler, nested", "compiler"), ("Triton kernels, in this process", "slowest_kernels"),
    ):  # fmt: skip
        lines += [f"{title}: {sum(parts[name].values()):.1f} s" if "compiler" not in name else title]
        lines += [f"  {seconds:7.2f} s  {what}" for what, seconds in parts[name].items()]
    return lines


def kernel_seconds() -> dict[str, float]:
    """Kernel -> seconds that Triton spends on it in this process, compiled or (named so) found in the cache; filled from now on."""
    seconds: dict[str, float] = {}

    def listen(*, src: Any, metadata: Any, metadata_group: Any, times: Any, cache_hit: bool) -> None:
        name = f"{src.name} (found)" if cache_hit else src.name
        seconds[name] = seconds.get(name, 0.0) + times.total / 1e6

    triton.knobs.compilation.listener = listen
    return seconds
