"""Branch and adapter as one pair of matrices per layer, brought up to date once a step instead of joined at every use.

    down [R + r, K] = [D; A],   up [N, R + r] = [U, (alpha / r) B]         in the compute dtype

A layer that joins them itself launches a dozen small kernels in every forward and backward pass; over FLUX.1's 418 layers
that is 3 % of a step. The base's own factors become views of the joined ones, so the memory is that of A and B in 16 bits.
"""

import torch
from torch import Tensor, nn

from loragraft.adapters.inject import SVDQuantLoraLinear, layer_factors
from loragraft.quantization.linear import SVDQuantLinear


class JoinedFactors:
    """The joined factors of every W4A8 layer of `transformer` that carries one active adapter."""

    def __init__(self, transformer: nn.Module, dtype: torch.dtype) -> None:
        self._layers: list[tuple[SVDQuantLoraLinear, SVDQuantLinear]] = []
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._scaled: list[tuple[Tensor, Tensor, float]] = []
        for layer in transformer.modules():
            if isinstance(layer, SVDQuantLoraLinear) and len(layer.active_adapters) == 1:
                base = layer.get_base_layer()
                if isinstance(base, SVDQuantLinear) and base.numerics == "w4a8" and base.lora_down.dtype == dtype:
                    self._join(layer, base)
        self.refresh()

    def _join(self, layer: SVDQuantLoraLinear, base: SVDQuantLinear) -> None:
        name = layer.active_adapters[0]
        (down, up), scale = layer_factors(layer, name), float(layer.scaling[name])
        rank, (r, K), N = base.rank, down.shape, up.shape[0]
        layer.joined_down = base.lora_down.new_empty((rank + r, K))
        layer.joined_up = base.lora_up.new_empty((N, rank + r))
        layer.joined_down[:rank], layer.joined_up[:, :rank] = base.lora_down, base.lora_up
        self._layers.append((layer, base))
        base.lora_down, base.lora_up = layer.joined_down[:rank], layer.joined_up[:, :rank]
        self._copies.append((layer.joined_down[rank:], down))
        self._scaled.append((layer.joined_up[:, rank:], up, scale))

    @torch.no_grad()
    def refresh(self) -> None:
        """Copies A and B as they are now; before a forward pass with gradients."""
        if not self._layers:
            return
        torch._foreach_copy_([to for to, _ in self._copies], [factor.detach() for _, factor in self._copies])
        for to, factor, scale in self._scaled:
            to.copy_(factor if scale == 1 else factor * scale)

    def separate(self) -> None:
        """Takes the joined factors off again; the base's own are as they were."""
        for layer, base in self._layers:
            layer.joined_down = layer.joined_up = None
            base.lora_down, base.lora_up = base.lora_down.clone(), base.lora_up.contiguous()
        self._layers, self._copies, self._scaled = [], [], []
