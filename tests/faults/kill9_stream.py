"""Kills the quantizing of weights on disk before and after every flush, write, rename and removal; then lets it end.

    python tests/faults/kill9_stream.py

A FLUX transformer of one double and one single block in shards. One process forks a child for every attempt, all into one
folder. Prints JSON: where it was killed, how often each layer was quantized, whether the files equal those of a run that nobody
killed, and what a full disk leads to.
"""

import json
import os
import resource
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: a forked child must not meet a thread pool of its parent

import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from loragraft.backbones.architectures import open_model, plan_model
from loragraft.outcome import guarded
from loragraft.quantization import stream
from loragraft.quantization.partial_file import JOURNAL
from loragraft.quantization.settings import QuantSettings
from loragraft.quantization.stream import quantize_stream

SETTINGS = QuantSettings(rank=4, iterations=1, grid=1, smoothing="weight", search="subsampled")
CALLS = ("fsync", "fdatasync", "pwrite", "replace", "unlink")


def make_model(folder: Path) -> None:
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=64, num_attention_heads=1,
        joint_attention_dim=64, pooled_projection_dim=32, guidance_embeds=False, axes_dims_rope=(16, 24, 24),
    )  # fmt: skip
    nn.Module.to(model, torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="100KB")


def quantize(model: Path, out: Path, log: Path, arm: Callable[[], None] = lambda: None) -> tuple[int, str]:
    """`quantize_stream` in a child: (exit code, minus the signal's number; output). `log` gets a line per quantized layer."""
    output = log.with_suffix(".out")
    child = os.fork()
    if child == 0:
        target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(target, 1), os.dup2(target, 2)
        inner = stream.quantize_linear

        def counted(*args: Any, path: str, **more: Any) -> Any:
            with log.open("a") as file:
                file.write(f"{path}\n")
            return inner(*args, path=path, **more)

        stream.quantize_linear = counted  # type: ignore[attr-defined]
        source, architecture, config = open_model(model)
        plan = plan_model(source, architecture, SETTINGS)
        arm()
        code = guarded(lambda: quantize_stream(source, plan, config, out, progress=False) and 0)
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), output.read_text()


def killed_everywhere(model: Path, out: Path, log: Path) -> dict[str, Any]:
    """Kills at one call further each time until the checkpoint is complete."""
    sites: list[str] = []
    redone: list[str] = []

    def journalled() -> set[str]:
        journal = out.with_name(f".{out.name}.unfinished") / JOURNAL
        lines = journal.read_bytes().split(b"\n")[1:-1] if journal.exists() else []
        return {json.loads(line)["piece"] for line in lines}

    def arm() -> None:
        pieces = min(len(journalled()), 2)  # the later ones are alike

        def dying(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
            count = 0

            def inside(*args: Any, **more: Any) -> Any:
                nonlocal count
                count += 1
                for when in ("before", "after"):
                    if when == "after":
                        result = function(*args, **more)
                    site = f"{when} {name} {count} with {pieces} done"
                    if site not in sites and count <= (2 if name in ("pwrite", "fdatasync") else 8):
                        print(f"site: {site}", flush=True)
                        os.kill(os.getpid(), signal.SIGKILL)
                return result

            return inside

        for name in CALLS:
            setattr(os, name, dying(name, getattr(os, name)))

    while True:
        before, quantized = journalled(), len(log.read_text().splitlines()) if log.exists() else 0
        code, output = quantize(model, out, log, arm)
        redone += [path for path in log.read_text().splitlines()[quantized:] if path in before] if log.exists() else []
        if code != -signal.SIGKILL:
            break
        sites.append(output.rpartition("site: ")[2].strip())
        if out.exists() and not (out / JOURNAL).exists():
            return {"sites": sites, "redone": redone}  # killed after the very last call: nothing is left to do
    assert code == 0, output
    return {"sites": sites, "redone": redone}


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def main() -> int:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="kill9-stream-") as name:
        root = Path(name)
        make_model(root / "model")
        code, output = quantize(root / "model", root / "clean", root / "clean.log")
        assert code == 0, output
        report = killed_everywhere(root / "model", root / "killed", root / "killed.log")
        report["equal"] = bytes_of(root / "clean") == bytes_of(root / "killed")
        size = (root / "clean" / stream.WEIGHTS_NAME).stat().st_size
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

        def full() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))

        report["full"] = quantize(root / "model", root / "full", root / "full.log", full)
        report["after_full"] = quantize(root / "model", root / "full", root / "full.log")[0]
        report["equal_after_full"] = bytes_of(root / "clean") == bytes_of(root / "full")
        report["times_quantized"] = max(Counter((root / "killed.log").read_text().splitlines()).values())
        report["left"] = sorted(path.name for path in root.iterdir() if path.is_dir())
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
