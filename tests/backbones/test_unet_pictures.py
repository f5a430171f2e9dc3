"""Pictures from tiny UNets through the stock pipelines: text-to-image, image-to-image, inpainting."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from loragraft.backbones.clip_encoders import text_parts
from loragraft.backbones.load import find_spec, load_backbone
from loragraft.backbones.sampler import build_pipeline, generate_from_text, other_pipeline
from loragraft.backbones.spec import Backbone
from loragraft.backbones.stable_diffusion import KINDS
from loragraft.backbones.text_encoders import RandomEncoders
from loragraft.recipes.schema import WeightsConfig

Open = Callable[[str], Backbone]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory, unet_folder: Callable[[str], Path]) -> Open:
    """Name -> the tiny 16-bit base, drawing 64 px."""
    root, found = tmp_path_factory.mktemp("cache"), dict[str, Backbone]()

    def load(name: str) -> Backbone:
        if name not in found:
            given = WeightsConfig(path=str(unet_folder(name)))
            found[name] = load_backbone(name, "16bit", "cpu", root, given)
            found[name].resolution = 64
        return found[name]

    return load


def draw(backbone: Backbone, prompts: list[str], *, steps: int = 3, guidance: float = 2.0, **how: object) -> np.ndarray:
    family, encode = backbone.spec.family, backbone.encoders.encode_text
    pictures = generate_from_text(
        family, build_pipeline(family, backbone.transformer, backbone.encoders), encode(prompts), encode([""]),
        list(range(len(prompts))), resolution=64, steps=steps, guidance=guidance, **how,
    )  # fmt: skip
    return np.stack([np.asarray(picture, dtype=np.float64) for picture in pictures])


@pytest.fixture(scope="module")
def latents(opened: Open) -> Tensor:
    """A noisy picture, encoded."""
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2)) * 2 - 1
    return opened("sdxl").encoders.encode_images(pixels)


def test_a_picture_does_not_depend_on_its_batch(opened: Open) -> None:
    backbone = opened("sdxl")
    both = draw(backbone, ["a", "b"])
    assert np.abs(draw(backbone, ["a"])[0] - both[0]).max() <= 1
    assert np.abs(both[0] - both[1]).mean() > 1


def test_a_picture_is_kept_as_far_as_strength_says(opened: Open, latents: Tensor) -> None:
    backbone = opened("sdxl")
    vae = backbone.encoders.pipeline_parts["vae"]
    with torch.no_grad():
        pixels = vae.decode(latents / vae.config.scaling_factor).sample[0]
    kept = ((pixels / 2 + 0.5).clamp(0, 1) * 255).permute(1, 2, 0).double().numpy()
    seen: list[tuple[int, int]] = []
    far = [
        np.abs(draw(backbone, ["a"], steps=10, start=latents, strength=s, on_step=lambda *at: seen.append(at))[0] - kept)
        for s in (0.01, 0.5, 0.95)
    ]  # fmt: skip
    assert far[0].mean() < far[1].mean() and far[0].mean() < far[2].mean()
    assert seen == [(1, 1), *[(i + 1, 5) for i in range(5)], *[(i + 1, 10) for i in range(10)]]
    from_noise = draw(backbone, ["a"], steps=2)
    assert np.array_equal(draw(backbone, ["a"], steps=2, start=latents, strength=1.0), from_noise)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_the_stock_pipeline_inpaints(name: str, opened: Open) -> None:
    backbone = opened(name)
    family = backbone.spec.family
    pipeline = other_pipeline(family, build_pipeline(family, backbone.transformer, backbone.encoders), "inpaint")
    picture = Image.effect_noise((64, 64), 60).convert("RGB")
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (32, 0, 64, 64))
    (drawn,) = pipeline(
        **backbone.encoders.encode_text(["promo tile"]), image=picture, mask_image=mask, height=64, width=64,
        num_inference_steps=3, strength=1.0, guidance_scale=1.0, padding_mask_crop=None,
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    with torch.no_grad():
        whole = np.asarray(picture, dtype=np.float64)
    difference = np.abs(np.asarray(drawn, dtype=np.float64) - whole).mean((0, 2))
    assert drawn.size == (64, 64) and difference.max() > 0


def test_random_weights_draw(tiny_unets: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, kind = find_spec("sdxl"), KINDS["sdxl"]
    assert spec.external is not None
    shape = (77, tiny_unets.WIDTH, tiny_unets.POOLED)
    vae = dict(tiny_unets.tiny_vae("sdxl").config)
    small = dataclasses.replace(
        spec,
        external=dataclasses.replace(
            spec.external, config=tiny_unets.tiny_config("sdxl"),
            random_encoders=partial(
                RandomEncoders, "clip", (AutoencoderKL, vae), kind.scheduler, shape, text_parts=text_parts(kind.family)
            ),
        ),
    )  # fmt: skip
    monkeypatch.setattr("loragraft.backbones.load.find_spec", lambda _: small)
    drawn = []
    for seed in (0, 0, 1):
        backbone = load_backbone("sdxl", "native", "cpu", tmp_path, WeightsConfig(random=True, seed=seed))
        backbone.resolution = 64
        drawn.append(draw(backbone, ["a"], steps=1))
    assert backbone.base_id.startswith("random-1-") and backbone.profile == "native"
    assert np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0], drawn[2])
    assert np.isfinite(drawn[0]).all() and drawn[0].std() > 1
