"""`QuantizedLinear`: a frozen linear layer in any of the `FORMATS`, its dequantized weight made anew for each product.

    y = round_input(x) deq(q)^T + (x lora_down^T) lora_up^T + bias            dx = dy (deq(q) + lora_up lora_down)

Rounding of x is straight-through: its derivative is taken as 1. The backward pass decodes the weight again instead of keeping
it; for dA it keeps x itself, whatever `train.save_x` says. Where `Format.engine_on` says so, a GPU multiplies the codes themselves.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from loragraft.quantization import nf4
from loragraft.quantization.branched import BranchedLinear
from loragraft.quantization.calibrate import ActivationStats
from loragraft.quantization.formats import FORMATS, Engine, FormatName
from loragraft.quantization.linear import SVDQuantLinear, buffer_layout, check_tensors
from loragraft.quantization.settings import LayerReport, Numerics, QuantSettings
from loragraft.quantization.svdquant import quantize_linear


class QuantizedLinear(BranchedLinear):
    """Drop-in for `nn.Linear`: x [..., K] -> y [..., N] in x's dtype, for one adapter or none."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        numerics: FormatName,
        tensors: dict[str, Tensor],
        *,
        output_error: float | None = None,
    ) -> None:
        """`tensors` as `quantize_linear` returns them. Raises ValueError naming a missing, foreign or mis-shaped one."""
        self.format = FORMATS[numerics]
        super().__init__(in_features, out_features, numerics, self.format.block, output_error)
        rank = tensors["lora_down"].shape[0] if "lora_down" in tensors else 0
        expected = buffer_layout(in_features, out_features, numerics, self.group_size, rank)
        check_tensors(tensors, expected)
        for name in expected:
            self.register_buffer(name, tensors[name])
        self.register_buffer("bias", tensors.get("bias"))
        device = self.lora_down.device
        for name, table in self.format.tables.items():
            # Their own memory: an in-place move of one layer must not reach the others.
            on = torch.device("cpu") if device.type == "meta" else device
            self.register_buffer(name, table.to(on, copy=True), persistent=False)
        self._names = (*(name for name in expected if not name.startswith("lora_")), *self.format.tables)
        self.base_rank = rank

    @property
    def engine(self) -> Engine:
        """Who multiplies, where the layer lies now."""
        return self.format.engine_on(self.qweight.device, self.out_features, self.in_features)

    def forward(
        self,
        x: Tensor,
        adapter_down: Tensor | None = None,
        adapter_up: Tensor | None = None,
        joined: None = None,
    ) -> Tensor:
        """y of the layer plus (x adapter_down^T) adapter_up^T; `adapter_up` [N, r] already carries alpha / r.

        Gradients reach x, `adapter_down` [r, K] and `adapter_up`; the base has none. `joined` is W4A8's and stays None.
        """
        rows = x.reshape(-1, self.in_features)
        y = _Product.apply(rows, self.numerics, self.engine, self.out_features, self._names, *self._tensors().values())
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        down, up = [self.lora_down] if self.rank else [], [self.lora_up] if self.rank else []
        if adapter_down is not None and adapter_up is not None:
            down.append(adapter_down)
            up.append(adapter_up)
        if down:
            branch_down = torch.cat([factor.to(x.dtype) for factor in down])
            branch_up = torch.cat([factor.to(x.dtype) for factor in up], dim=1)
            y = y + (rows @ branch_down.T) @ branch_up.T
        return y.view(*x.shape[:-1], self.out_features)

    def dequantized_codes(self, dtype: torch.dtype) -> Tensor:
        """[N, K]: what the codes stand for, without the branch."""
        return _decode(self.numerics, self.engine, self._tensors(), self.out_features, self.in_features, dtype)

    def dequantized_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W_eff [N, K], computed in float32 or wider."""
        wide = torch.promote_types(dtype, torch.float32)
        return (self.dequantized_codes(wide) + self.lora_up.to(wide) @ self.lora_down.to(wide)).to(dtype)

    def _tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self._names}

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        for name in self.format.tables:  # not among what was loaded, which may lie on a GPU
            setattr(self, name, getattr(self, name).to(self.qweight.device))

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, {self.numerics}, rank={self.rank}, bias={self.bias is not None}"
        )


class _Product(torch.autograd.Function):
    """x deq(q)^T [M, N] in x's dtype, x rounded as the format wants it."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, name: str, engine: Engine, N: int, names: tuple[str, ...], *tensors: Tensor
    ) -> Tensor:
        ctx.about, ctx.K = (name, engine, names), rows.shape[1]
        ctx.save_for_backward(*tensors)
        found, named = FORMATS[name], dict(zip(names, tensors, strict=True))
        if found.product is not None and engine == found.engine:
            return found.product(rows, named).to(rows.dtype)
        rounded = rows if found.round_input is None else found.round_input(rows)
        return linear(rounded, _decode(name, engine, named, N, rows.shape[1], rows.dtype))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        name, engine, names = ctx.about
        named = dict(zip(names, ctx.saved_tensors, strict=True))
        dx = dy @ _decode(name, engine, named, dy.shape[1], ctx.K, dy.dtype)
        return dx, *(None,) * (4 + len(names))


def _decode(name: str, engine: Engine, tensors: dict[str, Tensor], N: int, K: int, dtype: torch.dtype) -> Tensor:
    if engine == "bitsandbytes":
        return nf4.decode_bitsandbytes(tensors, N, K, dtype)
    return FORMATS[name].decode(tensors, N, K).to(dtype)


def from_linear(
    linear: nn.Linear, stats: ActivationStats | None, settings: QuantSettings, *, path: str = ""
) -> tuple[BranchedLinear, LayerReport]:
    """Quantize a float layer; see `svdquant.quantize_linear` for the errors."""
    if settings.numerics not in FORMATS:
        return SVDQuantLinear.from_linear(linear, stats, settings, path=path)
    tensors, report = quantize_linear(linear.weight, linear.bias, stats, settings, path=path)
    name = FORMATS[settings.numerics].name
    layer = QuantizedLinear(linear.in_features, linear.out_features, name, tensors, output_error=report.output_error)
    return layer, report


def make_empty(
    linear: nn.Linear,
    numerics: Numerics,
    *,
    rank: int,
    group_size: int = 64,
    hadamard: bool = False,
    act_unsigned: bool = False,
    unsigned_from: int = 0,
    output_error: float | None = None,
    bias_dtype: torch.dtype = torch.bfloat16,
) -> BranchedLinear:
    """A layer in the place of `linear`, of the right shapes and no values, on the meta device. Raises ValueError as the classes do."""
    K, N, bias = linear.in_features, linear.out_features, linear.bias is not None
    if numerics not in FORMATS:
        return SVDQuantLinear.empty(
            K, N, numerics, rank=rank, bias=bias, group_size=group_size, hadamard=hadamard, act_unsigned=act_unsigned,
            unsigned_from=unsigned_from, output_error=output_error, bias_dtype=bias_dtype,
        )  # fmt: skip
    if hadamard or act_unsigned or unsigned_from:
        raise ValueError(f"{numerics} layers have neither a rotation nor unsigned activations")
    layout = buffer_layout(K, N, numerics, group_size, rank) | ({"bias": ((N,), bias_dtype)} if bias else {})
    tensors = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in layout.items()}
    return QuantizedLinear(K, N, FORMATS[numerics].name, tensors, output_error=output_error)
