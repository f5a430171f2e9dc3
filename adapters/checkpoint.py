"""The adapter file: what diffusers reads as it is, plus one JSON block of ours in the header.

    pytorch_lora_weights.safetensors
      transformer.<path>.lora_A.weight [r, K]     transformer.<path>.lora_B.weight [N, r], already times alpha / r
      (of a convolution A [r, C, k, k] and B [N, r, 1, 1], as PEFT has them)
      header: lora_adapter_metadata (PEFT's configuration with alpha = r, keys "transformer.<field>": diffusers'
              `LoraBaseMixin._save_lora_weights`), loragraft (which base, recipe, rank: `Adapter.metadata`)

`transformer` is the denoiser's name in diffusers' pipelines; a UNet's is `unet`.

There are no `.alpha` tensors: diffusers refuses a file that has both them and the header.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from torch import Tensor, nn

from loragraft.adapters.formats.contract import COMPENSATING, PORTABLE, START_HASH, START_NAME, contract_of, less_start
from loragraft.adapters.formats.factors import MAX_RANK
from loragraft.adapters.formats.families import UNKNOWN_FAMILY, Family
from loragraft.adapters.formats.guard import checked_block
from loragraft.adapters.formats.reading import read_file
from loragraft.adapters.inject import DEFAULT_NAME, adapter_factors
from loragraft.quantization.names import nearest, nearest_path
from loragraft.quantization.tensor_file import CheckpointError, read_tensors, write_tensors

DOWN, UP = ".lora_A.weight", ".lora_B.weight"
Component = Literal["transformer", "unet"]
COMPONENTS: tuple[Component, ...] = ("transformer", "unet")
"""What stands before a path in a file: the denoiser's name in a pipeline."""
METADATA_KEY = "loragraft"
PEFT_WEIGHTS = "adapter_model.safetensors"
REQUIRED = ("base", "base_id")
RUN_RECIPE = "recipe.yaml"
"""In a run folder, beside `adapter`."""
BELOW = ("*", "*/*")
"""Where the adapters of a folder of runs, of adapters or of a zoo lie."""
MOST_LISTED = 5
UNKNOWN_BASE = "unknown (the file does not say)"


@dataclass(frozen=True)
class Adapter:
    """A trained adapter in memory: y += B A x at every path."""

    name: str
    metadata: dict[str, Any]
    """The `loragraft` block: base, base_id, profile, rank, alpha, targets, recipe, created, versions, ..."""
    pairs: dict[str, tuple[Tensor, Tensor]]
    """Path -> (A [r, K], B [N, r] with alpha / r in it); of a convolution A [r, C, kh, kw], B [N, r, 1, 1]."""
    component: Component = "transformer"
    """The part of a pipeline that it is for."""
    dialect: str = "loragraft"
    """Whose naming the file had; loragraft: diffusers' with our block in the header."""
    family: Family = UNKNOWN_FAMILY
    """Which kind of base its layers belong to, by names and sizes."""
    extras: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    """What else the file changes, which a graft does not: text encoders, embeddings, norms, biases (`formats.reading`)."""
    errors: Mapping[str, float] = field(default_factory=dict)
    """Path -> relative error of an expanded LoKr, LoHa or difference, where it was cut to the largest rank."""
    unscaled: int = 0
    """Modules whose alpha / r the file does not say, taken as 1."""

    @property
    def base_id(self) -> str:
        """Id of the base that it was trained on."""
        return str(self.metadata.get("base_id", UNKNOWN_BASE))

    @property
    def rank(self) -> int:
        """Largest rank of any pair."""
        return max(down.shape[0] for down, _ in self.pairs.values())

    @property
    def approximation(self) -> str:
        """What expanding a LoKr, LoHa or difference cost, in words; "" where it is exact."""
        if not self.errors:
            return ""
        return (
            f"adapter {self.name!r}: {len(self.errors)} of {len(self.pairs)} layers are cut to rank {self.rank}, relative error "
            f"of their update up to {max(self.errors.values()):.2g}"
        )

    def denoiser_only(self) -> "Adapter":
        """The same without what a graft does not change."""
        return replace(self, extras={})

    def check_whole(self) -> None:
        """Raises ValueError listing what the file changes besides the denoiser's layers: a graft alone would draw other images."""
        if self.extras:
            listed = ", ".join(f"{kind} ({len(tensors)} tensors)" for kind, tensors in self.extras.items())
            raise ValueError(
                f"adapter {self.name!r} also changes {listed}, which Loragraft leaves as they are. To use the rest of it "
                "knowingly, give --denoiser-only, or write a file without them: loragraft adapter export FILE --style diffusers "
                "--denoiser-only --out FOLDER"
            )

    def less(self, start: "Adapter") -> "Adapter":
        """A compensating adapter less what it started from: portable, of the sum of both ranks. Raises ValueError."""
        pairs = less_start(self.pairs, start.pairs)
        about = {**self.metadata, "contract": PORTABLE, "rank": max(down.shape[0] for down, _ in pairs.values())}
        about.pop(START_HASH, None)
        return replace(self, pairs=pairs, metadata=about)

    def check_portable(self, base_id: str) -> None:
        """Raises ValueError for a compensating adapter on another base than its own, which it would only damage."""
        if contract_of(self.metadata) == COMPENSATING and self.base_id != base_id:
            raise ValueError(
                f"adapter {self.name!r} is compensating: it makes up for the error of INT4 base {self.base_id} and is wrong on "
                f"this one ({base_id}); make it portable: loragraft adapter export FILE --portable --style diffusers --out FOLDER"
            )

    def check_base(self, base_id: str) -> None:
        """Raises ValueError naming both ids unless the adapter was trained on exactly this base."""
        if self.base_id == UNKNOWN_BASE:
            raise ValueError(
                f"adapter {self.name!r} was trained on an unknown base: its file does not say which (layers: {self.family}). If it "
                f"is one for this base, graft it with --any-base (any_base=True); this base is {base_id}"
            )
        if self.base_id != base_id:
            profile = f" in profile {self.metadata['profile']}" if self.metadata.get("profile") else ""
            raise ValueError(
                f"adapter {self.name!r} was trained on base {self.base_id} ({self.metadata.get('base', 'no name')}{profile}), "
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
    file_name: str = LORA_WEIGHT_NAME_SAFE,
) -> Path:
    """`save_adapter` for (A, scaled B) pairs that are in memory already; `file_name` is the file's in `folder`.

    Raises ValueError for metadata that lack the base, DiskFullError where there is no room.
    """
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
    block = {"created": datetime.now(UTC).isoformat(timespec="seconds"), "contract": PORTABLE, **metadata}
    header = {
        "format": "pt",
        METADATA_KEY: json.dumps(block, sort_keys=True),
        LORA_ADAPTER_METADATA_KEY: json.dumps(peft_metadata(pairs, component), sort_keys=True),
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / file_name, tensors, header)
    return folder / file_name


def rename_adapter(source: Path, target: Path, name: str) -> None:
    """Writes an adapter file that `write_adapter` wrote once more, under another name: every factor and all else that it states as before."""
    tensors, header = read_tensors(source)
    block = json.loads(header[METADATA_KEY]) | {"name": name}
    write_tensors(target, tensors, {**header, METADATA_KEY: json.dumps(block, sort_keys=True)})


def peft_metadata(pairs: Mapping[str, tuple[Tensor, Tensor]], component: Component) -> dict[str, Any]:
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


def load_adapter(path: Path | str, max_rank: int = MAX_RANK) -> Adapter:
    """Read an adapter file, or the one in a folder, onto the CPU; its dialect is found out (`formats.reading`).

    Files of other trainers do not say which base they are for (`check_base` refuses them). LoKr, LoHa and full differences are
    expanded up to `max_rank`. Raises CheckpointError as `read_file` does, and for metadata that cannot be trusted; ValueError for a
    `max_rank` below 1.
    """
    if max_rank < 1:
        raise ValueError(f"largest rank {max_rank} of an expanded LoKr or LoHa (--rank): it is at least 1")
    file = adapter_file(Path(path))
    contents = read_file(file, max_rank)
    metadata = _block(file, contents.header)
    fallback = file.parent.name if file.name in (LORA_WEIGHT_NAME_SAFE, PEFT_WEIGHTS) else file.stem
    name = metadata.get("name") or fallback
    own = METADATA_KEY in contents.header and contents.dialect == "diffusers"
    dialect = "loragraft" if own else contents.dialect
    component: Component = "unet" if contents.unet else "transformer"
    return Adapter(
        name,
        metadata,
        contents.pairs,
        component,
        dialect,
        contents.family,
        contents.extras,
        contents.errors,
        contents.unscaled,
    )


def adapter_file(path: Path) -> Path:
    """The adapter file of a run or folder (diffusers' name, PEFT's, or the only one there is), or the file itself.

    Raises CheckpointError where there is none.
    """
    if not path.exists():
        raise CheckpointError(
            f"there is no {path}: give a run folder, an adapter folder or a .safetensors file{nearest_path(path)}"
        )
    if not path.is_dir():
        return path
    run, path = path, path / "adapter" if (path / "adapter").is_dir() else path
    for name in (LORA_WEIGHT_NAME_SAFE, PEFT_WEIGHTS):
        if (path / name).is_file():
            return path / name
    only = sorted(file for file in path.glob("*.safetensors") if file.name != START_NAME)
    if not only and (run / RUN_RECIPE).is_file():
        raise CheckpointError(f"{run} is a run that is not finished: give its training command again, it goes on")
    if len(only) != 1:
        found = sorted(file for below in BELOW for file in run.glob(f"{below}/{LORA_WEIGHT_NAME_SAFE}"))
        near = [str(file.parent.parent if file.parent.name == "adapter" else file.parent) for file in found]
        listed = (
            f"; in it are {', '.join(near[:MOST_LISTED])}{', ...' if len(near) > MOST_LISTED else ''}" if near else ""
        )
        raise CheckpointError(
            f"{path} holds {len(only)} .safetensors files and none named {LORA_WEIGHT_NAME_SAFE} or {PEFT_WEIGHTS}; give the "
            f"file{listed}"
        )
    return only[0]


def _block(file: Path, header: dict[str, str]) -> dict[str, Any]:
    try:
        block = json.loads(header.get(METADATA_KEY, "{}"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: the {METADATA_KEY!r} block of its header is not JSON") from error
    return checked_block(file, block)


def check_fits(adapter: Adapter, layers: Mapping[str, tuple[tuple[int, ...], int]]) -> None:
    """Every pair must meet a layer of its shape; `layers` is path -> ((K,) or (C, k, k), N).

    Raises ValueError listing what does not fit, with the nearest paths.
    """
    unknown = [path for path in adapter.pairs if path not in layers]
    if unknown:
        listed = "; ".join(f"{path!r} ({nearest(path, layers)})" for path in unknown[:MOST_LISTED])
        more = f"; and {len(unknown) - MOST_LISTED} more" if len(unknown) > MOST_LISTED else ""
        raise ValueError(
            f"adapter {adapter.name!r} targets {len(unknown)} layer(s) that cannot carry it here: {listed}{more}. {_meant_for(adapter)}"
        )
    for path, (down, up) in adapter.pairs.items():
        inputs, outputs = layers[path]
        if (_less_ones(down.shape[1:]), up.shape[0]) != (_less_ones(inputs), outputs):
            raise ValueError(
                f"adapter {adapter.name!r}: {path!r} maps {_sizes(down.shape[1:])} to {up.shape[0]} features, "
                f"the layer {_sizes(inputs)} to {outputs}. {_meant_for(adapter)}"
            )


def _meant_for(adapter: Adapter) -> str:
    """Which base the adapter seems to be for, in words."""
    return f"Is it for this base? Its file says {adapter.metadata.get('base') or 'none'}; layers: {adapter.family}"


def _sizes(shape: Sequence[int]) -> str:
    """256, or 64 x 3 x 3."""
    return " x ".join(map(str, shape))


def _less_ones(shape: Sequence[int]) -> tuple[int, ...]:
    """Without a 1x1 kernel, which some trainers write as a matrix and others as a convolution."""
    return tuple(shape[:1]) if set(shape[1:]) <= {1} else tuple(shape)
