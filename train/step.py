"""One micro-batch, forward and backward: launched kernel by kernel, or replayed from a CUDA graph.

A layer of four-bit codes is quick on the GPU and slow to launch: a step of FLUX.1's 418 adapted layers spends more time in
Python than on the device. So on a GPU the repeated blocks are compiled (Inductor fuses norms, modulation, RoPE and GELU; the
INT4 layers stay the custom ops that they are), and forward, loss and backward are captured once per shape and replayed.
Gradients are added to `.grad` either way.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from threading import Thread

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from loragraft.adapters.joined import JoinedFactors
from loragraft.backbones.compiled import MOST_KINDS, compile_blocks, fills_card
from loragraft.backbones.family import Family
from loragraft.backbones.flow import FLUX_LIKE
from loragraft.backbones.replay import capture_stream
from loragraft.recipes.schema import TrainConfig
from loragraft.train.gathered import GatheredGradients
from loragraft.train.sharding import shards_base
from loragraft.train.warm import warm_layers

Loss = Callable[[dict[str, Tensor]], Tensor]
"""Named tensors of a micro-batch -> the scalar to differentiate."""
Prepare = Callable[[dict[str, Tensor]], Thread]
"""Starts what can be made ready beside the first run."""


class EagerStep:
    """Launches the step anew each time; accelerate scales and synchronizes."""

    assigns = True
    """Whether `.grad` may be None between steps."""

    def __init__(self, loss: Loss, accelerator: Accelerator, model: nn.Module) -> None:
        self.loss, self.accelerator, self.model = loss, accelerator, model

    def __call__(self, tensors: dict[str, Tensor], *, last: bool) -> Tensor:
        """Adds the gradients of one micro-batch and returns its loss; processes exchange them at the `last` one."""
        sync = contextlib.nullcontext() if last else self.accelerator.no_sync(self.model)
        with sync:
            loss = self.loss(tensors)
            self.accelerator.backward(loss)
        return loss.detach()

    def pause(self) -> None:
        """Holds no memory between steps."""

    def close(self) -> None:
        """Nothing to undo."""


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Tensor]
    loss: Tensor


class _Clock:
    """Adds the seconds since the last call, with the GPU at rest, to what a phase has taken."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds, self._last = seconds, time.perf_counter()

    def __call__(self, phase: str) -> None:
        torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now


class GraphStep:
    """Captures forward and backward once per shape of input, then replays: the launch costs one call.

    All graphs share one memory pool, so several shapes take the memory of the largest. What is captured may not read a
    value back to the CPU. Processes do not exchange gradients here (`sharding.average_gradients` does, after the last replay).
    """

    assigns = False

    def __init__(
        self,
        loss: Loss,
        parameters: Sequence[nn.Parameter],
        joined: JoinedFactors | None = None,
        prepare: Prepare | None = None,
        fills: bool = False,
    ) -> None:
        """joined: refreshed at the start of every step. prepare: called with the first micro-batch; the capture waits for the
        thread that it returns. fills: whether `pause` frees memory."""
        self.loss, self.parameters, self.joined, self.prepare, self.fills = loss, parameters, joined, prepare, fills
        self.seconds: dict[str, float] = {}
        """Phase -> seconds that the captures so far have taken."""
        self._captured: dict[tuple[object, ...], _Captured] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, tensors: dict[str, Tensor], *, last: bool) -> Tensor:
        """Adds the gradients of one micro-batch and returns its loss."""
        key = tuple((name, tuple(value.shape), value.dtype) for name, value in tensors.items())
        if key not in self._captured:
            self._captured[key] = self._capture(tensors)
        captured = self._captured[key]
        for name, value in tensors.items():
            captured.inputs[name].copy_(value, non_blocking=True)
        captured.graph.replay()
        return captured.loss.clone()  # the pool's memory belongs to whichever graph runs next

    def pause(self) -> None:
        """Between steps, where gradients are zero: frees the memory of graphs, gradients and joined factors, for validation or
        images on a card that this model fills; the next step captures anew (some seconds, nothing is compiled again)."""
        if self.fills and self._captured:
            torch.cuda.synchronize()
            self._captured.clear()
            for parameter in self.parameters:
                parameter.grad = None
            if self.joined is not None:
                self.joined.separate()
            torch.cuda.empty_cache()
            self._pool = torch.cuda.graph_pool_handle()

    def close(self) -> None:
        """Frees the graphs and takes the layers apart again; the step cannot be used after it."""
        self._captured.clear()
        if self.joined is not None:
            self.joined.separate()

    def _run(self, tensors: dict[str, Tensor]) -> Tensor:
        if self.joined is not None:
            self.joined.refresh()
        loss = self.loss(tensors)
        with GatheredGradients(self.parameters):
            loss.backward()
        return loss.detach()

    def _capture(self, tensors: dict[str, Tensor]) -> _Captured:
        clock = _Clock(self.seconds)
        if self.joined is not None:
            self.joined.join()
        beside, self.prepare = self.prepare(tensors) if self.prepare is not None else None, None
        inputs = {name: value.clone() for name, value in tensors.items()}
        # What earlier micro-batches left waits in host memory; most captures find nothing.
        before = [None if parameter.grad is None else parameter.grad.cpu() for parameter in self.parameters]
        for parameter in self.parameters:  # a captured backward adds to what is there; to None it would assign
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        clock("joined factors and gradients")
        stream = capture_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles, tunes and allocates whatever must not happen inside a capture
            self._run(inputs)
        clock("blocks traced, compiled and run once")
        if beside is not None:
            beside.join()
            clock("waiting for the layers' kernels")
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        torch._C._cuda_clearCublasWorkspaces()  # of the run above: the capture's stream gets its own
        torch.cuda.empty_cache()  # the graph's pool is another: without this both would hold a step's activations
        graph = torch.cuda.CUDAGraph()
        # A data loader's thread may pin memory meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            loss = self._run(inputs)
        for parameter, kept in zip(self.parameters, before, strict=True):
            assert parameter.grad is not None
            parameter.grad.zero_() if kept is None else parameter.grad.copy_(kept)
        clock("capture")
        return _Captured(graph, inputs, loss)


def choose_step(
    config: TrainConfig,
    accelerator: Accelerator,
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    loss: Loss,
    shapes: int = 1,
    family: Family = FLUX_LIKE,
) -> EagerStep | GraphStep:
    """The step that `train.compile` and `train.cuda_graph` ask for. Raises ValueError where that cannot be had.

    shapes: how many shapes of latents there will be; each is compiled and captured once. family: the model's.
    """
    cuda = accelerator.device.type == "cuda"
    if config.compile == "always" or (config.compile == "auto" and cuda and fills_card(model) and not shards_base()):
        compiled = compile_blocks(accelerator.unwrap_model(model), shapes)
        if config.compile == "always" and not compiled:
            raise ValueError(
                f"train.compile=always: this model's blocks are of more than {MOST_KINDS} kinds (rotated, smoothed, ...), or "
                "it has no repeated blocks; train with train.compile=never"
            )
    if captures(config, accelerator):
        return graph_step(accelerator.unwrap_model(model), loss, parameters, family, join=config.join_factors)
    return EagerStep(loss, accelerator, model)


def captures(config: TrainConfig, accelerator: Accelerator) -> bool:
    """Whether steps are replayed from CUDA graphs: then the model must not be wrapped by DDP, whose hooks a graph lacks.

    Raises ValueError where `train.cuda_graph=always` cannot be had.
    """
    obstacles = {
        "needs a CUDA GPU": accelerator.device.type != "cuda",
        "cannot capture the gathering of a divided base (--use_fsdp)": shards_base(),
    }
    found = [what for what, there in obstacles.items() if there]
    if config.cuda_graph == "always" and found:
        raise ValueError(f"train.cuda_graph=always {'; it '.join(found)}: leave it at auto")
    return config.cuda_graph != "never" and not found


def graph_step(
    transformer: nn.Module,
    loss: Loss,
    parameters: Sequence[nn.Parameter],
    family: Family = FLUX_LIKE,
    *,
    join: bool = True,
) -> GraphStep:
    """A captured step of `transformer`, its factors joined if asked and its kernels compiled beside the blocks."""
    dtype = next(p for p in transformer.parameters() if not p.requires_grad).dtype
    joined = JoinedFactors(transformer, dtype) if join else None
    fills = fills_card(
        transformer
    )  # a small model's kernels are soon compiled, one after the other as they are launched
    prepare = partial(prepare_layers, transformer, family) if fills else None
    return GraphStep(loss, parameters, joined, prepare, fills)


def prepare_layers(transformer: nn.Module, family: Family, tensors: dict[str, Tensor]) -> Thread:
    """Has the layers' kernels compiled beside the blocks (`warm_layers`)."""
    latents = tensors["latents"]
    return warm_layers(transformer, family.rows(tuple(latents.shape), tensors), len(latents), latents.dtype)
