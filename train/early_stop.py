"""Stop when the held-out loss no longer falls, and keep the adapter of its lowest point."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class EarlyStop:
    """Counts validations in a row without a new lowest loss. With patience 0 it never stops and keeps nothing.

    Its state goes into every checkpoint, so that a resumed run stops at the same step with the same adapter.
    """

    patience: int
    best_loss: float = math.inf
    best_step: int = 0
    waited: int = 0
    best: list[Tensor] = field(default_factory=list)

    def observe(self, loss: float, step: int, parameters: Sequence[nn.Parameter]) -> None:
        """A validation loss after `step` steps, with the parameters that gave it. A tie is no improvement."""
        if not self.patience:
            return
        if loss < self.best_loss:
            self.best_loss, self.best_step, self.waited = loss, step, 0
            self.best = [p.detach().cpu().clone() for p in parameters]
        else:
            self.waited += 1

    @property
    def exhausted(self) -> bool:
        return 0 < self.patience <= self.waited

    @torch.no_grad()
    def restore(self, parameters: Sequence[nn.Parameter]) -> None:
        """The best parameters, back in place."""
        if self.best:
            for parameter, saved in zip(parameters, self.best, strict=True):
                parameter.copy_(saved)

    def state(self) -> dict[str, Any]:
        return {"best_loss": self.best_loss, "best_step": self.best_step, "waited": self.waited, "best": self.best}

    def load(self, state: dict[str, Any]) -> None:
        self.best_loss, self.best_step, self.waited = state["best_loss"], state["best_step"], state["waited"]
        self.best = list(state["best"])
