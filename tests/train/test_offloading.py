"""Inputs of blocks wait on the host: the same gradients, two blocks' inputs on the device, no buffer made twice."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from loragraft.backbones.compiled import compile_blocks
from loragraft.backbones.flow import flow_loss
from loragraft.kernels.layout import relative_rms
from loragraft.train.memory import set_checkpointing
from loragraft.train.offloading import HostBuffers, Parked, offloaded_inputs


class Postponed(TorchDispatchMode):
    """Copies are put on a list instead of being done."""

    def __init__(self, later: list[Callable[[], object]]) -> None:
        super().__init__()
        self.later = later

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is torch.ops.aten.copy_.default, "the side stream copies and does nothing else"
        self.later.append(partial(func, *args))
        return args[0]


class LateBuffers(HostBuffers):
    """A side stream that does nothing until somebody waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.later: list[Callable[[], object]] = []
        self.made = 0

    @contextmanager
    def beside(self, device: torch.device) -> Iterator[None]:
        with Postponed(self.later):
            yield

    def wait(self, device: torch.device) -> None:
        for copy in self.later:
            copy()
        self.later.clear()

    def take(self, tensor: Tensor) -> Tensor:
        found = bool(self._free.get((tensor.shape, tensor.dtype)))
        self.made += not found
        return super().take(tensor).fill_(torch.nan)


def chain(buffers: HostBuffers | None, x: Tensor, blocks: int = 5) -> list[Tensor]:
    """Gradients of x and of each block's weight."""
    weights = [torch.full((4,), 1 + i / 8, requires_grad=True) for i in range(blocks)]
    out = x.clone()
    for weight in weights:
        run = partial(lambda w, h: (h * w).sin(), weight)
        if buffers is None:
            out = run(out)
        else:
            with offloaded_inputs(buffers):
                out = checkpoint(run, out, use_reentrant=False)
    return list(torch.autograd.grad(out.sum(), [x, *weights]))


def test_nothing_is_read_before_its_copy_has_arrived() -> None:
    """And a second run of the same step makes no buffer, as a captured one must not."""
    buffers, x = LateBuffers(), torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    expected = chain(None, x)
    for _ in range(2):
        for one, two in zip(chain(buffers, x), expected, strict=True):
            assert torch.equal(one, two)
    assert buffers.made == 5
    assert not buffers.later, "a captured side stream must be joined"


def test_two_blocks_inputs_are_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    parked: list[Parked] = []
    seen: list[int] = []

    def noted(self: Parked, buffers: HostBuffers) -> None:
        made(self, buffers)
        parked.append(self)

    def watched(self: Parked, place: int) -> Tensor:
        tensor = fetch(self, place)
        seen.append(1 + sum(len(p._here) for p in parked))
        return tensor

    made, fetch = Parked.__init__, Parked.fetch
    monkeypatch.setattr(Parked, "__init__", noted)
    monkeypatch.setattr(Parked, "fetch", watched)
    chain(HostBuffers(), torch.ones(1, 3, 4, requires_grad=True))
    assert seen == [2, 2, 2, 2, 1], "this block's and that of the next one in the backward pass"


@pytest.mark.parametrize("frozen", [range(2), range(3, 5), range(5)])
def test_the_side_stream_is_joined_where_no_gradient_passes(frozen: range) -> None:
    """A captured side stream that nobody waits for breaks the capture."""
    buffers, out = LateBuffers(), torch.ones(1, 3, 4)
    weights = [torch.ones(4, requires_grad=number not in frozen) for number in range(5)]
    for weight in weights:
        with offloaded_inputs(buffers):
            out = checkpoint(
                partial(lambda w, h: (h.detach() if w is weights[3] else h) * w, weight), out, use_reentrant=False
            )
    if out.requires_grad:
        out.sum().backward()
    del out
    assert not buffers.later


def test_compiled_blocks_are_not_compiled_again(two_ranks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """For what has been on the host: two kinds of block are two graphs."""
    monkeypatch.setattr("loragraft.train.memory._check_offload", lambda device: None)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model, parameters = two_ranks.build_tiny_flux()
    set_checkpointing(model, "block", offload=True)
    compile_blocks(model)
    text = {"prompt_embeds": torch.ones(1, 5, 64), "pooled_prompt_embeds": torch.ones(1, 32)}
    torch._dynamo.reset()
    counters.clear()
    for _ in range(2):
        loss = flow_loss(model, torch.ones(1, 4, 8, 8), torch.zeros(1, 4, 8, 8), torch.ones(1) / 2, text)
        torch.autograd.grad(loss, parameters)
    assert counters["stats"]["unique_graphs"] == 2


def test_a_layout_comes_back_as_it_was() -> None:
    """Compiled blocks are compiled again for inputs with other strides, even of an axis of one."""
    whole = torch.arange(24.0).view(1, 6, 4)
    for tensor in (whole[:, 2:], torch.arange(48.0).view(2, 6, 4)[:, 2:]):
        buffers = HostBuffers()
        first = Parked(buffers)
        place = first.park(tensor)
        Parked(buffers).park(whole)
        assert not first._here
        back = first.fetch(place)
        assert torch.equal(back, tensor)
        assert back.stride() == (tensor.stride() if len(tensor) == 1 else (16, 4, 1))


def test_what_was_left_behind_is_not_waited_for() -> None:
    """A forward pass without a backward pass, then a whole step."""
    buffers, x = HostBuffers(), torch.ones(1, 3, 4, requires_grad=True)
    with offloaded_inputs(buffers):
        checkpoint(torch.sin, x * 1, use_reentrant=False)
    assert torch.equal(chain(buffers, x)[0], chain(None, x)[0])
    kept = Parked(buffers)
    kept.park(torch.ones(1, 2, 2))
    kept._captured = True  # as if it had been parked by a graph
    after = Parked(buffers)
    after.park(torch.ones(1, 2, 2))
    assert kept._here, "a stream outside of a graph cannot be waited for inside of it"


def step(model: nn.Module, parameters: list[nn.Parameter], loss_of: Callable[..., Tensor]) -> list[Tensor]:
    """[loss, every gradient]."""
    loss = loss_of(model)
    return [loss.detach(), *torch.autograd.grad(loss, parameters)]


def test_only_the_inputs_of_blocks_are_moved(tiny_flux: Any, loss_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, parameters = tiny_flux()
    plain, moved = step(model, parameters, loss_of), []

    def counted(buffers: HostBuffers) -> saved_tensors_hooks:
        hooks = offloaded_inputs(buffers)

        def pack(tensor: Tensor) -> Any:
            packed = hooks.pack_hook(tensor)
            if not isinstance(packed, Tensor):
                moved.append(tuple(tensor.shape))
            return packed

        return saved_tensors_hooks(pack, hooks.unpack_hook)

    monkeypatch.setattr("loragraft.train.memory.offloaded_inputs", counted)
    monkeypatch.setattr("loragraft.train.memory._check_offload", lambda device: None)  # host to host here
    set_checkpointing(model, "block", offload=True)
    for one, two in zip(plain, step(model, parameters, loss_of), strict=True):
        assert torch.equal(one, two)
    assert sorted(moved) == sorted([(2, 16, 128), (2, 5, 128)] * 4)


@pytest.mark.gpu
def test_offloading_gives_the_same_gradients_in_less_memory(tiny_flux: Any, loss_of: Any) -> None:
    model, parameters = tiny_flux(torch.bfloat16, device="cuda")
    seen = []
    for offload in (False, True):
        set_checkpointing(model, "block", offload=offload)
        before = torch.cuda.memory_allocated()
        loss = loss_of(model, torch.bfloat16, "cuda")
        seen.append((torch.cuda.memory_allocated() - before, torch.autograd.grad(loss, parameters)))
    assert seen[1][0] < seen[0][0]
    for one, two in zip(seen[0][1], seen[1][1], strict=True):
        assert relative_rms(one, two) < 1e-2  # flash's backward is not deterministic
