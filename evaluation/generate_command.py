"""The verb `loragraft generate`: its options, and what they mean. Heavy imports wait until it runs."""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from loragraft.backbones.bases import list_bases
from loragraft.disk import write_atomic
from loragraft.recipes.schema import Numerics

if TYPE_CHECKING:
    from loragraft.backbones.spec import Backbone, BaseSpec, Profile
    from loragraft.evaluation.generate import Settings
    from loragraft.evaluation.prompt_file import Line
    from loragraft.recipes.schema import WeightsConfig

PROFILES = get_args(Numerics)
SHEET = "before_after.png"
"""What `--compare` writes beside the images: no image of its own."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Everything behind `loragraft generate`."""
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="PATH[@WEIGHT]",
        help="a run, an adapter folder or file; can be repeated",
    )
    parser.add_argument(
        "--prompt", action="append", help="what to draw; can be repeated (default: the recipe's sample prompts)"
    )
    parser.add_argument(
        "--prompt-file",
        metavar="FILE",
        help="JSON lines with name, prompt and seed, as `loragraft prompts SET --from DIR` prints: OUT/<name>.png each, what "
        "is there is skipped",
    )
    parser.add_argument(
        "--negative-prompt", default="", help="what the picture should not show (default: the recipe's, for its base)"
    )
    parser.add_argument("--base", help=f"one of {', '.join(list_bases())}; default: the adapter's own, else pocket")
    parser.add_argument("--profile", choices=PROFILES, help="default: the adapter's own, else native")
    parser.add_argument("--any-base", action="store_true", help="graft an adapter that was trained on another base")
    parser.add_argument(
        "--denoiser-only", action="store_true", help="of adapters that change text encoders or norms too, use the rest"
    )
    parser.add_argument(
        "--out", default="images", help="folder for the images (default: images); 0000.png and so on are replaced"
    )
    parser.add_argument("--seed", type=int, help="of the first image (default: the recipe's, else 0)")
    parser.add_argument("--per-prompt", type=int, default=1, help="images per prompt, at consecutive seeds")
    parser.add_argument("--steps", type=int, help="sampling steps (default: the recipe's, else the base's own)")
    parser.add_argument(
        "--guidance", type=float, help="classifier-free (1 = off); on flux1-dev the distilled model's own"
    )
    parser.add_argument(
        "--true-guidance", type=float, help="classifier-free guidance of a distilled base; a negative prompt needs it"
    )
    parser.add_argument("--resolution", type=int, help="pixels of an edge (default: what was trained, else the base's)")
    parser.add_argument(
        "--weights",
        metavar="PATH",
        help="weights of a base that does not travel with the package, as a recipe's weights.path (default: the run's own)",
    )
    parser.add_argument("--encoders", metavar="PATH", help="the pipeline with its encoders, as weights.encoders")
    parser.add_argument("--allow-download", action="store_true", help="fetch --weights and --encoders from the Hub")
    parser.add_argument("--random-weights", action="store_true", help="random values in the base's true shapes")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="on a GPU, compile the repeated blocks first: half a minute or more once, then less time per image "
        "(default: where a model above 0.5 GB has 1000 passes to make: steps x batches, twice with classifier-free "
        "guidance). Either way passes are replayed from CUDA graphs. Compiled pictures differ in rounding",
    )
    parser.add_argument(
        "--compare", action="store_true", help="also write before_after.png: base beside adapter, same seeds"
    )


def run(args: argparse.Namespace, device: str) -> int:
    """Draws every prompt, with the adapters and, on request, beside the base without them. Raises ValueError."""
    from loragraft.adapters.opening import open_adapters
    from loragraft.backbones.load import find_spec, load_backbone
    from loragraft.data.cache import default_cache_root
    from loragraft.data.images import png_bytes
    from loragraft.evaluation.generate import Settings, before_after_grid, render, save_image
    from loragraft.evaluation.prompt_file import draw_lines

    if args.compile and device != "cuda":
        from loragraft.backbones.compiled import NEEDS_GPU

        raise ValueError(NEEDS_GPU)  # before anything is loaded
    adapters = open_adapters(args.adapter, denoiser_only=args.denoiser_only)
    for adapter, _ in adapters:
        if adapter.approximation:
            print(f"note: {adapter.approximation}", file=sys.stderr)
    trained = adapters[0][0].metadata if adapters else {}
    spec = find_spec(args.base or trained.get("base") or "pocket")
    _check_numbers(args, spec)
    sample = trained.get("recipe", {}).get("sample", {})
    if spec.name != trained.get("base"):  # steps and guidance were for another base
        sample = {key: sample[key] for key in sample.keys() & {"prompts", "negative_prompt", "seed"}}
    listed = _listed(args)
    prompts = args.prompt or sample.get("prompts") or [line.prompt for line in listed[:1]]
    if not prompts:
        raise ValueError('nothing to draw: give --prompt "..." (it can be repeated)')
    profile = parse_profile(args.profile or trained.get("profile") or "native")
    backbone = load_backbone(
        spec.name, profile, device, default_cache_root(), _weights(args, spec.external is not None), True
    )
    data = trained.get("recipe", {}).get("data", {})
    backbone.resolution = (
        args.resolution or max((data.get("resolution", 0), *data.get("resolutions", ()))) or spec.resolution
    )
    settings = [
        Settings(
            prompt=prompt,
            negative_prompt=args.negative_prompt or sample.get("negative_prompt", ""),
            seed=(sample.get("seed", 0) if args.seed is None else args.seed) + i,
            steps=args.steps or sample.get("steps", spec.steps),
            guidance=sample.get("guidance", spec.guidance) if args.guidance is None else args.guidance,
            true_guidance=sample.get("true_guidance", 1.0) if args.true_guidance is None else args.true_guidance,
        )
        for prompt in prompts
        for i in range(args.per_prompt)
    ]
    _compile(args, backbone, settings[0], (len(listed) or len(settings)) * (2 if args.compare else 1))
    if listed:
        cost = draw_lines(backbone, adapters, listed, settings[0], Path(args.out), any_base=args.any_base)
        print(f"{cost.drawn} images drawn, {len(listed)} in {args.out}" + (f"; {cost.as_row}" if cost.as_row else ""))
        return 0
    images = render(backbone, adapters, settings, any_base=args.any_base)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for i, (image, setting) in enumerate(zip(images, settings, strict=True)):
        save_image(image, out / f"{i:04d}.png", setting, backbone, adapters)
    print(f"{len(images)} image{'s' * (len(images) != 1)} in {out}")
    if args.compare:
        before = render(backbone, [], settings)
        grid = before_after_grid([s.prompt for s in settings], before, images)
        write_atomic(out / SHEET, png_bytes(grid))
        print(f"before and after: {out / SHEET}")
    return 0


def _check_numbers(args: argparse.Namespace, spec: "BaseSpec") -> None:
    """Before anything is loaded. Raises ValueError for what cannot be drawn, or written."""
    for option, value in (("--steps", args.steps), ("--per-prompt", args.per_prompt)):
        if value is not None and value < 1:
            raise ValueError(f"{option} {value}: it is at least 1")
    if args.seed is not None and not 0 <= args.seed <= 2**64 - args.per_prompt:
        raise ValueError(f"--seed {args.seed}: it is at least 0, and that of the last image below 2^64")
    edge, grain = args.resolution, spec.grain
    if edge is not None and (edge < grain or edge % grain):
        near = max(grain, round(edge / grain) * grain)
        raise ValueError(f"--resolution {edge}: {spec.name} draws edges that are multiples of {grain}, such as {near}")
    if Path(args.out).is_file():
        raise ValueError(f"--out {args.out} is a file: name a folder for the images")
    place = next(
        folder for folder in (Path(args.out).absolute(), *Path(args.out).absolute().parents) if folder.exists()
    )
    if not os.access(place, os.W_OK):
        raise ValueError(f"--out {args.out}: nothing may be written into {place}")


def _compile(args: argparse.Namespace, backbone: "Backbone", settings: "Settings", images: int) -> None:
    """Before so many images, where `--compile` says so or they repay it."""
    if backbone.device.type != "cuda" and not args.compile:
        return  # importing the compiler takes seconds
    from loragraft.backbones.compiled import compile_to_draw

    guided = backbone.spec.guided(settings.guidance, settings.true_guidance, settings.negative_prompt)
    compile_to_draw(backbone, images, settings.steps, guided, args.compile)


def _listed(args: argparse.Namespace) -> "list[Line]":
    """The lines of --prompt-file. Raises ValueError for options that it makes meaningless."""
    from loragraft.evaluation.prompt_file import read_lines

    if args.prompt_file is None:
        return []
    given = {"--prompt": args.prompt, "--seed": args.seed is not None, "--compare": args.compare}
    given["--per-prompt"] = args.per_prompt != 1
    if clash := [option for option, used in given.items() if used]:
        raise ValueError(f"--prompt-file gives prompts, seeds and names: leave out {', '.join(clash)}")
    return read_lines(Path(args.prompt_file))


def parse_profile(name: str) -> "Profile | None":
    """None for the 16-bit model. Raises ValueError for a name that is none, such as an adapter's of a later version."""
    from loragraft.backbones.architectures import NUMERICS

    if name == "16bit":
        return None
    for profile in NUMERICS:
        if profile == name:
            return profile
    raise ValueError(f"profile {name!r}: expected one of {', '.join(NUMERICS)}")


def _weights(args: argparse.Namespace, external: bool) -> "WeightsConfig":
    """What the options say of a base's weights, over what the first adapter's run was trained on, where it says. Raises
    RecipeError for options that contradict each other."""
    from loragraft.adapters.opening import recipe_of_run
    from loragraft.recipes.schema import WeightsConfig

    if args.random_weights or args.weights:
        return WeightsConfig(
            path=args.weights or "",
            encoders=args.encoders or "",
            allow_download=args.allow_download,
            random=args.random_weights,
        )
    recipe = recipe_of_run(args.adapter[0]) if args.adapter and external else None
    own = recipe.weights if recipe is not None and recipe.base == (args.base or recipe.base) else WeightsConfig()
    if args.encoders or args.allow_download:
        return replace(
            own, encoders=args.encoders or own.encoders, allow_download=args.allow_download or own.allow_download
        )
    return own
