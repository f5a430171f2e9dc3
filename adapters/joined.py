"""Branch and adapter as one pair of matrices per layer, brought up to date once a step instead of joined at every use.

    down [R + r, K] = [D; A],   up [N, R + r] = [U, (alpha / r) B]         in the compute dtype

A layer that joins them itself launches a dozen small kernels in every forward and backward pass; over FLUX.1's 418 layers
that is 3 % of a step. The base's own factors become views of the joined ones, so the memory is that of A and B in 16 bits.
"""

import torch
from torch import Tensor, nn

from loragraft.adapters.inject import SVDQuantLoraLinear, layer_factors
from loragraft.kernels.join_factors import Plan
from loragraft.quantization.linear import SVDQuantLinear


class JoinedFactors:
    """The joined factors of every W4A8 layer of `transformer` that carries one active adapter."""

    def __init__(self, transformer: nn.Module, dtype: torch.dtype) -> None:
        self._transformer, self._dtype = transformer, dtype
        self._layers: list[tuple[SVDQuantLoraLinear, SVDQuantLinear]] = []
        self._together: dict[SVDQuantLinear, tuple[Tensor, int]] = {}
        self._plan: Plan | None = None
        self.join()

    def join(self) -> None:
        """Joins what is apart: nothing, unless `separate` came before."""
        if self._layers:
            return
        copies: list[tuple[Tensor, Tensor, float]] = []
        for layer in self._transformer.modules():
            if isinstance(layer, SVDQuantLoraLinear) and len(layer.active_adapters) == 1:
                base = layer.get_base_layer()
                if isinstance(base, SVDQuantLinear) and base.numerics == "w4a8" and base.lora_down.dtype == self._dtype:
                    copies += self._join(layer, base)
        if copies:
            self._plan = Plan(*zip(*copies, strict=True))
        self.refresh()

    @property
    def nbytes(self) -> int:
        """What joining takes beside the base's own factors: A and B in the compute dtype."""
        return 0 if self._plan is None else sum(copy.nbytes for copy in self._plan.targets)

    def _join(self, layer: SVDQuantLoraLinear, base: SVDQuantLinear) -> list[tuple[Tensor, Tensor, float]]:
        """The places of its A and B, these, and what they are multiplied with."""
        name = layer.active_adapters[0]
        (down, up), scale = layer_factors(layer, name), float(layer.scaling[name])
        rank, (r, K), N = base.rank, down.shape, up.shape[0]
        layer.joined_together, layer.joined_first = self._room(base, rank + r)
        together, first = layer.joined_together, layer.joined_first
        layer.joined_down = (
            base.lora_down.new_empty((rank + r, K)) if together is None else together[first : first + rank + r]
        )
        layer.joined_up = base.lora_up.new_empty((N, rank + r))
        layer.joined_down[:rank], layer.joined_up[:, :rank] = base.lora_down, base.lora_up
        self._layers.append((layer, base))
        base.lora_down, base.lora_up = layer.joined_down[:rank], layer.joined_up[:, :rank]
        return [(layer.joined_down[rank:], down, 1.0), (layer.joined_up[:, rank:], up, scale)]

    def _room(self, base: SVDQuantLinear, rows: int) -> tuple[Tensor | None, int]:
        """Where [D; A] of a layer goes among those of its group (`join_group`), and from which row on; (None, 0) without one.

        All layers of a group have the rank of the first that asks, or no room: an adapter has one rank, and so has the base.
        """
        if not base.group or rows % 8 or any(layer.rank != base.rank for layer in base.group):
            return None, 0
        if base.group[0] not in self._together:
            self._together[base.group[0]] = base.lora_down.new_zeros((rows * len(base.group), base.in_features)), rows
        together, each = self._together[base.group[0]]
        return (together, base.place * rows) if each == rows else (None, 0)

    def refresh(self) -> None:
        """Copies A and B as they are now; before a forward pass with gradients."""
        if self._plan is not None:
            self._plan.run()

    def separate(self) -> None:
        """Takes the joined factors off again; the base's own are as they were."""
        self._plan = None  # it holds views, which would keep every layer's memory until the last is apart
        self._together = {}
        for layer, base in self._layers:
            layer.joined_down = layer.joined_up = layer.joined_together = None
            base.lora_down, base.lora_up = base.lora_down.clone(), base.lora_up.contiguous()
        self._layers = []
