"""GPU times that can be compared: medians over CUDA graphs replayed in turn, and eager calls as Python makes them."""

import random
import statistics
from collections.abc import Callable

import torch


def compare(steps: dict[str, Callable[[], object]], inner: int = 10, rounds: int = 15) -> dict[str, float]:
    """Microseconds a call: medians over replays of CUDA graphs of `inner` calls, one of each step in turn, `rounds` times.

    In turn, because the clock of a card follows its load: steps timed one after the other do not meet the same card. And in
    another order each time (seeded), because a step that always follows the same one meets what that one left of the clock.
    """
    graphs = {name: _captured(step, inner) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    shuffled = random.Random(0)
    for _ in range(rounds):
        for name in shuffled.sample(list(graphs), len(graphs)):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            graphs[name].replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) / inner * 1e3)
    return {name: float(statistics.median(values)) for name, values in times.items()}


def _captured(step: Callable[[], object], inner: int) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(inner):
            step()
    graph.replay()
    return graph


def eager_us(step: Callable[[], object], repeats: int = 15) -> float:
    """Median microseconds of a call as Python makes it, by CUDA events."""
    step()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return float(statistics.median(times))
