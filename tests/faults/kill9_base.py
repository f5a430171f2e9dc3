"""Kills the quantizing of a base on first use before every flush and around every rename; then lets it end.

    python tests/faults/kill9_base.py

A FLUX transformer of one double and one single block takes the place of `pocket`'s, with `pocket`'s own encoders and
calibration. Prints JSON: where it was killed, and what a disk that is full, a damaged and a foreign file lead to.
"""

import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: a forked child must not meet a thread pool of its parent

import torch
from diffusers import FluxTransformer2DModel

from loragraft.backbones import load
from loragraft.backbones.load import load_backbone
from loragraft.backbones.pocket import SPEC
from loragraft.outcome import guarded
from loragraft.quantization.settings import QuantSettings
from loragraft.quantization.tensor_file import read_tensors


def small_spec(folder: Path) -> Any:
    """`pocket` with a transformer that quantizes in a second, and no ready-made checkpoint."""
    torch.manual_seed(0)
    FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=64, num_attention_heads=2,
        joint_attention_dim=384, pooled_projection_dim=384, guidance_embeds=False, axes_dims_rope=(16, 24, 24),
    ).to(torch.bfloat16).save_pretrained(folder)  # fmt: skip
    encoders = SPEC.load_encoders(torch.device("cpu"), torch.float32)
    return replace(
        SPEC, name="small", transformer_16bit=folder, transformer_int4={}, calibration_prompts=("a disc",),
        load_encoders=lambda *_: encoders,
    )  # fmt: skip


def quick_settings(**given: Any) -> QuantSettings:
    """Without the search for the best smoothing, which is most of the time and writes nothing."""
    quick = {"smoothing": "weight", "rank": 4, "iterations": 1, "grid": 1} if given["numerics"] == "w4a8" else {}
    return QuantSettings(**{**given, **quick})


def quantize(cache: Path, arm: Callable[[], None] = lambda: None) -> tuple[int, str]:
    """`load_backbone` in a child: (exit code, minus the signal's number; output)."""
    log = cache / "log"
    child = os.fork()
    if child == 0:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1), os.dup2(output, 2)
        arm()
        code = guarded(lambda: load_backbone("small", "native", "cpu", cache) and 0)
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), log.read_text()


def killed_everywhere(cache: Path, spec: Any) -> list[str]:
    """Kills before every fsync and around every rename until nothing is left to kill."""
    sites: list[str] = []

    def arm() -> None:
        count, fsync = 0, os.fsync

        def die_at(site: str) -> None:
            if site not in sites:
                print(f"site: {site}", flush=True)
                os.kill(os.getpid(), signal.SIGKILL)

        def dying(function: Callable[..., Any]) -> Callable[..., Any]:
            def inside(*args: Any) -> Any:
                nonlocal count
                count += 1
                die_at(f"before {function.__name__} {count}")
                result = function(*args)
                if function is not fsync:  # the next site comes right after it
                    die_at(f"after {function.__name__} {count}")
                return result

            return inside

        os.fsync, os.replace = dying(os.fsync), dying(os.replace)

    while (ended := quantize(cache, arm))[0] == -signal.SIGKILL:
        sites.append(ended[1].rpartition("site: ")[2].strip())
        for folder in (cache / "bases").glob("[!.]*"):
            load.load_quantized(folder, spec.transformer_class)  # what is visible is whole
    assert ended[0] == 0, ended[1]
    return sites


def main() -> int:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="kill9-base-") as name:
        root = Path(name)
        spec = small_spec(root / "small")
        load.find_spec = lambda _: spec
        load.QuantSettings = quick_settings
        for folder in ("clean", "killed", "full"):
            (root / folder).mkdir()
        assert quantize(root / "clean")[0] == 0
        report: dict[str, Any] = {"sites": killed_everywhere(root / "killed", spec)}
        files = [next((root / folder / "bases").glob("[!.]*/*.safetensors")) for folder in ("clean", "killed")]
        clean, killed = (read_tensors(file)[0] for file in files)
        report["equal"] = clean.keys() == killed.keys() and all(torch.equal(clean[key], killed[key]) for key in clean)
        files[1].write_bytes(files[1].read_bytes()[:-100])
        report["damaged"] = quantize(root / "killed")
        report["full"] = quantize(root / "full", lambda: limit_files(100_000))
        report["left_by_full"] = [path.name for path in (root / "full" / "bases").iterdir()]
        report["after_full"] = quantize(root / "full")[0]
    print(json.dumps(report))
    return 0


def limit_files(count: int) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (count, count))


if __name__ == "__main__":
    sys.exit(main())
