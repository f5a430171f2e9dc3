"""Inception-v3 features of FID: 2048 numbers per image, from the published TorchScript file.

The resizing to 299 x 299 decides the value as much as the network does, so it is part of the metric's name:

    clean               PIL bicubic with its low-pass filter, channel by channel in float32, no rounding to 8 bits;
                        (x - 128) / 128, clipped neither way. What SVDQuant reports
    legacy-pytorch      bilinear at half-pixel centres without a low-pass filter; x / 127.5 - 1, pytorch-fid's input
    legacy-tensorflow   the file's own, TensorFlow 1's bilinear

Source: Parmar, Zhang and Zhu, "On Aliased Resizing and Surprising Subtleties in GAN Evaluation" (2022); Heusel et al. (2017).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL.Image import Image, Resampling, fromarray
from torch import Tensor
from torch.nn.functional import interpolate

EDGE, FEATURES = 299, 2048
Resizing = Literal["clean", "legacy-pytorch", "legacy-tensorflow"]


class Inception:
    """The network on one device; `path` as `weight_files.INCEPTION` gives it."""

    def __init__(self, path: Path, device: torch.device | str = "cpu") -> None:
        """Raises ValueError for a file that is no TorchScript module with the part `layers`."""
        try:
            self._network = torch.jit.load(str(path), map_location=device).eval()
        except RuntimeError as error:
            raise ValueError(f"{path} is no TorchScript file: {str(error).splitlines()[0]}") from error
        if not hasattr(self._network, "layers"):
            raise ValueError(f"{path} has no part `layers`: it is another network than FID's Inception-v3")
        self.device = torch.device(device)

    @torch.no_grad()
    def __call__(self, images: Sequence[Image], resizing: Resizing) -> Tensor:
        """N RGB images of any size -> float64 [N, 2048] on the CPU."""
        if resizing == "legacy-tensorflow":  # sizes may differ, and the file resizes: one by one
            rows = [self._network(pixels(image)[None].to(self.device), return_features=True) for image in images]
            features = torch.cat(rows)
        else:
            batch = torch.stack([resized(image, resizing) for image in images]).to(self.device)
            scaled = (batch - 128) / 128 if resizing == "clean" else batch / 127.5 - 1
            features = self._network.layers(scaled)
        return features.reshape(len(images), FEATURES).double().cpu()


def resized(image: Image, resizing: Resizing) -> Tensor:
    """float32 [3, 299, 299], 0 to 255 (bicubic overshoots a little). Raises ValueError for `legacy-tensorflow`."""
    if resizing == "clean":
        bands = [
            fromarray(np.asarray(band, np.float32)).resize((EDGE, EDGE), Resampling.BICUBIC)
            for band in image.convert("RGB").split()
        ]
        return torch.from_numpy(np.stack([np.asarray(band) for band in bands]))
    if resizing == "legacy-pytorch":
        small = interpolate(pixels(image)[None], (EDGE, EDGE), mode="bilinear", align_corners=False, antialias=False)
        return small[0].clamp(0, 255)
    raise ValueError(f"{resizing}: the network's file resizes by itself")


def pixels(image: Image) -> Tensor:
    """float32 [3, H, W], 0 to 255."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float()
