"""Two GPUs: how images/s scale, what a divided base holds, and how much of a run over cached images the GPU waits.

    python benchmarks/multi_gpu.py all --parts parts --work work --commit $(git rev-parse HEAD)          2 GPUs, about 220 s
    python benchmarks/multi_gpu.py all --parts parts --work work --base pocket --edge 64 --cpu ...       the same line, on a CPU

Every part goes through `train.loop.train` as train/lora.py calls it: a base of true shapes and random weights, an adapter of rank 16,
compiled blocks, steps replayed from CUDA graphs, batches from a cache of 2,000 random latents of four formats (`cached_images.py`).

    one      one process: images/s -> ddp_1.json; then a profile of whole steps -> idle.json (`gpu_timeline.py`)
    two      two processes, the same batch on each: images/s and `ddp2_scaling` -> ddp_2.json. Both must hold the same adapter
    divided  two processes, --use_fsdp: three steps, bytes of the base on each -> fsdp.json. It runs while `one` compiles

A part that fails leaves NAME.failed.txt with the end of its log, and the others go on; one that hangs says first where it stands.
The second shape's first step finds the first one's activations in the graphs' pool beside its own: 512 px, batch 4, no checkpointing,
take 75 GiB, batch 6 takes 105. Exit code: how many failed.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
from cached_images import FORMATS
from multi_gpu_part import FILES, cached_images, leave, run_one, run_several

LIMITS = {"one": 220.0, "two": 150.0, "divided": 110.0}
"""Seconds after which a part is ended."""


def merge(args: argparse.Namespace, what: str) -> None:
    """One file of the two processes' two. Raises ValueError where they do not hold the same adapter."""
    name = FILES[what][0]
    ranks = [json.loads((args.work / f"{name}.rank{rank}.json").read_text()) for rank in (0, 1)]
    if ranks[0]["adapter"] != ranks[1]["adapter"]:
        raise ValueError(f"{what}: the two processes hold different adapters after {ranks[0]['losses']}")
    figures = {**ranks[0], "peak_gib": [rank["peak_gib"] for rank in ranks], "held_gib": [r["held_gib"] for r in ranks]}
    alone = args.parts / "ddp_1.json"
    if what == "two":
        figures["ddp2_scaling"] = None
        if alone.exists():
            figures["ddp2_scaling"] = figures["images_per_second"] / json.loads(alone.read_text())["images_per_second"]
    leave(args, name, figures)


def run_all(args: argparse.Namespace) -> int:
    """The parts, each in processes of its own. Returns how many failed."""
    start = time.perf_counter()
    args.work.mkdir(parents=True, exist_ok=True)
    for name in (name for what in args.only for name in FILES[what]):  # nothing of an earlier run counts
        for file in (*args.parts.glob(f"{name}.*"), *args.work.glob(f"{name}.rank*")):
            file.unlink()
    cached_images(args).write()
    print(f"{time.perf_counter() - start:6.1f} s  {args.images} images cached", flush=True)
    free = args.work / "alone"
    free.unlink(missing_ok=True)
    first = {what: Running(args, what, free) for what in args.only if what != "two"}
    failed = 0
    for what in ("divided", "one"):
        if what in first:
            failed += _finish(args, first[what], start)
        free.touch()
    if "two" in args.only:
        failed += _finish(args, Running(args, "two", None), start)
    return failed


class Running:
    """A part that runs, its log in --work."""

    def __init__(self, args: argparse.Namespace, what: str, free: Path | None) -> None:
        self.args, self.what = args, what
        self.started = time.perf_counter()
        self.log = args.work / f"{what}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                self._command(free),
                env=self._environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def _command(self, free: Path | None) -> list[str]:
        args = self.args
        options = [self.what, "--parts", args.parts, "--work", args.work, "--commit", args.commit, "--base", args.base]
        options += ["--edge", args.edge, "--images", args.images, "--captions", args.captions, "--batch", args.batch]
        options += ["--attention", args.attention, "--checkpointing", args.checkpointing, "--seconds", args.seconds]
        options += ["--steps", args.steps or self._steps(), "--formats", *args.formats, *["--cpu"] * args.cpu]
        launcher = [sys.executable]
        if self.what == "one":
            options += ["--after", free] if free else []
        else:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
            launcher += [
                "--local-addr=127.0.0.1"
            ]  # otherwise the host's name is looked up, which hangs without a network
        return [*launcher, __file__, *map(str, options)]

    def _steps(self) -> int:
        """As many timed steps as take `--seconds-two`, going by `one`'s."""
        alone = self.args.parts / "ddp_1.json"
        milliseconds = json.loads(alone.read_text())["step_ms"] if alone.exists() else 500
        return max(4, round(1000 * self.args.seconds_two / milliseconds))

    def _environment(self) -> dict[str, str]:
        caches = {name: str(self.args.work / name.lower()) for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
        environment = {**caches, **os.environ, "OMP_NUM_THREADS": "1" if self.args.cpu else "4"}
        if self.args.cpu:
            environment["ACCELERATE_USE_CPU"] = "true"
        if self.what == "one":
            environment["CUDA_VISIBLE_DEVICES"] = environment.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        if self.what == "divided":
            environment |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
        return environment

    def wait(self) -> str:
        """ "" once it is done, else what went wrong."""
        try:
            code = self.process.wait(LIMITS[self.what] * self.args.patience - (time.perf_counter() - self.started))
        except subprocess.TimeoutExpired:
            it = psutil.Process(self.process.pid)
            below = it.children(recursive=True)  # torchrun's workers have own sessions
            for process in below if self.what != "one" else [it, *below]:
                with contextlib.suppress(psutil.NoSuchProcess):  # it may end just now
                    process.send_signal(signal.SIGUSR1)  # where it stands, into its log (`multi_gpu_part.Part`)
            time.sleep(1.0)
            for process in [it, *below]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self.process.wait()
            psutil.wait_procs(below, timeout=10)  # their memory is the next part's
            return f"not done after {LIMITS[self.what] * self.args.patience:.0f} s"
        return f"exit code {code}" if code else ""


def _finish(args: argparse.Namespace, running: Running, start: float) -> bool:
    """Waits for a part and says how it went. Returns whether it failed."""
    names = FILES[running.what]
    wrong = running.wait()
    if not wrong and running.what != "one":
        try:
            merge(args, running.what)
        except (OSError, ValueError) as error:
            wrong = str(error)
    print(f"{time.perf_counter() - start:6.1f} s  {running.what}: {wrong or 'done'}", flush=True)
    for name in names:
        file = args.parts / f"{name}.json"
        if file.exists():
            shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in json.loads(file.read_text()).items()}
            print(f"          {name}: {json.dumps({k: v for k, v in shown.items() if k != 'versions'})}", flush=True)
    if wrong:
        end = running.log.read_text(errors="replace")[-8000:]
        args.parts.mkdir(parents=True, exist_ok=True)
        (args.parts / f"{names[0]}.failed.txt").write_text(f"{wrong}\n{end}")
        print(end, flush=True)
    return bool(wrong)


def main() -> int:
    """Runs one part, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["all", *FILES])
    parser.add_argument("--parts", type=Path, required=True, help="folder for the JSON files")
    parser.add_argument("--work", type=Path, required=True, help="folder for cache, compiled code and logs")
    parser.add_argument("--commit", default="", help="commit of the code that runs")
    parser.add_argument("--only", nargs="+", choices=list(FILES), default=list(FILES), help="parts of `all`")
    parser.add_argument("--base", default="flux1-dev", help="flux1-dev, of random weights, or pocket")
    parser.add_argument("--edge", type=int, default=512, help="pictures have about its square of pixels")
    parser.add_argument(
        "--formats", nargs="+", default=list(FORMATS), help="width:height; at 512 the four have 1008 tokens each"
    )
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--captions", type=int, default=128, help="different ones")
    parser.add_argument("--batch", type=int, default=4, help="images of a process and step")
    parser.add_argument("--attention", default="sdpa", help="train.attention")
    parser.add_argument("--checkpointing", default="none", help="train.checkpointing")
    parser.add_argument("--seconds", type=float, default=30, help="timed seconds of `one`")
    parser.add_argument("--seconds-two", type=float, default=10, help="timed seconds of `two`")
    parser.add_argument("--steps", type=int, default=0, help="timed steps of `two` instead")
    parser.add_argument("--patience", type=float, default=1, help="factor on the time that a part may take")
    parser.add_argument("--after", type=Path, help="`one`: timed steps begin when this file is there")
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args()
    if args.what == "all":
        return run_all(args)
    run_one(args) if args.what == "one" else run_several(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
