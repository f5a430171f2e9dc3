"""However a step's samples are divided, among processes and micro-batches, the step is the same; so it is with a divided base."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from loragraft.backbones.flow import flow_loss
from loragraft.train.sharding import shards_base

sys.path.insert(0, str(Path(__file__).parent))
from conftest import build_tiny_flux  # type: ignore[import-not-found]
from two_ranks import samples, steps_of  # type: ignore[import-not-found]

HERE = Path(__file__).parent


def two_ranks(folder: Path, plan: str, **environment: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(HERE / "two_ranks.py"), str(folder), plan], capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def assert_same(one: dict[str, Any], two: dict[str, Any], rel: float) -> None:
    for a, b in zip(one["metrics"], two["metrics"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=rel)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=rel)
    assert one["adapter"] == pytest.approx(two["adapter"], rel=1e-3, abs=1e-5)  # Adam divides by small second moments


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """One process, all four samples at once."""
    model, parameters = build_tiny_flux(quantized=False)
    return steps_of(Accelerator(cpu=True), model, parameters, 1, sharded=False)  # type: ignore[no-any-return]


def test_a_step_is_the_mean_over_its_samples(alone: dict[str, Any]) -> None:
    """Against autograd itself, without the loop."""
    model, parameters = build_tiny_flux(quantized=False)
    loss = flow_loss(model, *samples(0))
    gradients = torch.autograd.grad(loss, parameters)
    norm = torch.stack([g.norm() for g in gradients]).norm()
    assert alone["metrics"][0]["loss"] == pytest.approx(float(loss.detach()), rel=1e-6)
    assert alone["metrics"][0]["grad_norm"] == pytest.approx(float(norm), rel=1e-5)


def test_accumulation_is_a_larger_batch(alone: dict[str, Any]) -> None:
    for accumulation in (2, 4):
        model, parameters = build_tiny_flux(quantized=False)
        assert_same(steps_of(Accelerator(cpu=True), model, parameters, accumulation, sharded=False), alone, 1e-5)


def test_two_processes_with_and_without_accumulation(alone: dict[str, Any], tmp_path: Path) -> None:
    ranks = two_ranks(tmp_path, "plain")
    assert ranks[0] == ranks[1]
    for divided in ("2 x 1", "2 x 2"):
        assert_same(ranks[0][divided], alone, 1e-5)


def test_a_divided_int4_base_trains_to_the_same_bits(tmp_path: Path) -> None:
    ranks = two_ranks(tmp_path, "sharded", ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    for rank in ranks:
        assert rank["fsdp"] == rank["ddp"]
        assert rank["unchanged"]
        assert rank["fsdp bytes"] < 0.6 * rank["ddp bytes"]


def test_what_is_not_done_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    two: Any = SimpleNamespace(num_processes=2)
    assert not shards_base(two)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"add --fsdp_version 2"):
        shards_base(two)
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert shards_base(two)
    with pytest.raises(ValueError, match=r"this is the only one: add --num_processes"):
        shards_base(SimpleNamespace(num_processes=1))  # type: ignore[arg-type]
    monkeypatch.setenv("FSDP_ACTIVATION_CHECKPOINTING", "true")
    with pytest.raises(ValueError, match=r"train\.checkpointing=block instead"):
        shards_base(two)
