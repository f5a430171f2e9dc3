"""Activation statistics of a FLUX pipeline that lies in a folder: its own text encoders, its own denoising.

The 16-bit transformer runs whole, so this step, unlike quantizing, takes the memory of the model. The text encoders are
gone before it is loaded onto the device.
"""

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline
from torch import Tensor, nn
from tqdm import tqdm

from loragraft.quantization.calibrate import collect, save_stats

STEPS, GUIDANCE, TEXT_TOKENS = 8, 3.5, 512
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
    resolution: int = 1024,
) -> None:
    """Denoises every prompt once, from seed 0, 1, ..., and writes what `layers` received to `out` (`calibrate.save_stats`).

    Raises ValueError without prompts, OSError for an incomplete pipeline folder.
    """
    if not prompts:
        raise ValueError("calibration needs at least one prompt")
    device = torch.device(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    texts = _encode(folder, prompts, device, dtype)
    pipeline = FluxPipeline.from_pretrained(
        folder, text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None, torch_dtype=dtype,
        local_files_only=True,
    )  # fmt: skip
    nn.Module.to(pipeline.transformer, device)
    pipeline.transformer.eval().requires_grad_(False)
    pipeline.set_progress_bar_config(disable=True)

    def run() -> None:
        for seed, text in enumerate(tqdm(texts, desc="calibrate", unit="prompt")):
            pipeline(
                **{name: tensor.to(device) for name, tensor in text.items()}, num_inference_steps=steps,
                guidance_scale=GUIDANCE, height=resolution, width=resolution, output_type="latent",
                generator=torch.Generator().manual_seed(seed),
            )  # fmt: skip

    save_stats(out, collect(pipeline.transformer, layers, run))


def _encode(folder: Path, prompts: Sequence[str], device: torch.device, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """Per prompt the arguments of the pipeline, on the CPU; the encoders are freed."""
    encoders: Any = FluxPipeline.from_pretrained(
        folder, transformer=None, vae=None, torch_dtype=dtype, local_files_only=True
    )
    encoders.to(device)
    texts = []
    with torch.no_grad():
        for prompt in prompts:
            states, pooled, _ = encoders.encode_prompt(prompt, device=device, max_sequence_length=TEXT_TOKENS)
            texts.append({"prompt_embeds": states.cpu(), "pooled_prompt_embeds": pooled.cpu()})
    del encoders
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return texts
