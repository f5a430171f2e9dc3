"""Train a LoRA adapter against a frozen SVDQuant INT4 backbone.

    accelerate launch train/lora.py --recipe marketing
    accelerate launch train/lora.py --recipe marketing train.steps=800 adapter.rank=32
    accelerate launch train/lora.py --recipe ./mine.yaml --out runs/mine

recipe -> sources -> encode once -> frozen INT4 backbone -> LoRA in the branch -> steps -> adapter

Everything goes to the run folder (runs/<recipe name> unless --out says otherwise): the resolved recipe, one line of
metrics per step, sample images, a checkpoint to resume from, the W&B run (offline by default) and, at the end,
adapter/pytorch_lora_weights.safetensors. Started again with the same recipe, an interrupted run goes on where its
last checkpoint was.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from loragraft.adapters.checkpoint import save_adapter
from loragraft.adapters.inject import inject_adapter, remove_adapter
from loragraft.backbones.load import load_backbone
from loragraft.data.cache import default_cache_root
from loragraft.data.encode import check_captions, encode_dataset
from loragraft.data.sources import open_source
from loragraft.outcome import guarded
from loragraft.recipes.load import load_recipe
from loragraft.train.loop import train
from loragraft.train.metadata import adapter_metadata
from loragraft.train.previews import Previews
from loragraft.train.run_folder import RunFolder
from loragraft.train.tracking import Tracking

__all__ = ["main"]


def main(argv: list[str] | None = None) -> int:
    """The whole line, read from top to bottom. Returns the exit code: 0 done, 130 interrupted and resumable."""
    args = _parse(argv)
    recipe = load_recipe(args.recipe, args.overrides)
    accelerator = Accelerator(cpu=args.cpu, log_with=None)
    if accelerator.device.type == "cpu":
        # accelerate launch sets OMP_NUM_THREADS=1, which is right for many ranks and wrong for one.
        torch.set_num_threads(recipe.train.threads or max(1, (os.cpu_count() or 1) // accelerator.num_processes))
    else:
        torch.backends.cuda.enable_cudnn_sdp(False)  # its backward fails on torch 2.11 with driver 580

    backbone = load_backbone(recipe.base, recipe.numerics, accelerator.device, default_cache_root())
    backbone.set_training_numerics(recipe.train.save_x, recipe.train.dgrad)
    base_before = backbone.fingerprint()
    folder = RunFolder.open(Path(args.out or f"runs/{recipe.name}"), recipe, backbone.base_id, fresh=args.fresh)
    if folder.finished:
        print(f"{folder.path} is finished: {folder.adapter_file}. Train again with --fresh, or elsewhere with --out.")
        return 0

    resolution = recipe.data.resolution or backbone.spec.resolution
    samples = open_source(recipe.data, resolution, default_cache_root())
    encoders = backbone.encoders
    check_captions(samples, encoders.readable, cut=recipe.data.long_captions == "cut")
    cache = encode_dataset(
        samples, encoders.encode_images, encoders.encode_text, encoders.id, resolution, default_cache_root()
    )
    previews = Previews.prepare(recipe.sample, backbone, cache)
    encoders.release_text()  # memory back before the first step

    parameters = inject_adapter(backbone.transformer, recipe.adapter, backbone.spec.lora_targets)
    print(backbone.ledger.table())
    with Tracking.start(recipe, backbone, folder, accelerator) as tracking:
        interrupted = train(accelerator, recipe, backbone, parameters, cache, previews, folder, tracking)
        if interrupted:
            print(f"\nstopped at step {folder.step}, nothing lost: run the same command again to go on.")
            return 130
        if accelerator.is_main_process:
            metadata = adapter_metadata(recipe, backbone, cache, folder)
            adapter_file = save_adapter(backbone.transformer, folder.adapter_folder, metadata)
            remove_adapter(backbone.transformer)
            if backbone.fingerprint() != base_before:
                raise RuntimeError(f"the frozen base changed during training: do not use {adapter_file}")
            tracking.log_adapter(adapter_file)
            folder.finish()
            print(f"adapter: {adapter_file}")
    accelerator.end_training()
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train/lora.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--recipe", required=True, help="a shipped recipe's name (see `loragraft recipe`) or a YAML file"
    )
    parser.add_argument("--out", help="run folder; default runs/<recipe name>")
    parser.add_argument("--fresh", action="store_true", help="move an existing run aside and start from step 0")
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU where there is a GPU")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe overrides, such as train.steps=500")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(guarded(main))
