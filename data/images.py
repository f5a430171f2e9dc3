"""One image file -> pixels for an encoder: upright, on white, at the size asked for; and back to a file."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, features
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

TRANSFORM_VERSION = 2
"""Part of every cache key: raise it whenever `load_pixels` gives other pixels for the same file."""

_IN_SOME_BUILDS = {".avif"} if features.check("avif") else set()
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif", *_IN_SOME_BUILDS})
NOT_READ = frozenset(
    {".heic", ".heif", ".avif", ".jxl", ".jp2", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".psd", ".svg"} - SUFFIXES
)
"""Suffixes of pictures that have to be converted first."""


def load_pixels(path: Path, size: int | tuple[int, int]) -> Tensor:
    """float32 [3, H, W] in [-1, 1]; size: (H, W), or one number for both.

    EXIF orientation is applied, transparency is laid on white, the largest central part of the size's aspect ratio is resized
    with Lanczos. Raises ValueError naming the file where it cannot be decoded to its end, or has no `check_white`.
    """
    height, width = (size, size) if isinstance(size, int) else size
    try:
        with Image.open(path) as opened:
            image = eight_bits(ImageOps.exif_transpose(opened))
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                rgba = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
            image = ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.LANCZOS)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what PIL's decoders raise
        raise ValueError(f"{path} is not a readable image ({error}); repair it, or take it out of the set") from error
    # numpy, not torch: waking torch's thread pool costs 20 times the arithmetic of one small image
    pixels_HWC = np.asarray(image, dtype=np.float32) / np.float32(127.5) - np.float32(1)
    return torch.from_numpy(np.ascontiguousarray(pixels_HWC.transpose(2, 0, 1)))


def check_white(image: Image.Image) -> None:
    """Raises ValueError for 32 bits a value (modes I and F): no file says which of them is white, and PIL would clip at 255."""
    if image.mode in ("I", "F"):
        raise ValueError("32 bits a value, and nothing says which is white; save it with 8 or 16 bits a value")


def eight_bits(image: Image.Image) -> Image.Image:
    """The image with 8 bits a value: 16-bit grey is divided by 257, where PIL would clip it to white. Raises ValueError as
    `check_white` does."""
    check_white(image)
    if not image.mode.startswith("I;16"):
        return image
    return Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))


def png_bytes(image: Image.Image, info: PngInfo | None = None) -> bytes:
    """The image as the bytes of a PNG file, with `info`'s text chunks."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()
