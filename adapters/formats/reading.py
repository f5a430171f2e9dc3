"""Any LoRA file that people have -> the project's form: path on the base -> (A, B with the scale in it), and what else it asks for.

    diffusers / PEFT      transformer.<path>.lora_A.weight; alpha in the header or in adapter_config.json
    attention processors  <path>.attn1.processor.to_q_lora.down.weight
    kohya                 lora_unet_<flattened LDM, BFL or diffusers name>.lora_down.weight, .alpha; lora_te*_ text encoders
    OneTrainer, LyCORIS   lora_transformer_, lycoris_; lokr_*, hada_*, diff
    ComfyUI               diffusion_model.<BFL or LDM name>
    XLabs, BFL control    double_blocks.0.processor.qkv_lora1.down.weight; double_blocks.0.img_attn.qkv.lora_A.weight, norms
    cloneofsimo           unet:0:down

A fused module (qkv, linear1) becomes its layers: B is cut by rows, A is shared; ranks that do not reach a part are left out of it, and
parts that none reaches are left alone, so that a block-diagonal file gives back the factors it was made of.

diffusers' own converters (`lora_conversion_utils`, 0.42) are the oracle in the tests where they are right. Not used, because
they (1) drop alpha in final_layer of kohya's FLUX files, (2) write its x_embedder, context_embedder, time, guidance and last
layers without the prefix "transformer.", so that the loader ignores them, (3) collapse OneTrainer's ff and norm layers into one
key, (4) exchange the halves of A too in BFL control's last adaLN, (5) drop T5, biases and norms with a log line, (6) know FLUX.1's
19 and 38 blocks and widths only, (7) take LDM's input_blocks_10 for a part of input_blocks_1, and
the upsampler of a block without attention for an attention (SD 1.5).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from loragraft.adapters.formats import cloneofsimo
from loragraft.adapters.formats.entries import DENOISER, Entry, entries_of
from loragraft.adapters.formats.factors import MAX_RANK, Factors, check_plain, expand, shaped
from loragraft.adapters.formats.families import (
    UNETS,
    Family,
    Names,
    Target,
    check_known,
    family_of,
    kernel_of,
    names_for,
)
from loragraft.adapters.formats.guard import read_untrusted
from loragraft.adapters.formats.header_scale import HeaderScale, header_scales
from loragraft.quantization.dialects.flux_names import exchange_halves
from loragraft.quantization.tensor_file import CheckpointError

Pair = tuple[Tensor, Tensor]
FACTORS = ("down", "up", "mid", "lokr", "hada")
NORMS = ("norm", "norm_diff", "norm_bias")
MOST_NUMBERS = 2**30
"""Of all factors together: LoKr over all of SDXL at rank 128 is 0.7 of it. A small file can spell out more than fits a memory."""
FOREIGN = ("double_blocks.", "single_blocks.", "input_blocks.", "middle_block.", "output_blocks.", "final_layer.")
"""Beginnings of names that no base of diffusers has."""
DIALECTS: tuple[tuple[str, Callable[[str], bool]], ...] = (
    ("cloneofsimo", lambda key: cloneofsimo.KEY.fullmatch(key) is not None),
    ("LyCORIS LoKr", lambda key: ".lokr_" in key),
    ("LyCORIS LoHa", lambda key: ".hada_" in key),
    ("BFL control", lambda key: key.endswith("query_norm.scale")),
    ("XLabs", lambda key: ".processor.qkv_lora" in key or ".processor.proj_lora" in key),
    ("attention processors", lambda key: ".processor." in key),
    ("kohya", lambda key: key.startswith("lora_unet_")),
    ("OneTrainer", lambda key: key.startswith("lora_transformer_")),
    ("LyCORIS", lambda key: key.startswith("lycoris_")),
    ("ComfyUI", lambda key: key.startswith("diffusion_model.")),
    ("PEFT", lambda key: "base_model.model." in key),
)


@dataclass(frozen=True)
class Contents:
    """What a file holds."""

    dialect: str
    family: Family
    pairs: dict[str, Pair]
    """Path -> (A, B with the scale in it): [r, K] and [N, r], of a convolution [r, C, kh, kw] and [N, r, 1, 1]."""
    extras: dict[str, dict[str, Tensor]]
    """What is no update of the denoiser's layers: "text_encoder", "embedding", "norm", "bias", "t5"... -> name -> tensor. Empty
    where all of it is zero."""
    header: dict[str, str]
    unet: bool = False
    """The denoiser is a UNet, `unet` in a pipeline, not a `transformer`."""
    errors: dict[str, float] = field(default_factory=dict)
    """Path -> relative error of an expansion cut to the largest rank; exact ones are left out."""
    unscaled: int = 0
    """Modules for which neither the tensors nor the header say alpha / r: it is taken as 1, as diffusers, kohya and ComfyUI do."""


def read_file(file: Path, max_rank: int = MAX_RANK) -> Contents:
    """Raises CheckpointError as `read_untrusted` does, and for modules of no known base, incomplete or misshapen factors, updates
    without a low-rank form, and two scales that disagree."""
    tensors, header = read_untrusted(file)
    dialect = next((name for name, test in DIALECTS if any(test(key) for key in tensors)), "diffusers")
    extras: dict[str, dict[str, Tensor]] = {}
    if cloneofsimo.is_cloneofsimo(tensors):
        tensors, embeddings = cloneofsimo.renamed(file, tensors, header)
        if embeddings:
            extras["embedding"] = embeddings
    components = entries_of(file, tensors)
    denoiser = components.pop(DENOISER, {})
    for component, entries in components.items():
        changing = [entry for entry in entries.values() if _changes(entry)]
        if changing:
            extras[component] = {entry.keys[part]: entry.parts[part] for entry in changing for part in entry.parts}
    targets = _targets(file, denoiser)
    scales = header_scales(file, header)
    scale = next((scales[prefix] for prefix in ("transformer", "unet", "") if prefix in scales), HeaderScale({}))
    reader = _Reader(file, targets, scale, max_rank)
    for module, entry in denoiser.items():
        reader.add(module, entry)
    if not reader.pairs:
        raise CheckpointError(f"{file} changes no layer of a denoiser; it has {', '.join(sorted(extras)) or 'nothing'}")
    extras |= {kind: found for kind, found in reader.extras.items() if found}
    family = family_of({path: (down[0].numel(), up.shape[0]) for path, (down, up) in reader.pairs.items()})
    pairs = {path: _with_kernel(pair, path, family) for path, pair in sorted(reader.pairs.items())}
    unet = family.name in UNETS or any(key.startswith("unet.") for key in tensors)
    return Contents(dialect, family, pairs, extras, header, unet, reader.errors, reader.unscaled)


def _changes(entry: Entry) -> bool:
    """Whether an update does anything: a product with a factor of zero does not."""
    factors = {part: tensor for part, tensor in entry.parts.items() if part.startswith(FACTORS)}
    others = [tensor for part, tensor in entry.parts.items() if part not in factors and part != "alpha"]
    return (bool(factors) and all(bool(tensor.any()) for tensor in factors.values())) or any(
        bool(tensor.any()) for tensor in others
    )


def _targets(file: Path, entries: Mapping[str, Entry]) -> dict[str, Target]:
    """Module -> layers. A dotted name of no known family is taken as a path of the base, which will check it; others are errors."""
    names = names_for(entries)
    found: dict[str, Target] = {}
    unknown: dict[str, str] = {}
    for module, entry in entries.items():
        target = _norm_target(module, entry, names) or names.find(module)
        if target is not None:
            found[module] = target
        elif not entry.flat and not module.startswith(FOREIGN):
            found[module] = Target((module,))
        else:
            unknown[next(iter(entry.keys.values()))] = module
    check_known(file, unknown, names)
    return found


def _norm_target(module: str, entry: Entry, names: Names) -> Target | None:
    """The norm that an entry changes; one that no table knows keeps its name, because norms are only reported."""
    if entry.parts.keys() <= {*NORMS, "alpha"}:
        return Target((names.find_norm(module) or module,))
    norm = names.find_norm(module) if "diff" in entry.parts else None
    return None if norm is None else Target((norm,))


class _Reader:
    """Collects the pairs of one file."""

    def __init__(self, file: Path, targets: Mapping[str, Target], scale: HeaderScale, max_rank: int) -> None:
        self.file, self.targets, self.scale, self.max_rank = file, targets, scale, max_rank
        self.pairs: dict[str, Pair] = {}
        self.extras: dict[str, dict[str, Tensor]] = {"norm": {}, "norm_diff": {}, "norm_bias": {}, "bias": {}}
        self.errors: dict[str, float] = {}
        self.numbers = self.unscaled = 0

    def add(self, module: str, entry: Entry) -> None:
        target = self.targets[module]
        parts = {part: tensor for part, tensor in entry.parts.items() if part != "reshape"}
        for kind in NORMS:
            if kind in parts:
                self._keep(kind, target, parts.pop(kind), absolute=kind == "norm")
        if "diff" in parts and parts["diff"].ndim == 1:
            self._keep("norm_diff", target, parts.pop("diff"))
        if "bias" in parts:
            self._keep("bias", target, parts.pop("bias"))
        if parts.keys() <= {"alpha"}:
            return
        try:
            scale = self._scale(target, parts)
            found = expand(parts, scale, self.max_rank)
            cut = self._cut(target, found)
        except ValueError as error:
            raise CheckpointError(f"{self.file}: {module!r} {error}") from error
        if not torch.isfinite(found.up).all() or not torch.isfinite(found.down).all():
            raise CheckpointError(f"{self.file}: {module!r} is not finite once its scale is in it")
        self.unscaled += "down" in parts and "alpha" not in parts and scale is None
        self.numbers += found.up.numel() + found.down.numel()
        if self.numbers > MOST_NUMBERS:
            raise CheckpointError(
                f"{self.file} expands to more than {MOST_NUMBERS} numbers, as no adapter of a known base does; a lower --rank "
                "makes it smaller"
            )
        for path, pair in cut.items():
            if path in self.pairs:
                raise CheckpointError(f"{self.file}: {path!r} is changed twice, once as part of {module!r}")
            self.pairs[path] = pair
            if found.error > 0:
                self.errors[path] = found.error

    def _scale(self, target: Target, parts: Mapping[str, Tensor]) -> float | None:
        if not self.scale.given or "down" not in parts:
            return None
        check_plain(parts)
        rank = parts["up"].shape[1]
        scale = self.scale.of(target.paths[0], rank)
        if "alpha" in parts and abs(float(parts["alpha"]) / rank - scale) > 1e-6 * abs(scale):
            raise ValueError(
                f"has two scales, {float(parts['alpha']) / rank:g} in its alpha tensor and {scale:g} in the file's configuration"
            )
        return scale

    def _keep(self, kind: str, target: Target, tensor: Tensor, absolute: bool = False) -> None:
        """An extra, unless it is a difference of zero."""
        if absolute or bool(tensor.any()):
            rows = exchange_halves(tensor) if target.exchanged else tensor
            for path, part in zip(target.paths, rows.split(_rows(target, len(rows), None)), strict=True):
                self.extras[kind][path] = part

    def _cut(self, target: Target, found: Factors) -> dict[str, Pair]:
        """One pair for each of the module's layers that it changes; for all of them where it changes none."""
        up = exchange_halves(found.up) if target.exchanged else found.up
        if len(target.paths) == 1:
            return {target.paths[0]: (found.down, up)}
        pairs = {}
        for path, rows in zip(target.paths, up.split(_rows(target, up.shape[0], found.down.shape[1])), strict=True):
            used = rows.flatten(2).any(dim=2).any(dim=0) if rows.ndim > 2 else rows.any(dim=0)
            if bool(up.any()) and not bool(used.any()):
                continue
            whole = bool(used.all()) or not bool(used.any())
            pairs[path] = (found.down, rows) if whole else (found.down[used], rows[:, used])
        return pairs


def _rows(target: Target, rows: int, inputs: int | None) -> list[int]:
    """Rows of each part of a fused module: equal thirds of qkv; of linear1 three times the width, and the rest is the MLP's."""
    count = len(target.paths)
    if count == 4:
        width = rows // 7 if inputs is None else inputs
        sizes = [width, width, width, rows - 3 * width]
    else:
        sizes = [rows // count] * count
    if sum(sizes) != rows or min(sizes) <= 0:
        raise ValueError(f"has {rows} rows, which are not those of {', '.join(target.paths)}")
    return sizes


def _with_kernel(pair: Pair, path: str, family: Family) -> Pair:
    """A convolution's update in a convolution's shapes, where the file has it flat."""
    down, up = pair
    kernel = kernel_of(path, family)
    if down.ndim == 4 or kernel is None or down.shape[1] % (kernel[0] * kernel[1]):
        return pair
    found = shaped(Factors(down, up, 0), kernel)
    return found.down, found.up
