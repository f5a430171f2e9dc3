"""Is the graft exact? Every layer of a trained adapter, on the inputs that the layer really sees.

    python benchmarks/graft.py runs/marketing --out benchmarks/results/graft.json

Per layer, with the same bf16 factors: y(grafted) against y(base) + (x A^T)(wB)^T in float32 and in bf16, both against
float64. Then the whole model: how much the graft changes the velocity, and that taking it off restores every byte.
"""

import argparse
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loragraft.adapters.checkpoint import Adapter, load_adapter
from loragraft.adapters.graft import graft, graft_deviation, ungraft
from loragraft.backbones.flow import predict_velocity
from loragraft.backbones.load import load_backbone
from loragraft.backbones.sampler import generate_images
from loragraft.backbones.spec import Backbone
from loragraft.quantization.calibrate import collect

ROWS = 256


def main() -> int:
    """Measures, writes the JSON, prints a summary; exit code 1 if a bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run folder that training wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", default="", help="commit of the code that runs")
    args = parser.parse_args()
    adapter = load_adapter(args.run / "adapter")
    with tempfile.TemporaryDirectory() as cache:
        backbone = load_backbone(adapter.metadata["base"], adapter.metadata["profile"], "cpu", Path(cache))
    result = {
        "device": "cpu",
        "versions": {package: version(package) for package in ("torch", "diffusers", "peft")},
        "commit": args.commit,
        "command": "python benchmarks/graft.py runs/marketing --out FILE",
        "recipe_hash": adapter.metadata["recipe_hash"],
        **measure(backbone, adapter),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    summary = {key: value for key, value in result.items() if key != "layers"}
    print(json.dumps(summary, indent=1))
    return 0 if result["passed"] else 1


def measure(backbone: Backbone, adapter: Adapter) -> dict[str, Any]:
    """Deviations per layer and over the whole model; see the module's text."""
    model = backbone.transformer
    before = backbone.fingerprint()
    inputs = layer_inputs(backbone, adapter)
    float32 = graft_deviation(model, adapter, inputs)
    bfloat16 = graft_deviation(model, adapter, {path: x.to(torch.bfloat16) for path, x in inputs.items()})
    effect = velocity_change(backbone, adapter)
    result: dict[str, Any] = {
        "layers": [
            {
                "path": wide.path,
                "fp32_grafted_vs_apart": wide.merged_vs_apart,
                "bf16_grafted_vs_apart": narrow.merged_vs_apart,
                "bf16_grafted_vs_float64": narrow.merged_vs_exact,
                "bf16_apart_vs_float64": narrow.apart_vs_exact,
                "layer_effect": wide.effect,
            }
            for wide, narrow in zip(float32, bfloat16, strict=True)
        ],
        "fp32_worst": max(row.merged_vs_apart for row in float32),
        "bf16_worst": max(row.merged_vs_apart for row in bfloat16),
        "bf16_grafted_vs_float64_worst": max(row.merged_vs_exact for row in bfloat16),
        "bf16_apart_vs_float64_worst": max(row.apart_vs_exact for row in bfloat16),
        "velocity_change": effect,
        "undo_restores_every_byte": backbone.fingerprint() == before,
    }
    result["passed"] = bool(
        result["fp32_worst"] <= 1e-5
        and result["bf16_worst"] <= 5e-3
        and result["bf16_grafted_vs_float64_worst"] <= 1.05 * result["bf16_apart_vs_float64_worst"]
        and effect >= 0.05
        and result["undo_restores_every_byte"]
    )
    return result


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


if __name__ == "__main__":
    sys.exit(main())
