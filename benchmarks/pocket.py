"""`pocket` on a GPU: the ledger, adapter gradients against a float32 CPU, and the seconds of a training step beside bf16.

    python benchmarks/pocket.py --out pocket.json

Gate first: adapter gradients of one step through the Triton kernels in bf16, against the same step in float32 on the CPU
(torch reference, raw saved x, dequantized dgrad), for both profiles. Where bf16 and float32 differ, the rounding of an
activation may fall the other way, and that grows through 9 blocks: at 4 bits much more than at 8. The gate therefore compares
directions (cosine), with a bound per profile; the ops one by one are held to 5e-3 in tests/kernels. Then timings: forward +
backward + AdamW on random latents, batch 16, INT4 with its LoRA in the branch beside bf16 with PEFT's LoRA.
"""

import argparse
import json
import statistics
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loragraft.adapters.inject import inject_adapter
from loragraft.backbones.flow import flow_loss
from loragraft.backbones.load import find_spec, load_16bit
from loragraft.quantization.checkpoint import load_quantized
from loragraft.quantization.ledger import build_ledger
from loragraft.quantization.linear import SVDQuantLinear
from loragraft.recipes.schema import AdapterConfig

BATCH, WARMUP, STEPS = 16, 10, 40
LEAST_COSINE = {"native": 0.99, "interchange": 0.9}


def main() -> int:
    """Runs gate and timings, writes the JSON; exit code 1 if the gate fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--interchange", type=Path, help="folder of the interchange checkpoint (loragraft quantize)")
    parser.add_argument("--commit", default="", help="commit of the code that runs")
    args = parser.parse_args()
    torch.backends.cuda.enable_cudnn_sdp(False)
    spec = find_spec("pocket")
    folders = {"native": spec.transformer_int4["native"], "interchange": args.interchange}
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "versions": {package: version(package) for package in ("torch", "triton", "diffusers", "peft")},
        "commit": args.commit,
        "command": "python benchmarks/pocket.py --out FILE --interchange FOLDER",
        "batch": BATCH,
        "profiles": {},
    }
    bf16 = load_16bit(spec).cuda()
    result["step_ms_bf16_peft_eager"] = timed_step(bf16)
    for profile, folder in folders.items():
        if folder is None:
            continue
        cosine = gradient_cosine(folder)
        model = load_quantized(folder, spec.transformer_class)
        nn.Module.to(model, device="cuda", dtype=torch.bfloat16)
        ledger = build_ledger(model)
        result["profiles"][profile] = {
            "layers": ledger.to_dict()["layers"],
            "backends": sorted({row.backend for row in ledger.rows}),
            "gradient_cosine_min": min(cosine.values()),
            "gradient_cosine_median": statistics.median(cosine.values()),
            "step_ms": timed_step(model),
        }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    fell_back = [p for p, figures in result["profiles"].items() if "reference" in figures["backends"]]
    wrong = [p for p, figures in result["profiles"].items() if figures["gradient_cosine_min"] < LEAST_COSINE[p]]
    return 1 if fell_back or wrong else 0


def inputs(seed: int) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Random latents, noise, times and unit-scale text of one batch, on the CPU in float32."""
    g = torch.Generator().manual_seed(seed)
    text = {
        "prompt_embeds": 0.3 * torch.randn(BATCH, 32, 384, generator=g),
        "pooled_prompt_embeds": nn.functional.normalize(torch.randn(BATCH, 384, generator=g), dim=-1),
    }
    latents, noise = (torch.randn(BATCH, 16, 16, 16, generator=g) for _ in range(2))
    return latents, noise, torch.rand(BATCH, generator=g), text


def one_step(model: nn.Module, seed: int, device: str, dtype: torch.dtype) -> Tensor:
    """The loss of one batch, backward done."""
    latents, noise, times, text = inputs(seed)
    cast = {key: value.to(device, dtype) for key, value in text.items()}
    loss = flow_loss(model, latents.to(device, dtype), noise.to(device, dtype), times.to(device), cast)
    loss.backward()
    return loss.detach()


def gradient_cosine(folder: Path) -> dict[str, float]:
    """Path of an adapter factor -> cosine of its gradient, GPU bf16 Triton against CPU float32 reference."""
    gradients: dict[str, dict[str, Tensor]] = {}
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        model = load_quantized(folder, find_spec("pocket").transformer_class)
        nn.Module.to(model, device=device, dtype=dtype)
        for module in model.modules():
            if isinstance(module, SVDQuantLinear):
                module.save_x = "raw"
        inject_adapter(model, AdapterConfig(rank=16, alpha=16), find_spec("pocket").lora_targets)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ".lora_B." in name:  # zero at the start, where dA would be zero
                parameter.data = (0.02 * torch.randn(parameter.shape, generator=generator)).to(device)
        one_step(model, 0, device, dtype)
        gradients[device] = {n: p.grad.double().cpu() for n, p in model.named_parameters() if p.grad is not None}
    assert gradients["cpu"].keys() == gradients["cuda"].keys()
    return {
        name: float(torch.cosine_similarity(reference.flatten(), gradients["cuda"][name].flatten(), dim=0))
        for name, reference in gradients["cpu"].items()
    }


def timed_step(model: nn.Module) -> float:
    """Median milliseconds of forward + backward + AdamW at rank 16, by CUDA events."""
    parameters = inject_adapter(model, AdapterConfig(rank=16, alpha=16), find_spec("pocket").lora_targets)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    times = []
    for step in range(WARMUP + STEPS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        one_step(model, step % 4, "cuda", torch.bfloat16)
        optimizer.step()
        optimizer.zero_grad()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[WARMUP:])


if __name__ == "__main__":
    sys.exit(main())
