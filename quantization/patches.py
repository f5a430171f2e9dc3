"""What a layer multiplies its weight with, row by row: tokens of a linear layer, patches of a convolution.

Calibration draws rows from both. A patch is [k k Ct], columns (tap, channel) as `SVDQuantConv2d` orders them; only those
drawn are ever gathered.
"""

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from loragraft.kernels.taps import Window, pad_taps


class Rows(Protocol):
    """The input of a layer as rows."""

    count: int

    def absmax(self) -> Tensor:
        """[K] float32: largest magnitude of each column."""
        ...

    def draw(self, index: Tensor) -> Tensor:
        """[S, K] in x's dtype: the rows of these numbers."""
        ...


class TokenRows:
    """x [..., K]."""

    def __init__(self, x: Tensor) -> None:
        self._x_MK = x.detach().reshape(-1, x.shape[-1])
        self.count = self._x_MK.shape[0]

    def absmax(self) -> Tensor:
        return self._x_MK.abs().amax(0).float()

    def draw(self, index: Tensor) -> Tensor:
        return self._x_MK[index.to(self._x_MK.device)]


class PatchRows:
    """The patches of a convolution over x [B, C, H, W], one per output pixel."""

    def __init__(self, x: Tensor, conv: nn.Conv2d) -> None:
        (B, self._channels, H, W), edge = x.shape, int(conv.padding[0])
        self._window = Window(B, H, W, conv.kernel_size[0], conv.stride[0], edge)
        self._x_BHWC = pad(x.detach(), (edge, edge, edge, edge)).permute(0, 2, 3, 1)
        self.count = self._window.out_pixels

    def absmax(self) -> Tensor:
        """The same for all taps of a channel."""
        return self._columns(self._x_BHWC.abs().amax((0, 1, 2)).float().repeat(self._window.taps))

    def draw(self, index: Tensor) -> Tensor:
        window, index = self._window, index.to(self._x_BHWC.device)
        image = index // (window.out_height * window.out_width)
        top = index // window.out_width % window.out_height * window.stride
        left = index % window.out_width * window.stride
        k = window.kernel
        taps = [self._x_BHWC[image, top + tap // k, left + tap % k] for tap in range(window.taps)]
        return self._columns(torch.cat(taps, dim=1))

    def _columns(self, rows: Tensor) -> Tensor:
        return rows if self._window.taps == 1 else pad_taps(rows, self._channels)


def rows_of(module: nn.Module, x: Tensor) -> Rows:
    """The rows that `module` makes of its input."""
    return PatchRows(x, module) if isinstance(module, nn.Conv2d) else TokenRows(x)
