"""A captured step is the eager step: losses and factors, over several shapes, pauses and offloaded inputs."""

import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from loragraft.adapters.inject import inject_adapter
from loragraft.backbones.flow import flow_loss
from loragraft.backbones.load import load_backbone
from loragraft.kernels.layout import relative_rms
from loragraft.recipes.schema import AdapterConfig
from loragraft.train.memory import set_checkpointing
from loragraft.train.step import GraphStep, graph_step

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
STEPS = 3
Batch = dict[str, torch.Tensor]


class Run:
    """`pocket` with an adapter that matters, and plain gradient descent: its steps keep the size of their rounding errors."""

    def __init__(self, cache: Path, *, offload: bool = False) -> None:
        backbone = load_backbone("pocket", "native", torch.device("cuda"), cache)
        self.model, self.dtype = backbone.transformer, backbone.dtype
        self.parameters = inject_adapter(self.model, AdapterConfig(rank=4, alpha=4), backbone.spec.lora_targets)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for factor in self.parameters[1::2]:
                factor.copy_(torch.randn(factor.shape, generator=generator) / 50)
        set_checkpointing(self.model, "block", offload=offload)
        self.optimizer = torch.optim.SGD(self.parameters, lr=0.05)

    def loss(self, tensors: Batch) -> torch.Tensor:
        text = {key: tensors[key] for key in ("prompt_embeds", "pooled_prompt_embeds")}
        return flow_loss(self.model, tensors["latents"], tensors["noise"], tensors["times"], text)

    def batch(self, step: int, edge: int = 8) -> Batch:
        config: Any = self.model.config
        generator = torch.Generator().manual_seed(step)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(2, *shape, generator=generator).to("cuda", self.dtype)

        latents = (config.in_channels // 4, edge, edge)
        return {
            "latents": draw(*latents), "noise": draw(*latents), "times": torch.tensor([0.3, 0.8], device="cuda"),
            "prompt_embeds": draw(7, config.joint_attention_dim), "pooled_prompt_embeds": draw(config.pooled_projection_dim),
        }  # fmt: skip

    def eagerly(self, tensors: Batch) -> torch.Tensor:
        loss = self.loss(tensors)
        loss.backward()
        return loss.detach()

    def go(self, add: Callable[[Batch], torch.Tensor], steps: range, *, keep: bool) -> list[float]:
        """Two micro-batches a step, of two sizes. keep: gradients are zeroed, not dropped."""
        losses = []
        for step in steps:
            losses += [float(add(self.batch(step))), float(add(self.batch(step + 100, edge=16)))]
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=not keep)
        return losses


def same(one: list[nn.Parameter], other: list[nn.Parameter], start: list[torch.Tensor]) -> None:
    """What was learned agrees to 2 %: attention's gradients are added up in no fixed order."""
    moved, expected = (torch.cat([(p - s).flatten() for p, s in zip(run, start, strict=True)]) for run in (one, other))
    assert expected.abs().max() > 1e-4
    assert relative_rms(moved, expected) < 0.02


def captured(run: Run, *, fills: bool = False) -> GraphStep:
    step = graph_step(run.model, run.loss, run.parameters)
    step.fills = fills
    return step


@pytest.mark.parametrize("offload", [False, True])
def test_a_captured_step_is_the_eager_one(offload: bool, tmp_path: Path) -> None:
    eager, other = Run(tmp_path), Run(tmp_path, offload=offload)
    start = [p.detach().clone() for p in eager.parameters]
    step = captured(other)
    expected = eager.go(eager.eagerly, range(STEPS), keep=False)
    losses = other.go(partial(step, last=True), range(STEPS), keep=True)
    assert losses == pytest.approx(expected, rel=5e-3)
    assert len(step._captured) == 2
    same(other.parameters, eager.parameters, start)
    step.close()
    assert all(getattr(m, "joined_down", None) is None for m in other.model.modules())


def test_a_paused_step_goes_on_and_holds_nothing(tmp_path: Path) -> None:
    straight, paused = Run(tmp_path), Run(tmp_path)
    start = [p.detach().clone() for p in straight.parameters]
    one, other = captured(straight), captured(paused, fills=True)
    straight.go(partial(one, last=True), range(STEPS), keep=True)
    other.joined.separate()  # type: ignore[union-attr]
    before = torch.cuda.memory_allocated()
    other.joined.join()  # type: ignore[union-attr]
    for step in range(STEPS):
        paused.go(partial(other, last=True), range(step, step + 1), keep=True)
        held = torch.cuda.memory_allocated()
        other.pause()
        gc.collect()
        assert torch.cuda.memory_allocated() < held
        assert torch.cuda.memory_allocated() <= before + 2**20  # losses and the like, in blocks of 512 bytes
        assert all(p.grad is None for p in paused.parameters)
    same(paused.parameters, straight.parameters, start)


def test_close_frees_the_graphs(tmp_path: Path) -> None:
    run = Run(tmp_path)
    before = torch.cuda.memory_allocated()
    step = captured(run)
    run.go(partial(step, last=True), range(1), keep=True)
    run.optimizer.zero_grad(set_to_none=True)
    step.close()
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() <= before + 2**20


def test_pausing_a_small_model_keeps_its_graphs(tmp_path: Path) -> None:
    run = Run(tmp_path)
    step = captured(run)
    run.go(partial(step, last=True), range(1), keep=True)
    step.pause()
    assert len(step._captured) == 2
    step.close()
