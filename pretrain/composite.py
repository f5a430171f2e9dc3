"""Paints scene rows on the device: background, glyph, tint. Plus the richer pictures the autoencoder trains on.

Legend: B batch, S glyph edge, H = W = 128. Colours in [0, 1] inside, pictures out in [-1, 1].
"""

from collections.abc import Sequence

import numpy as np
import torch
from captions import CANVAS, DARK_OPAQUE, DIAGONAL, HORIZONTAL, LIGHT_OPAQUE, ORIGINAL, SOLID, VERTICAL
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)


def place(glyphs: Sequence[Tensor], rows: Tensor) -> Tensor:
    """Glyph pixels at their offsets -> float [B, 4, H, W], straight RGBA; ``glyphs[size]`` is uint8 [N, 4, S, S]."""
    canvas = torch.zeros(len(rows), 4, CANVAS, CANVAS, dtype=torch.uint8, device=rows.device)
    channel = torch.arange(4, device=rows.device)[None, :, None, None]
    for size, pixels in enumerate(glyphs):
        member = (rows[:, 1] == size).nonzero()[:, 0]
        chosen = rows[member].long()
        step = torch.arange(pixels.shape[-1], device=rows.device)
        top, left = chosen[:, 2, None] + step, chosen[:, 3, None] + step
        target = (member[:, None, None, None], channel, top[:, None, :, None], left[:, None, None, :])
        canvas[target] = pixels[chosen[:, 0]]
    return canvas.float() / 255


def gradient(kind: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Background [B, 3, H, W] from kind [B] and end colours a, b [B, 3]."""
    ramp = torch.linspace(0, 1, CANVAS, device=a.device)
    down, across = ramp[:, None].expand(CANVAS, CANVAS), ramp[None, :].expand(CANVAS, CANVAS)
    ramps = torch.empty(4, CANVAS, CANVAS, device=a.device)
    ramps[SOLID], ramps[VERTICAL], ramps[HORIZONTAL], ramps[DIAGONAL] = 0.0, down, across, (down + across) / 2
    return torch.lerp(a[:, :, None, None], b[:, :, None, None], ramps[kind][:, None])


def tint(rgba: Tensor, mode: Tensor, colour: Tensor) -> tuple[Tensor, Tensor]:
    """-> (rgb [B, 3, H, W], alpha [B, 1, H, W]); modes of ``captions``: luminance becomes opacity in 0.25..1."""
    rgb, alpha = rgba[:, :3], rgba[:, 3:]
    luma = (rgb * torch.tensor(LUMA, device=rgb.device)[None, :, None, None]).sum(1, keepdim=True)
    inside = alpha > 0.5
    low = luma.masked_fill(~inside, 1.0).amin((1, 2, 3), keepdim=True)
    high = luma.masked_fill(~inside, 0.0).amax((1, 2, 3), keepdim=True)
    spread = high - low
    light = ((luma - low) / spread.clamp_min(0.05)).clamp(0, 1)
    mode = mode[:, None, None, None]
    level = torch.where(mode == LIGHT_OPAQUE, light, 1 - light)
    shaded = ((mode == LIGHT_OPAQUE) | (mode == DARK_OPAQUE)) & (spread > 0.15)
    alpha = torch.where(shaded, alpha * (0.25 + 0.75 * level), alpha)
    return torch.where(mode == ORIGINAL, rgb, colour[:, :, None, None].expand_as(rgb)), alpha


def composite(glyphs: Sequence[Tensor], rows: Tensor, ground: Tensor | None = None) -> Tensor:
    """Scene rows int32 [B, 15] -> pictures [B, 3, H, W] in [-1, 1]; ``ground`` replaces the rows' own background."""
    values = rows.float() / 255
    if ground is None:
        ground = gradient(rows[:, 4].long(), values[:, 5:8], values[:, 8:11])
    rgb, alpha = tint(place(glyphs, rows), rows[:, 11], values[:, 12:15])
    return torch.lerp(ground, rgb, alpha) * 2 - 1


def frames(pictures: Tensor) -> np.ndarray:
    """[B, 3, H, W] in [-1, 1] -> uint8 [B, H, W, 3] on the CPU."""
    return ((pictures + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def shapes(count: int, generator: torch.Generator, layers: int = 3) -> Tensor:
    """Gradient grounds with rounded rectangles, discs and text-like strokes -> [B, 3, H, W] in [0, 1]."""
    device = generator.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    def kinds() -> Tensor:
        return torch.randint(0, 4, (count,), generator=generator, device=device)

    picture = gradient(kinds(), uniform(count, 3), uniform(count, 3))
    axis = torch.arange(CANVAS, device=device) + 0.5
    for _ in range(layers):
        centre, half = uniform(count, 2) * CANVAS, uniform(count, 2) * 50 + 3
        radius = half.amin(1) * uniform(count)  # half sides equal and radius = half: a disc
        dy = (axis[None] - centre[:, :1]).abs() - (half[:, :1] - radius[:, None])
        dx = (axis[None] - centre[:, 1:]).abs() - (half[:, 1:] - radius[:, None])
        dy, dx = dy[:, :, None], dx[:, None, :]
        distance = (dy.clamp_min(0) ** 2 + dx.clamp_min(0) ** 2).sqrt() + torch.maximum(dy, dx).clamp_max(0)
        cover = (0.5 - (distance - radius[:, None, None])).clamp(0, 1)[:, None]
        cover = cover * (uniform(count, 1, 1, 1) < 0.6)
        picture = torch.lerp(picture, gradient(kinds(), uniform(count, 3), uniform(count, 3)), cover)
    cells = (uniform(count, 1, CANVAS // 2, CANVAS // 2) < 0.6).float()
    strokes = torch.nn.functional.interpolate(cells, size=(CANVAS, CANVAS))
    top, left, height, width = (
        uniform(4, count, 1, 1) * torch.tensor([110, 80, 12, 90], device=device)[:, None, None, None]
    ).unbind()
    line = ((axis - top[..., None]) * (top[..., None] + 4 + height[..., None] - axis) > 0).float().transpose(-1, -2)
    line = line * ((axis - left[..., None]) * (left[..., None] + 8 + width[..., None] - axis) > 0).float()
    strokes = strokes * line * (uniform(count, 1, 1, 1) < 0.5)
    return torch.lerp(picture, uniform(count, 3, 1, 1).round().expand_as(picture), strokes)
