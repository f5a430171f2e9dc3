"""How far the gradients of 4-bit training are from those of exact arithmetic, on `pocket` with a trained adapter.

    accelerate launch train/lora.py --recipe marketing --out runs/hundred train.steps=100
    python benchmarks/fidelity.py runs/hundred --out benchmarks/results/fidelity.json

The same adapter, batches, times and noise go through the model in every variant and through three models of plain linear layers:

    dequantized   W_eff = deq(q) H / smooth + U D of the same profile, activations not rounded
    bf16          the same, its products in bf16 (autocast): what people train with
    original      the 16-bit weights

Compared are the gradients of A and B and of every layer's input. In the whole model: each layer sees activations and a gradient
that all others have rounded already. Alone: each layer gets x and dy of the exact model. cosine = <g, r> / (|g| |r|) and
error = |g - r| / |r|, per layer and batch, in float64; a kind's figure is the mean over its layers and the batches, `min` the
least of its layers' means. `adapter`: all factors as one vector, what the optimizer sees. The floor is bf16 against
dequantized: what rounding to bf16 itself adds. Everything but bf16 is in float32 on a CPU; with --device cuda the variants
run their kernels, in bf16.
"""

import argparse
import json
import platform
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from loragraft.adapters.checkpoint import Adapter
from loragraft.adapters.inject import inject_adapter, load_factors
from loragraft.adapters.opening import open_run
from loragraft.backbones.flow import flow_loss, sample_timesteps
from loragraft.backbones.load import load_backbone
from loragraft.backbones.spec import Backbone
from loragraft.data.cache import default_cache_root
from loragraft.data.dataset import LatentDataset
from loragraft.data.encode import encode_dataset
from loragraft.data.sources import open_source
from loragraft.disk import write_atomic
from loragraft.evaluation.image_sets import device_name
from loragraft.quantization.checkpoint import quantized_layers
from loragraft.quantization.names import replace_module
from loragraft.recipes.schema import AdapterConfig, Recipe

SEED = 7
VARIANTS: dict[str, tuple[str, str, str]] = {
    # name: profile, save_x, dgrad
    "w4a8": ("native", "quantized", "dequantized"),
    "w4a8, x kept raw": ("native", "raw", "dequantized"),
    "w4a8, int8 dgrad": ("native", "quantized", "int8"),
    "w4a4": ("interchange", "quantized", "dequantized"),
    "w4a16": ("weight-only", "quantized", "dequantized"),
}
QUANTITIES = ("A", "B", "x")
Batch = tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]


@dataclass
class Pass:
    """One forward and backward pass: per layer the gradients of A, B and x, and what it received."""

    gradients: dict[str, dict[str, Tensor]] = field(default_factory=lambda: defaultdict(dict))
    x: dict[str, Tensor] = field(default_factory=dict)
    dy: dict[str, Tensor] = field(default_factory=dict)


def main() -> int:
    """Measures, writes the JSON, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run folder; its adapter and recipe are used")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--commit", default="", help="commit of the code that runs")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 = torch's own choice")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    adapter, recipe = open_run(args.run)
    result = measure(adapter, recipe, args)
    about = {
        "device": device_name(torch.device(args.device)),
        "versions": {name: version(name) for name in ("torch", "diffusers", "peft")}
        | {"python": platform.python_version()},
        "commit": args.commit,
        "command": "python benchmarks/fidelity.py runs/hundred --out benchmarks/results/fidelity.json",
        "adapter_steps": adapter.metadata["steps"],
        "recipe_hash": adapter.metadata["recipe_hash"],
        "batches": args.batches,
        "batch_size": args.batch_size,
    }
    write_atomic(args.out, (json.dumps({**about, **result}, indent=1) + "\n").encode())
    print(table(result))
    return 0


def measure(adapter: Adapter, recipe: Recipe, args: argparse.Namespace) -> dict[str, Any]:
    """All variants against both exact models; see the module's text."""
    batches = list(training_batches(recipe, args.batches, args.batch_size))
    original = _prepared("16bit", adapter, recipe, args.device, exact=True)
    references = {"original": [run(original, batch) for batch in batches]}
    result: dict[str, Any] = {"variants": {}}
    done = ""
    for name in sorted(args.variants, key=lambda name: VARIANTS[name][0]):
        profile, save_x, dgrad = VARIANTS[name]
        if profile != done:
            exact = _prepared(profile, adapter, recipe, args.device, exact=True)
            references["dequantized"] = [run(exact, batch) for batch in batches]
            references["bf16"] = [run(exact, batch, torch.bfloat16) for batch in batches]
            done = profile
        backbone = _prepared(profile, adapter, recipe, args.device)
        backbone.set_training_numerics(save_x, dgrad)  # type: ignore[arg-type]
        found = [run(backbone, batch) for batch in batches]
        alone = [layers_alone(backbone, reference) for reference in references["dequantized"]]
        against = {kind: compared(found, references[kind]) for kind in ("dequantized", "original")}
        floor = compared(references["bf16"], references["dequantized"])
        result["variants"][name] = {
            "whole_model": against,
            "layer_alone": compared(alone, references["dequantized"]),
            "against_bf16": _without_kinds(compared(found, references["bf16"])),
            "bf16_floor": _without_kinds(floor),
        }
        print(f"{name}: {summary(result['variants'][name])}", flush=True)
    return {**headline(result["variants"]), **result}


def _without_kinds(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key != "kinds"}


def headline(variants: Mapping[str, Any]) -> dict[str, float]:
    """Of all W4A8 variants the least figures: of the adapter's gradient in any batch, of one layer's in the mean."""
    native = [entry for name, entry in variants.items() if name.startswith("w4a8")]
    if not native:
        return {}
    exact = [entry["whole_model"]["dequantized"] for entry in native]
    return {
        "grad_cosine_min": min(entry["adapter"]["min"] for entry in exact),
        "grad_cosine_layer_min": min(entry["least"]["cosine"] for entry in exact),
        "grad_cosine_against_bf16": min(entry["against_bf16"]["adapter"]["cosine"] for entry in native),
        "grad_cosine_of_bf16": min(entry["bf16_floor"]["adapter"]["cosine"] for entry in native),
    }


def training_batches(recipe: Recipe, count: int, batch_size: int) -> Iterator[Batch]:
    """(latents, noise, times, text) of the training split, evenly spread, the same in every call."""
    backbone = load_backbone(recipe.base, "16bit", "cpu", default_cache_root())
    encoders, resolution = backbone.encoders, recipe.data.resolution or backbone.spec.resolution
    samples = [s for s in open_source(recipe.data, resolution, default_cache_root()) if s.split == "train"]
    samples = samples[:: max(1, len(samples) // (count * batch_size))][: count * batch_size]
    cache = encode_dataset(
        samples, encoders.encode_images, encoders.encode_text, encoders.id, resolution, default_cache_root()
    )
    dataset: LatentDataset = cache.split("train")
    generator = torch.Generator().manual_seed(SEED)
    for start in range(0, count * batch_size, batch_size):
        batch = dataset.batch(range(start, start + batch_size))
        latents = batch["latents"].float()
        noise = torch.randn(latents.shape, generator=generator)
        text = {key: batch[key].float() for key in ("prompt_embeds", "pooled_prompt_embeds")}
        yield latents, noise, sample_timesteps(batch_size, generator), text


def _prepared(profile: str, adapter: Adapter, recipe: Recipe, device: str, *, exact: bool = False) -> Backbone:
    """The base with the adapter injected; `exact` makes plain float32 layers of its quantized ones first."""
    backbone = load_backbone(recipe.base, profile, device, default_cache_root())  # type: ignore[arg-type]
    model = backbone.transformer
    if exact:
        backbone = replace(backbone, dtype=torch.float32)
        for path, layer in quantized_layers(model).items():
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            plain.weight.data = layer.dequantized_weight()
            if layer.bias is not None:
                plain.bias.data = layer.bias.float()
            replace_module(model, path, plain)
        nn.Module.to(model, device=backbone.device, dtype=torch.float32)
    rank = next(iter(adapter.pairs.values()))[0].shape[0]
    config = AdapterConfig(rank=rank, alpha=rank, targets=tuple(re.escape(path) for path in adapter.pairs))
    inject_adapter(model, config, ())
    load_factors(model, {path: (down.float(), up.float()) for path, (down, up) in adapter.pairs.items()})
    return backbone


def carriers(model: nn.Module) -> dict[str, LoraLayer]:
    """Path -> layer with an adapter."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LoraLayer)}


def run(backbone: Backbone, batch: Batch, products: torch.dtype | None = None) -> Pass:
    """Forward and backward of the flow loss on one batch; `products`: the dtype that they are taken in (autocast)."""
    latents, noise, times, text = _moved(batch, backbone)
    found, handles = Pass(), []

    def watch(path: str) -> tuple[Callable[..., None], Callable[..., None]]:
        def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            found.x[path] = args[0].detach()

        def behind(module: nn.Module, grad_x: tuple[Tensor, ...], grad_y: tuple[Tensor, ...]) -> None:
            found.gradients[path]["x"], found.dy[path] = grad_x[0].detach(), grad_y[0].detach()

        return before, behind

    for path, layer in carriers(backbone.transformer).items():
        assert isinstance(layer, nn.Module)
        before, behind = watch(path)
        handles += [layer.register_forward_pre_hook(before), layer.register_full_backward_hook(behind)]
    # Inputs that want a gradient: else the first layers would have none for their x.
    latents, text = latents.clone().requires_grad_(), {k: t.clone().requires_grad_() for k, t in text.items()}
    with torch.autocast(backbone.device.type, products, enabled=products is not None):
        loss = flow_loss(backbone.transformer, latents, noise, times, text)
    loss.backward()
    for handle in handles:
        handle.remove()
    for path, layer in carriers(backbone.transformer).items():
        for name, parameter in zip("AB", _parameters(layer), strict=True):
            assert parameter.grad is not None  # every layer takes part in the loss
            found.gradients[path][name], parameter.grad = parameter.grad, None
    return found


def _parameters(layer: LoraLayer) -> tuple[nn.Parameter, nn.Parameter]:
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert isinstance(down, nn.Parameter) and isinstance(up, nn.Parameter)
    return down, up


def _moved(batch: Batch, backbone: Backbone) -> Batch:
    latents, noise, times, text = batch
    latents, noise = (tensor.to(backbone.device, backbone.dtype) for tensor in (latents, noise))
    text = {key: tensor.to(backbone.device, backbone.dtype) for key, tensor in text.items()}
    return latents, noise, times.to(backbone.device), text


def layers_alone(backbone: Backbone, reference: Pass) -> Pass:
    """The gradients of every layer on the exact model's own x and dy."""
    found = Pass()
    for path, layer in carriers(backbone.transformer).items():
        x = reference.x[path].to(backbone.dtype).clone().requires_grad_()
        y = layer(x)  # type: ignore[operator]
        gradients = torch.autograd.grad(y, [*_parameters(layer), x], reference.dy[path].to(y.dtype))
        found.gradients[path] = dict(zip(QUANTITIES, gradients, strict=True))
    return found


def compared(found: list[Pass], exact: list[Pass]) -> dict[str, Any]:
    """Per kind of layer and quantity: mean cosine, mean error, least cosine of a layer; `adapter` as one vector; `least` of A, B."""
    layers: dict[str, dict[str, dict[str, list[tuple[float, float]]]]] = defaultdict(
        lambda: {quantity: defaultdict(list) for quantity in QUANTITIES}
    )
    whole = []
    for ours, reference in zip(found, exact, strict=True):
        for path, gradients in reference.gradients.items():
            for quantity, right in gradients.items():
                layers[kind_of(path)][quantity][path].append(agreement(ours.gradients[path][quantity], right))
        whole.append(agreement(*(_factors(side.gradients) for side in (ours, reference))))
    kinds: dict[str, Any] = defaultdict(dict)
    least: dict[str, Any] = {"cosine": 2.0}
    for kind, quantities in layers.items():
        for quantity, of_layer in quantities.items():
            cosines = {path: _mean(cosine for cosine, _ in values) for path, values in of_layer.items()}
            worst = min(cosines, key=lambda path: cosines[path])
            errors = (_mean(error for _, error in values) for values in of_layer.values())
            kinds[kind][quantity] = {"cosine": _mean(cosines.values()), "min": cosines[worst], "error": _mean(errors)}
            if quantity != "x" and cosines[worst] < least["cosine"]:
                least = {"cosine": cosines[worst], "layer": worst, "factor": quantity}
    adapter = {
        "cosine": _mean(cosine for cosine, _ in whole),
        "min": min(cosine for cosine, _ in whole),
        "error": _mean(error for _, error in whole),
    }
    return {"adapter": adapter, "least": least, "kinds": dict(kinds)}


def _factors(gradients: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
    return torch.cat([gradients[path][name].flatten() for path in sorted(gradients) for name in ("A", "B")])


def agreement(ours: Tensor, exact: Tensor) -> tuple[float, float]:
    """(cosine, |ours - exact| / |exact|)."""
    a, b = ours.double().flatten(), exact.double().flatten()
    return round(float(a @ b / (a.norm() * b.norm())), 6), round(float((a - b).norm() / b.norm()), 6)


def _mean(values: Iterable[float]) -> float:
    return round(statistics.fmean(values), 6)


def kind_of(path: str) -> str:
    """`transformer_blocks.3.attn.to_q` -> `transformer_blocks.*.attn.to_q`."""
    return re.sub(r"(?<=blocks\.)\d+", "*", path)


def summary(entry: Mapping[str, Any]) -> str:
    """One line."""
    exact, original = (entry["whole_model"][kind] for kind in ("dequantized", "original"))
    floor, least = entry["bf16_floor"], exact["least"]
    return (
        f"gradient of the adapter against dequantized {exact['adapter']['cosine']:.5f} (least layer {least['cosine']:.4f}, "
        f"{least['factor']} of {least['layer']}), against bf16 {entry['against_bf16']['adapter']['cosine']:.5f}, against "
        f"original {original['adapter']['cosine']:.4f}; layers alone {entry['layer_alone']['adapter']['cosine']:.5f}; bf16 "
        f"itself {floor['adapter']['cosine']:.5f} (least layer {floor['least']['cosine']:.4f})"
    )


def table(result: Mapping[str, Any]) -> str:
    """Markdown: one row per kind of layer."""
    lines = []
    for name, entry in result["variants"].items():
        lines += [
            f"**{name}**: {summary(entry)}",
            "",
            "| layers | dA | least | dB | least | dx | dA alone | dB alone | dx alone | dA to original | dB | dx |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        whole, alone = entry["whole_model"], entry["layer_alone"]["kinds"]
        for kind, row in whole["dequantized"]["kinds"].items():
            original = whole["original"]["kinds"][kind]
            cells = [row["A"]["cosine"], row["A"]["min"], row["B"]["cosine"], row["B"]["min"], row["x"]["cosine"]]
            cells += [alone[kind][q]["cosine"] for q in QUANTITIES] + [original[q]["cosine"] for q in QUANTITIES]
            lines.append(f"| {kind} | " + " | ".join(f"{cell:.4f}" for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
