"""The `loragraft` command: one verb per job, each a few lines over the layers below.

    loragraft recipe marketing            what a recipe says, resolved
    accelerate launch train/lora.py --recipe marketing        (the same as: loragraft train --recipe marketing)
    loragraft generate --adapter runs/marketing --compare     images, and a before/after grid
    loragraft score runs/marketing        how far the adapter moved the base into its domain
    loragraft demo --adapters runs        a browser page to play with

This is the only module that imports across all layers. Heavy imports wait until a verb needs them, so --help is quick.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import loragraft
from loragraft.outcome import guarded
from loragraft.recipes.schema import Numerics

if TYPE_CHECKING:
    from loragraft.recipes.schema import Recipe

PROFILES = [name for name in get_args(Numerics) if name != "16bit"]


def main(argv: list[str] | None = None) -> int:
    """Parses, runs one verb, returns its exit code. Errors that a user can mend are one sentence on stderr."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["train"]:  # hands its options to train/lora.py, which documents them itself
        return guarded(lambda: _train(arguments[1:]))
    if arguments[:1] == ["preflight"]:
        return guarded(lambda: _preflight(arguments[1:]))
    if arguments[:1] == ["zoo"]:
        return guarded(lambda: _zoo(arguments[1:]))
    args = _parser().parse_args(arguments)
    verb: Callable[[argparse.Namespace], int] = args.verb
    return guarded(lambda: verb(args))


def _train(arguments: list[str]) -> int:
    from loragraft.train.lora import main as train_main

    return train_main(arguments)


def _recipe(args: argparse.Namespace) -> int:
    import yaml

    from loragraft.backbones.bases import list_bases
    from loragraft.recipes.load import list_recipes, load_recipe, recipe_hash, recipe_to_dict

    if args.name is None:
        print("\n".join(list_recipes()))
        print(f"# bases (base=NAME): {', '.join(list_bases())}")
        return 0
    recipe = load_recipe(args.name, args.overrides)
    print(yaml.safe_dump(recipe_to_dict(recipe), sort_keys=False), end="")
    print(f"# recipe hash {recipe_hash(recipe)}")
    return 0


def _prompts(args: argparse.Namespace) -> int:
    import dataclasses

    from loragraft.data.cache import default_cache_root
    from loragraft.data.prompts import evaluation_prompts, prompts_id

    if args.source:
        from loragraft.data.prompt_sets import show

        return show(args.name, Path(args.source), args.count, args.training_folder)
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
    from loragraft.evaluation.report import write_report
    from loragraft.evaluation.score import FULL_IMAGES, ScorePlan, measure_score, render_score, score_folders
    from loragraft.evaluation.standard_command import open_metrics
    from loragraft.versions import installed_versions

    run = Path(args.run)
    root = run / "score"
    standard = open_metrics(args, _device(), root / "features")  # what is missing is said before anything is drawn
    adapter, recipe = open_run(run)
    controls = [open_control(Path(entry)) for entry in args.control]
    images = args.images or (max(FULL_IMAGES, recipe.eval.images) if args.full else recipe.eval.images)
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
    folders = (score_folders if args.measure_only else render_score)(backbone, plan, root)
    if args.render_only:
        print("\n".join(f"{name:16s} {folder}" for name, folder in folders.items()))
        return 0
    measured = measure_score(plan, folders, root, str(backbone.device), resolution, print, standard)
    context = {
        "base": recipe.base,
        "profile": backbone.profile,
        "base_id": backbone.base_id,
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
    if args.adapter or args.any_base or args.rank is not None:
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


def _parser() -> argparse.ArgumentParser:
    from loragraft.adapters.adapter_command import add_options as adapter_options
    from loragraft.evaluation.generate_command import add_options as generate_options
    from loragraft.evaluation.standard_command import EPILOG, add_metric_options
    from loragraft.evaluation.standard_command import add_options as measure_options
    from loragraft.zoo.zoo_command import publish_options

    parser = argparse.ArgumentParser(
        prog="loragraft", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=loragraft.__version__)
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)

    def verb(
        name: str, run: Callable[[argparse.Namespace], int], text: str, details: str = ""
    ) -> argparse.ArgumentParser:
        sub = verbs.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.\n\n{details}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(verb=run)
        return sub

    recipe = verb(
        "recipe", _recipe, "list the recipes, or show one resolved", "loragraft recipe marketing train.steps=800"
    )
    recipe.add_argument(
        "name", nargs="?", help="a shipped recipe's name or a YAML file; without it: the list, and the bases"
    )
    recipe.add_argument("overrides", nargs="*", metavar="key=value")

    prompts = verb(
        "prompts",
        _prompts,
        "print evaluation prompts about a recipe's test concepts, as JSON lines",
        "loragraft prompts marketing --count 256\n\n"
        "loragraft prompts mjhq --from MJHQ-30K --count 5000 > prompts.jsonl              SVDQuant's subset and seeds\n\n"
        "Each line has `long`, `short` and `concept`; the list is the same everywhere, its sha256 goes to stderr. Of a published\n"
        "set (mjhq, sdci, coco) it has `name`, `prompt`, `seed`, `category`, `split` and `image`.",
    )
    prompts.add_argument("name", metavar="recipe", help="or, with --from, a published set: mjhq, sdci, coco")
    prompts.add_argument("--count", type=int, help="how many (default: 256; of a published set 5000)")
    prompts.add_argument(
        "--from", dest="source", metavar="DIR", help="where the published set lies; nothing is fetched"
    )
    prompts.add_argument(
        "--training-folder",
        metavar="OUT",
        help="write a folder for data.folder instead: these prompts as its test split, the rest to train on",
    )
    prompts.add_argument("overrides", nargs="*", metavar="key=value")

    verb("train", _recipe, "train an adapter: all options as in train/lora.py", "loragraft train --recipe marketing")

    generate = verb(
        "generate",
        _generate,
        "draw images with adapters grafted onto the INT4 base",
        'loragraft generate --adapter runs/marketing@0.8 --prompt "promo tile: white rocket on blue" --compare\n\n'
        "Without --prompt the recipe's sample prompts are drawn. Every PNG carries its settings.",
    )
    generate_options(generate)

    score = verb(
        "score",
        _score,
        "measure how far a run's adapter moved the base into its domain",
        "loragraft score runs/marketing                                      64 images a side, about two minutes on two cores\n"
        "loragraft score runs/marketing --full --control runs/design         256 images a set, every set: half an hour\n"
        "loragraft score runs/marketing --full --render-only                 draw on a GPU machine, copy RUN/score back, and\n"
        "loragraft score runs/marketing --full --measure-only                measure here\n\n"
        "Draws held-out captions with and without the adapter into RUN/score and compares: kernel distance (KID formula) and\n"
        "Frechet distance on EfficientNet-Lite0 features to held-out images, and whether a caption finds its image. --control\n"
        "and --full add what the adapter has to beat, short prompts, drift on general prompts, and a search for copies of\n"
        "training images. Images that are there already are not drawn again; a killed score loses one batch.",
    )
    score.add_argument("run", help="the run folder that training wrote")
    score.add_argument(
        "--images", type=int, help="N, images per set (default: the recipe's eval.images; at least 256 with --full)"
    )
    score.add_argument(
        "--references",
        type=int,
        default=0,
        metavar="M",
        help="compare with only the first M held-out images (default: all)",
    )
    score.add_argument(
        "--control",
        action="append",
        default=[],
        metavar="OTHER_RUN",
        help="also draw these captions with another domain's adapter on the same base; can be repeated",
    )
    score.add_argument(
        "--full",
        action="store_true",
        help="every set: short prompts, untrained adapter, drift, copies of training images",
    )
    stage = score.add_mutually_exclusive_group()
    stage.add_argument("--render-only", action="store_true", help="draw what is missing and stop")
    stage.add_argument("--measure-only", action="store_true", help="draw nothing, measure what is there")

    add_metric_options(score)

    measure = verb(
        "measure",
        _measure,
        "FID, CLIP score, ImageReward, LPIPS, PSNR of images on disk; rows as a table",
        EPILOG,
    )
    measure_options(measure)

    quantize = verb(
        "quantize",
        _quantize,
        "turn a 16-bit base into an SVDQuant INT4 checkpoint",
        "loragraft quantize pocket --out pocket-int4\n"
        "loragraft quantize FLUX.1-dev/transformer --out flux-int4          layer by layer; needs no data\n"
        "loragraft quantize FLUX.1-dev --smoothing calibrated --out flux-int4       the pipeline's folder: runs it first\n"
        "loragraft quantize flux1-dev-diffusers.safetensors --out flux-int4 --stats activations.safetensors\n\n"
        "A base: calibrated smoothing watches the inputs of every linear while the calibration prompts are denoised; 'weight'\n"
        "and 'hadamard' need no data. A folder or file of a FLUX transformer in diffusers' names is never loaded as a whole:\n"
        "one layer at a time is read, quantized and written, and the same command goes on where a killed one ended.\n"
        "'auto' takes for every layer what measures best of no transform, smoothing, rotation and both: on its measured\n"
        "activations (--stats), else on synthetic inputs.",
    )
    quantize.add_argument("base", help="a base's name, or a folder or safetensors file of 16-bit weights")
    quantize.add_argument("--profile", choices=PROFILES, default="native")
    quantize.add_argument(
        "--smoothing",
        choices=("calibrated", "weight", "hadamard", "none", "auto"),
        help="default: calibrated for a base, auto for weights on disk",
    )
    quantize.add_argument("--rank", type=int, help="rank of the 16-bit branch (default: 16 for a base, else 32)")
    quantize.add_argument("--group-size", type=int, choices=(64, 128), default=64, help="128: native only, faster")
    quantize.add_argument("--gptq", action="store_true", help="choose the codes by GPTQ; needs activations")
    quantize.add_argument("--stats", metavar="FILE", help="activation statistics that calibrate.save_stats wrote")
    quantize.add_argument(
        "--prompts", metavar="FILE", help="calibrate a pipeline on these, one a line (default: 16 of ours)"
    )
    quantize.add_argument("--resolution", type=int, help="pixels of a pipeline's calibration (default: the base's own)")
    quantize.add_argument("--out", required=True, help="folder to write; must not exist")

    convert = verb(
        "convert",
        _convert,
        "an INT4 checkpoint of Nunchaku's, Nunchaku Lite, ComfyUI's or our own into another format",
        "loragraft convert svdq-int4_r32-flux.1-dev.safetensors flux-int4       add --numerics w4a8 for our own kernels\n\n"
        "Values stay as they are unless --numerics or --signed is given; then each layer's added error is shown. --to comfyui\n"
        "names layers as diffusers does, comfyui-flux as ComfyUI's FLUX does.\n\n"
        "loragraft convert pocket-w4a4 tiles.safetensors --to comfyui --adapter runs/tiles@0.8\n\n"
        "--adapter makes an adapter part of the checkpoint: more ranks of the 16-bit branch. No INT4 code changes.",
    )
    convert.add_argument("source", help="a file or folder; its format is found out")
    convert.add_argument("dest", help="a folder to write (ComfyUI: a file); must not exist")
    convert.add_argument("--to", choices=("native", "nunchaku-lite", "comfyui", "comfyui-flux"), default="native")
    convert.add_argument("--numerics", choices=("w4a8", "w4a4"), help="convert to these")
    convert.add_argument("--signed", action="store_true", help="replace unsigned activations, which Lite does not know")
    convert.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="PATH[@WEIGHT]",
        help="graft this run, adapter folder or file before writing; can be repeated",
    )
    convert.add_argument("--any-base", action="store_true", help="graft an adapter that was trained on another base")
    convert.add_argument("--rank", type=int, help="cut the adapters together to this rank; what is lost is shown")
    convert.add_argument("--layout", choices=("row-major", "tile-packed"), default="row-major", help="for ComfyUI")

    adapter = verb(
        "adapter",
        _adapter,
        "look into a LoRA file of any trainer, or write it in another one's naming",
        "loragraft adapter inspect downloaded.safetensors\n"
        "loragraft adapter export runs/marketing --style comfyui --out marketing.safetensors\n\n"
        "Read: diffusers, PEFT, attention processors, kohya, OneTrainer, LyCORIS (LoKr, LoHa), ComfyUI, XLabs, BFL control,\n"
        "cloneofsimo. generate, demo and the others take such files as they are.",
    )
    adapter_options(adapter)

    verb("preflight", _recipe, "memory and time of a run before it starts, what it fits and what would make it fit")

    publish = verb(
        "publish",
        _publish,
        "a finished adapter with card, pictures, score and index entry to a folder, a URL or the Hub",
        "loragraft publish runs/marketing --to zoo                 a folder\n"
        "loragraft publish runs/marketing --to s3://bucket/zoo     what fsspec opens\n"
        "loragraft publish runs/marketing --to hf://OWNER          the Hub: repository OWNER/marketing, private unless --public\n\n"
        "Killed or cut off at any moment, the place has its old or its new state; the same command goes on. What is there\n"
        "already is not sent again. `loragraft zoo` finds, fetches and checks what was published.",
    )
    publish_options(publish)

    verb("zoo", _recipe, "published adapters: ls, search, info, pull, verify, bench, mirror, yank, deprecate, key")

    demo = verb(
        "demo",
        _demo,
        "a browser page to play with: prompt, start picture, adapters with weights, before and after",
        "loragraft demo --adapters runs zoo\n\n"
        "Opens on this machine alone (127.0.0.1) and fetches nothing from a network. Adapters are looked for in the folders\n"
        'of --adapters on every load of the page. Needs gradio: pip install "loragraft[demo]"',
    )
    demo.add_argument("--base", default="pocket", help="the base to begin with (default: pocket)")
    demo.add_argument(
        "--profile",
        choices=("native", "interchange", "16bit"),
        default="native",
        help="its precision to begin with (default: native)",
    )
    demo.add_argument(
        "--adapters",
        nargs="+",
        default=[],
        metavar="FOLDER",
        help="runs, folders of runs, published folders, adapter files",
    )
    demo.add_argument("--port", type=int, default=7860)
    demo.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0 shows the page to your whole network, without a password"
    )
    demo.add_argument("--open", action="store_true", help="open the page in your browser")
    return parser


if __name__ == "__main__":
    sys.exit(main())
