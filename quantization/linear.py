"""`SVDQuantLinear`: a frozen four-bit linear layer with a 16-bit low-rank branch. Buffers only; the arithmetic is in `kernels/`.

    y = Q((x / smooth) H) deq(q)^T + (x lora_down^T) lora_up^T + bias          W_eff = (deq(q) H) / smooth + lora_up lora_down

| numerics | codes | scales | activations |
|---|---|---|---|
| w4a8  (native) | qweight u8 [N, Kp/2], unsigned | row_scale f32 [N], group_scale, group_zero u8 [Kp/g, N] | INT8 per token |
| w4a4  (interchange) | signed | wscale bf16 [Kp/64, N] | INT4 per 64 channels; act_unsigned: 0..15 of x + 0.171875 |
| w4a16 (adaLN) | unsigned | wscale, wzero bf16 [Kp/64, N] | not quantized, no smooth |

This is how layers are stored and what `state_dict` holds. In memory a w4a8 layer has its codes by tiles of 128 columns and one
word for a tile's scales and zeros instead (`layout.pack_tiles`, `pack_words`); both ways are exact.

Beside them: smooth bf16 [K], lora_down bf16 [R, K], lora_up bf16 [N, R], bias [N]. Kp is K rounded up to 128. Imported
layers may have float16 for bf16; the bias of an act_unsigned layer makes up for the shift (see `kernels/w4a4_linear.py`), and
only its columns from `unsigned_from` on are unsigned.
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from loragraft.kernels.branch import Joined
from loragraft.kernels.layout import (
    apply_hadamard,
    pack_int4,
    pack_tiles,
    pack_words,
    padded,
    unpack_tiles,
    unpack_uint4,
    unpack_words,
)
from loragraft.kernels.w4a4_linear import dequantize_w4a4, w4a4_linear
from loragraft.kernels.w4a8_group import MOST, w4a8_group
from loragraft.kernels.w4a8_linear import dequantize_w4a8, w4a8_linear
from loragraft.kernels.w4a16_linear import dequantize_w4a16, w4a16_linear
from loragraft.quantization.branched import BranchedLinear
from loragraft.quantization.calibrate import ActivationStats
from loragraft.quantization.formats import FORMATS, Layout
from loragraft.quantization.settings import LayerReport, Numerics, QuantSettings, SVDQuantNumerics
from loragraft.quantization.svdquant import quantize_linear

SHARING = frozenset({"to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "proj_mlp"})


class SVDQuantLinear(BranchedLinear):
    """Drop-in for `nn.Linear`: x [..., K] -> y [..., N] in x's dtype, for one adapter or none.

    `.to(dtype)`, `.half()` and the like move the buffers but never change their dtype: a scale rounded to 16 bits would be
    another model. `save_x` and `dgrad` choose what the backward pass keeps and multiplies with (see `kernels/`).
    """

    qweight: Tensor
    row_scale: Tensor
    group_words: Tensor
    wscale: Tensor
    wzero: Tensor
    smooth: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        numerics: Numerics,
        tensors: dict[str, Tensor],
        *,
        group_size: int = 64,
        hadamard: bool = False,
        act_unsigned: bool = False,
        unsigned_from: int = 0,
        output_error: float | None = None,
    ) -> None:
        """`tensors` as `quantize_linear` returns them. Raises ValueError naming a missing, foreign or mis-shaped one.

        Also for act_unsigned with other numerics than w4a4, or with a rotation, and for an unsigned_from inside a group.
        """
        if numerics not in get_args(SVDQuantNumerics):
            raise ValueError(f"numerics {numerics!r}: expected one of {', '.join(get_args(SVDQuantNumerics))}")
        super().__init__(in_features, out_features, numerics, group_size, output_error)
        if act_unsigned and (numerics != "w4a4" or hadamard):
            raise ValueError(f"act_unsigned is for w4a4 without a rotation, not {numerics} with hadamard = {hadamard}")
        if unsigned_from % 64 or not 0 <= unsigned_from < in_features or (unsigned_from and not act_unsigned):
            raise ValueError(
                f"unsigned_from {unsigned_from}: expected 0, or with act_unsigned a multiple of 64 below K"
            )
        self.hadamard = hadamard
        self.act_unsigned, self.unsigned_from = act_unsigned, unsigned_from
        self.save_x: Literal["quantized", "raw"] = "quantized"
        self.dgrad: Literal["dequantized", "int8"] = "dequantized"
        self.shares_input = False
        """Whether other layers read the same x (`share_inputs`)."""
        self.group: tuple[SVDQuantLinear, ...] = ()
        self.place = 0
        """The layers, this one at `place`, that a compiled forward pass computes together (`join_group`)."""
        rank = tensors["lora_down"].shape[0] if "lora_down" in tensors else 0
        expected = buffer_layout(in_features, out_features, numerics, group_size, rank)
        check_tensors(tensors, expected)
        for name, tensor in self._in_memory({name: tensors[name] for name in expected}).items():
            self.register_buffer(name, tensor)
        self.register_buffer("bias", tensors.get("bias"))
        if numerics == "w4a16":
            self.smooth = None
        self._note_smoothing()
        self.base_rank = rank

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, stats: ActivationStats | None, settings: QuantSettings, *, path: str = ""
    ) -> tuple["SVDQuantLinear", LayerReport]:
        """Quantize a float layer; see `svdquant.quantize_linear` for the errors."""
        tensors, report = quantize_linear(linear.weight, linear.bias, stats, settings, path=path)
        layer = cls(
            linear.in_features,
            linear.out_features,
            settings.numerics,
            tensors,
            group_size=settings.group_size,
            hadamard=report.hadamard,
            output_error=report.output_error,
        )
        return layer, report

    @classmethod
    def empty(
        cls,
        in_features: int,
        out_features: int,
        numerics: Numerics,
        *,
        rank: int,
        bias: bool,
        group_size: int = 64,
        hadamard: bool = False,
        act_unsigned: bool = False,
        unsigned_from: int = 0,
        output_error: float | None = None,
        bias_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "meta",
    ) -> "SVDQuantLinear":
        """A layer of the right shapes and no values, to be filled from a checkpoint."""
        layout = buffer_layout(in_features, out_features, numerics, group_size, rank)
        if bias:
            layout["bias"] = ((out_features,), bias_dtype)
        tensors = {name: torch.empty(shape, dtype=dtype, device=device) for name, (shape, dtype) in layout.items()}
        return cls(
            in_features,
            out_features,
            numerics,
            tensors,
            group_size=group_size,
            hadamard=hadamard,
            act_unsigned=act_unsigned,
            unsigned_from=unsigned_from,
            output_error=output_error,
        )

    def forward(
        self,
        x: Tensor,
        adapter_down: Tensor | None = None,
        adapter_up: Tensor | None = None,
        joined: Joined | None = None,
    ) -> Tensor:
        """y of the layer plus (x adapter_down^T) adapter_up^T; `adapter_up` [N, r] already carries alpha / r.

        joined: branch and adapter in one, for w4a8 layers whose caller keeps them so (`w4a8_linear`).

        Gradients reach x (straight through the rounding), `adapter_down` [r, K] and `adapter_up`; the base has none.
        """
        if self.group and torch.compiler.is_compiling() and not torch.is_grad_enabled() and adapter_down is None:
            return self._grouped(x)
        down, up, bias = self.lora_down, self.lora_up, self.bias
        smooth = self.smooth if self.smoothed else None
        if self.numerics == "w4a8":
            return w4a8_linear(
                x, self.qweight, self.row_scale, self.group_words, smooth, down, up, bias,
                hadamard=self.hadamard, adapter_down=adapter_down, adapter_up=adapter_up,
                save_x=self.save_x, dgrad=self.dgrad, shares_input=self.shares_input, joined=joined,
            )  # fmt: skip
        if self.numerics == "w4a4":
            return w4a4_linear(
                x, self.qweight, self.wscale, smooth, down, up, bias,
                hadamard=self.hadamard, unsigned=self.act_unsigned, unsigned_from=self.unsigned_from,
                adapter_down=adapter_down, adapter_up=adapter_up,
                save_x=self.save_x, dgrad=self.dgrad,
            )  # fmt: skip
        return w4a16_linear(
            x, self.qweight, self.wscale, self.wzero, down, up, bias, adapter_down=adapter_down, adapter_up=adapter_up
        )

    def _grouped(self, x: Tensor) -> Tensor:
        """This layer's part of the group's op. The others ask for the same op on the same arguments, and a compiled graph of
        `backbones.compiled` runs equal calls once."""
        together = self.group
        ys = w4a8_group(
            x, [layer.qweight for layer in together], [layer.row_scale for layer in together],
            [layer.group_words for layer in together], [layer.lora_down for layer in together],
            [layer.lora_up for layer in together], [layer.bias for layer in together], hadamard=self.hadamard,
        )  # fmt: skip
        return ys[self.place]

    def dequantized_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W_eff [N, K]: what the layer multiplies with when its input is not rounded, computed in float32 or wider."""
        wide = torch.promote_types(dtype, torch.float32)
        residual = self.dequantized_codes(wide)[:, : self.in_features]
        if self.hadamard:
            residual = apply_hadamard(residual)
        if self.smooth is not None:
            residual = residual / self.smooth.to(wide)
        return (residual + self.lora_up.to(wide) @ self.lora_down.to(wide)).to(dtype)

    def dequantized_codes(self, dtype: torch.dtype) -> Tensor:
        """The residual [N, Kp] that the codes stand for, still smoothed and rotated; columns from K on are padding."""
        if self.numerics == "w4a8":
            return dequantize_w4a8(self.qweight, self.row_scale, self.group_words, dtype)
        if self.numerics == "w4a4":
            return dequantize_w4a4(self.qweight, self.wscale, dtype)
        return dequantize_w4a16(self.qweight, self.wscale, self.wzero, dtype)

    def _in_memory(self, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        """Stored tensors -> buffers."""
        if self.numerics != "w4a8":
            return stored
        codes, scale, zero = (stored.pop(name) for name in ("qweight", "group_scale", "group_zero"))
        words = pack_words(scale, zero, self.group_size)
        return {"qweight": pack_tiles(unpack_uint4(codes)), "group_words": words, **stored}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.numerics == "w4a8":
            destination[f"{prefix}qweight"] = pack_int4(unpack_tiles(self.qweight))
            scale, zero = unpack_words(destination.pop(f"{prefix}group_words"), self.group_size)
            destination[f"{prefix}group_scale"], destination[f"{prefix}group_zero"] = scale, zero

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        names = [f"{prefix}{name}" for name in ("qweight", "group_scale", "group_zero")]
        if self.numerics == "w4a8" and all(name in state_dict for name in names):
            stored = {name.removeprefix(prefix): state_dict.pop(name) for name in names}
            state_dict.update({f"{prefix}{name}": tensor for name, tensor in self._in_memory(stored).items()})
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._note_smoothing()

    def _note_smoothing(self) -> None:
        """A vector of ones is left out of the arithmetic: rotated inputs then reach the tensor cores untouched."""
        smooth = self.smooth
        self.smoothed = smooth is not None and (smooth.is_meta or bool((smooth != 1).any()))

    def extra_repr(self) -> str:
        rotated = ", hadamard" if self.hadamard else ", act_unsigned" if self.act_unsigned else ""
        return (
            f"{self.in_features}, {self.out_features}, {self.numerics}, group_size={self.group_size}, rank={self.rank}, "
            f"bias={self.bias is not None}{rotated}"
        )


def share_inputs(model: nn.Module) -> None:
    """Marks the layers that by their names read the tensor that a sibling reads: q, k and v, and FLUX's proj_mlp.

    A wrong guess costs nothing but the fusion of quantizing and down-projection: what is shared is found by identity.
    """
    for path, module in model.named_modules():
        if isinstance(module, SVDQuantLinear):
            module.shares_input = path.rpartition(".")[2] in SHARING


def join_group(layers: Sequence[SVDQuantLinear]) -> bool:
    """Lets layers that read one x be computed together in compiled forward passes; returns whether they can be."""
    first = layers[0]
    if len(layers) > MOST or any(
        layer.numerics != "w4a8"
        or layer.smoothed
        or (layer.hadamard, layer.in_features) != (first.hadamard, first.in_features)
        for layer in layers
    ):
        return False
    for place, layer in enumerate(layers):
        layer.group, layer.place = tuple(layers), place
    return True


def buffer_layout(in_features: int, out_features: int, numerics: Numerics, group_size: int, rank: int) -> Layout:
    """Name -> (shape, dtype) of every buffer but the optional bias."""
    K, N, Kp = in_features, out_features, padded(in_features)
    branch: Layout = {"lora_down": ((rank, K), torch.bfloat16), "lora_up": ((N, rank), torch.bfloat16)}
    if numerics in FORMATS:
        return FORMATS[numerics].layout(N, K) | branch
    grouped = (Kp // group_size, N)
    layout: Layout = {"qweight": ((N, Kp // 2), torch.uint8)}
    if numerics == "w4a8":
        layout["row_scale"] = ((N,), torch.float32)
        layout["group_scale"] = layout["group_zero"] = (grouped, torch.uint8)
    elif numerics == "w4a4":
        layout["wscale"] = (grouped, torch.bfloat16)
    else:
        layout["wscale"] = layout["wzero"] = (grouped, torch.bfloat16)
    if numerics != "w4a16":
        layout["smooth"] = ((K,), torch.bfloat16)
    return layout | branch


def check_tensors(tensors: dict[str, Tensor], expected: Layout) -> None:
    """Raises ValueError naming a tensor of a layer that is missing, foreign or mis-shaped."""
    missing, foreign = expected.keys() - tensors.keys(), tensors.keys() - expected.keys() - {"bias"}
    if missing or foreign:
        raise ValueError(f"tensors of a quantized layer: missing {sorted(missing)}, not expected {sorted(foreign)}")
    for name, (shape, dtype) in expected.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape or not fits_dtype(name, tensor.dtype, dtype):
            raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} {shape}")


def fits_dtype(name: str, given: torch.dtype, wanted: torch.dtype) -> bool:
    """Whether the buffer `name` may be `given` where `buffer_layout` says `wanted`.

    The branch may be of any float type; scales and smoothing factors stored as bf16 may be float16, as in imported files.
    The offsets of imported W4A16 layers may be float32, as they are differences of what the file stores.
    """
    if name.startswith("lora_") or (name, given) == ("wzero", torch.float32):
        return given.is_floating_point
    return given == wanted or (wanted == torch.bfloat16 and given == torch.float16)
