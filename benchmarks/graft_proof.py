"""Is a graft exact? What `adapters.py` measures of a trained adapter: layer by layer on `pocket`, and how figures are judged."""

from typing import Any

import torch
from torch import Tensor

from loragraft.adapters.certificate import BFLOAT16_BOUND, FLOAT32_BOUND, NO_WORSE, Certificate, certify
from loragraft.adapters.checkpoint import Adapter
from loragraft.adapters.graft import graft, ungraft
from loragraft.adapters.resident import ResidentAdapters
from loragraft.backbones.flow import predict_velocity
from loragraft.backbones.sampler import generate_images
from loragraft.backbones.spec import Backbone
from loragraft.quantization.calibrate import collect

ROWS = 256


def on_real_inputs(backbone: Backbone, adapter: Adapter) -> dict[str, Any]:
    """Certificate of the adapter's graft on what its layers see, and how far it moves the velocity; the base is left as it was."""
    before, probe = backbone.fingerprint(), layer_inputs(backbone, adapter)
    adapters = ResidentAdapters(backbone.transformer)
    adapters.add(adapter)
    certificate = certify(backbone.transformer, probe)
    adapters.clear()
    return {
        "device": str(backbone.device), "recipe_hash": adapter.metadata["recipe_hash"], **figures(certificate),
        "undo_restores_every_byte": backbone.fingerprint() == before,
        "velocity_change": velocity_change(backbone, adapter),
    }  # fmt: skip


def layer_inputs(backbone: Backbone, adapter: Adapter) -> dict[str, Tensor]:
    """Path -> x [S, K] float32: what each layer of the adapter sees while the adapter's own prompts are drawn."""
    prompts = _prompts(adapter)

    def draw() -> None:
        generate_images(backbone, prompts, range(len(prompts)), steps=4)

    stats = collect(backbone.transformer, list(adapter.pairs), draw, rows=ROWS)
    return {path: stats[path].samples_SK.float() for path in adapter.pairs}


def _prompts(adapter: Adapter) -> list[str]:
    return list(adapter.metadata["recipe"]["sample"]["prompts"])


@torch.no_grad()
def velocity_change(backbone: Backbone, adapter: Adapter) -> float:
    """|v(grafted) - v(base)| / |v(base)| over the adapter's own prompts, at t = 0.5; the graft is taken off again."""
    prompts = _prompts(adapter)
    text = backbone.encoders.encode_text(prompts)
    latents = torch.randn(len(prompts), 16, 16, 16, generator=torch.Generator().manual_seed(0))
    times = torch.full((len(prompts),), 0.5)

    def velocity() -> Tensor:
        return predict_velocity(backbone.transformer, latents, times, text)

    base = velocity()
    graft(backbone.transformer, adapter)
    moved = velocity()
    ungraft(backbone.transformer, adapter.name)
    return float((moved - base).norm() / base.norm())


def figures(certificate: Certificate) -> dict[str, Any]:
    """Of all its layers, the worst."""
    return {
        "layers": len(certificate.float32), "rows": certificate.rows,
        "fp32_worst": certificate.rel_dev_fp32, "bf16_worst": certificate.rel_dev_bf16,
        "bf16_grafted_vs_float64_worst": max(row.merged_vs_exact for row in certificate.bfloat16),
        "bf16_apart_vs_float64_worst": max(row.apart_vs_exact for row in certificate.bfloat16),
        "smallest_effect": min(row.effect for row in certificate.float32),
    }  # fmt: skip


def exact(part: dict[str, Any]) -> bool:
    """Within the bounds, no worse than apart against float64, and every byte back."""
    close = part["fp32_worst"] <= FLOAT32_BOUND and part["bf16_worst"] <= BFLOAT16_BOUND
    no_worse = part["bf16_grafted_vs_float64_worst"] <= NO_WORSE * part["bf16_apart_vs_float64_worst"]
    return bool(close and no_worse and part["undo_restores_every_byte"])
