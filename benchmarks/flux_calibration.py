"""Activation statistics of a FLUX-shaped model on random inputs: the first half of `quantizer.py calibrated`.

The 16-bit model runs whole on the device. Text encoders and prompts have no part in it: latents, text embeddings and pooled
embeddings are N(0, 1), the timesteps are spread evenly. `loragraft quantize --smoothing calibrated` makes 128 passes (16
prompts, 8 steps) where --passes says how many are made here; `pass_seconds` is what each further one takes.
"""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import FluxTransformer2DModel
from torch import Tensor
from tqdm import tqdm

from loragraft.quantization.calibrate import ActivationStats, collect, save_stats
from loragraft.quantization.weight_source import WeightSource

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Note = Callable[[dict[str, Any]], None]
"""Told of every figure as soon as it is known."""


def build_model(source: WeightSource) -> Any:
    """The model with its weights on the device, read one at a time: nothing is held twice."""
    with init_empty_weights():
        model = FluxTransformer2DModel.from_config(source.config)
    names = tqdm(source.tensors, desc="load", unit="tensor", mininterval=5)
    model.load_state_dict({name: source.read(name).to(DEVICE) for name in names}, assign=True)
    return model.requires_grad_(False).eval()


def collect_stats(
    source: WeightSource, layers: Sequence[str], path: Path, *, scale: float, passes: int, seed: int, note: Note
) -> None:
    """Runs the model and writes what `layers` received to `path`; `note` is told the seconds of each phase and the peak."""
    stats = _collected(source, layers, scale, passes, seed, note)
    gc.collect()  # the model, before the quantizer starts beside this process
    started = time.monotonic()
    save_stats(path, stats)
    note({"save_seconds": time.monotonic() - started, "statistics_gb": path.stat().st_size / 1e9})
    stats.clear()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def _collected(
    source: WeightSource, layers: Sequence[str], scale: float, passes: int, seed: int, note: Note
) -> dict[str, ActivationStats]:
    started = time.monotonic()
    model = build_model(source)
    _wait()
    note({"load_seconds": time.monotonic() - started})
    started, seconds = time.monotonic(), list[float]()

    def run() -> None:
        for number in tqdm(range(passes), desc="calibrate", unit="pass", mininterval=5):
            began = time.monotonic()
            random_pass(model, scale, seed, number, passes)
            _wait()
            seconds.append(time.monotonic() - began)
            note({"passes_done": number + 1, "pass_seconds": statistics.median(seconds)})

    stats = collect(model, layers, run)
    note({"passes_seconds": time.monotonic() - started, "calibration_peak_gpu_gib": _peak_gib()})
    return stats


def random_pass(model: Any, scale: float, seed: int, number: int, passes: int) -> None:
    """One forward pass on inputs of its own: 1024 px and 512 text tokens at scale 1."""
    side, text = max(4, round(64 * scale)), max(8, round(512 * scale))
    generator = torch.Generator().manual_seed(seed * passes + number)
    c = model.config

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, torch.bfloat16)

    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    grid = torch.stack((torch.zeros_like(row), row, column), -1).reshape(-1, 3)
    model(
        hidden_states=normal(1, side * side, c.in_channels), encoder_hidden_states=normal(1, text, c.joint_attention_dim),
        pooled_projections=normal(1, c.pooled_projection_dim), guidance=torch.full((1,), 3.5, device=DEVICE),
        timestep=torch.full((1,), (number + 0.5) / passes, device=DEVICE, dtype=torch.bfloat16),
        img_ids=grid.to(DEVICE), txt_ids=torch.zeros(text, 3, device=DEVICE),
    )  # fmt: skip


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def _peak_gib() -> float | None:
    return torch.cuda.max_memory_reserved() / 2**30 if DEVICE == "cuda" else None
