"""A grafted model as a checkpoint that runtimes load by themselves: what `loragraft convert --adapter` does.

Nothing is quantized again: the factors go into the file's 16-bit branch. Only W4A16 layers, for which ComfyUI and Nunchaku Lite
have no branch, are written in 16 bits where an adapter reaches them.
"""

from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from torch import nn

from loragraft.adapters.checkpoint import Adapter
from loragraft.adapters.graft import graft
from loragraft.adapters.opening import open_adapters
from loragraft.adapters.truncation import truncate
from loragraft.quantization.dialects.conversion import convert_checkpoint


def graft_all(transformer: nn.Module, adapters: Sequence[tuple[Adapter, float]], *, any_base: bool = False) -> None:
    """Graft each (adapter, weight). Raises ValueError as `graft` does."""
    for adapter, weight in adapters:
        graft(transformer, adapter, weight, any_base=any_base)


def run(args: Namespace) -> int:
    """The verb with --adapter: options are those of `convert_checkpoint`, and what is grafted.

    Raises ValueError without an adapter, and as `graft` and `truncate` do.
    """
    if not args.adapter:
        raise ValueError("--rank, --any-base and --denoiser-only say how adapters are grafted: name one with --adapter")
    adapters = open_adapters(args.adapter, denoiser_only=args.denoiser_only)
    notes = [f"grafted {adapter.name} with weight {weight:g}, rank {adapter.rank}" for adapter, weight in adapters]
    if args.rank is not None:
        joined = truncate(adapters, args.rank, "+".join(adapter.name for adapter, _ in adapters))
        worst, error = joined.worst
        adapters = [(joined.adapter, 1.0)]
        notes.append(
            f"cut together to rank {joined.adapter.rank}: {joined.error:.2%} of the update is lost, at most {error:.2%} in a "
            f"layer ({worst})"
        )
    done = convert_checkpoint(
        Path(args.source), Path(args.dest), args.to, numerics=args.numerics, signed=args.signed, layout=args.layout,
        graft=partial(graft_all, adapters=adapters, any_base=args.any_base),
    )  # fmt: skip
    if done.dense:
        notes.append(
            f"{len(done.dense)} grafted W4A16 layers, which {args.to} has no branch for, are in 16 bits, e.g. {done.dense[0]}"
        )
    print("\n".join([done.table(), *notes, f"{args.source} ({done.source_dialect}) as {args.to}: {done.path}"]))
    return 0
