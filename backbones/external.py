"""A base whose weights do not travel with the package: found where the recipe says, on disk or on the Hub, and opened.

    diffusers pipeline       its denoiser (transformer or UNet), text encoders and autoencoder
    denoiser alone           16-bit folder or file (of a UNet also the file of a whole pipeline, of SANA its authors' file),
                             our INT4 folder, an SVDQuant file of another program; the encoders come from the pipeline around it, or
                             from weights.encoders

16-bit weights are quantized once, layer by layer, into <cache root>/bases/<base>-<profile>-<key>, key = their names, sizes and
times; a killed quantization goes on where it was. SVDQuant weights run in the numerics that they state.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from torch import nn
from tqdm import tqdm

from loragraft.backbones.architectures import NUMERICS, open_model, quantize_files, stand_in_settings
from loragraft.backbones.pipeline_folder import variant
from loragraft.backbones.single_file import as_folder, is_one_file
from loragraft.backbones.skeleton import meta_transformer, plan_architecture, randomize
from loragraft.backbones.spec import BaseSpec, External, Profile, Weights
from loragraft.quantization.checkpoint import (
    CONFIG_NAME,
    branched_layers,
    load_quantized,
    quantization_config,
    record_base_id,
)
from loragraft.quantization.dialects.assembly import read_json
from loragraft.quantization.dialects.comfyui import is_comfyui
from loragraft.quantization.dialects.detection import load_any
from loragraft.quantization.dialects.files import TensorFiles
from loragraft.quantization.dialects.nunchaku_flux import BLOCKS, is_nunchaku
from loragraft.quantization.names import nearest_path
from loragraft.quantization.partial_file import JOURNAL
from loragraft.quantization.tensor_file import CheckpointError

INDEX = "model_index.json"
HUB_FILE = re.compile(r"([\w.-]+/[\w.-]+)/([\w./-]+\.safetensors)")
HUB_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
PIPELINE_FILES = (INDEX, "scheduler/*", "text_encoder*/*", "tokenizer*/*", "vae/*")
"""Of a repository, beside the denoiser's folder: the published ones also hold the same weights in one more file, at their root."""
TRANSFORMER_FILES = ("*.json", "*.safetensors")
"""Of a repository that is no pipeline."""
PROFILES: dict[str, Profile] = {profile: profile for profile in NUMERICS}


@dataclass(frozen=True)
class Located:
    """Where the parts of a base are."""

    transformer: Path
    """The denoiser: a folder or a file."""
    pipeline: Path
    """The folder with the text encoders and the autoencoder."""


def check_weights(spec: BaseSpec, weights: Weights | None) -> None:
    """Raises ValueError where an external base has no weights, or where one that travels with the package is given some."""
    given = weights is not None and (weights.random or bool(weights.path))
    if spec.external is None and given:
        raise ValueError(f"the weights of {spec.name} travel with the package: leave the block `weights` out")
    if spec.external is not None and not given:
        raise ValueError(
            f"the weights of {spec.name} do not travel with the package: say where they are, weights.path=FOLDER_OR_FILE (a "
            f"diffusers pipeline, an INT4 checkpoint, an SVDQuant file), fetch them, weights.path={spec.external.hub_id} "
            "weights.allow_download=true, or try its shapes without any: weights.random=true. `loragraft generate` calls these "
            "--weights, --allow-download and --random-weights"
        )


def locate(spec: BaseSpec, external: External, weights: Weights) -> Located:
    """Finds, and on request fetches, what `weights` names. Raises ValueError saying what is not there, and the nearest that is."""
    component = spec.family.component
    path = find(weights.path, weights.allow_download, (*PIPELINE_FILES, f"{component}/*", CONFIG_NAME))
    if (path / INDEX).is_file():
        _check_pipeline(spec, external, path)
        transformer, around = path / component, path
    else:
        path = find(weights.path, weights.allow_download, TRANSFORMER_FILES)
        transformer, around = path, path.parent
    if weights.encoders:
        pipeline = find(weights.encoders, weights.allow_download, PIPELINE_FILES)
        if not (pipeline / INDEX).is_file():
            raise ValueError(f"weights.encoders {pipeline} is no diffusers pipeline: it has no {INDEX}")
        _check_pipeline(spec, external, pipeline)
        return Located(transformer, pipeline)
    if not (around / INDEX).is_file():
        raise ValueError(
            f"{path} holds a {component} alone. The text encoders and the autoencoder of {spec.name} are needed too: say where "
            f"they are, weights.encoders=FOLDER (its diffusers pipeline; {external.hub_id} on the Hub)"
        )
    return Located(transformer, around)


def find(name: str, allow_download: bool, patterns: Sequence[str]) -> Path:
    """A path on this machine, or a repository or file of the Hub in its cache here. Raises ValueError."""
    path = Path(name).expanduser()
    if path.exists():
        return path
    file = HUB_FILE.fullmatch(name)
    if file is None and HUB_REPOSITORY.fullmatch(name) is None:
        raise ValueError(f"weights {name}: no such file or folder{nearest_path(path)}")
    try:
        if file is not None:
            return Path(hf_hub_download(file[1], file[2], local_files_only=not allow_download))
        return Path(snapshot_download(name, allow_patterns=list(patterns), local_files_only=not allow_download))
    except GatedRepoError as error:
        raise ValueError(
            f"weights {name}: the Hub gives them only to who has accepted their licence; do so on their page, then `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"weights {name}: no such file or folder here{nearest_path(path)}, and no such repository on the Hub"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        remedy = (
            f"the Hub could not be reached ({error})"
            if allow_download
            else "if it is a name on the Hub, nothing is fetched unless you say weights.allow_download=true"
        )
        raise ValueError(f"weights {name}: no such file or folder here{nearest_path(path)}; {remedy}") from error


def _check_pipeline(spec: BaseSpec, external: External, folder: Path) -> None:
    found = read_json(folder / INDEX).get("_class_name")
    if found != external.pipeline_class:
        raise ValueError(f"{folder} is a {found}; {spec.name} needs a {external.pipeline_class}")


def open_transformer(
    spec: BaseSpec, external: External, path: Path, profile: Profile | None, device: torch.device, cache_root: Path
) -> tuple[nn.Module, Profile | None]:
    """The denoiser at `path` on the CPU, and its profile: the one asked for, or that of ready-made INT4 weights.

    16-bit weights in a profile are quantized on `device`, once. Raises ValueError for another base's, CheckpointError for
    damaged ones.
    """
    if is_quantized(path):
        return _ready_made(spec, external, path, profile)
    if is_one_file(spec, path):
        path = as_folder(spec, external, path, cache_root)
    _, _, config = open_model(path)
    external.check(config, str(path))
    if profile is None:
        if path.is_file():
            raise ValueError(f"{path} is one file; for the 16-bit model give the diffusers folder")
        model: nn.Module = spec.transformer_class.from_pretrained(  # type: ignore[attr-defined]
            path, torch_dtype=torch.bfloat16, variant=variant(path), local_files_only=True
        )
        record_base_id(model)
        return model, None
    folder = quantized_once(spec.name, path, profile, device, cache_root)
    try:
        return load_quantized(folder, spec.transformer_class), profile
    except CheckpointError as error:
        raise CheckpointError(f"{error}. {folder} is a cache: delete it, and it is quantized again") from error


def quantized_once(name: str, path: Path, profile: Profile, device: torch.device, cache_root: Path) -> Path:
    """The INT4 checkpoint of the 16-bit weights at `path`, from the cache where it is there."""
    source, _, _ = open_model(path)
    folder = cache_root / "bases" / f"{name}-{profile}-{source.identity[:16]}"
    if not folder.exists() or (folder / JOURNAL).exists():
        print(f"{path} is in 16 bits: quantizing it once, in profile {profile}, into {folder}", file=sys.stderr)
        folder.parent.mkdir(parents=True, exist_ok=True)
        quantize_files(path, folder, profile, device)
    return folder


def is_quantized(path: Path) -> bool:
    if path.is_file():
        with TensorFiles([path]) as files:
            return is_comfyui(files) or is_nunchaku(files)
    config = path / CONFIG_NAME
    return (path / BLOCKS).is_file() or (config.is_file() and "quantization_config" in read_json(config))


def stated_profile(spec: BaseSpec, weights: Weights) -> Profile | None:
    """The profile in which ready-made INT4 weights run, whatever a recipe asks for; None where they are in 16 bits, random, not on
    this machine, or of mixed numerics. Reads headers alone. Raises CheckpointError for a damaged file."""
    if spec.external is None or weights.random or not weights.path:
        return None
    try:
        path = find(weights.path, False, (*PIPELINE_FILES, f"{spec.family.component}/*", CONFIG_NAME))
    except ValueError:  # said when the weights are opened
        return None
    path = path / spec.family.component if (path / INDEX).is_file() else path
    if not is_quantized(path):
        return None
    block = {} if path.is_file() or (path / BLOCKS).is_file() else read_json(path / CONFIG_NAME)["quantization_config"]
    return PROFILES.get(block.get("profile", "interchange"))


def _ready_made(spec: BaseSpec, external: External, path: Path, profile: Profile | None) -> tuple[nn.Module, Profile]:
    with tqdm(desc=f"read {path.name}", unit="part", leave=False) as bar:

        def step(done: int, total: int, _: str) -> None:
            bar.total = total
            bar.update(done - bar.n)

        model, dialect = load_any(path, step)
    if not isinstance(model, spec.transformer_class):
        raise ValueError(f"{path} is a {type(model).__name__}; {spec.name} is a {spec.transformer_class.__name__}")
    external.check(model.config, str(path))  # type: ignore[arg-type]  # diffusers' registered configuration
    if profile is None:
        raise ValueError(f"{path} is INT4 ({dialect}): its 16-bit weights are not there; give the 16-bit folder")
    stated = quantization_config(model)["profile"]
    if stated not in PROFILES:
        numerics = sorted({layer.numerics for layer in branched_layers(model).values()})
        raise ValueError(
            f"{path} mixes numerics ({', '.join(numerics)}): make it one with `loragraft convert --numerics`"
        )
    if stated != profile:
        print(f"{path} is ready-made in profile {stated}: it runs in that, not in {profile}", file=sys.stderr)
    return model, PROFILES[stated]


def random_transformer(
    spec: BaseSpec, external: External, profile: Profile | None, device: torch.device, dtype: torch.dtype, seed: int
) -> nn.Module:
    """The true shapes on `device`, filled from `seed` (`skeleton.randomize`)."""
    plan = None
    if profile is not None:
        plan = partial(plan_architecture, spec, stand_in_settings(profile, seed))
    return randomize(meta_transformer(spec.transformer_class, external.config, plan), device, dtype, seed)
