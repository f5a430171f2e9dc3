"""The `loragraft` command: one verb per job, each a few lines over the layers below; `verbs.py` has their options.

This is the only module that imports across all layers. Heavy imports wait until a verb needs them, so --help is quick.
"""

import argparse
import difflib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from loragraft.outcome import MENDED, guarded
from loragraft.verbs import VERBS, build_parser

if TYPE_CHECKING:
    from loragraft.recipes.schema import Recipe


def main(argv: list[str] | None = None) -> int:
    """Parses, runs one verb, returns its exit code. Errors that a user can mend are one sentence on stderr."""
    arguments = sys.argv[1:] if argv is None else argv
    first = arguments[0] if arguments else ""
    if not first:
        build_parser().print_help()
        return MENDED
    if first in OWN_PARSER:
        return guarded(lambda: OWN_PARSER[first](arguments[1:]))
    if first not in VERBS and not first.startswith("-"):
        return guarded(lambda: _refuse_unknown(first))
    args = _parsed(arguments)
    return guarded(lambda: RUN[args.verb](args))


def _parsed(arguments: list[str]) -> argparse.Namespace:
    """Recipe overrides may stand before and behind options; argparse gives a verb's positional words to the first group alone."""
    parser = build_parser()
    args, rest = parser.parse_known_args(arguments)
    if rest and not hasattr(args, "overrides"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    return args


def _train(arguments: list[str]) -> int:
    from loragraft.train.lora import main as train_main

    return train_main(arguments)


def _recipe(args: argparse.Namespace) -> int:
    import yaml

    from loragraft.backbones.bases import known_base, list_bases
    from loragraft.recipes.load import list_recipes, load_recipe, recipe_hash, recipe_to_dict

    if args.name is None:
        print("\n".join(list_recipes()))
        print(f"# bases (base=NAME): {', '.join(list_bases())}")
        return 0
    recipe = load_recipe(args.name, args.overrides)
    known_base(recipe.base)
    print(yaml.safe_dump(recipe_to_dict(recipe), sort_keys=False), end="")
    print(f"# recipe hash {recipe_hash(recipe)}")
    return 0


def _prompts(args: argparse.Namespace) -> int:
    import dataclasses

    from loragraft.data.cache import default_cache_root
    from loragraft.data.prompt_sets import READERS as PUBLISHED_SETS
    from loragraft.data.prompts import evaluation_prompts, prompts_id

    if args.source:
        from loragraft.data.prompt_sets import show

        if args.overrides:
            raise ValueError(f"{' '.join(args.overrides)}: overrides change a recipe, and --from reads a published set")
        return show(args.name, Path(args.source), args.count, args.training_folder)
    if args.name in PUBLISHED_SETS:
        raise ValueError(f"{args.name} is a published set: say where it lies with --from DIR")
    if args.training_folder:
        raise ValueError("--training-folder serves a published set, which --from finds")
    args.count = 256 if args.count is None else args.count
    prompts = evaluation_prompts(_recipe_from(args).data, args.count, default_cache_root())
    for prompt in prompts:
        print(json.dumps(dataclasses.asdict(prompt), ensure_ascii=False))
    print(f"{len(prompts)} prompts, sha256 {prompts_id(prompts)}", file=sys.stderr)
    return 0


def _generate(args: argparse.Namespace) -> int:
    from loragraft.evaluation.generate_command import run

    return run(args, _device())


def _score(args: argparse.Namespace) -> int:
    import dataclasses

    from loragraft.adapters.opening import open_control, open_run
    from loragraft.backbones.load import load_backbone
    from loragraft.data.cache import default_cache_root
    from loragraft.data.sources import open_source
    from loragraft.evaluation.image_sets import device_name
    from loragraft.evaluation.report import CHANGED_DATA, write_report
    from loragraft.evaluation.score import FULL_IMAGES, ScorePlan, is_trained_data, measure_score, render_score, score_folders
    from loragraft.evaluation.standard_command import open_metrics
    from loragraft.versions import installed_versions

    run = Path(args.run)
    root = run / "score"
    standard = open_metrics(args, _device(), root / "features")  # what is missing is said before anything is drawn
    adapter, recipe = open_run(run)
    controls = [open_control(Path(entry)) for entry in args.control]
    own = max(FULL_IMAGES, recipe.eval.images) if args.full else recipe.eval.images
    images = own if args.images is None else args.images
    backbone = load_backbone(recipe.base, recipe.numerics, _device(), default_cache_root(), recipe.weights, True)
    resolution = backbone.resolution = max(recipe.data.edges(backbone.spec.resolution))
    samples = open_source(recipe.data, resolution, default_cache_root())
    plan = ScorePlan(
        adapter=adapter,
        config=dataclasses.replace(recipe.eval, images=images),
        held_out=tuple(s for s in samples if s.split == recipe.eval.split),
        train=() if recipe.data.streaming else tuple(s for s in samples if s.split == "train"),  # their images are gone
        controls=tuple(controls),
        references=args.references,
        full=args.full,
    )
    same_data = is_trained_data(adapter, samples, recipe.data, backbone)
    if same_data is False:
        print(f"{CHANGED_DATA} This score says so and will not be published.")
    folders = (score_folders if args.measure_only else render_score)(backbone, plan, root)
    if args.render_only:
        print("\n".join(f"{name:16s} {folder}" for name, folder in folders.items()))
        return 0
    measured = measure_score(plan, folders, root, str(backbone.device), resolution, print, standard)
    context = {
        "base": recipe.base,
        "profile": backbone.profile,
        "base_id": backbone.base_id,
        "same_data": same_data,
        "device": device_name(backbone.device),
        "versions": installed_versions("loragraft", "torch", "diffusers"),
    }
    print(write_report(plan, measured, root, resolution, context))
    print(f"\nwritten to {root}: score.json, score.csv, score.md, grid.png; figures also in {run / 'score.json'}")
    return 0


def _measure(args: argparse.Namespace) -> int:
    from loragraft.evaluation.standard_command import run

    return run(args, _device())


def _quantize(args: argparse.Namespace) -> int:
    from loragraft.backbones.quantize_command import run

    return run(args, _device())


def _convert(args: argparse.Namespace) -> int:
    if args.adapter or args.any_base or args.denoiser_only or args.rank is not None:
        from loragraft.adapters.baking import run

        return run(args)
    from loragraft.quantization.dialects.conversion import run_convert

    return run_convert(args)


def _preflight(arguments: list[str]) -> int:
    from loragraft.train.preflight_command import run

    return run(arguments)


def _publish(args: argparse.Namespace) -> int:
    from loragraft.zoo.zoo_command import run_publish

    return run_publish(args)


def _adapter(args: argparse.Namespace) -> int:
    from loragraft.adapters.adapter_command import run

    return run(args)


def _zoo(arguments: list[str]) -> int:
    from loragraft.zoo.zoo_command import main as zoo_main

    return zoo_main(arguments)


def _demo(args: argparse.Namespace) -> int:
    from importlib.util import find_spec

    if find_spec("gradio") is None:
        raise ValueError('the browser page needs gradio, which is not installed: pip install "loragraft[demo]"')
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported, and on every launch
    from loragraft.data.cache import default_cache_root
    from loragraft.demo.catalogue import Catalogue
    from loragraft.demo.engine import Engine
    from loragraft.demo.page import Page, serve

    engine = Engine(Catalogue([Path(folder) for folder in args.adapters]), _device(), default_cache_root())
    engine.backbone(args.base, args.profile)  # a misspelt base is an error here, not in the browser
    serve(Page(engine, args.base, args.profile), args.host, args.port, open_browser=args.open)
    return 0


def _recipe_from(args: argparse.Namespace) -> "Recipe":
    from loragraft.recipes.load import load_recipe

    return load_recipe(args.name, args.overrides)


def _device() -> str:
    import torch

    if not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:  # torch obeys the variable by itself
        torch.set_num_threads(os.cpu_count() or 1)
    return "cuda" if torch.cuda.is_available() else "cpu"


def _refuse_unknown(verb: str) -> int:
    near = difflib.get_close_matches(verb, VERBS, n=1)
    hint = f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(VERBS)}"
    raise ValueError(f"`loragraft {verb}`: no such verb. {hint}")


RUN: dict[str, Callable[[argparse.Namespace], int]] = {
    "recipe": _recipe,
    "prompts": _prompts,
    "generate": _generate,
    "score": _score,
    "measure": _measure,
    "quantize": _quantize,
    "convert": _convert,
    "adapter": _adapter,
    "publish": _publish,
    "demo": _demo,
}
OWN_PARSER: dict[str, Callable[[list[str]], int]] = {"train": _train, "preflight": _preflight, "zoo": _zoo}
"""They read their options themselves, from the words behind the verb."""


if __name__ == "__main__":
    sys.exit(main())
