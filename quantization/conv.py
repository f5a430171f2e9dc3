"""`SVDQuantConv2d`: a frozen four-bit convolution, which is a four-bit linear layer over patches.

    y = conv(Q((x / smooth) H), deq(q)) + conv1x1(conv(x, lora_down), lora_up) + bias

W [N, C, k, k] is quantized as a matrix [N, k k Ct], columns (tap, channel), Ct = C rounded up to 64 with zero weights (of a
1 x 1 convolution [N, C]): buffers, checkpoint and graft are those of `SVDQuantLinear` with so many in features. All taps of a
channel share its smoothing factor, because they read the same codes. k > 1 is W4A8 alone (`kernels/w4a8_conv.py`); a 1 x 1
convolution is its linear layer on pixels, in any numerics. Adapters are A [r, C, k, k] and B [N, r, 1, 1], as PEFT and
kohya's scripts write them. What cannot be quantized stays in 16 bits: depthwise and grouped convolutions, other paddings
than zeros, dilation.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from loragraft.kernels.branch import Joined
from loragraft.kernels.layout import GROUP
from loragraft.kernels.taps import pad_taps, tap_columns, trim_taps
from loragraft.kernels.w4a8_conv import as_columns, as_image, as_kernel, as_pixels, w4a8_conv
from loragraft.quantization.calibrate import ActivationStats
from loragraft.quantization.linear import SVDQuantLinear
from loragraft.quantization.settings import LayerReport, Numerics, QuantSettings
from loragraft.quantization.svdquant import quantize_linear


class SVDQuantConv2d(SVDQuantLinear):
    """Drop-in for `nn.Conv2d`: x [B, C, H, W] -> y [B, N, H', W'] in x's dtype and channels-last layout.

    `lora_down` and the adapter that `forward` takes are matrices over (tap, channel); `adapter_columns` makes A one.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: int,
        padding: int,
        numerics: Numerics,
        tensors: dict[str, Tensor],
        **options: Any,
    ) -> None:
        """`tensors` and `options` as of `SVDQuantLinear` with `conv_columns` in features.

        Raises ValueError for other numerics than w4a8 where kernel > 1, a padded 1 x 1, and as `SVDQuantLinear` does.
        """
        check_conv(in_channels, kernel, padding, numerics, bool(options.get("hadamard")))
        super().__init__(conv_columns(in_channels, kernel), out_channels, numerics, tensors, **options)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.padding = (kernel, kernel), (stride, stride), (padding, padding)

    @classmethod
    def from_conv(
        cls, conv: nn.Conv2d, stats: ActivationStats | None, settings: QuantSettings, *, path: str = ""
    ) -> tuple["SVDQuantConv2d", LayerReport]:
        """Quantize a float convolution. Raises ValueError as `quantize_linear` and `check_quantizable` do."""
        check_quantizable(conv, path)
        tensors, report = quantize_conv_weight(conv.weight, conv.bias, stats, settings, path=path)
        options: dict[str, Any] = {
            "group_size": settings.group_size,
            "hadamard": report.hadamard,
            "output_error": report.output_error,
        }
        return cls(*_sizes(conv), settings.numerics, tensors, **options), report

    @classmethod
    def empty_like(cls, conv: nn.Conv2d, numerics: Numerics, *, path: str = "", **options: Any) -> "SVDQuantConv2d":
        """A layer of the shapes of `conv` and no values; `options` as of `SVDQuantLinear.empty`, which makes the tensors."""
        check_quantizable(conv, path)
        C, _, kernel, _, padding = _sizes(conv)
        check_conv(C, kernel, padding, numerics, bool(options.get("hadamard")), path)
        columns = conv_columns(C, kernel)
        flat = SVDQuantLinear.empty(columns, conv.out_channels, numerics, bias=conv.bias is not None, **options)
        tensors = {name: tensor for name, tensor in flat.state_dict().items() if tensor is not None}
        kept = {name: value for name, value in options.items() if name not in ("rank", "bias_dtype", "device")}
        return cls(*_sizes(conv), numerics, tensors, **kept)

    @property
    def taps(self) -> int:
        """T = k^2."""
        return self.kernel_size[0] ** 2

    @property
    def adapter_shape(self) -> tuple[int, int, int]:
        """(C, k, k): the shape of A without its rank."""
        return self.in_channels, *self.kernel_size

    def forward(
        self,
        x: Tensor,
        adapter_down: Tensor | None = None,
        adapter_up: Tensor | None = None,
        joined: Joined | None = None,
    ) -> Tensor:
        """y of the layer plus the adapter's; adapter_down [r, in_features] of `adapter_columns`, adapter_up [N, r].

        Gradients reach x (straight through the rounding), `adapter_down` and `adapter_up`; the base has none.
        """
        if self.taps == 1:
            step = self.stride[0]
            x = x if step == 1 else x[:, :, ::step, ::step]
            y_PN = super().forward(as_pixels(x), adapter_down, adapter_up, joined)
            return as_image(y_PN, x.shape[0], x.shape[2], x.shape[3])
        C, T = self.in_channels, self.taps
        smooth = self.smooth[:C] if self.smoothed and self.smooth is not None else None
        down = None if adapter_down is None else trim_taps(adapter_down, C, T)
        return w4a8_conv(
            x, self.qweight, self.row_scale, self.group_words, smooth, trim_taps(self.lora_down, C, T), self.lora_up,
            self.bias, kernel=self.kernel_size[0], stride=self.stride[0], padding=self.padding[0],
            hadamard=self.hadamard, adapter_down=down, adapter_up=adapter_up, save_x=self.save_x,
        )  # fmt: skip

    def adapter_columns(self, down: Tensor) -> Tensor:
        """A [r, C, k, k] -> [r, in_features]; differentiable. Raises ValueError for another shape."""
        if down.ndim != 4 or tuple(down.shape[1:]) != self.adapter_shape:
            raise ValueError(f"A has shape {tuple(down.shape)}; this convolution needs [r, {self.adapter_shape}]")
        return _matrix(down)

    def kernel_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W_eff [N, C, k, k]: `dequantized_weight` without padding, as a convolution takes it."""
        return self.as_kernel(self.dequantized_weight(dtype))

    def as_kernel(self, matrix: Tensor) -> Tensor:
        """[n, in_features] -> [n, C, k, k], without padding."""
        matrix = matrix if self.taps == 1 else trim_taps(matrix, self.in_channels, self.taps)
        return as_kernel(matrix, self.kernel_size[0])

    def extra_repr(self) -> str:
        window = f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"
        rotated = ", hadamard" if self.hadamard else ""
        return (
            f"{self.in_channels}, {self.out_channels}, {window}, {self.numerics}, group_size={self.group_size}, "
            f"rank={self.rank}, bias={self.bias is not None}{rotated}"
        )


def _sizes(conv: nn.Conv2d) -> tuple[int, int, int, int, int]:
    """(C, N, kernel, stride, padding) of a quantizable convolution."""
    return conv.in_channels, conv.out_channels, conv.kernel_size[0], conv.stride[0], int(conv.padding[0])


def conv_columns(channels: int, kernel: int) -> int:
    """In features of a convolution as a matrix: k k Ct, or C of a 1 x 1."""
    return channels if kernel == 1 else kernel * kernel * tap_columns(channels)


def _matrix(weight: Tensor) -> Tensor:
    """[N, C, k, k] -> [N, conv_columns]."""
    matrix = as_columns(weight)
    return matrix if weight.shape[-1] == 1 else pad_taps(matrix, weight.shape[1])


def quantize_conv_weight(
    weight: Tensor, bias: Tensor | None, stats: ActivationStats | None, settings: QuantSettings, *, path: str = ""
) -> tuple[dict[str, Tensor], LayerReport]:
    """`quantize_linear` of W [N, C, k, k], as `SVDQuantConv2d` stores it. Raises ValueError as it and `check_conv` do."""
    _, C, kernel, _ = weight.shape
    rotates = C % GROUP == 0
    if settings.smoothing_mode == "hadamard" and not rotates:
        raise ValueError(f"layer {path!r}: block-Hadamard-64 needs channels divisible by 64, not {C}; use 'weight'")
    check_conv(C, kernel, 0, settings.numerics, False, path)
    settings = settings if rotates else replace(settings, rotation="never")
    return quantize_linear(_matrix(weight), bias, stats, settings, path=path, taps=kernel * kernel)


def why_16bit(conv: nn.Conv2d) -> str | None:
    """Why a convolution cannot be quantized; None if it can."""
    square = [len(set(pair)) == 1 for pair in (conv.kernel_size, conv.stride) if isinstance(pair, tuple)]
    if conv.groups != 1:
        return "depthwise" if conv.groups == conv.in_channels else f"{conv.groups} groups"
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str) or len(set(conv.padding)) != 1:
        return f"padding {conv.padding} of {conv.padding_mode}"
    if not all(square) or set(conv.dilation) != {1}:
        return f"kernel {conv.kernel_size}, stride {conv.stride}, dilation {conv.dilation}"
    return "a padded 1 x 1" if conv.kernel_size[0] == 1 and conv.padding[0] else None


def is_quantizable(module: nn.Module) -> bool:
    """Whether a quantized layer can take the module's place: a linear layer's or such a convolution's."""
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and why_16bit(module) is None)


def check_quantizable(conv: nn.Conv2d, path: str = "") -> None:
    """Raises ValueError saying why the convolution must stay in 16 bits."""
    reason = why_16bit(conv)
    if reason is not None:
        raise ValueError(f"convolution {path!r} cannot be quantized: {reason}; keep it in 16 bits")


def check_conv(channels: int, kernel: int, padding: int, numerics: Numerics, hadamard: bool, path: str = "") -> None:
    """Raises ValueError for numerics or a rotation that no convolution kernel runs."""
    where = f"layer {path!r}: " if path else ""
    if kernel > 1 and numerics != "w4a8":
        raise ValueError(f"{where}{numerics} for a {kernel} x {kernel} convolution: only w4a8 has a kernel; use it")
    if kernel == 1 and padding:
        raise ValueError(f"{where}a 1 x 1 convolution with padding {padding}; keep it in 16 bits")
    if hadamard and channels % GROUP:
        raise ValueError(f"{where}a rotation needs channels divisible by {GROUP}, not {channels}")
