"""What an adapter file is, in words: dialect, base family, ranks, targets, what else it changes, what its header says."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from loragraft.adapters.checkpoint import Adapter

SHOWN = (
    "modelspec.",
    "ss_base_model_version",
    "ss_network_",
    "ss_sd_model_name",
    "ss_output_name",
    "ss_steps",
    "ss_seed",
)
OWN = ("base", "base_id", "profile", "contract", "recipe_hash", "data_fingerprint", "created")
LONGEST_VALUE = 100


def inspection(adapter: Adapter, header: Mapping[str, str]) -> dict[str, Any]:
    """What `loragraft adapter inspect` shows; every value is a number, a string without control characters, or a map of such."""
    ranks = Counter(down.shape[0] for down, _ in adapter.pairs.values())
    said = {key: plain(value) for key, value in sorted(header.items()) if key.startswith(SHOWN)}
    own = {key: plain(str(adapter.metadata[key])) for key in OWN if adapter.metadata.get(key)}
    numbers = sum(factor.numel() for pair in adapter.pairs.values() for factor in pair)
    return {
        "name": plain(adapter.name),
        "dialect": adapter.dialect,
        "family": str(adapter.family),
        "component": adapter.component,
        "layers": len(adapter.pairs),
        "ranks": {str(rank): count for rank, count in sorted(ranks.items())},
        "numbers": numbers,
        "zero": sum(not (bool(down.any()) and bool(up.any())) for down, up in adapter.pairs.values()),
        "unscaled": adapter.unscaled,
        "targets": targets(adapter.pairs),
        "extras": {kind: len(tensors) for kind, tensors in adapter.extras.items()},
        "approximated": {
            "layers": len(adapter.errors),
            "worst_error": max(adapter.errors.values(), default=0.0),
        },
        "metadata": own | said,
    }


def targets(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, int]:
    """Kind of layer (path with * for the numbers of blocks, a UNet's three parts as one) -> how many."""
    blocks = (re.sub(r"(_blocks?|attentions|resnets|samplers)\.\d+", r"\1.*", path) for path in pairs)
    return dict(
        sorted(Counter(re.sub(r"^(down_blocks\.\*|mid_block|up_blocks\.\*)", "*", kind) for kind in blocks).items())
    )


def inspection_text(found: Mapping[str, Any]) -> str:
    """The same to read."""
    ranks = ", ".join(f"{rank} ({count} layers)" for rank, count in found["ranks"].items())
    said = found["metadata"]
    base = ", profile ".join(said[key] for key in ("base", "profile") if key in said) or "the file does not say"
    lines = [
        f"name      {found['name']}",
        f"dialect   {found['dialect']}",
        f"base      {base}; layers: {found['family']}",
        f"layers    {found['layers']}, {found['numbers'] / 1e6:.2f} million numbers",
        f"rank      {ranks}",
        *(f"  {count:4d}  {kind}" for kind, count in found["targets"].items()),
    ]
    if found["zero"]:
        lines.append(f"zero      the update of {found['zero']} layers: they stay as they are")
    if found["unscaled"]:
        lines.append(
            f"scale     not in the file for {found['unscaled']} modules (no alpha, no configuration): taken as 1, as diffusers, kohya "
            "and ComfyUI do"
        )
    for kind, count in found["extras"].items():
        lines.append(f"also      {kind}, {count} tensors: not part of a graft")
    if found["approximated"]["layers"]:
        lines.append(
            f"cut       {found['approximated']['layers']} layers to the largest rank, relative error up to "
            f"{found['approximated']['worst_error']:.3g}"
        )
    lines += [f"header    {key} = {value}" for key, value in found["metadata"].items()]
    return "\n".join(lines)


def plain(text: str) -> str:
    """A stranger's text on one line, without what a terminal would obey."""
    clean = "".join(letter if letter.isprintable() else " " for letter in text)
    return clean if len(clean) <= LONGEST_VALUE else f"{clean[:LONGEST_VALUE]}..."
