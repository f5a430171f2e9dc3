"""What every frozen low-bit linear layer is to the rest of the project: a 16-bit low-rank branch beside a stored weight.

    y = (what the codes compute of x) + (x lora_down^T) lora_up^T + bias         lora_down [R, K], lora_up [N, R]

Adapters are trained beside the branch and grafted into it; neither asks how the weight is stored.
"""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from loragraft.quantization.settings import Numerics


class BranchedLinear(nn.Module):
    """The frame of `SVDQuantLinear` and `QuantizedLinear`: buffers only, x [..., K] -> y [..., N] in x's dtype.

    `.to(dtype)`, `.half()` and the like move the buffers but never change their dtype: a scale rounded to 16 bits would be
    another model.
    """

    qweight: Tensor
    lora_down: Tensor
    lora_up: Tensor
    bias: Tensor | None
    base_rank: int
    """Rank of the branch that belongs to the base; `rank` is larger while an adapter is grafted."""

    def __init__(
        self, in_features: int, out_features: int, numerics: Numerics, group_size: int, output_error: float | None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.numerics, self.group_size = numerics, group_size
        self.output_error = output_error

    @property
    def rank(self) -> int:
        """Rank of the branch as it is now, grafted adapters included."""
        return self.lora_down.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def dequantized_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W_eff [N, K]: what the layer multiplies with when its input is not rounded, computed in float32 or wider."""
        raise NotImplementedError

    def set_branch(self, lora_down: Tensor, lora_up: Tensor) -> None:
        """Exchange the branch for factors [R', K] and [N, R']; the old tensors are left as they are.

        `base_rank` does not change. Raises ValueError on a shape or dtype that does not fit.
        """
        wanted = (lora_down.shape[0], self.in_features), (self.out_features, lora_down.shape[0])
        given = tuple(lora_down.shape), tuple(lora_up.shape)
        if given != wanted:
            raise ValueError(f"branch of shapes {given[0]}, {given[1]}; this layer needs {wanted[0]}, {wanted[1]}")
        if lora_down.dtype != lora_up.dtype or not lora_down.is_floating_point():
            raise ValueError(f"branch dtypes {lora_down.dtype}, {lora_up.dtype}: expected one floating-point dtype")
        self.lora_down, self.lora_up = lora_down.contiguous(), lora_up.contiguous()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """`nn.Module.to` and its kin end here: keep the device of fn's result, never its dtype."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keep_dtype, recurse)
        return self
