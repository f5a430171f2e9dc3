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
from graft_proof import layer_inputs, velocity_change

from loragraft.adapters.checkpoint import Adapter, load_adapter
from loragraft.adapters.graft import graft_deviation
from loragraft.backbones.load import load_backbone
from loragraft.backbones.spec import Backbone


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


if __name__ == "__main__":
    sys.exit(main())
