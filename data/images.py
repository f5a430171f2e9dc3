"""One image file -> pixels for an encoder: upright, on white, square, at the resolution asked for."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

TRANSFORM_VERSION = 1
"""Part of every cache key: raise it whenever `load_pixels` gives other pixels for the same file."""

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"})


def load_pixels(path: Path, resolution: int) -> Tensor:
    """float32 [3, resolution, resolution] in [-1, 1].

    EXIF orientation is applied, transparency is laid on white, the largest central square is resized with Lanczos.
    Raises ValueError naming the file where it cannot be decoded to its end.
    """
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                rgba = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
            image = ImageOps.fit(image.convert("RGB"), (resolution, resolution), Image.Resampling.LANCZOS)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what PIL's decoders raise
        raise ValueError(f"{path} is not a readable image ({error}); repair it, or take it out of the set") from error
    pixels = torch.from_numpy(np.array(image, dtype=np.float32))
    return pixels.permute(2, 0, 1).contiguous() / 127.5 - 1.0
