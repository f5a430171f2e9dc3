"""A whole run of `train/lora.py` on FLUX.1-dev's shapes under a hard cap of reserved GPU memory: encode, train, validate, draw, save.

    python benchmarks/whole_run.py whole_run_1024 --parts parts --commit $(git rev-parse HEAD)

Random weights, twelve pictures that are drawn here, three steps. The cap is the allocator's: beyond it the run fails for want of memory,
so that a part in `--parts` says that it was enough.
"""

import argparse
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from PIL import Image
from timed_alone import end_with

from loragraft.train.lora import main as train_lora

GIB = 2**30
PICTURES = 12


@dataclass(frozen=True)
class WholeRun:
    """overrides: of the recipe `marketing`, beside `COMMON`."""

    cap_gib: float
    overrides: tuple[str, ...]


COMMON = (
    "data.domain=null", f"data.count={PICTURES}", "data.validation_fraction=0.2", "data.short_captions=0",
    "data.allow_overlap=true", "train.steps=3", "train.validate_every=2", "sample.steps=2", "tracking.mode=disabled",
)  # fmt: skip
WHOLE_RUNS = {
    "whole_run_1024": WholeRun(11, ("base=flux1-dev", "data.resolution=1024")),
    "whole_run_512": WholeRun(
        8, ("base=flux1-dev", "data.resolution=512", "optim.name=adamw8bit", "train.offload_activations=true")
    ),
}


def draw_pictures(folder: Path, edge: int = 1024) -> None:
    """Squares of different greys, NUMBER.png, and their captions, NUMBER.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(PICTURES):
        Image.new("RGB", (edge, edge), (20 * number,) * 3).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a grey square number {number}\n", encoding="utf-8")


def run(overrides: tuple[str, ...], cap_gib: float, random_weights: bool = True) -> dict[str, Any]:
    """One run in this process, with a cache and a folder of its own: its summary and, on a GPU, its peaks under the cap.

    Raises what the run raises, torch.cuda.OutOfMemoryError beyond the cap; RuntimeError if it was stopped."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_per_process_memory_fraction(cap_gib * GIB / torch.cuda.mem_get_info()[1])
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        draw_pictures(folder / "pictures")
        os.environ["LORAGRAFT_CACHE"] = str(folder / "cache")  # encoding belongs to the run
        arguments = ["--recipe", "marketing", *["--random-weights"] * random_weights, *COMMON, *overrides]
        code = train_lora([*arguments, f"data.folder={folder / 'pictures'}", "--out", str(folder / "run")])
        if code:
            raise RuntimeError(f"train/lora.py {' '.join(arguments)} ended with code {code}")
        summary = json.loads((folder / "run" / "summary.json").read_text(encoding="utf-8"))
    peaks: dict[str, float | None] = {"peak_gib": None, "reserved_gib": None, "cap_gib": None}
    if on_gpu:
        most = torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB
        peaks = {"peak_gib": most[0], "reserved_gib": most[1], "cap_gib": cap_gib}
    return {**peaks, "summary": summary, "arguments": " ".join(arguments)}


def main() -> int:
    """Writes the part and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=WHOLE_RUNS)
    parser.add_argument("--parts", type=Path, required=True)
    parser.add_argument("--commit", default="", help="commit of the code that runs")
    parser.add_argument("--beside", type=int, metavar="PID", help="of the process that runs others beside this one")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device: the cap is that of its allocator")
    if args.beside is not None:
        end_with(args.beside)
    asked = WHOLE_RUNS[args.name]
    found = run(asked.overrides, asked.cap_gib)
    versions = {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda}
    part = {"variant": args.name, "device": torch.cuda.get_device_name(), "versions": versions, "commit": args.commit}
    part |= {**found, "first_step_seconds": None, "first_step_why": "the run does not time it"}
    args.parts.mkdir(parents=True, exist_ok=True)
    (args.parts / f"{args.name}.json").write_text(json.dumps(part, indent=1) + "\n")
    print(json.dumps(part, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
