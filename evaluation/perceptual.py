"""ST-LPIPS: a perceptual distance between two images that does not mind a shift of a pixel or two.

    d(a, b) = sum_l mean over places of w_l . (n(f_l(a)) - n(f_l(b)))^2,   n(f) = f / (|f| over channels + 1e-10)

with f_l five layers of an AlexNet whose strides are replaced by blur pooling (reflection padding of 2, a fixed 3 x 3
binomial filter, stride 2), and w_l learned weights >= 0. 0 for equal images, larger is further apart.

Weights: the pip package `stlpips-pytorch` (BSD-2-Clause). Only its weight file is read: parts of that package's code are
under a non-commercial licence, so nothing of it is imported, and the layers below are written from the paper and from the
shapes in the file. They give the value in that project's README, 0.7777554988861084 for its example pair, digit by digit.
Source: Ghildyal and Liu, "Shift-tolerant Perceptual Similarity Metric" (ECCV 2022); Zhang et al., LPIPS (2018).
"""

import importlib.util
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import conv2d, max_pool2d, pad, relu

PACKAGE, WEIGHTS = "stlpips_pytorch", "weights/vST0.0/alex_shift_tolerant.pth"
SMALLEST = 32
"""Edge in pixels below which the last layers have nothing left to look at."""


class STLPIPS:
    """The network on one device; call it with two batches."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        """Raises FileNotFoundError naming the package where its weights are not installed."""
        package = importlib.util.find_spec(PACKAGE)  # finds, does not import
        if package is None or package.origin is None:
            raise FileNotFoundError("ST-LPIPS needs the weights of stlpips-pytorch: pip install stlpips-pytorch==0.0.2")
        state = torch.load(Path(package.origin).parent / WEIGHTS, map_location=device, weights_only=True)
        self._state: dict[str, Tensor] = state
        self.device = torch.device(device)

    @torch.no_grad()
    def __call__(self, a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
        """a, b [B, 3, H, W] in [0, 1] -> float32 [B] on the CPU. Raises ValueError under 32 pixels or on other shapes."""
        if a_BCHW.shape != b_BCHW.shape or a_BCHW.ndim != 4 or a_BCHW.shape[1] != 3:
            raise ValueError(f"expected two batches [B, 3, H, W], got {tuple(a_BCHW.shape)}, {tuple(b_BCHW.shape)}")
        if min(a_BCHW.shape[-2:]) < SMALLEST:
            raise ValueError(f"ST-LPIPS needs at least {SMALLEST} pixels on an edge, got {tuple(a_BCHW.shape[-2:])}")
        total = torch.zeros(len(a_BCHW), device=self.device)
        for layer, (of_a, of_b) in enumerate(zip(self._layers(a_BCHW), self._layers(b_BCHW), strict=True)):
            difference = (unit_features(of_a) - unit_features(of_b)).square()
            total += conv2d(difference, self._state[f"lin{layer}.model.1.weight"]).mean((1, 2, 3))
        return total.cpu()

    def _layers(self, pixels: Tensor) -> list[Tensor]:
        scaled = pixels.to(self.device, torch.float32) * 2 - 1
        scaled = (scaled - self._state["scaling_layer.shift"]) / self._state["scaling_layer.scale"]
        one = relu(self._blur_pool(self._conv(scaled, "slice1.0", 2), "slice1.1"))
        two = relu(self._conv(self._blur_pool(max_pool2d(one, 3, 1), "slice2.4"), "slice2.5", 2))
        three = relu(self._conv(self._blur_pool(max_pool2d(two, 3, 1), "slice3.8"), "slice3.9", 1))
        four = relu(self._conv(three, "slice4.11", 1))
        return [one, two, three, four, relu(self._conv(four, "slice5.13", 1))]

    def _conv(self, x: Tensor, name: str, padding: int) -> Tensor:
        return conv2d(x, self._state[f"net.{name}.weight"], self._state[f"net.{name}.bias"], padding=padding)

    def _blur_pool(self, x: Tensor, name: str) -> Tensor:
        kernel = self._state[f"net.{name}.filt"]
        return conv2d(pad(x, (2, 2, 2, 2), mode="reflect"), kernel, stride=2, groups=len(kernel))


def unit_features(features: Tensor) -> Tensor:
    """[B, C, H, W] divided by its length over channels; 1e-10 keeps zero at zero."""
    return features / (features.square().sum(1, keepdim=True).sqrt() + 1e-10)
