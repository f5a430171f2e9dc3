"""Prompts and adapters to image files: settings in the PNG, and a before/after grid where people would rather look."""

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

import loragraft
from loragraft.adapters.checkpoint import Adapter
from loragraft.adapters.switching import using
from loragraft.backbones.sampler import generate_images
from loragraft.backbones.spec import Backbone
from loragraft.data.images import png_bytes
from loragraft.disk import write_atomic

LABEL_LINES = 3
LINE_HEIGHT = 12


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that an image depends on besides base and adapters."""

    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    steps: int = 20
    guidance: float = 3.0
    true_guidance: float = 1.0


def render(
    backbone: Backbone,
    adapters: Sequence[tuple[Adapter, float]],
    settings: Sequence[Settings],
    *,
    any_base: bool = False,
    batch_size: int = 16,
) -> list[Image.Image]:
    """One image per entry of `settings`, with `adapters` (each with its weight) put in and taken out again.

    All entries must agree in steps, guidance and negative prompt: one pipeline call serves a batch. Raises ValueError for
    an adapter of another base unless `any_base`.
    """
    shared = {(s.steps, s.guidance, s.true_guidance, s.negative_prompt) for s in settings}
    if len(shared) != 1:
        raise ValueError("steps, both guidances and negative prompt must be the same for all images of one call")
    with using(backbone.transformer, adapters, any_base=any_base):
        return generate_images(
            backbone,
            [s.prompt for s in settings],
            [s.seed for s in settings],
            steps=settings[0].steps,
            guidance=settings[0].guidance,
            true_guidance=settings[0].true_guidance,
            negative_prompt=settings[0].negative_prompt,
            batch_size=batch_size,
        )


def save_image(
    image: Image.Image,
    path: Path,
    settings: Settings,
    backbone: Backbone,
    adapters: Sequence[tuple[Adapter, float]],
) -> None:
    """Writes `encode_png`, whole or not at all."""
    write_atomic(path, encode_png(image, settings, backbone, adapters))


def encode_png(
    image: Image.Image,
    settings: Settings,
    backbone: Backbone,
    adapters: Sequence[tuple[Adapter, float]],
    extra: Mapping[str, str] | None = None,
) -> bytes:
    """PNG with a text chunk `loragraft`: the settings, base name, id and profile, adapters and weights, version, `extra`."""
    about = {
        **asdict(settings),
        "base": backbone.spec.name,
        "base_id": backbone.base_id,
        "profile": backbone.profile,
        "adapters": [{"name": a.name, "weight": weight} for a, weight in adapters],
        "loragraft": loragraft.__version__,
        **(extra or {}),
    }
    info = PngInfo()
    info.add_text("loragraft", json.dumps(about))
    return png_bytes(image, info)


def before_after_grid(
    prompts: Sequence[str], before: Sequence[Image.Image], after: Sequence[Image.Image], pairs_per_row: int = 4
) -> Image.Image:
    """Pairs (base left, adapter right) with the prompt under each pair, on white."""
    edge = before[0].width
    pair_w, pair_h, gap = 2 * edge + 2, edge + LABEL_LINES * LINE_HEIGHT + 6, 10
    rows = -(-len(prompts) // pairs_per_row)
    columns = min(pairs_per_row, len(prompts))
    sheet = Image.new("RGB", (columns * (pair_w + gap) + gap, rows * (pair_h + gap) + gap + 16), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    draw.text((gap, 2), "left: base   right: base + adapter, same seed", fill="black", font=font)
    for i, (prompt, left, right) in enumerate(zip(prompts, before, after, strict=True)):
        x, y = gap + (i % pairs_per_row) * (pair_w + gap), 16 + gap + (i // pairs_per_row) * (pair_h + gap)
        sheet.paste(left, (x, y))
        sheet.paste(right, (x + edge + 2, y))
        lines = textwrap.wrap(prompt, width=pair_w // 5)[:LABEL_LINES]
        draw.multiline_text((x, y + edge + 2), "\n".join(lines), fill="black", font=font, spacing=1)
    return sheet
