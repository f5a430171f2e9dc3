"""Activation statistics of a pipeline that lies in a folder: its own text encoders, its own denoising, guidance included.

The 16-bit denoiser runs whole, so this step, unlike quantizing, takes the memory of the model. The text encoders are
gone before it is loaded onto the device.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from loragraft.backbones.load import find_spec, list_bases
from loragraft.backbones.pipeline_folder import variant
from loragraft.backbones.sampler import build_pipeline, generate_from_text
from loragraft.backbones.spec import BaseSpec, External
from loragraft.quantization.calibrate import collect, save_stats
from loragraft.quantization.dialects.assembly import read_json

STEPS = 8
PROMPTS = (
    "a photograph of an old fisherman mending nets at dawn",
    "a red sports car parked in front of a modern glass building",
    "an oil painting of a stormy sea with a small sailing boat",
    "a close-up of a bumblebee on a purple flower, macro lens",
    "a wooden sign that says OPEN above the door of a bakery",
    "an isometric illustration of a tiny house with a garden",
    "a bowl of ramen with a soft-boiled egg, steam, overhead view",
    "a portrait of a woman with curly hair laughing, soft window light",
    "a black and white etching of a medieval city wall",
    "a flat vector icon of a paper plane on a yellow background",
    "an astronaut riding a horse across a desert, wide angle",
    "two cats asleep on a pile of books beside a fireplace",
    "a snowy mountain range under the northern lights",
    "a watercolor of a street market with many people and umbrellas",
    "a futuristic city at night, neon reflections on wet asphalt",
    "a child's drawing of a green dinosaur under a rainbow",
)
"""Photographs, paintings, text and icons: what calibrates unless the caller has prompts of the model's own use."""


def collect_pipeline_stats(
    folder: Path,
    layers: Sequence[str],
    out: Path,
    device: torch.device | str,
    *,
    prompts: Sequence[str] = PROMPTS,
    steps: int = STEPS,
    resolution: int | None = None,
) -> None:
    """Denoises every prompt once, from seed 0, 1, ..., and writes what `layers` received to `out` (`calibrate.save_stats`).

    resolution None: the base's own. Raises ValueError without prompts and for a pipeline of no known base, CheckpointError or
    OSError for an incomplete folder.
    """
    if not prompts:
        raise ValueError("calibration needs at least one prompt")
    spec, external = base_of(folder)
    device = torch.device(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    encoders = external.open_encoders(folder, device, dtype)
    texts, empty = [encoders.encode_text([prompt]) for prompt in prompts], encoders.encode_text([""])
    encoders.release_text()
    place = folder / spec.family.component
    model = spec.transformer_class.from_pretrained(  # type: ignore[attr-defined]
        place, dtype=dtype, variant=variant(place), local_files_only=True
    )
    nn.Module.to(model, device)
    model.eval().requires_grad_(False)
    family = replace(spec.family, arguments={**spec.family.arguments, "output_type": "latent"})  # nothing is decoded
    pipeline = build_pipeline(family, model, encoders)

    def run() -> None:
        for seed, text in enumerate(tqdm(texts, desc="calibrate", unit="prompt")):
            generate_from_text(
                family, pipeline, text, empty, [seed],
                resolution=spec.resolution if resolution is None else resolution, steps=steps,
                **spec.guided(spec.guidance),
            )  # fmt: skip

    save_stats(out, collect(model, layers, run))


def base_of(folder: Path) -> tuple[BaseSpec, External]:
    """The base that the pipeline in `folder` is. Raises ValueError saying why it is none."""
    found, reasons = read_json(folder / "model_index.json").get("_class_name"), []
    for spec in map(find_spec, list_bases()):
        if spec.external is None or spec.external.pipeline_class != found:
            continue
        config = read_json(folder / spec.family.component / "config.json")
        try:
            spec.external.check(config, str(folder))
        except ValueError as error:
            reasons.append(f"{spec.name}: {error}")
        else:
            return spec, spec.external
    raise ValueError(f"{folder} is a {found} of no known base: {'; '.join(reasons) or ', '.join(list_bases())}")
