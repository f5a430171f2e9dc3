"""Gradient checkpointing: which blocks keep only their input, and compute the rest again during the backward pass.

    none        every block keeps what its backward pass reads            peak = L c
    gelu        GELU and the linear layer before it are computed again (FLUX.1: 0.7 c, 5 % more time)
    cheap       what costs little time for its bytes is computed again: norms, modulation, RoPE too; codes, attention and
                the other layers' outputs are kept (FLUX.1: 0.6 c, 8 % more time)
    block       every block keeps its input                               peak = L s + c
    selective   the first n blocks keep their input, the rest everything  peak = max(n s + (L - n) c, n s + c)

with s the bytes of a block's input, c those that a block keeps otherwise, L blocks. The *first* n: by the time that their
backward pass computes a block again, the later blocks have freed what they kept; spread out, the same n would peak c higher.
Recomputation repeats the same operations on the same input, so results do not change by a bit where kernels are deterministic.
Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost" (2016); torch.utils.checkpoint without reentrance.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from loragraft.train.offloading import HostBuffers, offloaded_inputs

Checkpointing = Literal["none", "gelu", "cheap", "block", "selective"]


def block_paths(transformer: nn.Module) -> list[str]:
    """Paths of the repeated blocks of a diffusers model, in the order in which they run. Raises ValueError if it names none."""
    classes = getattr(transformer, "_repeated_blocks", None) or getattr(transformer, "_no_split_modules", None) or ()
    named = [path for path, module in transformer.named_modules() if type(module).__name__ in classes]
    paths = [
        path for path in named if path.rpartition(".")[2].isdigit()
    ]  # items of a list: diffusers also names embedders
    if not paths:
        raise ValueError(
            f"{type(transformer).__name__} names no repeated blocks: set train.checkpointing=none or block"
        )
    return paths


def supported_policies(transformer: nn.Module) -> tuple[Checkpointing, ...]:
    """Policies that `set_checkpointing` takes for this model, the least recomputation first; `selective` goes with `block`."""
    partly: tuple[Checkpointing, ...] = ("gelu", "cheap") if getattr(transformer, "_repeated_blocks", None) else ()
    whole: tuple[Checkpointing, ...] = (
        ("block",) if getattr(transformer, "_supports_gradient_checkpointing", False) else ()
    )
    return ("none", *partly, *whole)


def set_checkpointing(transformer: nn.Module, policy: Checkpointing, blocks: int = 0, *, offload: bool = False) -> int:
    """Turns checkpointing of a diffusers model on or off. Returns how many blocks are checkpointed.

    blocks: of `selective`, how many, counted from the first. offload: the inputs of checkpointed blocks wait in pinned host
    memory. Raises ValueError for a model that cannot checkpoint, for more blocks than there are, and for offload without a GPU.
    """
    for path in block_paths(transformer) if policy in ("gelu", "cheap") else ():
        keep_what_costs(transformer.get_submodule(path), norms=policy == "gelu")
    if policy in ("none", "gelu", "cheap"):
        if getattr(transformer, "_supports_gradient_checkpointing", False):
            transformer.disable_gradient_checkpointing()  # type: ignore[operator]
        return 0 if policy == "none" else len(block_paths(transformer))
    if not getattr(transformer, "_supports_gradient_checkpointing", False):
        raise ValueError(f"{type(transformer).__name__} supports no checkpointing: set train.checkpointing=none")
    if offload:
        _check_offload(next(transformer.parameters()).device)
    chosen = None
    if policy == "selective":
        paths = block_paths(transformer)
        if not 1 <= blocks <= len(paths):
            raise ValueError(
                f"train.checkpoint_blocks is {blocks}: {type(transformer).__name__} has {len(paths)} blocks"
            )
        chosen = {id(transformer.get_submodule(path)) for path in paths[:blocks]}
    random = any(isinstance(m, nn.Dropout) and m.p > 0 and m.training for m in transformer.modules())
    inputs: Callable[[], AbstractContextManager[Any]]
    inputs = partial(offloaded_inputs, HostBuffers()) if offload else nullcontext

    def run(block: nn.Module, *args: Any) -> Any:
        if chosen is not None and id(block) not in chosen:
            return block(*args)
        with inputs():  # inside, checkpoint has hooks of its own: only the block's inputs see these
            return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=random)

    transformer.enable_gradient_checkpointing(run)  # type: ignore[operator]
    return len(block_paths(transformer)) if chosen is None else len(chosen)


def _check_offload(device: torch.device) -> None:
    if device.type != "cuda":
        raise ValueError(
            f"train.offload_activations moves GPU memory to the host; this run is on {device}: set it to false"
        )


def keep_what_costs(block: nn.Module, *, norms: bool) -> None:
    """Makes `block` keep the results of its expensive operations alone (`worth_keeping`), for good; compile it afterwards.

    norms: a compiled block may keep what lies between them, too, and computes only GELU's input again.
    """
    original = block.forward
    every, most = _contexts(worth_keeping_or_small), _contexts(worth_keeping)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return original(*args, **kwargs)
        # Without the compiler, which saves what is read alone, a policy that keeps everything would keep far more.
        contexts = every if norms and torch.compiler.is_compiling() else most
        return checkpoint(original, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts, **kwargs)

    block.forward = forward


@functools.cache
def _contexts(policy: Callable[..., CheckpointPolicy]) -> Callable[[], Any]:
    """The policy as `checkpoint` takes it, one object for all blocks; its hash lets the compiler's cache serve them."""
    contexts = partial(create_selective_checkpoint_contexts, policy)
    contexts.cache_hash = f"{policy.__name__} {sha256(Path(__file__).read_bytes()).hexdigest()}"  # type: ignore[attr-defined]
    return contexts


def worth_keeping(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Products and codes are kept. A layer more than twice as wide as its input is the one before GELU: its output is the
    largest tensor of a block, and one product of codes that are there anyway brings it back."""
    if operation is torch.ops.loragraft.w4a8_linear.default and args[1].shape[0] > 2 * args[0].shape[1]:
        return CheckpointPolicy.MUST_RECOMPUTE
    return CheckpointPolicy.MUST_SAVE if operation in _expensive() else CheckpointPolicy.PREFER_RECOMPUTE


def worth_keeping_or_small(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """`worth_keeping`, and everything else that the backward pass reads."""
    decided = worth_keeping(context, operation, *args, **kwargs)
    return CheckpointPolicy.PREFER_SAVE if decided == CheckpointPolicy.PREFER_RECOMPUTE else decided


@functools.cache
def _expensive() -> frozenset[Any]:
    ours, aten = torch.ops.loragraft, torch.ops.aten
    return frozenset({
        ours.w4a8_linear.default, ours.w4a4_linear.default, ours.w4a16_linear.default, ours.w4a8_conv.default,
        ours.quantize_activation.default,
        ours.attention.default, aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default, aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default, aten.mm.default, aten.addmm.default, aten.bmm.default,
    })  # fmt: skip
