"""Images from a backbone, through diffusers' own pipeline for its family.

Steps from noise, or from a picture at `strength`, down to the picture; classifier-free guidance
v = v_empty + g (v_prompt - v_empty) (Ho and Salimans, 2022), or what a distilled base has in its place. Each image has a
seed of its own, drawn on the CPU, so an image does not depend on its batch or on the device.

Image-to-image is SDEdit (Meng et al., 2022): the picture is noised as far as `strength` says, and denoised from there. strength 1
is text-to-image, to the bit, and strength near 0 returns the picture as the autoencoder keeps it. Where on its path a family
begins: `Family.path`.
"""

import contextlib
import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from PIL.Image import Image
from torch import Tensor, nn

from loragraft.backbones.family import Family
from loragraft.backbones.replay import Replay
from loragraft.backbones.resting import rest
from loragraft.backbones.spec import Backbone, Encoders

TOKENS_TOGETHER = 4096
"""Image tokens that are drawn in one batch: 64 pictures of 128 px, 4 of 512, 1 of 1024."""

_log = logging.getLogger(__name__)

OnStep = Callable[[int, int], None]
"""(steps done, steps in all), called after each; what it raises ends the sampling and reaches the caller."""


def unread(encoders: Encoders, prompt: str) -> str:
    """The end of a prompt that the text encoder does not read; "" if it reads all of it."""
    return prompt.removeprefix(encoders.readable(prompt)).strip()


def build_pipeline(family: Family, model: nn.Module, encoders: Encoders) -> Any:
    """The stock diffusers pipeline around a (possibly quantized, possibly grafted) denoiser."""
    parts = {"scheduler": family.scheduler(), **family.options, **encoders.pipeline_parts}
    pipeline = family.text_to_image(**{family.component: model}, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def other_pipeline(family: Family, pipeline: Any, task: Literal["image_to_image", "inpaint"]) -> Any:
    """The stock pipeline for `task` around the same parts. Raises ValueError where diffusers has none."""
    found = getattr(family, task)
    if found is None:
        raise ValueError(
            f"diffusers has no {task.replace('_', '-')} pipeline beside {family.text_to_image.__name__}: draw from text alone"
        )
    names = inspect.signature(found.__init__).parameters
    parts = {name: part for name, part in {**pipeline.components, **family.options}.items() if name in names}
    again = found(**parts)
    again.set_progress_bar_config(disable=True)
    return again


@torch.no_grad()
def generate_from_text(
    family: Family,
    pipeline: Any,
    text: dict[str, Tensor],
    empty: dict[str, Tensor],
    seeds: Sequence[int],
    *,
    resolution: int,
    steps: int,
    guidance: float,
    embedded_guidance: float = 1.0,
    start: Tensor | None = None,
    strength: float = 1.0,
    on_step: OnStep | None = None,
    replay: Replay | None = None,
    together: int | None = None,
) -> list[Image]:
    """len(seeds) images from encoded prompts, `together` at a time; None: as many as have `TOKENS_TOGETHER`.

    `text`: the family's `text_keys`, [B, ...] each; `empty`: the same for one negative prompt (batch 1). guidance
    (classifier-free) <= 1 skips the negative pass; `embedded_guidance` is the input of a guidance-distilled
    transformer (`BaseSpec.guided` gives both). `start`: scaled latents [1 or B, C, h, w] of pictures to begin
    from, with `strength` in (0, 1]. replay: on a GPU the denoiser's passes are replayed from its graphs; None launches each anew,
    which hooks on the denoiser's layers need. Raises ValueError if B differs from len(seeds), for a strength out of range, and where
    diffusers has no image-to-image for the family.
    """
    count = text["prompt_embeds"].shape[0]
    if count != len(seeds):
        raise ValueError(f"{count} prompts but {len(seeds)} seeds: give each image its own seed")
    if start is not None and not 0 < strength <= 1:
        raise ValueError(f"strength is {strength}: it must be above 0 (keep the picture) and at most 1 (ignore it)")
    edge = resolution // pipeline.vae_scale_factor
    tokens = family.tokens(edge, edge)
    start = None if strength == 1 else start
    path, taken = family.path(pipeline, steps, tokens, None if start is None else strength)
    if start is not None:
        pipeline = other_pipeline(family, pipeline, "image_to_image")
    size = {name: resolution for name in ("height", "width") if name in inspect.signature(pipeline.__call__).parameters}
    together = together or drawn_together(tokens)
    chunks = [slice(first, first + together) for first in range(0, count, together)]
    images: list[Image] = []
    model = getattr(pipeline, family.component)
    with contextlib.nullcontext() if replay is None else replay.drawing(model):
        for number, chunk in enumerate(chunks):
            report = None if on_step is None else _reporter(on_step, number * taken, len(chunks) * taken)
            images += _draw(
                family, pipeline, {key: value[chunk] for key, value in text.items()}, empty if guidance > 1 else {},
                **path,
                **({} if start is None else {"image": start if len(start) == 1 else start[chunk]}),
                **family.guided(guidance, embedded_guidance),
                **family.reporting(report),
                **family.arguments,
                **size,
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds[chunk]],
            )  # fmt: skip
    rest(pipeline.vae)
    return images


def drawn_together(tokens: int) -> int:
    """Pictures of so many image tokens that are drawn in one batch."""
    return max(1, TOKENS_TOGETHER // max(1, tokens))


def _draw(family: Family, pipeline: Any, text: dict[str, Tensor], empty: dict[str, Tensor], **how: Any) -> list[Image]:
    """One batch."""
    model = getattr(pipeline, family.component)
    device, dtype = model.device, next(model.parameters()).dtype
    cast = {key: value.to(device, dtype) for key, value in text.items()}
    count = cast["prompt_embeds"].shape[0]
    # Copies, not views that repeat one row: torch multiplies those by another path, which rounds otherwise, and a graph's inputs
    # are copies (`replay`).
    negative = {
        f"negative_{key}": value.to(device, dtype).expand(count, *value.shape[1:]).contiguous()
        for key, value in empty.items()
    }
    if "image" in how:
        how["image"] = how["image"].to(device, dtype)
    return list(pipeline(**cast, **negative, **how).images)


def _reporter(on_step: OnStep, before: int, total: int) -> Callable[[int], None]:
    return lambda done: on_step(before + done, total)


def generate_images(
    backbone: Backbone,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance: float | None = None,
    true_guidance: float = 1.0,
    negative_prompt: str = "",
    batch_size: int = 16,
) -> list[Image]:
    """One image of `backbone.resolution` per prompt and seed; `guidance` None takes the base's default.

    All prompts are encoded before the transformer goes onto the device. Warns of prompts that are too long; raises ValueError
    as `BaseSpec.guided` does.
    """
    guided = backbone.spec.guided(
        backbone.spec.guidance if guidance is None else guidance, true_guidance, negative_prompt
    )
    for prompt in dict.fromkeys((*prompts, negative_prompt)):
        if lost := unread(backbone.encoders, prompt):
            _log.warning("the prompt %r is longer than the text encoder reads; its end is lost: %r", prompt, lost)
    empty = backbone.encoders.encode_text([negative_prompt])
    chunks = [slice(start, start + batch_size) for start in range(0, len(prompts), batch_size)]
    texts = [backbone.encoders.encode_text(list(prompts[chunk])) for chunk in chunks]
    backbone.onto_device()
    family = backbone.spec.family
    pipeline = build_pipeline(family, backbone.transformer, backbone.encoders)
    images: list[Image] = []
    for chunk, text in zip(chunks, texts, strict=True):
        images += generate_from_text(
            family, pipeline, text, empty, seeds[chunk],
            resolution=backbone.resolution, steps=steps, **guided, replay=backbone.replay,
        )  # fmt: skip
    return images
