"""Seconds of a picture as `loragraft generate` draws it: launched kernel by kernel, from CUDA graphs, and with compiled blocks too.

    python benchmarks/generate.py --out generate.json --commit $(git rev-parse HEAD)
    python benchmarks/generate.py --bases flux1-dev --resolutions 1024 --repeats 1 --out flux.json       two minutes; gives COMPILE_FROM
    python benchmarks/generate.py --bases pocket --modes eager captured compiled --out pocket.json       six kinds of block to compile

`pocket` at 128 px with guidance 3 (two passes a step), and FLUX.1 [dev]'s shapes with random codes at 512 and 1024 px (one pass),
20 steps, one picture at a time, text and decoding included. Unless --modes says otherwise `pocket` is not compiled (nor is it by
`generate`, as it is small). Modes are tried in order in one process; only the largest resolution is compiled. Everything is the product's own path: `sampler.generate_images`, `Replay`, `compile_to_draw`, `AdapterSwitch`.

| key | meaning |
|---|---|
| first_seconds | from a loaded base to its first picture: kernels built or read, blocks compiled, a graph captured |
| image_seconds | median of those that follow |
| same_pixels | as eager; `pixel_difference`: mean difference of 8-bit values |
| adapters | captured: first picture after an adapter came in, after a switch, another weight, back to the base; whether the last has the base's pixels |
| compile_repays_after | passes after which compiling has paid for itself at that resolution |

The file is written after each measurement; one that fails is in it as {"error": text}, and the others are made all the same. Exit
code 1 if one failed, or if a captured picture, or the base's after adapters, has other pixels.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from loragraft.adapters.checkpoint import Adapter
from loragraft.adapters.switching import AdapterSwitch
from loragraft.backbones.compiled import compile_to_draw
from loragraft.backbones.load import find_spec, load_backbone
from loragraft.backbones.replay import Replay
from loragraft.backbones.sampler import generate_images
from loragraft.backbones.spec import Backbone
from loragraft.data.cache import default_cache_root
from loragraft.disk import write_atomic
from loragraft.evaluation.image_sets import device_name
from loragraft.quantization.checkpoint import quantized_layers, recorded_base_id
from loragraft.recipes.schema import WeightsConfig
from loragraft.versions import installed_versions

Mode = Literal["eager", "captured", "compiled"]
MODES: tuple[Mode, ...] = ("eager", "captured", "compiled")
DEFAULT_MODES: dict[str, tuple[Mode, ...]] = {"pocket": ("eager", "captured"), "flux1-dev": MODES}
RESOLUTIONS = {"pocket": (128,), "flux1-dev": (512, 1024)}
GUIDANCE = {"pocket": 3.0, "flux1-dev": 3.5}
RANK, GIB = 16, 2**30


class Eager(Replay):
    """No graph."""

    def allowed(self, model: nn.Module) -> bool:
        return False


class Drawing:
    """One base at one resolution, and how long its pictures take."""

    def __init__(self, backbone: Backbone, steps: int, repeats: int) -> None:
        self.backbone, self.steps, self.repeats = backbone, steps, repeats
        self.guidance = GUIDANCE[backbone.spec.name]

    def picture(self) -> tuple[float, np.ndarray]:
        """(seconds, pixels) of one."""
        begun = time.perf_counter()
        (image,) = generate_images(self.backbone, ["a red star"], [0], steps=self.steps, guidance=self.guidance)
        if self.backbone.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun, np.asarray(image, dtype=np.int16)

    def times(self) -> tuple[dict[str, float], np.ndarray]:
        """The first picture, and the median of `repeats` more."""
        if self.backbone.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        first, _ = self.picture()
        drawn = [self.picture() for _ in range(self.repeats)]
        found = {"first_seconds": first, "image_seconds": statistics.median(seconds for seconds, _ in drawn)}
        if self.backbone.device.type == "cuda":
            found["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
        return found, drawn[-1][1]

    def adapters(self, base: np.ndarray) -> dict[str, Any]:
        """Seconds of the pictures at the exchanges of two adapters."""
        switch = AdapterSwitch(self.backbone.transformer)
        one, other = (
            random_adapter(self.backbone.transformer, name, seed) for seed, name in enumerate(("one", "other"))
        )
        found: dict[str, Any] = {}
        pixels = base
        for what, used in (
            ("came_in", [(one, 1.0)]), ("again", [(one, 1.0)]), ("switched", [(other, 1.0)]), ("weighted", [(other, 0.5)]),
            ("base_again", []),
        ):  # fmt: skip
            begun = time.perf_counter()
            switch.use(used)
            found[f"{what}_switch_seconds"] = time.perf_counter() - begun
            found[f"{what}_image_seconds"], pixels = self.picture()
            if what == "came_in":
                found["changes_pixels_by"] = difference(pixels, base)
        found["base_again_same_pixels"] = bool(np.array_equal(pixels, base))
        switch.clear()
        return found


def difference(one: np.ndarray, other: np.ndarray) -> float:
    """Mean difference of 8-bit values."""
    return float(np.abs(one - other).mean())


def random_adapter(model: nn.Module, name: str, seed: int) -> Adapter:
    """Rank 16 on every layer of more than a few rows; it adds about a tenth of each layer's output."""
    random, pairs = torch.Generator().manual_seed(seed), {}
    for path, layer in quantized_layers(model).items():
        if layer.numerics != "w4a16":
            down = torch.randn(RANK, layer.in_features, generator=random) / layer.in_features**0.5
            pairs[path] = down, 0.1 * torch.randn(layer.out_features, RANK, generator=random) / RANK**0.5
    return Adapter(name, {"base": "random", "base_id": recorded_base_id(model)}, pairs)


def measure(
    base: str, args: argparse.Namespace, device: torch.device, found: dict[str, Any], save: Callable[[], None]
) -> None:
    """Fills `found`, resolution -> mode -> figures; `save` is called after each."""
    weights = WeightsConfig(random=True) if find_spec(base).external is not None else None
    begun = time.perf_counter()
    backbone = load_backbone(base, "native", device, default_cache_root(), weights)
    if device.type == "cuda":
        backbone.set_attention(args.attention)
    found |= {"load_seconds": time.perf_counter() - begun, "attention": args.attention, "steps": args.steps}
    eager: dict[int, np.ndarray] = {}
    resolutions = args.resolutions or RESOLUTIONS[base]
    for mode in args.modes or DEFAULT_MODES[base]:
        for resolution in resolutions if mode != "compiled" else (max(resolutions),):
            begun = time.perf_counter()
            try:
                figures = drawn(backbone, mode, resolution, args, eager, adapters=resolution == max(resolutions))
            except (RuntimeError, ValueError) as error:  # the others are drawn all the same
                figures = {"error": str(error)[-1500:]}
            found.setdefault(str(resolution), {})[mode] = figures
            print(
                f"{base} {resolution} px {mode}, {time.perf_counter() - begun:.0f} s: {json.dumps(figures)}", flush=True
            )
            save()
    for resolution in resolutions:
        passes = args.steps * (2 if backbone.spec.guided(GUIDANCE[base])["guidance"] > 1 else 1)
        found[str(resolution)]["compile_repays_after"] = repaid(found[str(resolution)], passes)


def drawn(
    backbone: Backbone,
    mode: Mode,
    resolution: int,
    args: argparse.Namespace,
    eager: dict[int, np.ndarray],
    *,
    adapters: bool,
) -> dict[str, Any]:
    """The figures of one mode at one resolution. eager: pixels by resolution, filled by that mode and compared with by the others.
    adapters: captured, measure their exchange too."""
    backbone.replay.clear()
    backbone.replay = Eager() if mode == "eager" else Replay()
    if mode == "compiled":
        compile_to_draw(backbone, 1, args.steps, backbone.spec.guided(GUIDANCE[backbone.spec.name]), True)
    backbone.resolution = resolution
    drawing = Drawing(backbone, args.steps, args.repeats)
    times, pixels = drawing.times()
    figures: dict[str, Any] = {**times}
    if mode == "eager":
        eager[resolution] = pixels
    elif resolution in eager:
        same = bool(np.array_equal(pixels, eager[resolution]))
        figures |= {"same_pixels": same, "pixel_difference": difference(pixels, eager[resolution])}
    if mode == "captured" and adapters:
        figures["adapters"] = drawing.adapters(pixels)
    return figures


def repaid(modes: dict[str, Any], passes: int) -> float | None:
    """Passes after which the compiled model, its first picture included, is ahead of the captured one; None if it never is."""
    if any("error" in modes.get(mode, {"error": "not drawn"}) for mode in ("captured", "compiled")):
        return None
    saved = modes["captured"]["image_seconds"] - modes["compiled"]["image_seconds"]
    cost = modes["compiled"]["first_seconds"] - modes["captured"]["first_seconds"]
    return passes * cost / saved if saved > 0 else None


def failures(bases: dict[str, Any]) -> list[str]:
    """What may not be: an error, a captured picture unlike the eager one, a base that adapters left changed."""
    found = []
    for base, figures in bases.items():
        if "error" in figures:
            found.append(f"{base}: {figures['error']}")
        for resolution, modes in figures.items():
            for mode, figure in modes.items() if isinstance(modes, dict) else ():
                if not isinstance(figure, dict):  # compile_repays_after
                    continue
                if "error" in figure:
                    found.append(f"{base} {resolution} px {mode}: {figure['error']}")
                if mode == "captured" and not figure.get("same_pixels", True):
                    found.append(f"{base} {resolution} px: a captured picture has other pixels than an eager one")
                if not figure.get("adapters", {}).get("base_again_same_pixels", True):
                    found.append(f"{base} {resolution} px {mode}: after adapters the base draws other pixels")
    return found


def main() -> int:
    """One line per measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bases", nargs="+", choices=[*RESOLUTIONS], default=[*RESOLUTIONS])
    parser.add_argument("--modes", nargs="+", choices=MODES, help="default: all; of pocket eager and captured")
    parser.add_argument("--resolutions", nargs="+", type=int, help="default: 128 on pocket, 512 and 1024 on FLUX.1")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--attention", choices=("sdpa", "cudnn_forward", "flash_attn_4"), default="sdpa")
    parser.add_argument("--commit", default="", help="commit of the code that runs")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result: dict[str, Any] = {
        "device": device_name(device), "versions": installed_versions("torch", "triton", "diffusers"),
        "commit": args.commit, "command": " ".join(["python", "benchmarks/generate.py", *sys.argv[1:]]), "bases": {},
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        write_atomic(args.out, (json.dumps(result, indent=1) + "\n").encode())

    for base in args.bases:
        found_here = result["bases"].setdefault(base, {})
        try:
            measure(base, args, device, found_here, save)
        except (ImportError, RuntimeError, ValueError) as error:  # `pocket` without its text encoder's package
            found_here["error"] = f"{type(error).__name__}: {error}"[-1500:]
        save()
    for line in (found := failures(result["bases"])):
        print(line, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
