"""Image-to-image enters the flow at t = strength: against Euler steps written out, and at both ends."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from loragraft.backbones.family import steps_from
from loragraft.backbones.flow import predict_velocity
from loragraft.backbones.load import load_backbone
from loragraft.backbones.sampler import build_pipeline, generate_from_text
from loragraft.backbones.spec import Backbone


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return load_backbone("pocket", "native", "cpu", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def latents(backbone: Backbone) -> Tensor:
    """A white disc on blue, encoded."""
    edge = backbone.spec.resolution
    picture = Image.new("RGB", (edge, edge), (30, 90, 200))
    ImageDraw.Draw(picture).ellipse((edge // 4, edge // 4, 3 * edge // 4, 3 * edge // 4), fill="white")
    pixels = torch.from_numpy(np.asarray(picture, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)
    return backbone.encoders.encode_images(pixels[None])


def draw(backbone: Backbone, *, steps: int = 2, guidance: float = 1.0, **how: object) -> np.ndarray:
    encode = backbone.encoders.encode_text
    (image,) = generate_from_text(
        backbone.spec.family, build_pipeline(backbone.spec.family, backbone.transformer, backbone.encoders), encode(["a red star"]), encode([""]), [5],
        resolution=backbone.spec.resolution, steps=steps, guidance=guidance, **how,
    )  # fmt: skip
    return np.asarray(image, dtype=np.float64)


def decoded(backbone: Backbone, latents: Tensor) -> np.ndarray:
    vae = backbone.encoders.pipeline_parts["vae"]
    with torch.no_grad():
        pixels = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample[0]
    return ((pixels / 2 + 0.5).clamp(0, 1) * 255).permute(1, 2, 0).double().numpy()


def test_it_is_euler_from_the_noised_picture(backbone: Backbone, latents: Tensor) -> None:
    strength, steps = 0.7, 3
    assert steps_from(strength, steps) == 3
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(5))
    text = backbone.encoders.encode_text(["a red star"])
    x, times = (1 - strength) * latents + strength * noise, torch.linspace(strength, 0, steps + 1)
    with torch.no_grad():
        for t, below in itertools.pairwise(times):
            x = x + (below - t) * predict_velocity(backbone.transformer, x, t[None], text)
    written_out = decoded(backbone, x)
    ours = draw(backbone, steps=steps, start=latents, strength=strength)
    assert np.abs(ours - written_out).mean() < 1  # codes of 8 bits may round the other way
    assert np.abs(ours - draw(backbone, steps=steps)).mean() > 5


def test_full_strength_is_text_to_image(backbone: Backbone, latents: Tensor) -> None:
    assert np.array_equal(draw(backbone, start=latents, strength=1.0, guidance=3.0), draw(backbone, guidance=3.0))


def test_hardly_any_strength_returns_the_picture(backbone: Backbone, latents: Tensor) -> None:
    assert np.abs(draw(backbone, start=latents, strength=0.01) - decoded(backbone, latents)).mean() < 3


@pytest.mark.parametrize("strength", [0.0, -0.1, 1.01])
def test_strength_out_of_range_is_refused(backbone: Backbone, latents: Tensor, strength: float) -> None:
    with pytest.raises(ValueError, match="strength is"):
        draw(backbone, start=latents, strength=strength)


@pytest.mark.parametrize(
    ("strength", "steps", "expected"), [(1, 20, 20), (0.5, 20, 10), (0.6, 20, 12), (0.61, 20, 13), (0.01, 20, 1)]
)
def test_steps_are_the_share_below_strength(strength: float, steps: int, expected: int) -> None:
    assert steps_from(strength, steps) == expected


def test_each_step_is_reported_and_may_stop(backbone: Backbone, latents: Tensor) -> None:
    seen: list[tuple[int, int]] = []
    draw(backbone, steps=3, on_step=lambda done, steps: seen.append((done, steps)))
    draw(backbone, steps=4, start=latents, strength=0.5, on_step=lambda done, steps: seen.append((done, steps)))
    assert seen == [(1, 3), (2, 3), (3, 3), (1, 2), (2, 2)]

    def refuse(done: int, steps: int) -> None:
        raise InterruptedError(f"{done} of {steps}")

    with pytest.raises(InterruptedError, match="1 of 3"):
        draw(backbone, steps=3, on_step=refuse)


def test_one_negative_prompt_lies_densely_for_every_picture(backbone: Backbone) -> None:
    """A broadcast view is multiplied by another path, which rounds otherwise than a graph's copy of it."""
    family, encoders, seen = backbone.spec.family, backbone.encoders, []
    pipeline = build_pipeline(family, backbone.transformer, encoders)
    hook = backbone.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.extend(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)),
        with_kwargs=True,
    )
    text = encoders.encode_text(["a red star", "a blue house"])
    with hook:
        generate_from_text(
            family, pipeline, text, encoders.encode_text([""]), [1, 2], resolution=64, steps=1, guidance=3.0
        )
    states = [tensor for tensor in seen if tensor.shape == text["prompt_embeds"].shape]
    assert len(states) == 2, "with the prompt, and without"
    assert all(tensor.is_contiguous() for tensor in seen)
