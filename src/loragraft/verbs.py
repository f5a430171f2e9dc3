"""The verbs of the `loragraft` command: what each is for, and its options. What a verb does is said in `cli.py`.

Nothing heavy is imported here, so that --help is quick.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import loragraft
from loragraft.adapters.adapter_command import add_options as adapter_options
from loragraft.evaluation.generate_command import add_options as generate_options
from loragraft.evaluation.standard_command import EPILOG, add_metric_options
from loragraft.evaluation.standard_command import add_options as measure_options
from loragraft.parser import Parser
from loragraft.recipes.schema import Numerics
from loragraft.zoo.zoo_command import publish_options

PROFILES = [name for name in get_args(Numerics) if name != "16bit"]
DESCRIPTION = """Train LoRA adapters on the 4-bit model that you will ship, and graft them into it.

    loragraft recipe marketing            what a recipe says, resolved
    accelerate launch train/lora.py --recipe marketing        (the same as: loragraft train --recipe marketing)
    loragraft generate --adapter runs/marketing --compare     images, and a before/after grid
    loragraft score runs/marketing        how far the adapter moved the base into its domain
    loragraft demo --adapters runs        a browser page to play with

Every verb explains itself: loragraft VERB --help
"""
EPILOGUE = "Exit codes: 0 done, 2 a mistake that the message names, 130 stopped by ctrl-C and resumable."

Options = Callable[[argparse.ArgumentParser], None]


@dataclass(frozen=True)
class Verb:
    """One line for the list of verbs, examples and explanations for its own --help, and its options."""

    text: str
    details: str = ""
    options: Options = lambda parser: None
    """A verb that has a parser of its own (train, preflight, zoo) has none here."""


def build_parser() -> argparse.ArgumentParser:
    """Parses to a namespace whose `verb` is a key of `VERBS`."""
    parser = Parser(prog="loragraft", description=DESCRIPTION, epilog=EPILOGUE)
    parser.add_argument("--version", action="version", version=loragraft.__version__)
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", dest="verb", required=True)
    for name, verb in VERBS.items():
        described = f"{verb.text[0].upper()}{verb.text[1:]}.\n\n{verb.details}"
        verb.options(verbs.add_parser(name, help=verb.text, description=described))
    return parser


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """What changes a recipe."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe overrides, such as adapter.rank=32")


def recipe_options(parser: argparse.ArgumentParser) -> None:
    """`loragraft recipe`."""
    parser.add_argument(
        "name", nargs="?", help="a shipped recipe's name or a YAML file; without it: the list, and the bases"
    )
    add_overrides(parser)


def prompts_options(parser: argparse.ArgumentParser) -> None:
    """`loragraft prompts`."""
    parser.add_argument(
        "name",
        metavar="recipe",
        help="a shipped recipe's name or a YAML file; with --from, a published set: mjhq, sdci, coco",
    )
    parser.add_argument("--count", type=int, help="how many (default: 256; of a published set 5000)")
    parser.add_argument("--from", dest="source", metavar="DIR", help="where the published set lies; nothing is fetched")
    parser.add_argument(
        "--training-folder",
        metavar="OUT",
        help="write a folder for data.folder instead: these prompts as its test split, the rest to train on",
    )
    add_overrides(parser)


def score_options(parser: argparse.ArgumentParser) -> None:
    """`loragraft score`."""
    parser.add_argument("run", help="the run folder that training wrote")
    parser.add_argument(
        "--images", type=int, help="N, images per set (default: the recipe's eval.images; at least 256 with --full)"
    )
    parser.add_argument(
        "--references",
        type=int,
        default=0,
        metavar="M",
        help="compare with only the first M held-out images (default: all)",
    )
    parser.add_argument(
        "--control",
        action="append",
        default=[],
        metavar="OTHER_RUN",
        help="also draw these captions with another domain's adapter on the same base; can be repeated",
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="every set: short prompts, untrained adapter, drift, copies of training images",
    )
    stage = parser.add_mutually_exclusive_group()
    stage.add_argument("--render-only", action="store_true", help="draw what is missing and stop")
    stage.add_argument("--measure-only", action="store_true", help="draw nothing, measure what is there")
    add_metric_options(parser)


def quantize_options(parser: argparse.ArgumentParser) -> None:
    """`loragraft quantize`."""
    parser.add_argument("base", help="a base's name, or a folder or safetensors file of 16-bit weights")
    parser.add_argument(
        "--profile",
        choices=PROFILES,
        default="native",
        help="what the weights become (default: native, W4A8; interchange: what SVDQuant files for ComfyUI mean)",
    )
    parser.add_argument(
        "--smoothing",
        choices=("calibrated", "weight", "hadamard", "none", "auto"),
        help="default: calibrated for a base, auto for weights on disk",
    )
    parser.add_argument("--rank", type=int, help="rank of the 16-bit branch (default: 16 for a base, else 32)")
    parser.add_argument(
        "--group-size",
        type=int,
        choices=(64, 128),
        default=64,
        help="weights that share a scale (default: 64; 128: native only, faster)",
    )
    parser.add_argument("--gptq", action="store_true", help="choose the codes by GPTQ; needs activations")
    parser.add_argument("--stats", metavar="FILE", help="activation statistics that calibrate.save_stats wrote")
    parser.add_argument(
        "--prompts", metavar="FILE", help="calibrate a pipeline on these, one a line (default: 16 of ours)"
    )
    parser.add_argument("--resolution", type=int, help="pixels of a pipeline's calibration (default: the base's own)")
    parser.add_argument("--out", required=True, help="folder to write; must not exist")


def convert_options(parser: argparse.ArgumentParser) -> None:
    """`loragraft convert`."""
    parser.add_argument("source", help="a file or folder; its format is found out")
    parser.add_argument("dest", help="a folder to write (ComfyUI: a .safetensors file); must not exist")
    parser.add_argument(
        "--to",
        choices=("native", "nunchaku-lite", "comfyui", "comfyui-flux"),
        default="native",
        help="format to write (default: native, our own folder)",
    )
    parser.add_argument(
        "--numerics", choices=("w4a8", "w4a4"), help="round again to these (default: the source's own numerics)"
    )
    parser.add_argument("--signed", action="store_true", help="replace unsigned activations, which Lite does not know")
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="PATH[@WEIGHT]",
        help="graft this run, adapter folder or file before writing; can be repeated",
    )
    parser.add_argument("--any-base", action="store_true", help="graft an adapter that was trained on another base")
    parser.add_argument(
        "--denoiser-only", action="store_true", help="of adapters that change text encoders or norms too, graft the rest"
    )
    parser.add_argument("--rank", type=int, help="cut the adapters together to this rank; what is lost is shown")
    parser.add_argument("--layout", choices=("row-major", "tile-packed"), default="row-major", help="for ComfyUI")


def demo_options(parser: argparse.ArgumentParser) -> None:
    """`loragraft demo`."""
    parser.add_argument("--base", default="pocket", help="the base to begin with (default: pocket)")
    parser.add_argument(
        "--profile",
        choices=("native", "interchange", "16bit"),
        default="native",
        help="its precision to begin with (default: native)",
    )
    parser.add_argument(
        "--adapters",
        nargs="+",
        default=[],
        metavar="FOLDER",
        help="runs, folders of runs, published folders, adapter files (default: none, the base alone)",
    )
    parser.add_argument("--port", type=int, default=7860, help="of the page's address (default: 7860)")
    parser.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0 shows the page to your whole network, without a password"
    )
    parser.add_argument("--open", action="store_true", help="open the page in your browser")


VERBS = {
    "recipe": Verb(
        "list the recipes, or show one resolved",
        "loragraft recipe\n"
        "loragraft recipe marketing train.steps=800\n"
        "loragraft recipe ./mine.yaml base=sdxl            your own file; a misspelt key or base is named",
        recipe_options,
    ),
    "prompts": Verb(
        "print evaluation prompts about a recipe's test concepts, as JSON lines",
        "loragraft prompts marketing --count 256\n\n"
        "loragraft prompts mjhq --from MJHQ-30K --count 5000 > prompts.jsonl              SVDQuant's subset and seeds\n\n"
        "Each line has `long`, `short` and `concept`; the list is the same everywhere, its sha256 goes to stderr. Of a published\n"
        "set (mjhq, sdci, coco) it has `name`, `prompt`, `seed`, `category`, `split` and `image`.",
        prompts_options,
    ),
    "train": Verb("train an adapter: all options as in train/lora.py", "loragraft train --recipe marketing"),
    "generate": Verb(
        "draw images with adapters grafted onto the INT4 base",
        'loragraft generate --adapter runs/marketing@0.8 --prompt "promo tile: white rocket on blue" --compare\n\n'
        "Without --prompt the recipe's sample prompts are drawn. Every PNG carries its settings.",
        generate_options,
    ),
    "score": Verb(
        "measure how far a run's adapter moved the base into its domain",
        "loragraft score runs/marketing                                      64 images a side, about two minutes on two cores\n"
        "loragraft score runs/marketing --full --control runs/design         256 images a set, every set: half an hour\n"
        "loragraft score runs/marketing --full --render-only                 draw on a GPU machine, copy RUN/score back, and\n"
        "loragraft score runs/marketing --full --measure-only                measure here\n\n"
        "Draws held-out captions with and without the adapter into RUN/score and compares: kernel distance (KID formula) and\n"
        "Frechet distance on EfficientNet-Lite0 features to held-out images, and whether a caption finds its image. --control\n"
        "and --full add what the adapter has to beat, short prompts, drift on general prompts, and a search for copies of\n"
        "training images. Images that are there already are not drawn again; a killed score loses one batch.",
        score_options,
    ),
    "measure": Verb(
        "FID, CLIP score, ImageReward, LPIPS, PSNR of images on disk; rows as a table", EPILOG, measure_options
    ),
    "quantize": Verb(
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
        quantize_options,
    ),
    "convert": Verb(
        "an INT4 checkpoint of Nunchaku's, Nunchaku Lite, ComfyUI's or our own into another format",
        "loragraft convert svdq-int4_r32-flux.1-dev.safetensors flux-int4       add --numerics w4a8 for our own kernels\n\n"
        "Values stay as they are unless --numerics or --signed is given; then each layer's added error is shown. --to comfyui\n"
        "names layers as diffusers does, comfyui-flux as ComfyUI's FLUX does.\n\n"
        "loragraft convert pocket-w4a4 tiles.safetensors --to comfyui --adapter runs/tiles@0.8\n\n"
        "--adapter makes an adapter part of the checkpoint: more ranks of the 16-bit branch. No INT4 code changes.",
        convert_options,
    ),
    "adapter": Verb(
        "look into a LoRA file of any trainer, or write it in another one's naming",
        "loragraft adapter inspect downloaded.safetensors\n"
        "loragraft adapter export runs/marketing --style comfyui --out marketing.safetensors\n\n"
        "Read: diffusers, PEFT, attention processors, kohya, OneTrainer, LyCORIS (LoKr, LoHa), ComfyUI, XLabs, BFL control,\n"
        "cloneofsimo. generate, demo and the others take such files as they are.",
        adapter_options,
    ),
    "preflight": Verb("memory and time of a run before it starts, what it fits and what would make it fit"),
    "publish": Verb(
        "a finished adapter with card, pictures, score and index entry to a folder, a URL or the Hub",
        "loragraft publish runs/marketing --to runs/zoo            a folder\n"
        "loragraft publish runs/marketing --to s3://bucket/zoo     what fsspec opens\n"
        "loragraft publish runs/marketing --to hf://OWNER          the Hub: repository OWNER/marketing, private unless --public\n\n"
        "Killed or cut off at any moment, the place has its old or its new state; the same command goes on. What is there\n"
        "already is not sent again. `loragraft zoo` finds, fetches and checks what was published.",
        publish_options,
    ),
    "zoo": Verb("published adapters: ls, search, info, pull, verify, bench, mirror, yank, deprecate, index, key"),
    "demo": Verb(
        "a browser page to play with: prompt, start picture, adapters with weights, before and after",
        "loragraft demo --adapters runs zoo\n\n"
        "Opens on this machine alone (127.0.0.1) and fetches nothing from a network. Adapters are looked for in the folders\n"
        'of --adapters on every load of the page. Needs gradio: pip install "loragraft[demo]"',
        demo_options,
    ),
}
