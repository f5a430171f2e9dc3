"""LPIPS v0.1 on AlexNet: the learned perceptual distance that SVDQuant reports between 4-bit and 16-bit images.

    d(a, b) = sum_l mean over places of w_l . (n(f_l(a)) - n(f_l(b)))^2,   n(f) = f / (|f| over channels + 1e-10)

with f_l the five rectified convolutions of torchvision's AlexNet at the images' own resolution and w_l >= 0 the published
heads. 0 for equal images, larger is further apart. Values in [0, 1] are scaled to [-1, 1] and whitened first. Torchmetrics
puts its epsilon under the root: the same to 1e-6. Not comparable with `perceptual.STLPIPS`, another network.
Source: Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (2018).
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import conv2d, max_pool2d, relu

from loragraft.evaluation.perceptual import unit_features

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
CONVOLUTIONS = {
    "features.0": (4, 2),
    "features.3": (1, 2),
    "features.6": (1, 1),
    "features.8": (1, 1),
    "features.10": (1, 1),
}
"""Name in torchvision's file -> stride and padding. Those of `POOLED` see a 3 x 3 maximum of stride 2 before them."""
POOLED = ("features.3", "features.6")
WIDTHS = (64, 192, 384, 256, 256)
SMALLEST = 31
"""Edge in pixels below which nothing is left for the last layers."""


class LPIPSAlex:
    """The network on one device; call it with two batches."""

    def __init__(
        self, backbone: Mapping[str, Tensor], heads: Mapping[str, Tensor], device: torch.device | str = "cpu"
    ) -> None:
        """backbone: torchvision's AlexNet state; heads: `lin{0..4}.model.1.weight` [1, C, 1, 1]. Raises ValueError."""
        self.device = torch.device(device)
        wanted = {f"lin{i}.model.1.weight": (1, width, 1, 1) for i, width in enumerate(WIDTHS)}
        self._heads = [
            heads[name].float().to(device) for name in wanted if _fits(heads, name, wanted[name], "LPIPS heads")
        ]
        for name, width in zip(CONVOLUTIONS, WIDTHS, strict=True):
            _fits(backbone, f"{name}.bias", (width,), "AlexNet")
        self._state = {
            name: tensor.float().to(device) for name, tensor in backbone.items() if name.startswith("features.")
        }

    @classmethod
    def load(cls, backbone: Path, heads: Path, device: torch.device | str = "cpu") -> "LPIPSAlex":
        """From the published files."""
        states = [torch.load(path, map_location="cpu", weights_only=True) for path in (backbone, heads)]
        return cls(states[0], states[1], device)

    @torch.no_grad()
    def __call__(self, a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
        """a, b [B, 3, H, W] in [0, 1] -> float32 [B] on the CPU. Raises ValueError under 31 pixels or on other shapes."""
        if a_BCHW.shape != b_BCHW.shape or a_BCHW.ndim != 4 or a_BCHW.shape[1] != 3:
            raise ValueError(f"expected two batches [B, 3, H, W], got {tuple(a_BCHW.shape)}, {tuple(b_BCHW.shape)}")
        if min(a_BCHW.shape[-2:]) < SMALLEST:
            raise ValueError(f"LPIPS needs at least {SMALLEST} pixels on an edge, got {tuple(a_BCHW.shape[-2:])}")
        layers = zip(self._layers(a_BCHW), self._layers(b_BCHW), self._heads, strict=True)
        parts = [conv2d((unit_features(a) - unit_features(b)).square(), head).mean((1, 2, 3)) for a, b, head in layers]
        return torch.stack(parts).sum(0).cpu()

    def _layers(self, images: Tensor) -> list[Tensor]:
        shift, scale = (torch.tensor(v, device=self.device).view(1, 3, 1, 1) for v in (SHIFT, SCALE))
        x, found = (images.to(self.device, torch.float32) * 2 - 1 - shift) / scale, []
        for name, (stride, padding) in CONVOLUTIONS.items():
            x = max_pool2d(x, 3, 2) if name in POOLED else x
            x = relu(conv2d(x, self._state[f"{name}.weight"], self._state[f"{name}.bias"], stride, padding))
            found.append(x)
        return found


def _fits(state: Mapping[str, Tensor], name: str, shape: tuple[int, ...], what: str) -> bool:
    found = tuple(state[name].shape) if name in state else None
    if found != shape:
        raise ValueError(f"the file of {what} has {name} of shape {found}, expected {shape}: it is another network")
    return True
