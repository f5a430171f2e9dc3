"""The benchmark of two GPUs: the idle share is what the kernels say, and the whole line runs in two processes of a CPU."""

import json
import os
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
import torch

from loragraft.data.order import BatchOrder

ROOT = Path(__file__).parents[2]
TINY = ("--base", "pocket", "--edge", "64", "--images", "12", "--captions", "3", "--batch", "1", "--cpu")


@pytest.fixture(scope="module")
def gpu_timeline(benchmark_module: Callable[..., ModuleType]) -> ModuleType:
    return benchmark_module("gpu_timeline")


@pytest.fixture(scope="module")
def multi_gpu(benchmark_module: Callable[..., ModuleType]) -> ModuleType:
    return benchmark_module("multi_gpu", ("cached_images", "gpu_timeline", "multi_gpu_part"))


def test_idle_is_what_no_stream_covers(gpu_timeline: ModuleType) -> None:
    """Two whole steps of 10 ms: 8 and 9 ms covered, one kernel inside another, one across the end of its predecessor."""
    span = gpu_timeline.Span
    spans = [
        span("before", -3.0, -1.0), span("FusedAdam", 0.0, 1.0), span("FusedAdam", 1.2, 2.0), span("gemm", 2.0, 6.0),
        span("inside", 3.0, 4.0), span("Memcpy HtoD (Pinned -> Device)", 6.0, 8.0), span("gemm", 8.0, 10.0),
        span("FusedAdam", 10.0, 12.0), span("gemm", 12.005, 15.0), span("across", 14.0, 18.99),
        span("FusedAdam", 20.0, 21.0), span("after", 21.0, 29.0),
    ]  # fmt: skip
    seen = gpu_timeline.timeline(spans)
    assert (seen.steps, seen.kernels) == (2, 8)
    assert seen.window_ms == pytest.approx(20.0)
    assert seen.busy_ms == pytest.approx(20.0 - 0.2 - 2.0 - 0.005 - 1.01)
    assert seen.stalls_ms == pytest.approx(0.2 + 2.0 + 1.01)
    assert seen.longest_gap_ms == pytest.approx(2.0)
    assert seen.idle_share == pytest.approx(3.215 / 20)
    assert seen.stall_share == pytest.approx(3.21 / 20)


def test_a_profile_without_a_whole_step_is_refused(gpu_timeline: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"holds 1 ends of steps among 2 kernels"):
        gpu_timeline.timeline([gpu_timeline.Span("FusedAdam", 0.0, 1.0), gpu_timeline.Span("gemm", 1.0, 2.0)])


def test_cached_images_are_the_caches_own(benchmark_module: Callable[..., ModuleType], tmp_path: Path) -> None:
    """Written once, whole by the cache's own check, of the sizes that the formats ask for."""
    images = benchmark_module("cached_images").CachedImages(tmp_path, "pocket", 128, images=9, captions=2)
    images.write()
    files = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    images.write()
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")} == files
    cache = images.open()
    keys = [entry.key for entry in cache.entries]
    assert cache.store.verify(keys) == set(keys)
    train = cache.split("train")
    assert len(train) == 9
    assert len(BatchOrder(train.shapes, 2, 0).buckets) == 4
    for index, (height, width) in enumerate(train.shapes):
        item = train.item(index, 0)
        assert item["latents"].shape == (16, height // 8, width // 8)  # type: ignore[union-attr]
        assert item["prompt_embeds"].shape == cache.empty["prompt_embeds"].shape  # type: ignore[union-attr]
        assert isinstance(item["latents"], torch.Tensor) and bool(item["latents"].isfinite().all())


def test_different_adapters_are_no_result(multi_gpu: ModuleType, tmp_path: Path) -> None:
    args = Namespace(work=tmp_path, parts=tmp_path / "parts")
    ranks: list[dict[str, Any]] = [
        {"adapter": name, "losses": [1.0], "peak_gib": 1.0, "held_gib": 2.0, "images_per_second": 19.0}
        for name in "aab"
    ]
    for first, second in ((0, 1), (0, 2)):
        for rank, found in enumerate((ranks[first], ranks[second])):
            (tmp_path / f"ddp_2.rank{rank}.json").write_text(json.dumps(found))
        if second == 2:
            with pytest.raises(ValueError, match="the two processes hold different adapters"):
                multi_gpu.merge(args, "two")
            continue
        multi_gpu.merge(args, "two")
        assert json.loads((args.parts / "ddp_2.json").read_text())["ddp2_scaling"] is None
        (args.parts / "ddp_1.json").write_text('{"images_per_second": 10.0}')
        multi_gpu.merge(args, "two")
        assert json.loads((args.parts / "ddp_2.json").read_text())["ddp2_scaling"] == 1.9


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "multi_gpu.py"), "all", *TINY, *options]
    command += ["--parts", str(folder / "parts"), "--work", str(folder / "work")]
    return subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False, env=dict(os.environ))


@pytest.mark.slow
def test_two_processes_hold_one_adapter(tmp_path: Path) -> None:
    done = run(tmp_path, "--only", "two", "--steps", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "parts" / "ddp_2.json").read_text())
    assert found["processes"] == 2
    assert found["steps_timed"] == 3
    assert found["images_per_second"] == pytest.approx(2000 / found["step_ms"])
    assert found["ddp2_scaling"] is None  # nothing to compare with


def test_a_failed_part_says_so_and_is_counted(
    multi_gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it left before it failed is shown all the same."""
    log = tmp_path / "one.log"
    log.write_text("RuntimeError: no room")
    args = Namespace(work=tmp_path, parts=tmp_path / "parts")
    args.parts.mkdir()
    (args.parts / "ddp_1.json").write_text('{"images_per_second": 10.0}')
    running = Namespace(what="one", log=log, wait=lambda: "exit code 1")
    assert multi_gpu._finish(args, running, 0.0) is True
    assert (args.parts / "ddp_1.failed.txt").read_text() == "exit code 1\nRuntimeError: no room"
    said = capsys.readouterr().out
    assert "one: exit code 1" in said
    assert 'ddp_1: {"images_per_second": 10.0}' in said


def test_a_part_that_hangs_is_ended_with_what_it_started(
    multi_gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It hears no signal but the last, and its worker has a session of its own, as torchrun's have."""
    script = f"trap '' USR1; setsid sleep 600 & echo $! > {tmp_path / 'pid'}; sleep 600"
    monkeypatch.setattr(multi_gpu.Running, "_command", lambda *_: ["sh", "-c", script])
    args = Namespace(work=tmp_path, cpu=True, patience=3 / multi_gpu.LIMITS["two"])
    running = multi_gpu.Running(args, "two", None)
    assert running.wait() == "not done after 3 s"
    assert running.process.poll() == -signal.SIGKILL
    child = int((tmp_path / "pid").read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_the_report_takes_these_parts(benchmark_module: Callable[..., ModuleType], tmp_path: Path) -> None:
    report = benchmark_module("flux_figures")
    about = {"device": "H200", "versions": {"torch": "2.11"}, "commit": "abc"}
    (tmp_path / "ddp_2.json").write_text(json.dumps({**about, "ddp2_scaling": 1.95}))
    found = report.collect(tmp_path, None)
    assert (found["ddp2_scaling"], found["gpu_idle_share"], found["fsdp_held_share"]) == (1.95, None, None)
    (tmp_path / "idle.json").write_text(json.dumps({**about, "idle_share": 0.012}))
    (tmp_path / "fsdp.json").write_text(json.dumps({**about, "held_gib": [3.25, 3.5], "held_gib_whole": 7.0}))
    found = report.collect(tmp_path, None)
    assert (found["ddp2_scaling"], found["gpu_idle_share"], found["fsdp_held_share"]) == (1.95, 0.012, 0.5)
    assert found["preflight_worst_pct"] is None
    (tmp_path / "of_preflight").write_text('{"preflight_worst_pct": 4.2}')
    assert report.collect(tmp_path, None, tmp_path / "of_preflight")["preflight_worst_pct"] == 4.2
