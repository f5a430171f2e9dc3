"""A transformer whose repeated blocks are compiled, and whose forward pass is replayed from a CUDA graph.

Inductor fuses norms, modulation, RoPE and GELU; INT4 layers stay the custom ops that they are. Layers that read one x ask for the
same quantization, or the same op of a whole group, each for itself: `EqualCalls` makes one call of equal ones. (Of graphs with
gradients AOT autograd does so itself, of those without it does not.)
"""

import contextlib
import logging
import math
import operator
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._inductor.config
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.utils import _pytree as pytree

from loragraft.backbones.like_later import SLICED, hook_first_blocks
from loragraft.backbones.sampler import drawn_together
from loragraft.backbones.spec import Backbone, Guided
from loragraft.quantization.branched import BranchedLinear
from loragraft.quantization.linear import SVDQuantLinear, join_group

MOST_KINDS = 8
"""Kinds of block that are compiled; a model with more of them runs uncompiled."""
COMPILE_FROM = 1000
"""Passes of a large model from which drawing is taken to repay compiling; `benchmarks/generate.py` measures it."""
LARGE = 5e8
"""Bytes of a model from which the GPU, and not Python, is what a compiled pass waits for, and compiling for a minute pays."""
NEEDS_GPU = "--compile needs a CUDA GPU; on a CPU the layers run as they are: leave it out"
SHAPES = 4
"""Of what is drawn: a last, smaller batch is one of its own, and so are branches with and without adapters."""
SAME_INPUT = {
    "FluxTransformerBlock": (
        ("attn.to_q", "attn.to_k", "attn.to_v"),
        ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    ),
    "FluxSingleTransformerBlock": (("proj_mlp", "attn.to_q", "attn.to_k", "attn.to_v"),),
}
"""Per class of block, layers that read one x; the largest first, as the others then fill what it leaves of the GPU."""
_MADE_APART: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Blocks whose `forward` is wrapped by `_apart` already."""
_log = logging.getLogger(__name__)


class EqualCalls(CustomGraphPass):
    """Common subexpressions: of equal calls of pure operators in a graph without gradients the first is kept."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        if any(node.op == "placeholder" and node.name.startswith("tangents") for node in graph.nodes):
            return  # forward and backward pass in one: what is saved is the partitioner's to choose
        first: dict[tuple[object, ...], torch.fx.Node] = {}
        for node in list(graph.nodes):
            if node.op != "call_function" or not _pure(node.target):
                continue
            leaves, structure = pytree.tree_flatten((node.args, node.kwargs))
            key = (node.target, structure, *((type(leaf), leaf) for leaf in leaves))
            kept = first.setdefault(key, node)
            if kept is not node:
                node.replace_all_uses_with(kept)
                graph.erase_node(node)

    def uuid(self) -> Any:
        """Names this file's contents to the compiler's cache."""
        return get_hash_for_files((__file__,))


def _pure(target: Any) -> bool:
    if target is operator.getitem:
        return True
    return (
        isinstance(target, torch._ops.OpOverload)
        and not target._schema.is_mutable
        and torch.Tag.nondeterministic_seeded not in target.tags
        and target.namespace in ("aten", "prims", "loragraft")
    )


def fills_card(model: nn.Module) -> bool:
    """More than `LARGE`."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) > LARGE


def compile_to_draw(backbone: Backbone, images: int, steps: int, guided: Guided, wanted: bool | None = None) -> bool:
    """Compiles the blocks before so many images are drawn on a GPU, if `wanted`, or (None) if that repays; returns whether it did.

    It repays from `COMPILE_FROM` passes of a model that `fills_card` on. Raises ValueError for what is wanted and cannot be had.
    """
    model, cuda = backbone.transformer, backbone.device.type == "cuda"
    if wanted and not cuda:
        raise ValueError(NEEDS_GPU)
    if wanted is None:
        wanted = cuda and fills_card(model) and _passes(backbone, images, steps, guided) >= COMPILE_FROM
        return wanted and compile_blocks(model, SHAPES) > 0
    if wanted and not compile_blocks(model, SHAPES):
        raise ValueError(
            f"--compile: this model's blocks are of more than {MOST_KINDS} kinds (rotated, smoothed, ...), or it has no repeated "
            "blocks; give --no-compile"
        )
    return wanted


def _passes(backbone: Backbone, images: int, steps: int, guided: Guided) -> int:
    together = drawn_together(backbone.spec.tokens(backbone.resolution))
    return math.ceil(images / together) * steps * (2 if guided["guidance"] > 1 else 1)


def compile_blocks(transformer: nn.Module, shapes: int = 1) -> int:
    """Compiles the transformer's repeated blocks in place (diffusers' regional compilation); returns how many.

    Blocks of one class share compiled code as long as their quantized layers are set up alike. The first of the `shapes` that
    they see gets code of its own; of three or more, all others share code for any number of rows, as each would take half a
    minute. With more than `MOST_KINDS` kinds nothing is compiled, a warning says so, and the result is 0.
    """
    blocks, kinds = repeated_blocks(transformer)
    if not compiles(transformer):
        _log.warning(
            "the %d blocks run uncompiled: they are of %d kinds (rotated, smoothed, ...), and %d is the limit",
            len(blocks), len(kinds), MOST_KINDS,
        )  # fmt: skip
        return 0
    if (
        torch._inductor.config.joint_custom_pre_pass is None
    ):  # as an option of `compile`, every block would be a kind of its own
        torch._inductor.config.joint_custom_pre_pass = EqualCalls()
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 2 * len(kinds) * shapes)
    for block in blocks:
        group_layers(block)
        # `forward` alone: hooks, which `Module.compile` compiles too, run outside, and the first block's is no difference.
        forward = block.forward
        if type(block).__name__ in SLICED and block not in _MADE_APART:
            _MADE_APART.add(block)
            forward = _apart(forward)
        block.forward = torch.compile(forward, fullgraph=True, dynamic=None if shapes > 2 else False)
    hook_first_blocks(blocks)
    return len(blocks)


def _apart(forward: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """`forward` whose compiled results, where they need a gradient, are tensors of their own, not slices of one.

    Slices of one tensor are cut outside the compiled code. Their gradients then come together there too, for every block: two
    tensors of zeros as large as the whole, two copies into them and a sum (2.5 ms in the profile of a FLUX.1 step on an H100).
    """

    def run(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        slices = forward(*args, **kwargs)
        if not (torch.compiler.is_compiling() and torch.is_grad_enabled()):
            return slices
        return tuple(x.clone(memory_format=torch.contiguous_format) for x in slices)

    return run


def repeated_blocks(transformer: nn.Module) -> tuple[list[nn.Module], Counter[tuple[object, ...]]]:
    """(what diffusers names as repeated, how many there are of each kind)."""
    names = getattr(transformer, "_repeated_blocks", None) or getattr(transformer, "_no_split_modules", None) or ()
    named = [(path, module) for path, module in transformer.named_modules() if type(module).__name__ in names]
    blocks = [module for path, module in named if path.rpartition(".")[2].isdigit()]  # items of a list
    return blocks, Counter(_kind(block) for block in blocks)


def compiles(transformer: nn.Module) -> bool:
    """Whether `compile_blocks` would compile anything."""
    blocks, kinds = repeated_blocks(transformer)
    return bool(blocks) and len(kinds) <= MOST_KINDS


def group_layers(block: nn.Module) -> None:
    """Joins the layers of a block that read one x (`SAME_INPUT`), where their arithmetic lets them."""
    modules = dict(block.named_modules())
    for paths in SAME_INPUT.get(type(block).__name__, ()):
        layers = [
            module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
            for module in map(modules.get, paths)
        ]
        found = [layer for layer in layers if isinstance(layer, SVDQuantLinear)]
        if len(found) == len(paths):
            join_group(found)


def _kind(block: nn.Module) -> tuple[object, ...]:
    """What compiled code depends on: the class, and per quantized layer its shape and arithmetic."""
    layers = [
        (path, m.in_features, m.out_features, m.numerics, m.group_size, m.rank, m.bias is None)
        + ((m.hadamard, m.smoothed, m.act_unsigned) if isinstance(m, SVDQuantLinear) else ())
        for path, m in block.named_modules()
        if isinstance(m, BranchedLinear)
    ]
    return (type(block).__name__, *layers)


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Compiled blocks run as they were written: what runs seldom, or without gradients, is not compiled anew."""
    with torch.compiler.set_stance("force_eager"):
        yield
