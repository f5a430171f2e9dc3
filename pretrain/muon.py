"""Muon for the weight matrices, all matrices of one shape at once, so that a step can be captured in a CUDA graph.

    m <- mu m + (1 - mu) g
    w <- (1 - lr wd) w - 0.2 lr sqrt(max(N, K)) NS((1 - mu) g + mu m)

NS is five Newton-Schulz steps towards the nearest orthogonal matrix, in bf16; the factor gives updates the size of
AdamW's, so that both share one learning rate. ``torch.optim.Muon`` goes matrix by matrix (some 1,500 launches a step
here) and takes the rate as a Python number, which a graph would freeze. Sources: Jordan et al., "Muon" (2024); Liu et
al., "Muon is scalable for LLM training" (2025).
"""

import collections
import math
from collections.abc import Iterable

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """[n, N, K] -> about the nearest [n, N, K] with singular values 1 (between 0.7 and 1.2), bf16."""
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon:
    """``lr`` is a scalar tensor that the caller fills before each ``step``."""

    def __init__(self, parameters: Iterable[Tensor], lr: Tensor, momentum: float = 0.95, weight_decay: float = 0.0):
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.groups: dict[torch.Size, list[Tensor]] = collections.defaultdict(list)
        for parameter in parameters:
            self.groups[parameter.shape].append(parameter)
        self.averages = {shape: torch.stack([torch.zeros_like(p) for p in ps]) for shape, ps in self.groups.items()}

    @torch.no_grad()
    def step(self) -> None:
        for shape, parameters in self.groups.items():
            gradient = torch.stack([parameter.grad for parameter in parameters])
            average = self.averages[shape].lerp_(gradient, 1 - self.momentum)
            update = orthogonalise(gradient.lerp(average, self.momentum)).float()
            update = update * (-0.2 * math.sqrt(max(shape)) * self.lr)
            torch._foreach_mul_(parameters, 1 - self.lr * self.weight_decay)
            torch._foreach_add_(parameters, list(update.unbind()))

    def state_dict(self) -> dict[str, Tensor]:
        return {"x".join(map(str, shape)): average for shape, average in self.averages.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for shape, average in self.averages.items():
            average.copy_(state["x".join(map(str, shape))])
