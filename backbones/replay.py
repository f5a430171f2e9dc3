"""A denoiser's forward pass, replayed from CUDA graphs while pictures are drawn.

A GPU is done with a pass of four-bit layers before Python has launched the next. So of each kind of call the first runs as it is,
the second is captured, and later ones are replays: the same kernels on the same arguments, hence the same bits. Arguments are
copied to lie densely; a broadcast view may take another kernel when launched.

A kind of call is
    its arguments   structure, shapes and dtypes of tensors, values of all else: batch, resolution, text, guidance
    its model       where every tensor lies, which blocks are compiled, which attention they run

A graph reads the model's tensors where they lay at its capture. Adapters that are switched or re-weighted in place
(`adapters.resident`) therefore keep it; a tensor that lies elsewhere (a graft, a wider branch) makes another kind; and once the
former tensors are back, so is their graph. A change of Python numbers alone, such as PEFT's scaling of an injected adapter, is
not seen: `clear` first. Source: CUDA C++ programming guide, "CUDA graphs".
"""

import contextlib
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

MOST_GRAPHS = 8
"""Kinds of call that are remembered; the one that was used longest ago goes first."""
ROOM = 0.75
"""Graphs are made where this share of the model's own bytes is free besides: they keep a pass's activations from the decoder."""


@dataclass(frozen=True)
class Captured:
    """One graph: fill `inputs`, call `replay`, read `output`."""

    inputs: list[Tensor]
    replay: Callable[[], None]
    output: Any

    def __call__(self, leaves: list[Any]) -> Any:
        """The pass on the tensors among `leaves`. What comes back is a copy: the next replay writes over the original."""
        for to, tensor in zip(self.inputs, _tensors(leaves), strict=True):
            to.copy_(tensor, non_blocking=True)
        self.replay()
        return pytree.tree_map_only(Tensor, torch.clone, self.output)


class Replay:
    """The graphs of one model, in one pool of memory: it is as large as the largest of them needs."""

    def __init__(self, most: int = MOST_GRAPHS) -> None:
        self.most = most
        self._kinds: OrderedDict[Hashable, Captured | None] = OrderedDict()
        """None: seen once."""
        self._pool: Any = None

    @property
    def graphs(self) -> int:
        """How many there are."""
        return sum(kind is not None for kind in self._kinds.values())

    @contextlib.contextmanager
    def drawing(self, model: nn.Module) -> Iterator[None]:
        """Inside the block `model` is replayed where it can be (`allowed`); it may not be changed there.

        Calls with gradients, and with arguments that cannot be compared, run as they are.
        """
        if not self.allowed(model):
            yield
            return
        own = model.__dict__.get("forward")  # accelerate puts one there
        model.__dict__["forward"] = partial(self._call, model.forward, _where(model), _device(model))
        try:
            yield
        finally:
            del model.__dict__["forward"]
            if own is not None:
                model.__dict__["forward"] = own

    def clear(self) -> None:
        """Frees the graphs and their memory."""
        held, self._pool = self._pool is not None, None
        self._kinds.clear()
        if held:
            torch.cuda.empty_cache()

    def allowed(self, model: nn.Module) -> bool:
        """On a GPU, and with `ROOM` for the first graph."""
        device = _device(model)
        if device.type != "cuda":
            return False
        return self.graphs > 0 or free_bytes(device) >= ROOM * sum(t.nbytes for t in _held(model))

    def capture(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """(what repeats `run`, where the result of it then lies)."""
        if self._pool is None or self.graphs == 0:  # a pool whose last graph is gone takes no other
            self._pool = torch.cuda.graph_pool_handle()
        graph, stream = torch.cuda.CUDAGraph(), capture_stream()
        # Another thread (a data loader's, the demo's page) may allocate meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            output = run()
        return graph.replay, output

    def _call(self, forward: Callable[..., Any], where: str, device: torch.device, *args: Any, **kwargs: Any) -> Any:
        leaves, structure = pytree.tree_flatten((args, kwargs))
        if torch.is_grad_enabled() or not all(isinstance(leaf, Hashable) for leaf in leaves):
            return forward(*args, **kwargs)
        key = (where, structure, *map(_described, leaves))
        if key not in self._kinds:
            self._remember(key)
            return forward(*args, **kwargs)
        self._kinds.move_to_end(key)
        captured = self._kinds[key]
        if captured is None:
            captured = self._kinds[key] = self._captured(forward, leaves, structure, device)
        return captured(leaves)

    def _remember(self, key: Hashable) -> None:
        while len(self._kinds) >= self.most:
            self._kinds.popitem(last=False)
        self._kinds[key] = None

    def _captured(
        self, forward: Callable[..., Any], leaves: list[Any], structure: Any, device: torch.device
    ) -> Captured:
        """Inputs of its own, on the device: what a captured pass copies from the CPU would stay what it was."""
        mine = [leaf.to(device, copy=True) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(mine, structure)
        return Captured(_tensors(mine), *self.capture(lambda: forward(*args, **kwargs)))


def capture_stream() -> torch.cuda.Stream:
    """The one stream of the current GPU that graphs are captured on, those of training included: cuBLAS keeps a workspace, on
    Hopper of 32 MiB, for every stream that it has worked on, and never gives it back."""
    return _stream_of(torch.cuda.current_device())


@cache
def _stream_of(gpu: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(gpu)


def free_bytes(device: torch.device) -> float:
    """What this process can still allocate on a GPU: free, or kept by torch's allocator, within the process's share."""
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    share = torch.cuda.get_per_process_memory_fraction(device) * total - reserved
    return min(free, share) + reserved - torch.cuda.memory_allocated(device)


def _where(model: nn.Module) -> str:
    """Changes when a graph of `model` no longer computes what the model does."""
    tensors = [(t.data_ptr(), t.dtype, *t.shape) for t in _held(model)]
    made = [
        (
            id(vars(module).get("forward")),  # another one once it is compiled
            getattr(getattr(module, "processor", None), "_attention_backend", None),
        )
        for module in model.modules()
    ]
    return hashlib.sha256(repr((tensors, made)).encode()).hexdigest()


def _held(model: nn.Module) -> Iterator[Tensor]:
    return chain(model.parameters(), model.buffers())


def _device(model: nn.Module) -> torch.device:
    return next(_held(model)).device


def _tensors(leaves: list[Any]) -> list[Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _described(leaf: Any) -> Hashable:
    return (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else (type(leaf), leaf)
