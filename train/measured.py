"""What a step measured, read late on a GPU: the next step is queued before Python waits for this one, so the GPU never does."""

import math
import statistics
import time
from collections import deque

import torch
from torch import Tensor


class Measured:
    """Loss and gradient norm of one optimizer step, on their way to the CPU.

    On a GPU `read` waits for that step alone, whatever was queued after it; on a CPU there is nothing to wait for.
    """

    def __init__(self, step: int, loss: Tensor, norm: Tensor, rate: float, asked: Tensor | None = None) -> None:
        """step: how many are done with it. loss, norm: scalars on the device. rate: its learning rate. asked: the share of the
        processes that were asked to stop (`stopping`)."""
        self.step, self._rate = step, rate
        self.asked = False
        """Whether any process was, once this was read."""
        scalars = [loss, norm] if asked is None else [loss, norm, asked]
        self._values = torch.stack([scalar.detach().float() for scalar in scalars])
        self._ready: torch.cuda.Event | None = None
        if self._values.is_cuda:
            host = torch.empty(len(scalars), pin_memory=True)
            self._values, self._ready = host.copy_(self._values, non_blocking=True), torch.cuda.Event()
            self._ready.record()

    @property
    def waits(self) -> bool:
        """Whether reading now would keep the GPU from the next step."""
        return self._ready is not None

    def read(self) -> dict[str, float]:
        """loss, learning_rate, grad_norm. Raises ValueError for a loss that is not finite."""
        if self._ready is not None:
            self._ready.synchronize()
        loss, norm, *asked = self._values.tolist()
        self.asked = any(asked)
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss is {loss} at step {self.step}: lower optim.learning_rate or raise optim.warmup_steps; "
                "the last checkpoint is intact"
            )
        return {"loss": loss, "learning_rate": self._rate, "grad_norm": norm}


class StepTimes:
    """Seconds of a step as the run goes: the median of what lies between the figures of one step and of the next, so that
    validation, checkpoints and images, which follow few steps, do not count."""

    KEPT = 1000

    def __init__(self) -> None:
        self._last: float | None = None
        self._seconds: deque[float] = deque(maxlen=self.KEPT)

    def note(self) -> None:
        """The figures of a step are there."""
        now = time.perf_counter()
        if self._last is not None:
            self._seconds.append(now - self._last)
        self._last = now

    @property
    def median(self) -> float | None:
        """None before the fourth step: the first ones compile and capture."""
        settled = list(self._seconds)[2:] if len(self._seconds) < self.KEPT else self._seconds
        return statistics.median(settled) if settled else None
