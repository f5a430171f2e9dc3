"""However a step's samples are divided, among processes and micro-batches, the step is the same; so it is with a divided base."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.distributed.fsdp._fully_shard import _fsdp_param

from loragraft.backbones.flow import flow_loss
from loragraft.recipes.schema import TrainConfig
from loragraft.train.sharding import check_sharding, integers_as_parts, shards_base
from loragraft.train.step import EagerStep, captures, choose_step


def assert_same(one: dict[str, Any], two: dict[str, Any], rel: float) -> None:
    for a, b in zip(one["metrics"], two["metrics"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=rel)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=rel)
    assert one["adapter"] == pytest.approx(two["adapter"], rel=1e-3, abs=1e-5)  # Adam divides by small second moments


@pytest.fixture(scope="module")
def alone(two_ranks: ModuleType) -> dict[str, Any]:
    """One process, all four samples at once."""
    model, parameters = two_ranks.build_tiny_flux(quantized=False)
    return two_ranks.steps_of(Accelerator(cpu=True), model, parameters, 1, wrapped=True)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes (gloo, CPU) found."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {"ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    script = Path(__file__).with_name("two_ranks.py")
    done = subprocess.run(
        [*command, str(script), str(folder)], capture_output=True, text=True, timeout=1200, check=False,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def test_a_step_is_the_mean_over_its_samples(alone: dict[str, Any], two_ranks: ModuleType) -> None:
    """Against autograd itself, without the loop."""
    model, parameters = two_ranks.build_tiny_flux(quantized=False)
    loss = flow_loss(model, *two_ranks.samples(0))
    gradients = torch.autograd.grad(loss, parameters)
    norm = torch.stack([g.norm() for g in gradients]).norm()
    assert alone["metrics"][0]["loss"] == pytest.approx(float(loss.detach()), rel=1e-6)
    assert alone["metrics"][0]["grad_norm"] == pytest.approx(float(norm), rel=1e-5)


def test_accumulation_is_a_larger_batch(alone: dict[str, Any], two_ranks: ModuleType) -> None:
    for accumulation in (2, 4):
        model, parameters = two_ranks.build_tiny_flux(quantized=False)
        steps = two_ranks.steps_of(Accelerator(cpu=True), model, parameters, accumulation, wrapped=True)
        assert_same(steps, alone, 1e-5)


@pytest.mark.slow
def test_two_processes_with_and_without_accumulation(alone: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
    for divided in ("2 x 1", "2 x 2"):
        assert ranks[0][divided] == ranks[1][divided]
        assert_same(ranks[0][divided], alone, 1e-5)


@pytest.mark.slow
def test_gradients_averaged_after_the_step_are_ddps(ranks: list[dict[str, Any]]) -> None:
    """As CUDA graphs need it, and the divided base."""
    for rank in ranks:
        assert rank["averaged"] == rank["ddp"]


@pytest.mark.slow
def test_a_divided_int4_base_trains_to_the_same_bits(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["fsdp none"] == rank["fsdp block"] == rank["ddp"]
        assert rank["unchanged"]
        assert rank["fsdp bytes"] < 0.6 * rank["ddp bytes"]


def test_integers_become_parts_on_torch_2_11() -> None:
    """As its `fully_shard` makes them: with a gradient by default, which floats have and integers cannot."""
    codes, scale = torch.zeros(2, 2, dtype=torch.uint8), torch.zeros(2)
    before = _fsdp_param.nn
    with pytest.raises(RuntimeError, match="floating point"):
        before.Parameter(codes)
    with integers_as_parts():
        assert not _fsdp_param.nn.Parameter(codes).requires_grad
        assert _fsdp_param.nn.Parameter(scale).requires_grad
        assert not _fsdp_param.nn.Parameter(scale, requires_grad=False).requires_grad
        assert isinstance(torch.nn.Linear(2, 2), _fsdp_param.nn.Module)
    assert _fsdp_param.nn is before


def test_what_is_not_done_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    two: Any = SimpleNamespace(num_processes=2)
    check_sharding(two, TrainConfig())
    assert not shards_base()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"add --fsdp_version 2"):
        check_sharding(two, TrainConfig())
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")  # as `accelerate launch` sets it
    check_sharding(two, TrainConfig())
    assert shards_base()
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
    with pytest.raises(ValueError, match=r"this is the only one: add --num_processes"):
        check_sharding(SimpleNamespace(num_processes=1), TrainConfig())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"a divided base runs uncompiled"):
        check_sharding(two, TrainConfig(compile="always"))
    on_gpu: Any = SimpleNamespace(device=torch.device("cuda"), num_processes=2)
    assert not captures(TrainConfig(), on_gpu)
    large = SimpleNamespace(parameters=lambda: [torch.empty(10**9, device="meta")], buffers=list)
    on_gpu.unwrap_model = lambda _: pytest.fail("the gathering of a divided base cannot be compiled")
    assert isinstance(choose_step(TrainConfig(), on_gpu, large, [], lambda _: torch.zeros(())), EagerStep)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"cuda_graph=always cannot capture .*--use_fsdp.*: leave it at auto"):
        captures(TrainConfig(cuda_graph="always"), on_gpu)
    monkeypatch.setenv("FSDP_ACTIVATION_CHECKPOINTING", "true")
    with pytest.raises(ValueError, match=r"train\.checkpointing=block instead"):
        check_sharding(two, TrainConfig())
