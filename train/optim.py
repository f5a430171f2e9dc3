"""The optimizer over the adapter's float32 factors, and its learning-rate schedule (diffusers' `get_scheduler`).

    adamw       torch's; on a GPU its fused kernel, one launch for all factors        8 bytes of state a parameter
    adamw8bit   both moments in 8 bits (`kernels.adamw8bit`), one launch, too         2.03

Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (2019).
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import nn

from loragraft.kernels.adamw8bit import BLOCK, adamw8bit, count_blocks
from loragraft.recipes.schema import OptimConfig

SCHEDULES = {"constant": "constant_with_warmup", "cosine": "cosine", "linear": "linear"}
MOMENTS: Any = "moments"
"""Key of the only state, which belongs to all factors together."""


class AdamW8bit(torch.optim.Optimizer):
    """AdamW over one group of contiguous float32 parameters whose moments lie in one buffer of 8-bit codes (`kernels.adamw8bit`).

    A parameter without a gradient counts as one whose gradient is zero.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raises ValueError for a second group: one launch has one learning rate."""
        if self.param_groups:
            raise ValueError(
                "adamw8bit takes one group of parameters: give all of them at once, or use optim.name=adamw"
            )
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step on the gradients that are there."""
        (group,) = self.param_groups
        parameters: list[nn.Parameter] = group["params"]
        if MOMENTS not in self.state:
            self.state[MOMENTS] = self._fresh(parameters)
        moments = self.state[MOMENTS]
        moments["step"] += 1
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        names = ("lr", "betas", "eps", "weight_decay")
        adamw8bit(
            parameters, gradients, moments["codes"], moments["scales"], step=moments["step"], **{name: group[name] for name in names}
        )  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copies the state. Raises ValueError for that of another optimizer or of other parameters."""
        super().load_state_dict(state_dict)
        if not self.state:
            return
        parameters = self.param_groups[0]["params"]
        fresh, loaded = self._fresh(parameters), self.state.get(MOMENTS, {})
        tensors = {name: value for name, value in fresh.items() if isinstance(value, torch.Tensor)}
        if loaded.keys() != fresh.keys() or any(loaded[name].shape != tensors[name].shape for name in tensors):
            raise ValueError("the saved state is not adamw8bit's for these factors: start the run again with --fresh")
        self.state[MOMENTS] = {"step": loaded["step"], **{name: tensors[name].copy_(loaded[name]) for name in tensors}}

    @staticmethod
    def _fresh(parameters: Sequence[nn.Parameter]) -> dict[str, Any]:
        blocks, device = sum(count_blocks(p) for p in parameters), parameters[0].device
        codes = torch.zeros(2, blocks * BLOCK, dtype=torch.uint8, device=device)
        return {"step": 0, "codes": codes, "scales": torch.zeros(2, blocks, device=device)}


def build_optimizer(
    parameters: Sequence[nn.Parameter], config: OptimConfig, steps: int
) -> tuple[torch.optim.Optimizer, Any]:
    """(optimizer, schedule)."""
    optimizer = choose_optimizer(parameters, config, fused=all(parameter.is_cuda for parameter in parameters))
    schedule = get_scheduler(
        SCHEDULES[config.schedule], optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=steps
    )
    return optimizer, schedule


def choose_optimizer(parameters: Sequence[nn.Parameter], config: OptimConfig, *, fused: bool) -> torch.optim.Optimizer:
    """`optim.name`'s. fused: of torch's AdamW, the kernel that a GPU has."""
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": config.betas,
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    if config.name == "adamw8bit":
        return AdamW8bit(parameters, **settings)
    return torch.optim.AdamW(parameters, **settings, fused=True if fused else None)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the moments and what belongs to them, each storage once; 0 before the first step."""
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    }
    return sum(storages.values())
