"""Which of a base's layers a foreign name means: key tables of the families of bases, one lookup for every spelling.

A name in a file is a module of diffusers', of the makers' code (FLUX: BFL's; UNets: LDM's), or of XLabs' processors, with its
dots or flattened to underscores. `Names` maps all of them at once; flattened names are looked up, never split by guesswork.
FLUX's table comes from its block counts, so that FLUX-shaped bases of other sizes have one too.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from loragraft.adapters.formats.unet_names import SD2, SD15, SDXL, UNet
from loragraft.quantization.dialects.flux_names import EXCHANGED, flux_linears, flux_norms
from loragraft.quantization.names import nearest
from loragraft.quantization.tensor_file import CheckpointError

UNETS: dict[str, UNet] = {"sd15": SD15, "sdxl": SDXL, "sd2": SD2}
FLUX_BLOCKS = 19, 38
FLUX_WIDTH = 3072
SD3_WIDTHS = (1536, 2432)
"""Stable Diffusion 3 and 3.5: some of its layers are called as FLUX's are."""
BLOCK_INDEX = re.compile(r"(double_blocks|single_blocks|transformer_blocks)[._](\d{1,3})(?!\d)")
XLABS = {
    "double_blocks.{}.processor.qkv_lora1": "img_attn.qkv",
    "double_blocks.{}.processor.qkv_lora2": "txt_attn.qkv",
    "double_blocks.{}.processor.proj_lora1": "img_attn.proj",
    "double_blocks.{}.processor.proj_lora2": "txt_attn.proj",
}


@dataclass(frozen=True)
class Target:
    """The layers that one module of a file is, row after row."""

    paths: tuple[str, ...]
    exchanged: bool = False
    """Its two halves of rows are the other way round in diffusers (BFL's last adaLN)."""


@dataclass(frozen=True)
class Names:
    """Every spelling of every layer, and of the norms that some files replace."""

    layers: Mapping[str, Target]
    norms: Mapping[str, str]
    flat: Mapping[str, str]
    """Spelling with underscores -> spelling with dots."""

    def find(self, name: str) -> Target | None:
        """The layers that `name`, with dots or flattened, means."""
        return self.layers.get(name) or self.layers.get(self.flat.get(name, ""))

    def find_norm(self, name: str) -> str | None:
        """The norm that `name` means."""
        return self.norms.get(name) or self.norms.get(self.flat.get(name, ""))


def names_for(modules: Iterable[str]) -> Names:
    """The tables of all families, FLUX's with as many blocks as `modules` speak of."""
    most = {"double_blocks": FLUX_BLOCKS[0], "single_blocks": FLUX_BLOCKS[1]}
    for module in modules:
        for kind, index in BLOCK_INDEX.findall(module):
            if kind == "transformer_blocks":
                kind = "single_blocks" if "single_transformer" in module else "double_blocks"
            most[kind] = max(most[kind], int(index) + 1)
    return _names(most["double_blocks"], most["single_blocks"])


@lru_cache(maxsize=4)
def _names(double: int, single: int) -> Names:
    config = {"num_layers": double, "num_single_layers": single, "guidance_embeds": True}
    linears, norms = flux_linears(config), flux_norms(config)
    layers = {theirs: Target(paths, theirs == EXCHANGED) for theirs, paths in linears.items()}
    for i in range(double):
        for xlabs, theirs in XLABS.items():
            layers[xlabs.format(i)] = layers[f"double_blocks.{i}.{theirs}"]
    for i in range(single):
        block = f"single_transformer_blocks.{i}"
        layers[f"single_blocks.{i}.processor.qkv"] = Target(tuple(f"{block}.attn.to_{part}" for part in "qkv"))
        layers[f"single_blocks.{i}.processor.proj"] = Target((f"{block}.proj_out",))
    for unet in UNETS.values():
        for path, ldm in unet.ldm_names().items():
            layers[ldm] = Target((path,))
    own = {path for target in layers.values() for path in target.paths}
    layers |= {path: Target((path,)) for path in own}
    all_norms = {name.removesuffix(".scale"): path.removesuffix(".weight") for name, path in norms.items()}
    flat = {name.replace(".", "_"): name for name in (*layers, *all_norms)}
    return Names(layers, all_norms, flat)


def check_known(file: object, unknown: Mapping[str, str], names: Names) -> None:
    """Raises CheckpointError listing names (key -> module) that no table knows, each with the nearest known spellings."""
    if not unknown:
        return
    lines = []
    for key, module in list(unknown.items())[:5]:
        known = names.flat if "." not in module else names.layers
        lines.append(f"{key!r} ({nearest(module, known)})")
    more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
    raise CheckpointError(
        f"{file}: {len(unknown)} module(s) belong to no base known here: {'; '.join(lines)}{more}. Give a file for FLUX.1, SDXL, "
        "SD 2 or SD 1.5, or one in diffusers' own names"
    )


@dataclass(frozen=True)
class Family:
    """What kind of base a set of layers belongs to."""

    name: str
    """flux, sdxl, sd2, sd15, or "" where the names are of none of them."""
    published: bool
    """The sizes are those of the published base too."""
    also: tuple[str, ...] = ()
    """Families that fit as well as this one."""

    def __str__(self) -> str:
        if not self.name:
            return "unknown: the names are those of no family in the tables"
        if not self.published:
            return f"{self.name}'s names, other sizes than the published base"
        return self.name + (f" (or {', '.join(self.also)}: these layers are the same there)" if self.also else "")


UNKNOWN_FAMILY = Family("", False)


def family_of(shapes: Mapping[str, tuple[int, int]]) -> Family:
    """The family of path -> (inputs, outputs), inputs of a convolution counted as C kh kw.

    Where names fit several (the UNets), the one whose sizes fit most layers; of equals the first in `UNETS`.
    """
    fits = {}
    for name, unet in UNETS.items():
        table = unet.layers
        if shapes.keys() <= table.keys():
            fits[name] = sum((math.prod(table[path][1:]), table[path][0]) == size for path, size in shapes.items())
    if shapes and fits:
        best = [name for name, same in fits.items() if same == max(fits.values())]
        return Family(best[0], fits[best[0]] == len(shapes), tuple(best[1:]))
    flux = {path for target in names_for(shapes).layers.values() for path in target.paths}
    if shapes and shapes.keys() <= flux:
        inside = [size for path, size in shapes.items() if path.endswith(("attn.to_q", "attn.to_k", "attn.to_v"))]
        if any(width in SD3_WIDTHS for width, _ in inside) and not any(path.startswith("single_") for path in shapes):
            return UNKNOWN_FAMILY
        return Family("flux", bool(inside) and all(size == (FLUX_WIDTH, FLUX_WIDTH) for size in inside))
    return UNKNOWN_FAMILY


def kernel_of(path: str, family: Family) -> tuple[int, int] | None:
    """(kh, kw) of a UNet's convolution; None for a linear, and where the UNets that have this path disagree."""
    known = family.published and family.name in UNETS
    unets = [UNETS[name] for name in (family.name, *family.also)] if known else list(UNETS.values())
    shapes = [unet.layers.get(path, ()) for unet in unets]
    kernels = {shape[2:] for shape in shapes if shape}
    if len(kernels) != 1:
        return None
    (kernel,) = kernels
    return (kernel[0], kernel[1]) if kernel else None
