"""The adapter file: what diffusers and PEFT read as it is, plus one JSON block of ours in the header.

    pytorch_lora_weights.safetensors
      transformer.<path>.lora_A.weight [r, K]     transformer.<path>.lora_B.weight [N, r], already times alpha / r
      (of a convolution A [r, C, k, k] and B [N, r, 1, 1], as PEFT has them)
      header: lora_adapter_metadata (PEFT's configuration with alpha = r, keys "transformer.<field>": diffusers'
              `LoraBaseMixin._save_lora_weights`), loragraft (which base, recipe, rank: `Adapter.metadata`)

`transformer` is the denoiser's name in diffusers' pipelines; a UNet's is `unet`.

There are no `.alpha` tensors: diffusers refuses a file that has both them and the header.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from torch import Tensor, nn

from loragraft.adapters.inject import DEFAULT_NAME, adapter_factors
from loragraft.quantization.names import nearest
from loragraft.quantization.tensor_file import CheckpointError, read_tensors, write_tensors

DOWN, UP = ".lora_A.weight", ".lora_B.weight"
Component = Literal["transformer", "unet"]
COMPONENTS: tuple[Component, ...] = ("transformer", "unet")
"""What stands before a path in a file: the denoiser's name in a pipeline."""
METADATA_KEY = "loragraft"
REQUIRED = ("base", "base_id")
UNKNOWN_BASE = "unknown (the file does not say)"


@dataclass(frozen=True)
class Adapter:
    """A trained adapter in memory: y += B A x at every path."""

    name: str
    metadata: dict[str, Any]
    """The `loragraft` block: base, base_id, profile, rank, alpha, targets, recipe, created, versions, ..."""
    pairs: dict[str, tuple[Tensor, Tensor]]
    """Path -> (A [r, K], B [N, r] with alpha / r in it); of a convolution A [r, C, k, k] and B [N, r, 1, 1]."""
    component: Component = "transformer"
    """The part of a pipeline that it is for."""

    @property
    def base_id(self) -> str:
        """Id of the base that it was trained on."""
        return str(self.metadata.get("base_id", UNKNOWN_BASE))

    @property
    def rank(self) -> int:
        """Largest rank of any pair."""
        return max(down.shape[0] for down, _ in self.pairs.values())

    def check_base(self, base_id: str) -> None:
        """Raises ValueError naming both ids unless the adapter was trained on exactly this base."""
        if self.base_id != base_id:
            raise ValueError(
                f"adapter {self.name!r} was trained on base {self.base_id} ({self.metadata.get('base', 'no name')}), "
                f"this base is {base_id}; load that base, or graft it all the same with --any-base (any_base=True) and expect another result"
            )


def save_adapter(
    transformer: nn.Module,
    folder: Path | str,
    metadata: Mapping[str, Any],
    *,
    name: str = DEFAULT_NAME,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write the injected adapter `name`; returns the file. It replaces an older file as a whole or not at all.

    `metadata` needs `base` and `base_id`; creation time is added. Raises ValueError for missing metadata, no injected
    adapter, or factors that are not finite.
    """
    factors = adapter_factors(transformer, name)
    return write_adapter(factors, folder, metadata, dtype=dtype, component=component_of(transformer))


def component_of(model: nn.Module) -> Component:
    """A denoiser's name in diffusers' pipelines."""
    return "unet" if isinstance(model, UNet2DConditionModel) else "transformer"


def write_adapter(
    pairs: Mapping[str, tuple[Tensor, Tensor]],
    folder: Path | str,
    metadata: Mapping[str, Any],
    *,
    dtype: torch.dtype = torch.float32,
    component: Component = "transformer",
) -> Path:
    """`save_adapter` for (A, scaled B) pairs that are in memory already."""
    lacking = [key for key in REQUIRED if not metadata.get(key)]
    if lacking:
        raise ValueError(
            f"adapter metadata lacks {', '.join(lacking)}: without them nobody can tell which base it fits"
        )
    tensors = {}
    for path, (down, up) in pairs.items():
        for suffix, factor in ((DOWN, down), (UP, up)):
            if not torch.isfinite(factor).all():
                raise ValueError(f"{path}{suffix} holds NaN or infinity; the training diverged, nothing is written")
            tensors[f"{component}.{path}{suffix}"] = factor.detach().to("cpu", dtype, copy=True)
    block = {"created": datetime.now(UTC).isoformat(timespec="seconds"), **metadata}
    header = {
        "format": "pt",
        METADATA_KEY: json.dumps(block, sort_keys=True),
        LORA_ADAPTER_METADATA_KEY: json.dumps(_peft_metadata(pairs, component), sort_keys=True),
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / LORA_WEIGHT_NAME_SAFE, tensors, header)
    return folder / LORA_WEIGHT_NAME_SAFE


def _peft_metadata(pairs: Mapping[str, tuple[Tensor, Tensor]], component: Component) -> dict[str, Any]:
    """PEFT's LoraConfig as diffusers packs it. alpha = r everywhere: the scale is in B.

    Only the fields that matter: a dump of the whole dataclass names fields that an older PEFT refuses.
    """
    ranks = {path: down.shape[0] for path, (down, _) in pairs.items()}
    common = max(set(ranks.values()), key=list(ranks.values()).count)
    odd = {path: rank for path, rank in ranks.items() if rank != common}
    config = {
        "peft_type": "LORA",
        "r": common,
        "lora_alpha": common,
        "rank_pattern": odd,
        "alpha_pattern": odd,
        "target_modules": sorted(pairs),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
    }
    return {f"{component}.{key}": value for key, value in config.items()}


def load_adapter(path: Path | str) -> Adapter:
    """Read an adapter file, or the one in a folder, onto the CPU.

    Files of other trainers in the same layout load too; they do not say which base they are for (`check_base` refuses
    them). Raises CheckpointError for anything but safetensors, truncated files, foreign keys, incomplete pairs, shapes
    that do not fit together, NaN or infinity, and scales that are kept outside the tensors.
    """
    path = Path(path)
    file = path / LORA_WEIGHT_NAME_SAFE if path.is_dir() else path
    if file.suffix != ".safetensors":
        raise CheckpointError(f"{file}: adapters are read from .safetensors files only (others can run code)")
    tensors, header = read_tensors(file)
    component = _component(tensors)
    pairs = _pairs(file, tensors, component)
    _check_scale(file, header, component)
    metadata = _block(file, header)
    fallback = file.parent.name if file.name == LORA_WEIGHT_NAME_SAFE else file.stem
    return Adapter(str(metadata.get("name") or fallback), metadata, pairs, component)


def _component(tensors: Mapping[str, Tensor]) -> Component:
    """What the first key begins with; of a file with other keys `_pairs` says what is wrong."""
    first = next(iter(tensors), "")
    return next((name for name in COMPONENTS if first.startswith(f"{name}.")), COMPONENTS[0])


def _block(file: Path, header: dict[str, str]) -> dict[str, Any]:
    try:
        block = json.loads(header.get(METADATA_KEY, "{}"))
    except ValueError as error:
        raise CheckpointError(f"{file}: the {METADATA_KEY!r} block of its header is not JSON") from error
    if not isinstance(block, dict):
        raise CheckpointError(f"{file}: the {METADATA_KEY!r} block of its header is not a JSON object")
    return block


def _pairs(file: Path, tensors: dict[str, Tensor], component: Component) -> dict[str, tuple[Tensor, Tensor]]:
    if not tensors:
        raise CheckpointError(f"{file} holds no tensors")
    downs: dict[str, Tensor] = {}
    ups: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        bare = key.removeprefix(f"{component}.")
        if bare == key or not bare.endswith((DOWN, UP)):
            raise CheckpointError(f"{file}: tensor {key!r} is not {component}.<path>{DOWN} or {UP}")
        if tensor.ndim not in (2, 4) or not tensor.is_floating_point():
            raise CheckpointError(
                f"{file}: tensor {key!r} is {tensor.dtype} {tuple(tensor.shape)}, expected a float matrix, or a kernel [., ., k, k]"
            )
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{file}: tensor {key!r} holds NaN or infinity")
        (downs if bare.endswith(DOWN) else ups)[bare.removesuffix(DOWN).removesuffix(UP)] = tensor
    for path in sorted(downs.keys() ^ ups.keys()):
        raise CheckpointError(f"{file}: {path!r} has only one factor, {DOWN if path in downs else UP}")
    for path, down in downs.items():
        if down.ndim != ups[path].ndim or set(ups[path].shape[2:]) - {1}:
            raise CheckpointError(
                f"{file}: {path!r} has A {tuple(down.shape)} and B {tuple(ups[path].shape)}: expected [r, K] and [N, r], or "
                "[r, C, k, k] and [N, r, 1, 1]"
            )
        if down.shape[0] != ups[path].shape[1] or down.shape[0] == 0:
            raise CheckpointError(
                f"{file}: {path!r} has A {tuple(down.shape)} and B {tuple(ups[path].shape)}: ranks differ"
            )
    return {path: (downs[path], ups[path]) for path in sorted(downs)}


def _check_scale(file: Path, header: dict[str, str], component: Component) -> None:
    """Our files have alpha = r. A file whose header says otherwise would be grafted at the wrong strength."""
    fields = json.loads(header.get(LORA_ADAPTER_METADATA_KEY, "{}"))
    rank, alpha = fields.get(f"{component}.r"), fields.get(f"{component}.lora_alpha")
    patterns = fields.get(f"{component}.rank_pattern"), fields.get(f"{component}.alpha_pattern")
    same = rank is None or (math.isclose(rank, alpha) and patterns[0] == patterns[1])
    if not same or fields.get(f"{component}.use_rslora") or fields.get(f"{component}.use_dora"):
        raise CheckpointError(
            f"{file} keeps its scale outside the tensors (r {rank}, alpha {alpha}, patterns, rslora or dora); "
            "save it again as plain LoRA with alpha = r"
        )


def check_fits(adapter: Adapter, layers: Mapping[str, tuple[tuple[int, ...], int]]) -> None:
    """Every pair must meet a layer of its shape; `layers` is path -> ((K,) or (C, k, k), N).

    Raises ValueError listing what does not fit, with the nearest paths.
    """
    unknown = [path for path in adapter.pairs if path not in layers]
    if unknown:
        raise ValueError(
            f"adapter {adapter.name!r} targets {len(unknown)} layer(s) that cannot carry it here, the first is "
            f"{unknown[0]!r}; {nearest(unknown[0], layers)}"
        )
    for path, (down, up) in adapter.pairs.items():
        if (tuple(down.shape[1:]), up.shape[0]) != layers[path]:
            raise ValueError(
                f"adapter {adapter.name!r}: {path!r} maps {_sizes(down.shape[1:])} to {up.shape[0]} features, "
                f"the layer {_sizes(layers[path][0])} to {layers[path][1]}"
            )


def _sizes(shape: Sequence[int]) -> str:
    """256, or 64 x 3 x 3."""
    return " x ".join(map(str, shape))
