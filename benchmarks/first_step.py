"""Where the time to the first optimizer step goes: phases, what the captures took, torch's compiler, our Triton kernels."""

import time
from typing import Any

import torch
import triton


class Phases:
    """Seconds of each phase up to the first optimizer step, with the GPU at rest; a name that was called before is passed over."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def __call__(self, name: str) -> None:
        if name in self.seconds:
            return
        torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[name], self._last = now - self._last, now


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
