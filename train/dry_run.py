"""A step without data, weights or a GPU: the true code on fake tensors, every storage counted as the GPU's allocator would.

    run = dry_train(model, loss, optimizer)          forward, loss, backward, clipping, optimizer: the second step of a run
    run = dry_infer(model, call)                     one pass without gradients

A fake tensor has a shape, a dtype and a device, and no bytes; the ops' registered fake implementations say what comes out of
each. Storages are followed from the op that makes them to their release, through `allocator.CachingAllocator`. What an op
takes for itself while it runs is invisible here: `op_cost.workspace` adds it by formula.

Fake tensors lie on the CPU, so that no GPU is needed. Where a CPU would take another path than a GPU, the GPU's is put in
its place: one kernel for RMS norms (`gpu_paths`), one kernel for the whole optimizer step (the caller's `fused=True`).
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loragraft.quantization.branched import BranchedLinear
from loragraft.train.allocator import MIB, Block, CachingAllocator
from loragraft.train.fusion import Fusion
from loragraft.train.gathered import GatheredGradients
from loragraft.train.op_cost import OpCost, cost_of, nbytes_of, workspace

KINDS = ("INT4 weights", "16-bit weights", "adapter", "gradients", "optimizer", "activations", "workspace")
"""What memory holds. Activations: made by the forward pass and alive, until the backward pass lets go of them. Workspace: made
in the backward pass or the optimizer and neither a gradient nor a state, blocks computed again included."""
JOINED = ("joined_down", "joined_up")
"""Buffers that hold the base's branch beside a 16-bit copy of the adapter (`adapters.joined`): they count as INT4 weights."""
LIBRARY_WORKSPACE = 32 * MIB
"""What cuBLAS takes per thread and stream that call it, on sm_90; the backward pass has a thread of its own. A captured step runs on
one stream, before its capture and in it."""


@dataclass(frozen=True)
class DryRun:
    """What one step or pass takes, as a GPU would count it. Bytes."""

    peak: int
    """`torch.cuda.max_memory_allocated`."""
    reserved: int
    """`torch.cuda.max_memory_reserved`, if nothing presses; the allocator gives unused segments back before it fails."""
    at_peak: dict[str, int]
    """Kind (`KINDS`) -> bytes allocated at the peak."""
    static: int
    """What stays between steps: weights, adapter, optimizer."""
    library: int
    """What the matrix library keeps, beside `static`."""
    saved: int
    """Activations alive at the end of the (first) forward pass: what autograd keeps, the batch and the loss."""
    saved_by: dict[str, int]
    """Op -> bytes of `saved` that it made, largest first."""
    ops: dict[str, dict[OpCost, int]] = field(repr=False)
    """Phase (forward, backward, optimizer) -> op -> how often it runs."""
    unknown: tuple[str, ...] = ()
    """Ops of this project whose workspace and time no formula covers; their inputs and outputs are counted."""
    fused: dict[str, dict[OpCost, int]] = field(default_factory=dict, repr=False)
    """`ops` as a compiler leaves them (`fusion`)."""

    def counted(self, compiled: bool = False) -> Iterator[tuple[OpCost, int]]:
        """Every op of all phases with how often it runs, as written or as `compiled`."""
        for counts in (self.fused if compiled else self.ops).values():
            yield from counts.items()


def dry_train(
    model: nn.Module,
    loss: Callable[[], Tensor],
    optimizer: Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer],
    *,
    accumulation: int = 1,
    max_grad_norm: float = 1.0,
    captured: bool = False,
    expandable: bool = False,
) -> DryRun:
    """One optimizer step of `model`, whose values may be on meta and are fake from here on.

    captured: as `step.GraphStep` does it, gradients stay between steps. `max_memory_allocated` shows this peak if a step was captured
    when the optimizer had its states already (a resumed run, one that validated); a replay's memory counts as reserved alone.

    loss: makes a batch (of fake tensors, since it is called where all are) and returns the scalar. Trained is what requires
    a gradient. Raises ValueError if nothing does.
    """
    with _dry(model, expandable) as tracker:
        parameters = [p for p in model.parameters() if p.requires_grad]
        if not parameters:
            raise ValueError("nothing in the model requires a gradient: inject an adapter before the dry run")
        tracker.library_threads(2)
        chosen = optimizer(parameters)
        _prime(chosen, parameters, tracker)
        if captured:
            _gradients(parameters, tracker)
        handles = [p.register_post_accumulate_grad_hook(tracker.is_gradient) for p in parameters]
        for _ in range(accumulation):
            tracker.phase, tracker.kind = "forward", "activations"
            value = loss()
            tracker.note_saved()
            tracker.phase, tracker.kind = "backward", "workspace"
            with GatheredGradients(parameters) if captured else nullcontext():
                torch.autograd.backward(value)
            del value
        tracker.phase = "optimizer"
        if max_grad_norm:
            nn.utils.clip_grad_norm_(parameters, max_grad_norm, foreach=True)
        chosen.step()
        chosen.zero_grad(set_to_none=not captured)
        for handle in handles:
            handle.remove()
        return tracker.result()


def dry_infer(model: nn.Module, call: Callable[[], object], *, expandable: bool = False) -> DryRun:
    """One pass of `model`, whose values may be on meta and are fake from here on; `call` makes its inputs."""
    with _dry(model, expandable) as tracker, torch.no_grad():
        tracker.library_threads(1)
        tracker.phase, tracker.kind = "forward", "activations"
        call()
        return tracker.result()


@contextmanager
def _dry(model: nn.Module, expandable: bool) -> Iterator["StorageTracker"]:
    mode = FakeTensorMode()
    tracker = StorageTracker(expandable)
    with mode, gpu_paths(), tracker:
        swap_tensors(model, tracker)
        yield tracker


def _prime(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], tracker: "StorageTracker") -> None:
    """Optimizer states are there from the second step on: makes them by a step on gradients of zero."""
    tracker.phase, tracker.kind = "", "optimizer"
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    tracker.allocator.peak_allocated, tracker.allocator.peak_reserved = 0, tracker.allocator.reserved


def _gradients(parameters: Sequence[nn.Parameter], tracker: "StorageTracker") -> None:
    """Gradients that are there already."""
    tracker.kind = "gradients"
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)


def swap_tensors(model: nn.Module, tracker: "StorageTracker | None" = None) -> None:
    """Every parameter and buffer of `model` for a new one of its shape and dtype on the CPU; under FakeTensorMode, fake ones.

    Tensors that share a storage (tied weights, views) share the new one.
    """
    storages: dict[int, Tensor] = {}
    replaced: dict[int, Tensor] = {}
    replacing: list[Tensor] = []  # alive until the end: their addresses are keys
    for module in model.modules():
        quantized = isinstance(module, BranchedLinear)
        for owned in (module._parameters, module._buffers):
            for name, old in list(owned.items()):
                if old is None:
                    continue
                if tracker is not None:
                    frozen = "INT4 weights" if quantized or name in JOINED else "16-bit weights"
                    tracker.kind = "adapter" if old.requires_grad else frozen
                if id(old) not in replaced:
                    replaced[id(old)] = _renewed(old, storages)
                    replacing.append(old)
                owned[name] = replaced[id(old)]  # type: ignore[assignment]


def _renewed(old: Tensor, storages: dict[int, Tensor]) -> Tensor:
    storage = old.untyped_storage()
    if storage._cdata not in storages:
        storages[storage._cdata] = torch.empty(storage.nbytes() // old.dtype.itemsize, dtype=old.dtype, device="cpu")
    whole = storages[storage._cdata]
    with torch.no_grad():
        new = whole.as_strided(old.shape, old.stride(), old.storage_offset())
    return nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new


class StorageTracker(TorchDispatchMode):
    """Counts the storages that ops make, and the ops. `kind` and `phase` say what it is that runs."""

    def __init__(self, expandable: bool = False) -> None:
        super().__init__()
        self.allocator = CachingAllocator(expandable=expandable)
        self.kind, self.phase = "activations", ""
        self.live: Counter[str] = Counter()
        self.at_peak: dict[str, int] = {}
        self.ops: dict[str, Counter[OpCost]] = {}
        self.fusion = Fusion()
        self.unknown: set[str] = set()
        self.library = self.saved = 0
        self.saved_by: dict[str, int] = {}
        self._storages: dict[int, tuple[Block | None, str, str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.prim.device.default:
            return out
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        fresh = [result for result in results if self._follow(result, func._schema.name)]
        if self.phase and (fresh or func._schema.is_mutable):
            cost = cost_of(func, args, kwargs or {}, results)
            self.ops.setdefault(self.phase, Counter())[cost] += 1
            self._fuse(cost, (args, kwargs), results)
            if not cost.modelled:
                self.unknown.add(cost.name)
            self._passing(workspace(func, args, results))
        return out

    def _fuse(self, cost: OpCost, arguments: object, results: Sequence[Tensor]) -> None:
        fuses = self.phase != "optimizer" and (cost.fusible or not cost.parts)
        read = [(_key(leaf), nbytes_of(leaf)) for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
        self.fusion.op(self.phase, cost, read, map(_key, results), fuses=fuses)

    def library_threads(self, count: int) -> None:
        """Allocates what the matrix library keeps for each of `count` threads and their streams."""
        for _ in range(count):
            self._take(LIBRARY_WORKSPACE, "workspace")
            self.library += LIBRARY_WORKSPACE

    def is_gradient(self, parameter: Tensor) -> None:
        """A hook for `register_post_accumulate_grad_hook`."""
        assert parameter.grad is not None
        key = parameter.grad.untyped_storage()._cdata
        block, kind, maker = self._storages[key]
        size = 0 if block is None else block.size
        self.live[kind] -= size
        self.live["gradients"] += size
        self._storages[key] = block, "gradients", maker

    def note_saved(self) -> None:
        """Remembers what is alive at the end of the first forward pass."""
        if self.saved:
            return
        self.saved = self.live["activations"]
        makers: Counter[str] = Counter()
        for block, kind, maker in self._storages.values():
            if kind == "activations" and block is not None:
                makers[maker] += block.size
        self.saved_by = dict(makers.most_common())

    def result(self) -> DryRun:
        """The figures so far."""
        self.fusion.close(self.phase)
        static = sum(self.live[kind] for kind in ("INT4 weights", "16-bit weights", "adapter", "optimizer"))
        return DryRun(
            peak=self.allocator.peak_allocated,
            reserved=self.allocator.peak_reserved,
            at_peak={kind: self.at_peak.get(kind, 0) for kind in KINDS},
            static=static,
            library=self.library,
            saved=self.saved,
            saved_by=self.saved_by,
            ops={phase: dict(counts) for phase, counts in self.ops.items()},
            unknown=tuple(sorted(self.unknown)),
            fused={phase: dict(counts) for phase, counts in self.fusion.ops.items()},
        )

    def _follow(self, tensor: Tensor, maker: str) -> bool:
        """Whether the tensor's storage is new; from here on it is counted until it dies."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return False
        self._storages[key] = self._take(storage.nbytes(), self.kind), self.kind, maker
        weakref.finalize(storage, self._dies, key).atexit = False
        return True

    def _dies(self, key: int) -> None:
        block, kind, _ = self._storages.pop(key)
        self.fusion.dies(key)
        if block is not None:
            self.live[kind] -= block.size
            self.allocator.release(block)

    def _take(self, nbytes: int, kind: str) -> Block | None:
        before = self.allocator.peak_allocated
        block = self.allocator.allocate(nbytes)
        if block is not None:
            self.live[kind] += block.size
            if self.allocator.peak_allocated > before:
                self.at_peak = dict(self.live)
        return block

    def _passing(self, sizes: Iterable[int]) -> None:
        """Memory that an op holds while it runs."""
        blocks = [self._take(size, "workspace") for size in sizes]
        for block in blocks:
            if block is not None:
                self.live["workspace"] -= block.size
                self.allocator.release(block)


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@torch.library.custom_op("loragraft::dry_rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    raise NotImplementedError("stands for torch's RMS norm on fake tensors only")


@_rms_norm.register_fake
def _(x, weight, eps):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@torch.library.custom_op("loragraft::dry_rms_norm_backward", mutates_args=())
def _rms_norm_backward(dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor | None) -> Tensor:
    raise NotImplementedError("stands for torch's RMS norm on fake tensors only")


@_rms_norm_backward.register_fake
def _(dy, x, rstd, weight):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[0], output[1], inputs[1])
    ctx.set_materialize_grads(False)


def _rms_norm_grad(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
    x, rstd, weight = ctx.saved_tensors
    dweight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
    return _rms_norm_backward(dy, x, rstd, weight), dweight, None


_rms_norm.register_autograd(_rms_norm_grad, setup_context=_keep)


def _as_one_op(input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    normed: Tensor = _rms_norm(input, weight, eps or 0.0)[0]
    return normed


@contextmanager
def gpu_paths() -> Iterator[None]:
    """Within it RMS norms are one op that keeps x and a factor per row, as on a GPU, not their decomposition in float32."""
    # Not a TorchFunctionMode: blocks computed again in the backward pass would run outside it.
    with mock.patch.object(torch.nn.functional, "rms_norm", _as_one_op):
        yield
