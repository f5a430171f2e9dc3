"""Train a LoRA adapter against a frozen SVDQuant INT4 backbone.

    accelerate launch train/lora.py --recipe marketing
    accelerate launch train/lora.py --recipe marketing train.steps=800 adapter.rank=32
    accelerate launch train/lora.py --recipe ./mine.yaml --out runs/mine

recipe -> sources -> encode once -> frozen INT4 backbone -> LoRA in the branch -> steps -> adapter

Everything goes to the run folder (runs/<recipe name> unless --out says otherwise): the resolved recipe, one line of
metrics per step, sample images, a checkpoint to resume from, the W&B run (offline by default) and, at the end,
adapter/pytorch_lora_weights.safetensors. Started again with the same recipe, an interrupted run goes on where its
last checkpoint was.

A run that stands still: `kill -USR1 PID` of its process shows where every thread is, `--stall 300` does so by itself.

Exit codes: 0 done, 2 a mistake that the message names, 130 stopped by ctrl-C and resumable. `accelerate launch` adds a
traceback of its own to 2 and 130; `accelerate launch --quiet` does not (and makes both 1), nor does `loragraft train`.
"""

import argparse
import functools
import os
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from threading import Thread

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from loragraft.adapters.checkpoint import save_adapter
from loragraft.adapters.inject import inject_adapter, remove_adapter
from loragraft.backbones.load import find_spec, load_backbone
from loragraft.backbones.original_weights import open_original
from loragraft.backbones.spec import Backbone
from loragraft.data.buckets import BucketReport, Sizes, warn_enlarged
from loragraft.data.cache import default_cache_root
from loragraft.data.dataset import LatentCache, LatentDataset
from loragraft.data.encode import check_captions, encode_dataset, not_encoded
from loragraft.data.held_out import warn_few_held_out
from loragraft.data.overlap import check_overlap
from loragraft.data.sources import Sample, check_source, open_source
from loragraft.outcome import guarded
from loragraft.parser import Parser
from loragraft.recipes.load import load_recipe
from loragraft.recipes.schema import Recipe
from loragraft.train.compensating import start_compensating
from loragraft.train.forecast import Forecast
from loragraft.train.loop import distributed, train
from loragraft.train.memory import set_checkpointing
from loragraft.train.metadata import adapter_metadata
from loragraft.train.previews import Previews
from loragraft.train.prior import prior_samples
from loragraft.train.run_folder import RunFolder
from loragraft.train.sharding import check_sharding, shards_base
from loragraft.train.stall import show_on_signal, watched
from loragraft.train.tracking import Tracking, check_login
from loragraft.train.warm import start_workers

__all__ = ["main"]

Original = Callable[[str], Tensor]
"""Path of a layer -> its 16-bit weight."""


def main(argv: list[str] | None = None) -> int:
    """The whole line, read from top to bottom. Returns the exit code: 0 done, 130 interrupted and resumable."""
    show_on_signal()
    args = _parse(argv)
    overrides = [*args.overrides, *(["weights.random=true"] if args.random_weights else [])]
    recipe = load_recipe(args.recipe, overrides)
    if reason := find_spec(recipe.base).refuses_training:
        raise ValueError(reason)
    check_source(recipe.data)
    check_login(recipe.tracking.mode)
    path = _run_path(args, recipe)
    accelerator = Accelerator(cpu=args.cpu, log_with=None, kwargs_handlers=distributed())
    check_sharding(accelerator, recipe.train)
    begun = _set_up_device(recipe, accelerator)

    forecast = Forecast.start(args.recipe, overrides, accelerator)
    backbone, original = _load_base(recipe, accelerator)
    sizes = Sizes.asked(recipe.data, backbone.spec.resolution, backbone.spec.grain)
    samples, folder = _open(path, args.fresh, recipe, backbone, accelerator)
    if folder.finished:
        print(f"{folder.path} is finished: {folder.adapter_file}. Train again with --fresh, or elsewhere with --out.")
        return 0
    cache, prior = _encode(samples, recipe, backbone, accelerator, sizes)
    folder.check_data(cache.fingerprint)
    previews = Previews.prepare(recipe.sample, backbone, cache)
    backbone.encoders.release_text()  # memory back before the first step
    backbone.onto_device()
    if begun is not None:
        begun.join()
    backbone.set_attention(recipe.train.attention)
    base_before = backbone.fingerprint()
    parameters = _add_adapter(recipe, backbone, accelerator, original, folder)

    print(backbone.ledger.table())
    print(forecast.before(), end="")
    tracked = Tracking.start(recipe, backbone, folder, accelerator)
    with watched(args.stall), closing(forecast), tracked as tracking:
        if train(accelerator, recipe, backbone, parameters, cache, previews, folder, tracking, prior):
            print(f"\nstopped at step {folder.step}, nothing lost: run the same command again to go on.")
            return 130
        if accelerator.is_main_process:
            _finish(recipe, backbone, cache, folder, tracking, base_before)
            print(forecast.after(step_seconds=folder.step_seconds), end="")
    accelerator.end_training()
    return 0


def _set_up_device(recipe: Recipe, accelerator: Accelerator) -> Thread | None:
    """Threads of a CPU; on a GPU the thread that gets the compiler ready, where blocks will be compiled."""
    config = recipe.train
    if accelerator.device.type == "cpu":
        # accelerate launch sets OMP_NUM_THREADS=1, which is right for many ranks and wrong for one.
        torch.set_num_threads(config.threads or max(1, (os.cpu_count() or 1) // accelerator.num_processes))
        return None
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward fails on torch 2.11 with driver 580
    if config.compile == "always" or (config.compile == "auto" and find_spec(recipe.base).external):
        return start_workers(config.attention, accelerator.device)
    return None


def _load_base(recipe: Recipe, accelerator: Accelerator) -> tuple[Backbone, Original | None]:
    """The frozen base, and its weights of 16 bits where an adapter starts from what rounding took from them."""
    cache_root, original = default_cache_root(), None
    with accelerator.main_process_first():  # it fills the caches, here and below; the others find them full
        # The transformer of a large base waits on the CPU: encoders have the device for themselves.
        backbone = load_backbone(recipe.base, recipe.numerics, accelerator.device, cache_root, recipe.weights, True)
        if recipe.adapter.init == "loftq":
            original = open_original(backbone.spec, recipe.weights, cache_root)
    backbone.set_training_numerics(recipe.train.save_x, recipe.train.dgrad)
    backbone.resolution = max(recipe.data.edges(backbone.spec.resolution))
    return backbone, original


def _run_path(args: argparse.Namespace, recipe: Recipe) -> Path:
    """Where the run goes. Raises ValueError where its sample images would be found as images to train on."""
    path = Path(args.out or f"runs/{recipe.name}")
    data = recipe.data.folder
    if data is not None and path.resolve().is_relative_to(Path(data).resolve()):
        raise ValueError(
            f"the run folder {path} lies in data.folder {data}, and its sample images would be trained on next: give another "
            "with --out, or put the images into a folder of their own"
        )
    return path


def _open(
    path: Path, fresh: bool, recipe: Recipe, backbone: Backbone, accelerator: Accelerator
) -> tuple[list[Sample], RunFolder]:
    """The samples (none yet of a stream) and the run's folder."""
    with accelerator.main_process_first():
        samples = [] if recipe.data.streaming else open_source(recipe.data, backbone.resolution, default_cache_root())
        check_overlap(samples, recipe.data, default_cache_root())
        first = accelerator.is_main_process
        if first and samples:
            warn_few_held_out(samples, recipe.data, recipe.eval)
        return samples, RunFolder.open(path, recipe, backbone.base_id, fresh=fresh and first, exclusive=first)


def _encode(
    samples: list[Sample], recipe: Recipe, backbone: Backbone, accelerator: Accelerator, sizes: Sizes | None
) -> tuple[LatentCache, LatentDataset | None]:
    """Latents and embeddings of the samples, and of the class images if the recipe has any; buckets are shown."""
    encoders, cache_root = backbone.encoders, default_cache_root()

    def encode(samples: list[Sample]) -> LatentCache:
        check_captions(samples, encoders.readable, cut=recipe.data.long_captions == "cut")
        return encode_dataset(
            samples, encoders.encode_images, encoders.encode_text, encoders.id, backbone.resolution, cache_root,
            progress=accelerator.is_main_process and not recipe.data.streaming, sizes=sizes,
            readers=4 if accelerator.device.type == "cuda" else 0,
        )  # fmt: skip

    if recipe.data.streaming and sizes is not None:
        from loragraft.data.stream import read_stream  # `datasets` takes a second to import

        lacking = functools.partial(not_encoded, encoder_id=encoders.id, cache_root=cache_root, sizes=sizes)
        samples = read_stream(recipe.data, cache_root, encode, lacking)
        check_overlap(samples, recipe.data, cache_root)
    cache = encode(samples)  # all processes at once, each a part
    prior = None
    if recipe.data.prior.images:
        with accelerator.main_process_first():
            class_images = prior_samples(recipe.data.prior, backbone, cache_root)
        prior = encode(class_images).split("train")
    if sizes is not None and accelerator.is_main_process:
        shown = cache.split("train")
        warn_enlarged(shown.samples, shown.shapes)
        plan = (recipe.train.batch_size, recipe.train.accumulation, accelerator.num_processes)
        print(BucketReport.of(shown.shapes, *plan).table())
    return cache, prior


def _add_adapter(
    recipe: Recipe, backbone: Backbone, accelerator: Accelerator, original: Original | None, folder: RunFolder
) -> list[nn.Parameter]:
    """The adapter's factors, in the base, whose blocks keep what `train.checkpointing` says."""
    parameters = inject_adapter(backbone.transformer, recipe.adapter, backbone.spec.lora_targets)
    if original is not None:
        start_compensating(accelerator, backbone, original, folder)
    config = recipe.train
    set_checkpointing(
        backbone.transformer, config.checkpointing, config.checkpoint_blocks, offload=config.offload_activations
    )
    return parameters


def _finish(
    recipe: Recipe, backbone: Backbone, cache: LatentCache, folder: RunFolder, tracking: Tracking, base_before: str
) -> None:
    """The adapter's file, off the base again. Raises RuntimeError if the base is not what it was."""
    metadata = adapter_metadata(recipe, backbone, cache, folder)
    adapter_file = save_adapter(backbone.transformer, folder.adapter_folder, metadata)
    remove_adapter(backbone.transformer)
    if not shards_base() and backbone.fingerprint() != base_before:  # parts are compared by `train`
        raise RuntimeError(f"the frozen base changed during training: do not use {adapter_file}")
    tracking.log_adapter(adapter_file)
    folder.finish()
    print(f"adapter: {adapter_file}")


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="train/lora.py", description=__doc__)
    parser.add_argument(
        "--recipe", required=True, help="a shipped recipe's name (see `loragraft recipe`) or a YAML file"
    )
    parser.add_argument("--out", help="run folder; default runs/<recipe name>")
    parser.add_argument("--fresh", action="store_true", help="move an existing run aside and start from step 0")
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU where there is a GPU")
    parser.add_argument(
        "--random-weights", action="store_true", help="weights.random=true: a base's true shapes without its files"
    )
    parser.add_argument(
        "--stall", type=float, default=0.0, metavar="SECONDS",
        help="once no step, validation, checkpoint or picture was finished for so long, show where every thread stands, and go "
        "on (default 0: never)",
    )  # fmt: skip
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe overrides, such as train.steps=500")
    return parser.parse_intermixed_args(argv)  # options and overrides in any order


if __name__ == "__main__":
    sys.exit(guarded(main))
