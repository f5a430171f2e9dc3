"""Layers of diffusers' FLUX as the fused modules that BFL's code, kohya and ComfyUI have: reading's cut, backwards.

qkv (or linear1) = rows of q, k, v (and the MLP);  A's that are equal are kept once, different ones stand under one another
and B is block diagonal: rank r where q, k, v share A, else the sum of their ranks. Parts without an update are rows of zeros.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from loragraft.adapters.formats.families import FLUX_BLOCKS, names_for
from loragraft.quantization.dialects.flux_names import exchange_halves, flux_linears

Pair = tuple[Tensor, Tensor]
MLP_RATIO = 4
"""Of FLUX's single blocks: linear1 has (3 + 4) K rows."""


def fused_flux(pairs: Mapping[str, Pair]) -> dict[str, Pair]:
    """BFL's module -> (A, B). Raises ValueError for a path that FLUX does not have and for rows that are not its."""
    names = names_for(pairs)
    known = {path for target in names.layers.values() for path in target.paths}
    unknown = sorted(pairs.keys() - known)
    if unknown:
        raise ValueError(f"{unknown[0]!r} has no name in BFL's code, nor have kohya's files one for it")
    double = max([FLUX_BLOCKS[0], *(_index(path) for path in pairs if path.startswith("transformer_blocks."))])
    single = max([FLUX_BLOCKS[1], *(_index(path) for path in pairs if path.startswith("single_transformer_blocks."))])
    linears = flux_linears({"num_layers": double, "num_single_layers": single, "guidance_embeds": True})
    found: dict[str, Pair] = {}
    for module, paths in linears.items():
        present = {path: pairs[path] for path in paths if path in pairs}
        if not present:
            continue
        down, up = next(iter(present.values())) if len(paths) == 1 else _joined(module, paths, present)
        found[module] = (down, exchange_halves(up) if names.layers[module].exchanged else up)
    return found


def _index(path: str) -> int:
    return int(path.split(".")[1]) + 1


def _joined(module: str, paths: tuple[str, ...], present: Mapping[str, Pair]) -> Pair:
    width = next(iter(present.values()))[0].shape[1]
    rows = [width, width, width, MLP_RATIO * width][: len(paths)]
    downs: list[Tensor] = []
    owner: dict[str, int] = {}
    for path, (down, up) in present.items():
        if down.shape[1] != width or up.shape[0] != rows[paths.index(path)]:
            raise ValueError(f"{path!r} maps {down.shape[1]} to {up.shape[0]} features, which is no part of {module}")
        same = [i for i, other in enumerate(downs) if other.shape == down.shape and torch.equal(other, down)]
        owner[path] = same[0] if same else len(downs)
        downs += [] if same else [down]
    some = next(iter(present.values()))[1]
    parts = []
    for path, count in zip(paths, rows, strict=True):
        blocks = [
            present[path][1] if owner.get(path) == i else some.new_zeros(count, down.shape[0])
            for i, down in enumerate(downs)
        ]
        parts.append(torch.cat(blocks, dim=1))
    return torch.cat(downs), torch.cat(parts)
