"""What `all` runs and how it is asked for; the rivals' compilation on few blocks leaves the model as it was."""

import gc
import json
import math
import sys
import time
import weakref
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel

from loragraft.adapters.inject import inject_adapter
from loragraft.backbones.architectures import FLUX
from loragraft.backbones.flow import flow_loss
from loragraft.recipes.schema import AdapterConfig

BESIDE = (
    "first_step",
    "flux_figures",
    "flux_variants",
    "frozen_linears",
    "sdnq_rehearsal",
    "side_by_side",
    "timed_alone",
    "timed_steps",
)


@pytest.fixture(scope="module")
def module(benchmark_module: Callable[..., ModuleType]) -> ModuleType:
    return benchmark_module("flux_training", BESIDE)


def options(parts: Path, **given: object) -> Namespace:
    defaults = {
        "parts": parts, "variant": [], "commit": "abc", "caches": None, "gib": 77.0, "jobs": 4, "timeout": 9.0, "deadline": math.inf,
    }  # fmt: skip
    return Namespace(**{**defaults, **given})


def test_every_variant_and_whole_run_is_in_the_plan(
    module: ModuleType, benchmark_module: Callable[..., ModuleType], tmp_path: Path
) -> None:
    whole = benchmark_module("whole_run", "timed_alone")
    assert module.EXPECTED.keys() == module.VARIANTS.keys() | whole.WHOLE_RUNS.keys()
    assert next(iter(module.EXPECTED)) == module.FIRST
    assert "ours_1024_keep_all" in list(module.EXPECTED)[:-4], "it comes before what is only compared with ours"
    jobs = {name: module.job(name, options(tmp_path)) for name in module.EXPECTED}
    assert [name for name, job in jobs.items() if job.alone] == [module.FIRST]
    assert {"--profile", "--first-step"} <= set(jobs[module.FIRST].command)
    for name, job in jobs.items():
        assert job.gib <= 77, name
        assert job.early <= job.gib, name
        assert ("--grow" in job.command) == (job.before is not None), name
        if name in module.VARIANTS and module.VARIANTS[name].cap_gib:
            assert job.gib - module.CONTEXT_GIB == module.VARIANTS[name].cap_gib
    assert Path(jobs["whole_run_512"].command[1]).name == "whole_run.py"
    assert {name for name, job in jobs.items() if job.before is not None} == {
        "bf16_compiled_1024", "bf16_compiled_1024_same_attention", "bf16_compiled_512", "fp8_compiled_1024", "sdnq_eager_1024",
    }  # fmt: skip


def test_what_is_there_is_not_run_again(
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "job", lambda name, _: module.Job(name, ("python3", "-c", "raise SystemExit(1)"), 1, 1))
    for cache in ("TRITON", "TORCHINDUCTOR"):
        monkeypatch.setenv(f"{cache}_CACHE_DIR", "put back afterwards")
    for name in ("ours_1024", "ours_512"):
        (tmp_path / f"{name}.json").write_text("{}")
    assert module.run_all(options(tmp_path, variant=["ours_512"])) == 0
    assert module.run_all(options(tmp_path, variant=["ours_512", "bf16_image"])) == 1
    told = capsys.readouterr().out
    assert "bf16_image: failed" in told
    assert "ours_512" not in told


@pytest.fixture
def stubborn(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """(code that runs before) -> every job is a process that goes on for ten minutes and is expected to take none."""
    for cache in ("TRITON", "TORCHINDUCTOR"):
        monkeypatch.setenv(f"{cache}_CACHE_DIR", "put back afterwards")

    def set_job(code: str = "") -> None:
        command = (sys.executable, "-c", f"import os, signal, time\n{code}\ntime.sleep(600)")
        monkeypatch.setattr(module, "job", lambda name, _: module.Job(name, command, 1, 0))

    return set_job


def called(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["flux_training.py", "all", "ours_512", "bf16_image", *arguments])
    code: int = module.main()
    return code


def test_the_deadline_counts_from_the_start_of_the_process(
    module: ModuleType,
    stubborn: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of 109 s, imports took 100 and the end keeps 5: what runs is ended after four seconds, table and report are there."""
    stubborn()
    started = time.time() - 100
    monkeypatch.setattr(module.psutil.Process, "create_time", lambda _: started)
    begin = time.monotonic()
    code = called(module, monkeypatch, "--parts", str(tmp_path), "--deadline", "109", "--out", str(tmp_path / "out"))
    assert time.monotonic() - begin < 60
    assert code == 1
    told = capsys.readouterr().out
    assert "the deadline: what runs is ended" in told
    assert told.count("cut short") == 4, "each in its line and in the table"
    assert json.loads((tmp_path / "out").read_text())["parts"] == {}


def test_a_signal_leaves_the_table_and_the_report(
    module: ModuleType,
    stubborn: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stubborn("os.kill(os.getppid(), signal.SIGTERM)")
    (tmp_path / "ours_1024.json").write_text(
        json.dumps({"device": "a card", "versions": {}, "commit": "abc", "peak_gib": 23.5, "first_step_seconds": 30.0})
    )
    code = called(module, monkeypatch, "--parts", str(tmp_path), "--out", str(tmp_path / "out"))
    assert code == 128 + 15
    told = capsys.readouterr().out
    assert "SIGTERM: what runs is ended" in told
    assert "how          seconds" in told
    assert json.loads((tmp_path / "out").read_text())["peak_gib_nockpt_1024"] == 23.5


def test_images_are_compared_with_those_that_were_drawn(
    module: ModuleType, benchmark_module: Callable[..., ModuleType], tmp_path: Path
) -> None:
    """Both attentions and compilation are ours; a ratio and a row of the README's table are there if the part is."""
    images = {name: variant for name, variant in module.VARIANTS.items() if variant.infer}
    assert {(v.attention, v.compiled, v.resolution) for v in images.values()} == {("flash_attn_4", True, 1024)}
    assert {variant.base for variant in images.values()} == {"int4", "bf16", "fp8", "nf4"}
    common = {"device": "a card", "versions": {}, "commit": "abc", "transformer_gib": 6.0, "peak_gib": 9.0}
    for name, seconds in (("ours_image", 2.0), ("fp8_image", 3.0)):
        times = {"image_20_steps_seconds": seconds, "image_4_steps_seconds": seconds / 4}
        (tmp_path / f"{name}.json").write_text(json.dumps({**common, **times}))
    report = module.collect(tmp_path, None)
    assert [report[f"image_20_steps_vs_{name}"] for name in ("bf16", "fp8", "nf4")] == [None, 1.5, None]
    lines = benchmark_module("readme_figures")._images(report)
    assert "ours takes 20 steps 1.50 times as fast as FP8." in lines[0]
    assert lines[4:] == [
        "| ours | 2.00 | 0.50 | 6.0 | 9.0 |",
        "| FP8 weights and activations (modulations bf16) | 3.00 | 0.75 | 6.0 | 9.0 |",
    ]


def test_the_first_variant_asks_for_empty_caches(module: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "caches" / "triton").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="ours_1024's time to the first step is that of empty caches"):
        module.run_all(options(tmp_path, caches=tmp_path / "caches"))


@pytest.mark.parametrize("beside", [None, 1])
def test_a_first_step_beside_others_is_not_reported(
    beside: int | None, module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = {"first_step_seconds": 27.0, "first_step_parts": {"phases": {}}, "step_ms": 300.0}
    monkeypatch.setattr(module, "train", lambda *_: dict(figures))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    args = options(tmp_path, beside=beside, first_step=False, grow=False, profile=False)
    module.run("ours_512", args)
    part = json.loads((tmp_path / "ours_512.json").read_text())
    assert part["step_ms"] == 300.0
    assert (part["first_step_seconds"], part.get("first_step_why")) == (
        (27.0, None) if beside is None else (None, "other variants ran beside it")
    )
    module.run("ours_512", Namespace(**{**vars(args), "first_step": True}))
    assert json.loads((tmp_path / "ours_512.json").read_text())["first_step_seconds"] == 27.0


def test_what_few_blocks_compiled_serves_a_whole_model(module: ModuleType) -> None:
    """Nothing is compiled a second time though the small model is gone, and nothing of it stays in memory."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    def step(blocks: dict[str, int]) -> "weakref.ref[torch.Tensor]":
        sizes = {"attention_head_dim": 128, "num_attention_heads": 1, "in_channels": 8, "joint_attention_dim": 16}
        model = FluxTransformer2DModel(**sizes, **blocks, pooled_projection_dim=8, guidance_embeds=False)
        parameters = inject_adapter(model, AdapterConfig(), FLUX.quantize)
        model.compile_repeated_blocks(fullgraph=True, backend=backend)
        text = {"prompt_embeds": torch.randn(1, 3, 16), "pooled_prompt_embeds": torch.randn(1, 8)}
        with torch.autocast("cpu", torch.bfloat16):
            flow_loss(model, torch.randn(1, 2, 8, 8), torch.randn(1, 2, 8, 8), torch.rand(1), text).backward()
        return weakref.ref(parameters[0])

    held = step(module.FEW_BLOCKS)
    gc.collect()
    assert held() is None
    assert (few := len(graphs)) >= 2
    step({"num_layers": 3, "num_single_layers": 4})
    assert len(graphs) == few
